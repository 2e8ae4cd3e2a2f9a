"""Stage 1. Fine-grained data by minimal editing: the less preferred answer, y_l -> the same, minimally edited, y_w.

    python edit.py data/alpacafarm/pref.jsonl --dry_run=true          # requests, tokens, dollars and the first prompt
    python edit.py data/alpacafarm/pref.jsonl                         # Claude, as the paper does it (ANTHROPIC_API_KEY)
    python edit.py data/alpacafarm/pref.jsonl --batch_api=true        # the same at half the price, within a day
    python edit.py my.jsonl --editor=human                            # a person: opens a page in the browser
    python edit.py my.jsonl --editor=local --model=org/name           # any chat model: nothing leaves the machine
    python edit.py data/toy/pref.jsonl --editor=rules                 # the embedded world mends itself
    python edit.py stats out/edits.jsonl --tokenizer=out/sft          # are they minimal? Also of other people's edits

In: pref.jsonl (the preferred answer is not used), or rows with instruction, input, original. Out: edits.jsonl, one row
per distinct question: an edit, or a failure (edited: null) with its reason and the raw reply. A row is on disk as soon
as it is there: stop or kill the run at any moment; the same command goes on, and asks again for what failed.

The paper's Claude-2 is gone, and today's models refuse a begun answer: these get the same request and answer in tags.
"""
import errno, hashlib, json, os, random, re, signal, sys, threading
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from common import fail, load_tokenizer, read_jsonl, say, whole_characters, write_jsonl

# The paper's Figure 2. A row without input loses the line that names it. PREFILL begins the assistant's turn where the
# model allows that, else TAGS ends the user's. They are defaults of fields: edit them here, in a preset, or as flags.
PROMPT = """Question: {instruction}
Input: {input}

Response: {original}

Please make minimal changes to the above response in order to make it a more helpful response to the question. \
NOTE It is important to only make minimal changes to the response — try to keep most of the response unchanged."""
PREFILL = "Here is my attempt to make minimal changes to improve the response:"
TAGS = "Write the improved response between <edited> and </edited>, and nothing outside of these tags."

# Dollars per million tokens in and out, and when that was the list price; the Batches API takes half. A model that is
# not here runs all the same, its cost is said to be unknown: look it up and add a line.
PRICES = {
    "claude-opus-4-6": (5, 25, "2026-02"),
    "claude-sonnet-4-6": (3, 15, "2026-02"),
    "claude-opus-4-5": (5, 25, "2025-11"),
    "claude-haiku-4-5": (1, 5, "2025-10"),
    "claude-sonnet-4-5": (3, 15, "2025-09"),
}


@dataclass(frozen=True)
class Config:
    data: str = "data/alpacafarm/pref.jsonl"  # pref.jsonl, or rows with instruction, input, original
    editor: Literal["claude", "human", "local", "rules"] = "claude"
    model: str = "claude-sonnet-4-6"  # claude: one of the API's; local: a chat model's folder or hub name
    out: str = "out/edits.jsonl"
    system: str = ""             # a system prompt; the paper has none
    prompt: str = PROMPT
    prefill: str = PREFILL       # for models that take one (Claude 4.5 and older, local ones); empty: tags for all
    tags: str = TAGS
    max_tokens: int = 8192       # no reply may be longer; where the original is short, less is asked for
    concurrency: int = 16        # requests in flight; local: rows in a batch
    timeout: float = 600.0       # seconds until a request counts as dead
    retries: int = 5             # of a request, by the SDK: 429, 5xx, timeouts, dropped connections
    batch_api: bool = False      # half the price; answers within 24 hours, usually one
    dry_run: bool = False        # count, price and show; ask nothing, write nothing
    limit: int | None = None     # only the first so many rows
    tokenizer: str = ""          # whose tokens the summary counts (out/sft); empty: words
    seed: int = 0                # rules: which flaws are overlooked; local: the draws of the second try
    overwrite: bool = False


# ---------------------------------------------------------------- rows: what is asked

