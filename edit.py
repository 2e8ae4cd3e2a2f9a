"""Stage 1. Fine-grained data by minimal editing (Figure 1): the less preferred answer y_l -> the
same answer, minimally edited, y_w.

    python edit.py data/alpacafarm/pref.jsonl --dry_run=true   # requests, tokens, dollars, a prompt
    python edit.py data/alpacafarm/pref.jsonl                  # Claude, as in the paper
    python edit.py data/alpacafarm/pref.jsonl --batch_api=true # half the price, within a day
    python edit.py my.jsonl --editor=human                     # a person, in the browser
    python edit.py my.jsonl --editor=local --model=org/name    # a chat model on this machine
    python edit.py data/toy/pref.jsonl --editor=rules          # the toy world's rule-based editor
    python edit.py stats out/edits.jsonl --tokenizer=out/sft   # are they minimal? Anybody's edits

In: pref.jsonl (the preferred answer is not used), a model's outputs.jsonl from evaluate.py decode,
or rows with instruction, input, original. Out: edits.jsonl, one row per distinct question: an edit,
or a failure (edited: null) with its reason and the raw reply. Each row is written as soon as it is
known. Stop or kill the run at any moment: the same command continues, and asks again for what
failed. Claude needs ANTHROPIC_API_KEY.

The person's page keeps what is typed, who edited a row and for how long. --guide=FILE shows a text
next to the answers; --port=N is its address, also through the ssh line that is printed. With
--annotators=2 two people divide the rows and both edit a share of them (--shared=0.1); edit.py
stats prints how far they agree.

The paper's Claude-2 is no longer offered. Newer models reject a prefilled assistant turn; they get
the same request and are asked to answer between tags.
"""
import errno, hashlib, json, os, random, re, sys, threading
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal

from common import load_tokenizer
from plumbing import claude
from plumbing.claude import Reply
from plumbing.command_line import extra, load_config
from plumbing.files import (ABOVE_0, ANY, AT_LEAST_0, COUNT, SHARE, check_input, check_numbers,
                            read_jsonl, whole_characters, write_jsonl)
from plumbing.models import check_fits, check_model
from plumbing.paint import plain
from plumbing.ranks import fail, say
from plumbing.record import begin, finish

# The paper's Figure 2. A row without input loses the line that names it. PREFILL begins the
# assistant's turn where the model allows it; otherwise TAGS is appended to the user's message.
# These are the defaults of fields: change them here, in a preset, or as flags.
PROMPT = """Question: {instruction}
Input: {input}

Response: {original}

Please make minimal changes to the above response in order to make it a more helpful response to \
the question. NOTE It is important to only make minimal changes to the response — try to keep most \
of the response unchanged."""
PREFILL = "Here is my attempt to make minimal changes to improve the response:"
TAGS = ("Write the improved response between <edited> and </edited>, and nothing outside of these "
        "tags.")

@dataclass(frozen=True)
class Config:
    data: str = "data/alpacafarm/pref.jsonl"  # pref.jsonl, outputs.jsonl, or rows with `original`
    editor: Literal["claude", "human", "local", "rules"] = "claude"
    model: str = "claude-sonnet-4-6"  # one of the API's; local: a chat model's folder or name
    out: str = "out/edits.jsonl"
    system: str = ""             # a system prompt; the paper has none
    prompt: str = PROMPT
    prefill: str = PREFILL       # for Claude 4.5 and older, and local models; empty: tags
    tags: str = TAGS
    max_tokens: int = 8192       # the longest reply; for short originals a smaller limit is sent
    concurrency: int = 16        # requests in flight; local: rows in a batch
    timeout: float = 600.0       # seconds until a request counts as dead
    retries: int = 5             # of a request, by the SDK: 429, 5xx, timeouts, dropped connections
    batch_api: bool = False      # half the price; answers within 24 hours, usually one
    dry_run: bool = False        # count, price and show; ask nothing, write nothing
    limit: int | None = None     # only the first so many rows
    fixes: float = 0.9           # rules: share of the flaws that are fixed
    seed: int = 0                # rules: which flaws are overlooked; local: draws of the second try
    port: int = 0                # human: of the page, on this machine; 0: a free one, then the same
    guide: str = ""              # human: a text file with instructions, shown next to the answers
    annotators: int = 1          # human: with 2, each person edits the rows of `shared`, and they
    shared: float = 0.1          # divide the others; edit.py stats shows how far they agree
    overwrite: bool = False

