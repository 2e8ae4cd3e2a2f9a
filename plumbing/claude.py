"""Asking Claude: many requests at a time or by the Batches API; nothing is lost, nothing is paid
for twice. The stages hold the request itself: build_request and ask_once, which is passed in.
"""
import json
import os
import re
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from plumbing.files import replacing
from plumbing.paint import plain
from plumbing.ranks import fail, say

# Dollars per million tokens in and out, and the month of that list price. The Batches API takes
# half. A model that is not listed works too; its cost is said to be unknown: add a line.
PRICES = {
    "claude-opus-4-6": (5, 25, "2026-02"),
    "claude-sonnet-4-6": (3, 15, "2026-02"),
    "claude-opus-4-5": (5, 25, "2025-11"),
    "claude-haiku-4-5": (1, 5, "2025-10"),
    "claude-sonnet-4-5": (3, 15, "2025-09"),
}

MAX_WAIT = 60         # seconds: the longest retry-after that is obeyed; the SDK has no limit
ROWS = 10_000         # requests in one batch; the API takes 100,000 ...
BYTES = 7_000_000     # ... and 256 MB, but a lost upload should cost little
PAUSES = (0.5, 60)    # seconds between two polls of a batch: at first, at most
KEPT = timedelta(days=29)  # how long the service keeps a batch's results
NETWORK = ("http_proxy https_proxy all_proxy no_proxy ssl_cert_file ssl_cert_dir "
           "anthropic_base_url").split()
PATIENCE = 60         # give up after this many failed polls per batch (about an hour)

class Reply(NamedTuple):
    text: str | None = None         # None: no reply came
    stop_reason: str | None = None
    usage: dict | None = None       # input_tokens, output_tokens
    error: str | None = None        # why no reply came
    again: bool = False             # can asking once more help?

# ---------------------------------------------------------------- one reply

def read_message(message):
    """The SDK's message -> Reply. Thinking blocks may come before the text."""
    try:
        text = "".join(block.text for block in message.content if block.type == "text")
        usage = {name: getattr(message.usage, name) or 0
                 for name in ("input_tokens", "output_tokens")}
        return Reply(text, message.stop_reason, usage)
    except (AttributeError, TypeError):  # the SDK checks nothing: an HTML page arrives as a str
        return Reply(error="broken reply", again=True)

def read_error(error):
    """An error of the SDK -> Reply. An error without a status (a timeout, a dropped connection, a
    broken body) counts as a 500."""
    status = getattr(error, "status_code", 500)
    return Reply(error=in_one_line(error), again=status in (408, 409, 429) or status >= 500)

def in_one_line(error):
    """An error of the SDK in words: status, kind, the service's own message; never a header"""
    body = getattr(error, "body", None)
    inner = body.get("error") if isinstance(body, dict) else None
    inner = inner if isinstance(inner, dict) else {}
    status = getattr(error, "status_code", "")
    kind = inner.get("type") or type(error).__name__
    words = f"{status} {kind} {inner.get('message') or ''}"
    return " ".join(words.split())[:200]

# ---------------------------------------------------------------- the client and Ctrl-C

def claude_client(timeout=600.0, retries=5, *, dry_run=False):
    """The SDK's client, or None without a key. dry_run: None also where no client can be made"""
    import anthropic
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        if not re.fullmatch("[!-~]*", os.environ.get(name, "")):  # an HTTP error would quote it
            fail(f"{name} holds white space or other characters that no key has")
    try:
        http = anthropic.DefaultHttpxClient(event_hooks={"response": [bound_wait]})
        client = anthropic.Anthropic(timeout=timeout, max_retries=retries, http_client=http)
    except Exception as error:  # the HTTP library refuses a proxy or a certificate in many ways
        if dry_run:
            return None
        names = [name for name in os.environ if name.lower() in NETWORK]
        fail(f"the network settings {', '.join(names) or 'of this machine'} cannot be used "
             f"({' '.join(str(error).split())[:150]}); correct or unset them")
    return client if client.api_key or client.auth_token or client.credentials else None

def bound_wait(response):
    """No retry-after above MAX_WAIT; one that is not a number (a date) becomes MAX_WAIT"""
    for name, longest in (("retry-after", MAX_WAIT), ("retry-after-ms", 1000 * MAX_WAIT)):
        given = response.headers.get(name, "0")
        if not re.fullmatch(r"\d+(\.\d+)?", given) or float(given) > longest:
            response.headers[name] = str(longest)