def read_rows(cfg):
    """id -> the row to edit: id, instruction, input, original, what else it holds. Rows that ask the same are one."""
    fields = {"instruction": str, "input": (str, type(None))}
    ready = "original" in read_jsonl(cfg.data, fields)[0]
    pref = {} if ready else {"output_1": str, "output_2": str, "preference": (1, 2)}
    given = read_jsonl(cfg.data, fields | (pref or {"original": str}))[:cfg.limit]
    setting = [cfg.model, cfg.system, cfg.prompt, cfg.prefill, cfg.tags] if cfg.editor in ("claude", "local") else []
    rows, ours = {}, {"id", "edited", "editor", "model", "stop_reason", "usage", "error", "raw", "cut", *pref}
    for row in given:
        loser = f"output_{3 - int(row['preference'])}" if pref else "original"  # y_l; no editor ever sees y_w
        asked = [row["instruction"], row["input"] or "", row[loser]]
        key = hashlib.sha256(json.dumps([*asked, cfg.editor, *setting]).encode()).hexdigest()[:32]
        rows[key] = {"id": key, "instruction": asked[0], "input": asked[1], "original": asked[2],
                     **{name: value for name, value in row.items() if name not in ours},
                     **({"source_id": row["id"]} if "id" in row else {}),
                     **({"cut": ["original"]} if loser in (row.get("cut") or []) else {})}
    if len(rows) < len(given):
        say(f"{cfg.data}: {len(given) - len(rows)} of {len(given)} rows ask what another one asks; that is asked once")
    return rows


def uses_tags(cfg):
    """Claude 4.5 and older continue a begun answer, later ones refuse (400); tags work with every model"""
    old = re.search(r"claude-(2|3|instant|(opus|sonnet|haiku)-4(-[015])?(-20\d{6})?$)", cfg.model)
    return not cfg.prefill or cfg.editor == "claude" and not old


def build_request(cfg, row, longest=False):
    """The arguments of client.messages.create. longest: after a reply that was cut"""
    template = cfg.prompt if row["input"] else re.sub(r"^.*\{input\}.*\n?", "", cfg.prompt, flags=re.M)
    text = re.sub(r"\{(instruction|input|original)\}", lambda name: row[name[1]], template)
    turns = [("user", f"{text}\n\n{cfg.tags}")]
    if not uses_tags(cfg):
        turns = [("user", text), ("assistant", cfg.prefill.rstrip())]  # white space at its end is refused
    turns = [{"role": role, "content": whole_characters(content)} for role, content in turns]
    # Room for an answer twice as long (a token is ~4 bytes) and, with Claude, for thinking, which counts, too.
    room = len(whole_characters(row["original"]).encode()) // 2 + (1024 if cfg.editor == "claude" else 64)
    return dict(model=cfg.model, max_tokens=cfg.max_tokens if longest else min(room, cfg.max_tokens), messages=turns,
                **({"system": cfg.system} if cfg.system else {}))


# ---------------------------------------------------------------- replies: is this an edit?

class Reply(NamedTuple):
    text: str | None = None         # None: no reply came
    stop_reason: str | None = None
    usage: dict | None = None       # input_tokens, output_tokens
    error: str | None = None        # why no reply came
    again: bool = False             # can asking once more help?


PREAMBLE = re.compile(r"(sure|certainly|of course|okay|(here|below|this) (is|are)|here's|i('ve| have| made)|"
                      r"(the )?(edited|revised|improved))\b[^\n]*:[ \t]*(\n|$)|"
                      r"(sure|certainly|of course|okay)\W+(here|below|this)\b|"
                      r".{0,40}\b(edited|revised|improved) (answer|response|version|text)\b.{0,40}:", re.I)
COMMENT = re.compile(r"\n\s*\n\W*(i(['’]ve| have)? (only )?(made|changed|kept|added|removed|tried)|"
                     r"(the |my )?(main |minimal )?(changes|edits)( i)?( made)?:)", re.I)
REFUSAL = re.compile(r"(i'm sorry|i am sorry|i apologi[sz]e|i can't|i cannot|i won't|i'm unable|i am unable)\b", re.I)