# ---------------------------------------------------------------- rows: what is asked

def read_rows(cfg):
    """id -> the row to edit: id, instruction, input, original, and the other fields of its data.

    Of a pair, only the less preferred answer is read, as in Section 2.1. The id is a hash of all
    that is asked, so rows that ask the same are one."""
    fields = {"instruction": str, "input": (str, type(None))}
    first = read_jsonl(cfg.data, fields)[0]
    is_output = "output" in first and "output_1" not in first and "original" not in first
    is_pair = not is_output and "original" not in first
    own_fields = {"id", "edited", "editor", "model", "stop_reason", "usage", "error", "raw", "cut"}
    if is_pair:
        pair_fields = {"output_1": str, "output_2": str, "preference": (1, 2)}
        fields |= pair_fields
        own_fields |= pair_fields.keys()
    elif is_output:
        fields["output"] = str
        own_fields |= {"output", "generator"}
    else:
        fields["original"] = str
    if cfg.editor == "human":
        own_fields |= {"who", "unchanged", "seconds", "order", "saved_at", "also"}
    given = read_jsonl(cfg.data, fields)[:cfg.limit]

    # A model's edit depends on the wording of the request, too.
    wording = []
    if cfg.editor in ("claude", "local"):
        wording = [cfg.model, cfg.system, cfg.prompt, cfg.prefill, cfg.tags]

    rows = {}
    for source in given:
        name = "output" if is_output else "original"
        if is_pair:  # the less preferred answer y_l; no editor ever sees the preferred one
            name = "output_2" if source["preference"] == 1 else "output_1"
        asked = [source["instruction"], source["input"] or "", source[name], cfg.editor, *wording]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

        row = {"id": key, "instruction": source["instruction"], "input": source["input"]}
        row["original"] = source[name]
        row |= {field: source[field] for field in source if field not in own_fields}
        if "id" in source:
            row["source_id"] = source["id"]
        if name in (source.get("cut") or []):
            row["cut"] = ["original"]
        rows[key] = row

    if len(rows) < len(given):
        say(f"{cfg.data}: {len(given) - len(rows)} of {len(given)} rows are duplicates: asked once")
    return rows

def uses_tags(cfg):
    """Is the answer asked for between tags? They work with every model. Without them we prefill the
    model's turn, which Claude up to 4.5 and local models continue; later ones refuse (400)."""
    if not cfg.prefill:
        return True
    takes_prefill = re.search(r"claude-(2|3|instant|"
                              r"(opus|sonnet|haiku)-4(-[015])?(-20\d{6})?$)", cfg.model)
    return cfg.editor == "claude" and not takes_prefill

def build_request(cfg, row, longest=False):
    """The paper's Figure 2 as the arguments of client.messages.create. longest: with all of
    max_tokens, after a reply that was cut"""
    # Fill in the prompt; without an input the line that names it is removed.
    template = cfg.prompt
    if not row["input"]:
        template = re.sub(r"^.*\{input\}.*\n?", "", template, flags=re.M)
    text = re.sub(r"\{(instruction|input|original)\}", lambda name: row[name[1]], template)

    # The API refuses white space at the end of a prefilled turn.
    if uses_tags(cfg):
        turns = [("user", f"{text}\n\n{cfg.tags}")]
    else:
        turns = [("user", text), ("assistant", cfg.prefill.rstrip())]
    messages = [{"role": role, "content": whole_characters(content)} for role, content in turns]

    # Room for an answer twice as long (a token is ~4 bytes), and for Claude's thinking.
    max_tokens = cfg.max_tokens
    if not longest:
        room = len(whole_characters(row["original"]).encode()) // 2
        room += 1024 if cfg.editor == "claude" else 64
        max_tokens = min(room, max_tokens)

    request = {"model": cfg.model, "max_tokens": max_tokens, "messages": messages}
    if cfg.system:
        request["system"] = cfg.system
    return request

# ---------------------------------------------------------------- replies: is this an edit?