@contextmanager
def stopping():
    """-> an Event that the first Ctrl-C (or SIGTERM) sets: replies in flight are still saved. A
    second one exits at once."""
    stop = threading.Event()

    def handler(*_):
        if stop.is_set():
            os._exit(130)
        stop.set()
        os.write(2, b"\nstopping: requests in flight are finished first (again: stop at once)\n")
    before = {number: signal.signal(number, handler)
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)

# ---------------------------------------------------------------- many requests

def ask_claude(requests, ask_once, stop, *, concurrency=16, timeout=600.0, retries=5,
               batches=None):
    """requests: key -> arguments of messages.create; keys match [a-zA-Z0-9_-]{1,64}. Yields
    (key, Reply) as they come.

    ask_once(client, request) -> Reply. stop: the Event of stopping(); once it is set, nothing new
    is asked and the generator ends early. batches: a file that remembers what was sent to the
    Batches API; None: `concurrency` requests at a time. A missing or refused key: fail()."""
    client = claude_client(timeout, retries)
    if client is None:
        fail("no API key: set ANTHROPIC_API_KEY")
    if batches:
        yield from ask_in_batches(client, requests, stop, batches)
    else:
        yield from ask_in_parallel(client, requests, ask_once, stop, concurrency)

def ask_in_parallel(client, requests, ask_once, stop, concurrency):
    """`concurrency` requests at a time. An error that every request would meet ends the run, and so
    does a service that cannot be reached; replies in flight are still yielded."""
    waiting = iter(requests.items())
    running = {}     # future -> key
    unreached = []   # (key, reply) of the last requests, as long as none of them could connect
    any_reply = False
    reached = False
    fatal = None
    with ThreadPoolExecutor(concurrency) as pool:
        while True:
            while len(running) < concurrency and not stop.is_set() and not fatal:
                key, request = next(waiting, (None, None))
                if request is None:
                    break
                running[pool.submit(ask_once, client, request)] = key
            if not running:
                break

            for future in wait(running, return_when=FIRST_COMPLETED).done:
                key = running.pop(future)
                reply = future.result()
                any_reply = any_reply or not reply.error
                if reply.error and reply.error.startswith("APIConnectionError"):
                    unreached.append((key, reply))
                    limit = 3 * concurrency if reached else min(concurrency, len(requests))
                    if len(unreached) >= limit:
                        fatal = "unreachable"
                    continue
                reached = True
                yield from unreached  # the service is there: these rows did fail
                unreached = []
                if reply.error and concerns_all(reply.error, any_reply):
                    fatal = reply.error
                else:
                    yield key, reply

    if fatal == "unreachable":
        fail(f"the API at {client.base_url} cannot be reached ({len(unreached)} requests in a "
             "row): check the network, ANTHROPIC_BASE_URL and the proxy variables. These rows are "
             "not recorded as failed; the same command continues")
    if fatal:
        fail(f"the API says {fatal!r}; nothing more was asked. Fix that; the same command "
             "continues")
    if not stop.is_set():
        yield from unreached

def concerns_all(error, any_reply):
    """Would every other request end with this error? A bad key or an empty account; and, while no
    request has succeeded, a payment, permission or address problem."""
    if re.match("401 |400 .*(prefill|credit balance)", error):
        return True
    return not any_reply and bool(re.match("40[234] ", error))

class BarFile:
    """stderr for the progress bar. A closed pipe does not end what is paid for."""
    def __getattr__(self, name):
        return getattr(sys.stderr, name)

    def __eq__(self, other):  # tqdm.write() asks, to clear the bar before it prints
        return other is sys.stderr

    def write(self, text):
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # from now on stderr goes nowhere


def ask_until_read(keys, build, ask, take, stop, *, attempts, name, count=None):
    """Ask for every key; then ask again, up to `attempts` times in all, for those whose reply
    could not be used. -> the keys that are left.

    build(key, attempt) -> request; ask(requests, attempt) yields (key, Reply); take(key, reply) ->
    can asking again help, words for the progress bar."""
    for attempt in range(attempts):
        if not keys or stop.is_set():
            break
        requests = {key: build(key, attempt) for key in keys}
        left = []
        title = f"{name} again" if attempt else name
        with tqdm(total=count or len(requests), desc=title, file=BarFile(), dynamic_ncols=True,
                  initial=(count or len(requests)) - len(requests)) as bar:
            for key, reply in ask(requests, attempt):
                again, words = take(key, reply)
                if again:
                    left.append(key)
                bar.set_postfix_str(words, refresh=False)
                bar.update()
        keys = left
    return keys