def read_reply(reply, original, tag):
    """-> edited, error, again: the edit, or None, why there is none, and whether asking once more can help.

    tag: the answer stands between <tag> and </tag>; None: the reply is the answer. White space around it is the model's
    layout: the original's own is put back, so that it is no change. Nothing else is trimmed."""
    def begins(pattern, text):
        return bool(pattern.match(text.replace("’", "'")))
    if reply.error:
        return None, reply.error, reply.again
    if reply.stop_reason == "refusal":
        return None, "refusal", False
    if reply.stop_reason not in ("end_turn", "stop_sequence"):
        return None, f"cut by {reply.stop_reason}", True
    text, core = reply.text.strip(), original.strip()
    if tag and text:
        inside = re.search(rf"<{tag}>(.*)</{tag}>", text, re.S)
        if not inside:
            return None, f"no <{tag}> tags", True
        if inside[0] != text:
            return None, "preamble" if inside.start() else "text behind the tags", True
        text = inside[1].strip()
    if not text:
        return None, "empty reply", True
    if begins(PREAMBLE, text) and not begins(PREAMBLE, core):  # an answer may well begin "Here are five fruits:"
        return None, "preamble", True
    if not tag and begins(REFUSAL, text) and not begins(REFUSAL, core):
        return None, "refusal", False
    if not tag and COMMENT.search(text) and not COMMENT.search(core):
        return None, "comment behind the answer", True
    start = len(original) - len(original.lstrip())
    return original[:start] + text + original[start + len(core):], None, False


# ---------------------------------------------------------------- Claude (evaluate.py's judge asks through here, too)

MAX_WAIT = 60  # seconds: the longest retry-after that is obeyed; the SDK knows no limit of its own


@contextmanager
def stopping():
    """-> an Event that the first Ctrl-C (or SIGTERM) sets: what is paid for is still taken in. The second ends us."""
    stop = threading.Event()

    def handler(*_):
        if stop.is_set():
            os._exit(130)
        stop.set()
        os.write(2, b"\nstopping: what is in flight is finished first (again: stop at once)\n")
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def claude_client(timeout=600.0, retries=5):
    """The SDK's client, or None without a key"""
    import anthropic
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        if not re.fullmatch("[!-~]*", os.environ.get(name, "")):  # else the HTTP library would quote it in an error
            fail(f"{name} holds white space or other characters that no key has")

    def bound_wait(response):
        for name, longest in (("retry-after", MAX_WAIT), ("retry-after-ms", 1000 * MAX_WAIT)):
            wait = response.headers.get(name, "0")
            if not (re.fullmatch(r"\d+(\.\d+)?", wait) and float(wait) <= longest):  # too long, or a date
                response.headers[name] = str(longest)
    http = anthropic.DefaultHttpxClient(event_hooks={"response": [bound_wait]})
    client = anthropic.Anthropic(timeout=timeout, max_retries=retries, http_client=http)
    return client if client.api_key or client.auth_token or client.credentials else None


def why(error):
    """An API error in one line: status, kind, the service's own words; never a header"""
    status, body = getattr(error, "status_code", ""), getattr(error, "body", None)
    inner = body["error"] if isinstance(body, dict) and isinstance(body.get("error"), dict) else {}
    return " ".join(f"{status} {inner.get('type') or type(error).__name__} {inner.get('message') or ''}".split())[:200]


def read_message(message):
    try:
        text = "".join(block.text for block in message.content if block.type == "text")  # thinking may come before
        usage = {name: getattr(message.usage, name) or 0 for name in ("input_tokens", "output_tokens")}
        return Reply(text, message.stop_reason, usage)
    except (AttributeError, TypeError):  # the SDK checks nothing: an HTML page is a str, parts may be missing
        return Reply(error="broken reply", again=True)


def ask_once(client, request):
    import anthropic
    try:
        return read_message(client.messages.create(**request))
    except (anthropic.APIError, json.JSONDecodeError, UnicodeDecodeError) as error:
        status = getattr(error, "status_code", 500)  # none: a timeout, a dropped connection, a 200 with a broken body
        return Reply(error=why(error), again=status in (408, 409, 429) or status >= 500)