# How a reply begins that speaks about the edit before it gives it.
PREAMBLE = re.compile(
    # A first line that ends in a colon: "Here is the edited answer:"
    r"(sure|certainly|of course|okay|(here|below|this) (is|are)|here's|i('ve| have| made)|"
    r"(the )?(edited|revised|improved))\b[^\n]*:[ \t]*(\n|$)|"
    # "Of course! Here you are"
    r"(sure|certainly|of course|okay)\W+(here|below|this)\b|"
    # "My improved version of it: ..." on one line
    r".{0,40}\b(edited|revised|improved) (answer|response|version|text)\b.{0,40}:", re.I)

# A last paragraph about the edit: "I changed one word.", "(The changes I made: ...)"
COMMENT = re.compile(
    r"\n\s*\n\W*("
    r"i(['’]ve| have)? (only )?(made|changed|kept|added|removed|tried)|"
    r"(the |my )?(main |minimal )?(changes|edits)( i)?( made)?:)", re.I)

REFUSAL = re.compile(
    r"(i'm sorry|i am sorry|i apologi[sz]e|i can't|i cannot|i won't|"
    r"i'm unable|i am unable)\b", re.I)

def newly_begins(pattern, text, original):
    """Does the text begin like this, and not the original? An answer may well begin "Here are five
    fruits:"."""
    def begins(text):
        return pattern.match(text.replace("’", "'"))
    return bool(begins(text) and not begins(original))

def read_reply(reply, original, tag):
    """-> edited, error, again: the edit, or None, why there is none, and whether asking once more
    can help.

    tag: the answer is between <tag> and </tag>; None: the reply is the answer. The white space
    around it is the model's layout: the original's own is put back, so that it is no change.
    Nothing else is trimmed."""
    if reply.error:
        return None, reply.error, reply.again
    if reply.stop_reason == "refusal":
        return None, "refusal", False
    if reply.stop_reason not in ("end_turn", "stop_sequence"):
        return None, f"cut by {reply.stop_reason}", True

    # The answer between its tags, and nothing around them.
    text = reply.text.strip()
    if tag and text:
        inside = re.search(rf"<{tag}>(.*)</{tag}>", text, re.S)
        if not inside:
            return None, f"no <{tag}> tags", True
        if inside.start() > 0:
            return None, "preamble", True
        if inside.end() < len(text):
            return None, "text behind the tags", True
        text = inside[1].strip()
    if not text:
        return None, "empty reply", True

    # Words about the answer. Outside of tags the model may also talk instead of editing.
    core = original.strip()
    if newly_begins(PREAMBLE, text, core):
        return None, "preamble", True
    if not tag and newly_begins(REFUSAL, text, core):
        return None, "refusal", False
    if not tag and COMMENT.search(text) and not COMMENT.search(core):
        return None, "comment behind the answer", True

    start = len(original) - len(original.lstrip())
    end = start + len(core)
    return original[:start] + with_line_ends_of(core, text) + original[end:], None, False

def with_line_ends_of(original, text):
    """A model's text with the original's line ends, so that they are no change. A line keeps its
    own, also where its words were changed; a new line gets the one that is most frequent."""
    ends = re.findall(r"\r\n|\r|\n", original)
    lines = re.split(r"\r\n|\r|\n", text)
    if not ends:
        return "\n".join(lines)
    usual = Counter(ends).most_common(1)[0][0]
    new_ends = [usual] * (len(lines) - 1)
    matcher = SequenceMatcher(None, re.split(r"\r\n|\r|\n", original), lines, autojunk=False)
    for _, old_start, old_stop, new_start, new_stop in matcher.get_opcodes():
        old = range(old_start, min(old_stop, len(ends)))
        new = range(new_start, min(new_stop, len(new_ends)))
        for i, j in zip(old, new):
            new_ends[j] = ends[i]
    return "".join(line + end for line, end in zip(lines, new_ends + [""]))

# ---------------------------------------------------------------- the one call of the service

def ask_once(client, request):
    """One request to Claude -> Reply, with the reason where no reply came"""
    import anthropic
    try:
        return claude.read_message(client.messages.create(**request))
    except (anthropic.APIError, json.JSONDecodeError, UnicodeDecodeError) as error:
        return claude.read_error(error)

# ---------------------------------------------------------------- the stage

def read_edits(path):
    """id -> its last row. A line that a crash has torn is cut off first."""
    with open(path, "ab+") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
    if b"\n" not in text:
        return {}
    rows = read_jsonl(path, {"id": str, "edited": (str, type(None))})
    return {row["id"]: row for row in rows}