# ---------------------------------------------------------------- the Batches API

def ask_in_batches(client, requests, stop, path):
    """Yields (key, Reply) for the requests, from new batches and those under way.

    The ledger at `path` holds each batch before it is sent: [{id, keys, at}]. A key is removed
    once its result is taken; one that is not asked for now (--limit is smaller) is kept."""
    ledger = read_ledger(path)

    # A batch without an id: killed between sending it and reading its id.
    for batch in [batch for batch in ledger if batch["id"] is None]:
        batch["id"] = find(client, batch, ledger)
    ledger = [batch for batch in ledger if batch["id"]]

    sent = {key for batch in ledger for key in batch["keys"]}
    new = {key: request for key, request in requests.items() if key not in sent}
    for keys in chunks(new):
        if stop.is_set():
            return
        batch = {"id": None, "keys": keys, "at": datetime.now(timezone.utc).isoformat()}
        ledger.append(batch)
        write_ledger(path, ledger)
        batch["id"] = send(client, batch, ledger, requests, stop)
        write_ledger(path, ledger)
        if batch["id"]:
            say(f"sent {batch['id']}: {len(keys)} requests")
    yield from read_batches(client, requests, stop, path, ledger)

def read_batches(client, requests, stop, path, ledger):
    """Poll the batches until each is read; yields (key, Reply)"""
    pause = PAUSES[0]
    failures = 0
    while not stop.is_set():
        unread = [batch for batch in ledger
                  if batch["id"] and not requests.keys().isdisjoint(batch["keys"])]
        if not unread:
            return
        for batch in unread:
            try:
                results = read(client, batch)
                failures = 0
            except trouble() as error:
                results = None
                failures += 1
                hopeless = getattr(error, "status_code", 0) in (401, 403)
                if hopeless or failures > PATIENCE * len(unread):
                    fail(f"the Batches API: {in_one_line(error)}; {path} knows what was sent; the "
                         "same command continues (remove that file to send all of it again)")
            if results is None:
                continue

            if results and results.keys().isdisjoint(batch["keys"]):
                # find() took another run's batch of the same size for this one.
                ledger.append({**batch, "keys": []})
                batch["id"] = find(client, batch, ledger)
            else:
                for key in batch["keys"]:
                    if key in requests:
                        yield key, outcome(results.get(key))
                batch["keys"] = [key for key in batch["keys"] if key not in requests]
            write_ledger(path, ledger)
            pause = PAUSES[0]
        stop.wait(pause)
        pause = min(1.5 * pause, PAUSES[1])

def read_ledger(path):
    return json.loads(Path(path).read_text()) if Path(path).exists() else []

def write_ledger(path, ledger):
    with replacing(path) as file:
        json.dump(ledger, file)

def under_way(path):
    """The keys that the Batches API works on, paid for, from the ledger at `path`"""
    return {key for batch in read_ledger(path) for key in batch["keys"]}

def trouble():
    """The errors of a call to the Batches API; the last two come from broken replies"""
    import anthropic
    import httpx2
    return (anthropic.AnthropicError, httpx2.HTTPError, ValueError, AttributeError, TypeError)

def chunks(requests):
    """Lists of keys, each within the bounds of one batch"""
    keys = []
    size = 0
    for key, request in requests.items():
        length = len(json.dumps(request)) + 100
        if keys and (len(keys) == ROWS or size + length > BYTES):
            yield keys
            keys = []
            size = 0
        keys.append(key)
        size += length
    if keys:
        yield keys

def send(client, batch, ledger, requests, stop):
    """-> the batch's id. The SDK must not retry: if its answer were lost, the batch would be made,
    and paid for, twice. We look for the batch before sending it again."""
    once = client.with_options(max_retries=0)
    for attempt in range(6):
        try:
            sent = [{"custom_id": key, "params": requests[key]} for key in batch["keys"]]
            return once.messages.batches.create(requests=sent).id
        except trouble() as error:
            status = getattr(error, "status_code", 500)
            refused = 400 <= status < 500 and status not in (408, 409, 429)
            if attempt == 5 or refused:
                fail(f"the Batches API: {in_one_line(error)}; the same command continues")
            stop.wait(min(2 ** attempt, PAUSES[1]))
        found = find(client.with_options(max_retries=5), batch, ledger)
        if found:
            return found