def ask_claude(requests, stop, *, concurrency=16, timeout=600.0, retries=5, batches=None):
    """requests: key -> arguments of messages.create; keys match [a-zA-Z0-9_-]{1,64}. Yields (key, Reply) as they come.

    stop: the Event of stopping(); once it is set nothing new is asked, and the generator ends early. batches: a file to
    remember what the Batches API works on; None: `concurrency` requests at a time. A missing or refused key: fail()."""
    client = claude_client(timeout, retries) or fail("no API key: set ANTHROPIC_API_KEY")
    if batches:
        from extras.claude_batches import ask_in_batches
        for key, message, error in ask_in_batches(client, requests, stop, batches):
            yield key, Reply(error=error, again="invalid_request" not in error) if error else read_message(message)
        return
    waiting, running, hopeless, alive = iter(requests.items()), {}, None, False
    with ThreadPoolExecutor(concurrency) as pool:
        while True:
            while len(running) < concurrency and not stop.is_set() and not hopeless and (item := next(waiting, None)):
                running[pool.submit(ask_once, client, item[1])] = item[0]
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key, reply = running.pop(future), future.result()
                alive = alive or not reply.error
                if re.match("401 |400 .*(prefill|credit balance)" + "|40[234] " * (not alive), reply.error or ""):
                    hopeless = reply.error  # so would every other one end; those in flight are still taken in
                else:
                    yield key, reply
    if hopeless:
        fail(f"the API says {hopeless!r}; nothing more was asked. Once that is mended the same command goes on")


def dollars(model, usage, batch=False):
    """What tokens cost, or None for a model that is not in PRICES"""
    price = PRICES.get(re.sub(r"-20\d{6}$", "", model))
    return price and (price[0] * usage["input_tokens"] + price[1] * usage["output_tokens"]) / 1e6 / (2 if batch else 1)


# ---------------------------------------------------------------- the stage

def read_edits(path):
    """id -> its last row. A line that a crash has torn is cut off first."""
    with open(path, "ab+") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
    rows = read_jsonl(path, {"id": str, "edited": (str, type(None))}) if b"\n" in text else []
    return {row["id"]: row for row in rows}