def check(cfg, rows):
    """What can be wrong before anything is asked -> the name of the tag that holds the answer"""
    tag = re.search(r"</([\w-]+)>", cfg.tags)
    if not tag:
        fail("--tags must ask for an answer between <tag> and </tag>")
    # For more than 21,333 tokens the API wants to stream.
    check_numbers(cfg, max_tokens=(1, 21_333), concurrency=COUNT, timeout=ABOVE_0,
                  retries=AT_LEAST_0, limit=COUNT, annotators=COUNT, shared=SHARE,
                  port=(0, 65_535), fixes=SHARE, seed=ANY)
    for name in ("{instruction}", "{input}", "{original}"):
        if name not in cfg.prompt:
            fail(f"--prompt must contain {name}; the editor would not see it")
    if cfg.dry_run:
        return tag[1]

    if cfg.editor == "human":
        extra("editors.page", "--editor=human").check(cfg)
    if cfg.editor == "rules":
        from data.toy.prepare import gold
        for row in rows.values():
            gold(row, row["original"])  # ends the run if a row is not of the toy world
    if cfg.editor == "claude" and not claude.claude_client():
        fail("no API key: set ANTHROPIC_API_KEY (--dry_run=true needs none)")
    if cfg.editor == "local":
        extra("editors.local", "--editor=local")
        check_model(cfg.model, "model",
                    "--editor=local needs a chat model from the hub or a folder")
        tokenizer = load_tokenizer(cfg.model)
        if not tokenizer.chat_template:
            fail(f"--model={cfg.model} is no chat model: no chat template")
        check_fits(cfg.model, "model", 0, vocabulary=len(tokenizer))
    return tag[1]

class Edits:
    """edits.jsonl while it is being written: each row is on disk as soon as it is known"""

    def __init__(self, cfg, rows):
        self.cfg = cfg
        self.rows = rows
        self.done = read_edits(cfg.out)  # id -> its row
        self.file = open(cfg.out, "ab", buffering=0)
        self.lock = threading.Lock()

    def todo(self):
        """The rows that have no edit yet, a failed one included"""
        if self.cfg.editor == "human":
            page = extra("editors.page", "--editor=human")
            return page.todo(self.cfg, self.rows, self.done)
        return {key: row for key, row in self.rows.items()
                if key not in self.done or self.done[key]["edited"] is None}

    def save(self, key, edited, error=None, facts=None, reply=Reply()):
        model = self.cfg.model if self.cfg.editor in ("claude", "local") else None
        row = {name: self.rows[key][name] for name in ("id", "instruction", "input", "original")}
        row |= dict(edited=edited, editor=self.cfg.editor, model=model,
                    stop_reason=reply.stop_reason, usage=reply.usage)
        if edited is None:
            row |= dict(error=error, raw=reply.text)
        row |= self.rows[key] | (facts or {})
        line = whole_characters(json.dumps(row, ensure_ascii=False) + "\n").encode()

        # One write. If the disk is full, the torn line is removed again.
        with self.lock:
            written = self.file.write(line)
            if written < len(line):
                self.file.truncate(self.file.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.cfg.out)
            self.done[key] = row

def ask_model(cfg, rows, edits, batches, stop, tag):
    """Claude or a local model edits the rows; a reply that is no edit is asked for once more at the
    end. -> tokens spent, how many rows may be asked again, the cost in words"""
    spent = Counter()
    cost = ""

    def build(key, attempt):
        cut = edits.done.get(key, {}).get("error", "").startswith("cut by")
        return build_request(cfg, rows[key], longest=cut)

    def ask(requests, attempt):
        if cfg.editor == "local":
            return extra("editors.local", "--editor=local").ask_local(
                requests, stop, path=cfg.model, batch=cfg.concurrency, seed=cfg.seed,
                temperature=0.7 * attempt)
        return claude.ask_claude(requests, ask_once, stop, concurrency=cfg.concurrency,
                                 timeout=cfg.timeout, retries=cfg.retries, batches=batches)

    def take(key, reply):
        nonlocal cost
        used_tag = tag if uses_tags(cfg) else None
        edited, error, again = read_reply(reply, rows[key]["original"], used_tag)
        edits.save(key, edited, error, reply=reply)
        spent.update(reply.usage or {})
        price = claude.dollars(cfg.model, spent, cfg.batch_api)
        cost = f", ${price:,.2f}" if price else ""
        return again, f"{spent.total():,} tokens{cost}"

    left = claude.ask_until_read(list(edits.todo()), build, ask, take, stop, attempts=2,
                                 name="asking")
    return spent, len(left), cost