def find(client, batch, ledger):
    """The id of a batch that was sent without reading the answer: of that size, made since, not
    known. None: it never arrived"""
    since = datetime.fromisoformat(batch["at"]) - timedelta(minutes=5)
    known = {other["id"] for other in ledger}
    try:
        for seen in client.messages.batches.list(limit=100):  # the newest first
            n = seen.request_counts
            if seen.created_at < since:
                return None
            size = n.processing + n.succeeded + n.errored + n.canceled + n.expired
            if seen.id not in known and size == len(batch["keys"]):
                return seen.id
    except trouble() as error:
        fail(f"the Batches API: {in_one_line(error)}; a batch may be under way: the same command "
             "looks for it")

def read(client, batch):
    """custom_id -> result, or None while the batch is being worked on. A 404 means that a batch is
    gone only after the time for which it is kept; before, it is an error that may pass."""
    import anthropic
    try:
        if client.messages.batches.retrieve(batch["id"]).processing_status != "ended":
            return None
        results = client.messages.batches.results(batch["id"])
        return {line.custom_id: line.result for line in results}
    except anthropic.NotFoundError:
        if datetime.now(timezone.utc) - datetime.fromisoformat(batch["at"]) > KEPT:
            return {}
        raise

def outcome(result):
    """A batch's result for one row -> Reply. None: the batch ended without one"""
    if result is not None and result.type == "succeeded":
        return read_message(getattr(result, "message", None))
    error = getattr(getattr(result, "error", None), "error", None)  # errored, expired, canceled
    words = [getattr(result, "type", "lost"), getattr(error, "type", ""),
             getattr(error, "message", "")]
    words = " ".join(" ".join(map(str, words)).split())[:200]
    return Reply(error=words, again="invalid_request" not in words)

# ---------------------------------------------------------------- the price

def price_of(model):
    """(dollars per million tokens in, out, month), or None"""
    return PRICES.get(re.sub(r"-20\d{6}$", "", model))

def dollars(model, usage, batch=False):
    """What tokens cost, or None for a model that is not in PRICES"""
    price = price_of(model)
    if price is None:
        return None
    cost = (price[0] * usage["input_tokens"] + price[1] * usage["output_tokens"]) / 1e6
    return cost / 2 if batch else cost

def show_price(requests, answers, *, batch=False):
    """--dry_run=true: requests, tokens, dollars and the first prompt, before anything is asked.
    answers: texts as long as the replies will be"""
    first = requests[0]
    model = first["model"]
    tokens, how = count_input_tokens(requests)
    usage = {"input_tokens": round(tokens), "output_tokens": sum(map(len, answers)) // 4}
    by_batches = " by the Batches API" if batch else ""
    say(f"requests       {len(requests):,} to {model}{by_batches}")
    say(f"input tokens   {usage['input_tokens']:,} ({how})")
    say(f"output tokens  {usage['output_tokens']:,} (estimated: answers as long as now; thinking "
        "comes on top)")

    cost = dollars(model, usage, batch)
    if cost is None:
        say(f"dollars        unknown: {model} is not in the price table of plumbing/claude.py")
    else:
        per_token_in, per_token_out, month = price_of(model)
        half = "; half of that in batches" if batch else ""
        say(f"dollars        {cost:,.2f} (${per_token_in} and ${per_token_out} per million tokens "
            f"in and out, as of {month}{half})")

    turns = [{"role": "system", "content": first.get("system")}, *first["messages"]]
    for turn in turns:
        if turn["content"]:
            say(f"\n--- first prompt, {turn['role']}:\n{plain(turn['content'])}")

def count_input_tokens(requests):
    """-> tokens, how they were counted: by the API, on at most 100 requests and scaled by length,
    or estimated"""
    lengths = [sum(len(turn["content"]) for turn in request["messages"]) for request in requests]
    system = len(requests[0].get("system", ""))
    estimate = (sum(lengths) + len(requests) * system) / 4
    how = "estimated at 4 characters each"
    client = claude_client(dry_run=True)
    if client is None:
        return estimate, how

    import anthropic
    step = -(-len(requests) // 100)
    try:
        counts = []
        for request in requests[::step]:
            fields = {name: request[name] for name in request if name != "max_tokens"}
            counts.append(client.messages.count_tokens(**fields).input_tokens)
    except (anthropic.APIError, ValueError, AttributeError, TypeError) as error:
        return estimate, f"{how}; the API would not count: {in_one_line(error)}"
    how = "the API's count"
    if step > 1:
        how += f" of {len(counts)} requests, scaled by length"
    return sum(counts) * sum(lengths) / sum(lengths[::step]), how