def main(cfg):
    from extras.checks import check_input, check_model
    from extras.runs import begin, finish
    # ---- what is asked, and can it be?
    check_input(cfg.data, "data", "python data/alpacafarm/prepare.py (or data/toy/prepare.py)")
    rows = read_rows(cfg)
    tag = re.search(r"</([\w-]+)>", cfg.tags) or fail("--tags must ask for an answer between <tag> and </tag>")
    if not 0 < cfg.max_tokens <= 21_333:
        fail(f"--max_tokens={cfg.max_tokens} must be 1 to 21,333: for more the API wants to stream")
    if cfg.concurrency < 1 or cfg.retries < 0 or cfg.limit is not None and cfg.limit < 1:
        fail("--concurrency and --limit must be at least 1, --retries at least 0")
    if cfg.dry_run:
        from extras.claude_plan import show_plan
        return say(f"--editor={cfg.editor} asks no service: nothing to price") if cfg.editor != "claude" else show_plan(
            [build_request(cfg, row) for row in rows.values()], [row["original"] for row in rows.values()],
            batch=cfg.batch_api)
    if cfg.tokenizer:
        load_tokenizer(cfg.tokenizer)  # wanted for the figures at the end: now is the time to miss it
    if cfg.editor == "rules":
        from data.toy.prepare import gold, mend
        for row in rows.values():
            gold(row, row["original"])  # ends the run where a row is not of the toy world
    if cfg.editor == "claude" and not claude_client():
        fail("no API key: set ANTHROPIC_API_KEY (--dry_run=true needs none)")
    if cfg.editor == "local":
        check_model(cfg.model, "model", "no stage of ours: name a chat model")
        load_tokenizer(cfg.model).chat_template or fail(f"--model={cfg.model} is no chat model: no chat template")
    begin(cfg, free=("concurrency", "timeout", "retries", "max_tokens", "batch_api", "dry_run", "limit", "tokenizer"))
    batches = Path(f"{cfg.out}.batches.json")  # what the Batches API is at work on
    if cfg.overwrite:
        batches.unlink(missing_ok=True)
    done = read_edits(cfg.out)
    todo = {key: row for key, row in rows.items() if key not in done or done[key]["edited"] is None}
    under_way = [] if cfg.batch_api or not batches.exists() else json.loads(batches.read_text())
    if any(key in todo for batch in under_way for key in batch["keys"]):
        fail(f"{cfg.out}: the Batches API has rows of it, paid for: go on with --batch_api=true (or remove {batches})")
    say(f"{cfg.out}: {len(rows) - len(todo)} of {len(rows)} rows are done")

    # ---- ask, and write each row as it comes
    file, lock, spent = open(cfg.out, "ab", buffering=0), threading.Lock(), Counter()
    model = cfg.model if cfg.editor in ("claude", "local") else None

    def save(key, edited, error=None, reply=Reply()):
        row = {name: rows[key][name] for name in ("id", "instruction", "input", "original")}
        row |= dict(edited=edited, editor=cfg.editor, model=model, stop_reason=reply.stop_reason, usage=reply.usage)
        row |= ({"error": error, "raw": reply.text} if edited is None else {}) | rows[key]
        line = whole_characters(json.dumps(row, ensure_ascii=False) + "\n").encode()
        with lock:
            if (written := file.write(line)) < len(line):  # one write; the disk is full: the torn line goes
                file.truncate(file.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), cfg.out)
            done[key] = row

    with stopping() as stop:
        if cfg.editor == "human" and todo:
            from extras.edit_page import serve
            serve(rows, done, save, stop)
        if cfg.editor == "rules" and todo:
            for key, row in todo.items():
                save(key, mend(row, row["original"], random.Random(f"{cfg.seed} {key}"), p=0.9))
        asked = todo if cfg.editor in ("claude", "local") else {}
        for attempt in range(2):  # what a second try can help is asked again once all others were asked
            requests = {key: build_request(cfg, row, done.get(key, {}).get("error", "").startswith("cut by"))
                        for key, row in asked.items()}
            if not requests or stop.is_set():
                break
            asked = {}
            if cfg.editor == "local":
                from extras.local_editor import ask_local
                replies = ((key, Reply(**fields)) for key, fields in ask_local(
                    requests, stop, path=cfg.model, batch=cfg.concurrency, seed=cfg.seed, temperature=0.7 * attempt))
            else:
                replies = ask_claude(requests, stop, concurrency=cfg.concurrency, timeout=cfg.timeout,
                                     retries=cfg.retries, batches=batches if cfg.batch_api else None)
            with tqdm(total=len(requests), desc="asking again" if attempt else "asking") as bar:
                for key, reply in replies:
                    edited, error, again = read_reply(reply, rows[key]["original"], tag[1] if uses_tags(cfg) else None)
                    save(key, edited, error, reply)
                    asked |= {key: rows[key]} if again else {}
                    spent.update(reply.usage or {})
                    cost = dollars(cfg.model, spent, cfg.batch_api)
                    cost = f", ${cost:,.2f}" if cost else ""
                    bar.set_postfix_str(f"{spent.total():,} tokens{cost}", refresh=False)
                    bar.update()

    # ---- one line per id, in the order of the data; what an earlier, longer data file asked stays
    order = [key for key in rows if key in done] + [key for key in done if key not in rows]
    write_jsonl(cfg.out, [done[key] for key in order])
    left = sum(key not in done for key in rows)
    if spent:
        say(f"{spent['input_tokens']:,} tokens in and {spent['output_tokens']:,} out this time{cost}")
    if left or stop.is_set() and asked:
        say(f"{left} of {len(rows)} rows are left, {len(asked)} may be asked again: the same command goes on")
        raise SystemExit(130 if stop.is_set() else 0)
    tokens = Counter()
    for row in done.values():
        tokens.update(row.get("usage") or {})
    finish(cfg, config=vars(cfg), rows=len(rows), failed=sum(done[key]["edited"] is None for key in rows), **tokens)
    if todo:
        from extras.edit_stats import show_stats
        n = 10 if sys.stdout.isatty() else 0  # texts are for the eye, not for a log
        show_stats([done[key] for key in rows], cfg.tokenizer, n=n)


if __name__ == "__main__":
    from extras.command_line import load_config
    if sys.argv[1:2] == ["stats"]:
        from extras.edit_stats import main as stats
        stats(sys.argv[2:])
    else:
        main(load_config(Config))