def summary(rows, out):
    """What became of the rows, the commonest reasons of failures, and what to run next"""
    edited = [row for row in rows if row["edited"] is not None]
    unchanged = sum(row["edited"] == row["original"] for row in edited)
    say(f"{out}: {len(rows)} rows: {len(edited) - unchanged} edited, {unchanged} unchanged, "
        f"{len(rows) - len(edited)} failed")
    reasons = Counter(str(row.get("error") or "no reason given")
                      for row in rows if row["edited"] is None)
    words = "; ".join(f"{n} {plain(why)[:100]}" for why, n in reasons.most_common(5))
    if words:
        say(f"failed: {words}")
    say(f"next: python diff.py {out} (are the edits minimal? python edit.py stats {out})")

def main(cfg):
    # ---- what is asked, and can it be?
    check_input(cfg.data, "data", "python data/alpacafarm/prepare.py (or data/toy/prepare.py)")
    rows = read_rows(cfg)
    tag = check(cfg, rows)
    if cfg.dry_run and cfg.editor != "claude":
        return say(f"--editor={cfg.editor} does not call Claude, so there is no cost")
    if cfg.dry_run:
        requests = [build_request(cfg, row) for row in rows.values()]
        answers = [row["original"] for row in rows.values()]
        return claude.show_price(requests, answers, batch=cfg.batch_api)

    unimportant = ("concurrency", "timeout", "retries", "max_tokens", "batch_api", "dry_run",
                   "limit",
                   "port", "guide", "annotators", "shared")
    begin(cfg, "edit", unimportant=unimportant, paid=True)
    ledger = Path(f"{cfg.out}.batches.json")  # what the Batches API works on
    if cfg.overwrite:
        ledger.unlink(missing_ok=True)
        Path(f"{cfg.out}.drafts.jsonl").unlink(missing_ok=True)  # of the person's page
    edits = Edits(cfg, rows)
    todo = edits.todo()
    if not cfg.batch_api and not todo.keys().isdisjoint(claude.under_way(ledger)):
        fail(f"{cfg.out}: some rows are already submitted (and paid for) as a batch; continue with "
             f"--batch_api=true (or remove {ledger})")
    say(f"{cfg.out}: {len(rows) - len(todo)} of {len(rows)} rows are done")

    # ---- ask, and write each row as it comes
    spent = Counter()
    again = 0
    cost = ""
    with claude.stopping() as stop:
        if cfg.editor == "human" and todo:
            page = extra("editors.page", "--editor=human")
            page.serve(cfg, rows, edits.done, edits.save, stop)
        elif cfg.editor == "rules":
            from data.toy.prepare import mend
            for key, row in todo.items():
                rng = random.Random(f"{cfg.seed} {key}")
                edits.save(key, mend(row, row["original"], rng, p=cfg.fixes))
        elif todo:
            batches = ledger if cfg.batch_api else None
            spent, again, cost = ask_model(cfg, rows, edits, batches, stop, tag)

    # ---- one line per id, in the order of the data; rows of an earlier, longer data file are kept
    done = edits.done
    order = [key for key in rows if key in done] + [key for key in done if key not in rows]
    write_jsonl(cfg.out, [done[key] for key in order])
    if spent:
        say(f"{spent['input_tokens']:,} tokens in and {spent['output_tokens']:,} out this "
            f"time{cost}")
    left = sum(key not in done for key in rows)
    if cfg.editor == "human":
        left = len(edits.todo())
    if left or stop.is_set() and again:
        asked_again = f", {again} may be asked again" if again else ""
        say(f"{left} of {len(rows)} rows are left{asked_again}: the same command continues")
        raise SystemExit(130 if stop.is_set() else 0)

    tokens = Counter()
    for row in done.values():
        tokens.update(row.get("usage") or {})
    failed = sum(done[key]["edited"] is None for key in rows)
    finish(cfg, config=vars(cfg), rows=len(rows), failed=failed, **tokens)
    if todo:
        summary([done[key] for key in rows], cfg.out)

if __name__ == "__main__":
    if sys.argv[1:2] == ["stats"]:
        extra("editors.stats", "edit.py stats").main(sys.argv[2:])
    else:
        main(load_config(Config, "edit"))
