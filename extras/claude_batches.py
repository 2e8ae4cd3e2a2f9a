"""Anthropic's Message Batches, killed and restarted without losing one or paying for it twice; for edit.ask_claude"""
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import anthropic
import httpx2

from common import fail, say
from extras.runs import replacing

ROWS, BYTES = 10_000, 7_000_000  # of one batch. The API takes 100,000 and 256 MB; a lost upload should cost little
PAUSES = 0.5, 60                 # seconds between two looks at a batch: at first, at most
PATIENCE = 60                    # so many failed looks in a row at each batch, an hour, and we give up
TROUBLE = (anthropic.AnthropicError, httpx2.HTTPError, ValueError, AttributeError, TypeError)  # the last: broken replies


def describe(error):
    words = f"{type(error).__name__} {getattr(error, 'status_code', '')} {getattr(error, 'message', '')}"
    return " ".join(words.split())[:200]


def ask_in_batches(client, requests, stop, path):
    """requests: key -> arguments of messages.create. Yields (key, message, error): one of the two is None.

    Each batch stands in the file at `path` before it is sent: [{id, keys, at}]. A key goes once its result is taken;
    one that is not asked for this time (--limit is smaller) stays."""
    batches = json.loads(Path(path).read_text()) if Path(path).exists() else []

    def remember():
        with replacing(path) as file:
            json.dump(batches, file)

    for batch in [batch for batch in batches if batch["id"] is None]:  # killed between sending it and hearing its id
        batch["id"] = find(client, batch, batches)
    batches = [batch for batch in batches if batch["id"]]
    under_way = {key for batch in batches for key in batch["keys"]}
    for keys in chunks({key: request for key, request in requests.items() if key not in under_way}):
        if stop.is_set():
            return
        batch = {"id": None, "keys": keys, "at": datetime.now(timezone.utc).isoformat()}
        batches.append(batch)
        remember()
        batch["id"] = send(client, batch, batches, requests, stop)
        remember()
        if batch["id"]:
            say(f"sent {batch['id']}: {len(keys)} requests")

    pause, failures = PAUSES[0], 0
    while (unread := [batch for batch in batches if batch["id"] and not requests.keys().isdisjoint(batch["keys"])]) \
            and not stop.is_set():
        for batch in unread:
            try:
                results = read(client, batch["id"])
                failures = 0
            except TROUBLE as error:
                results, failures = None, failures + 1
                if getattr(error, "status_code", 0) in (401, 403) or failures > PATIENCE * len(unread):
                    fail(f"the Batches API: {describe(error)}; {path} knows what is sent; the same command goes on")
            if results is None:
                continue
            if results and results.keys().isdisjoint(batch["keys"]):  # another run's of that size: find() erred
                batches.append({**batch, "keys": []})
                batch["id"] = find(client, batch, batches)
            else:
                for key in filter(requests.__contains__, batch["keys"]):
                    yield key, *outcome(results.get(key))
                batch["keys"] = [key for key in batch["keys"] if key not in requests]
            remember()
            pause = PAUSES[0]
        stop.wait(pause)
        pause = min(1.5 * pause, PAUSES[1])


def chunks(requests):
    """Lists of keys, each within the bounds of one batch"""
    keys, size = [], 0
    for key, request in requests.items():
        length = len(json.dumps(request)) + 100
        if keys and (len(keys) == ROWS or size + length > BYTES):
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += length
    if keys:
        yield keys


def send(client, batch, batches, requests, stop):
    """-> the batch's id. Not by the SDK's retries: were its answer lost, the batch would be made, and paid, twice"""
    client = client.with_options(max_retries=0)
    for attempt in range(6):
        try:
            sent = [{"custom_id": key, "params": requests[key]} for key in batch["keys"]]
            return client.messages.batches.create(requests=sent).id
        except TROUBLE as error:
            status = getattr(error, "status_code", 500)
            if attempt == 5 or 400 <= status < 500 and status not in (408, 409, 429):
                fail(f"the Batches API: {describe(error)}; the same command goes on")
            stop.wait(min(2 ** attempt, PAUSES[1]))
        if found := find(client.with_options(max_retries=5), batch, batches):
            return found


def find(client, batch, batches):
    """The id of a batch whose sending nobody saw end: of that size, made since, not known. None: it never arrived"""
    since, known = datetime.fromisoformat(batch["at"]) - timedelta(minutes=5), {other["id"] for other in batches}
    try:
        for seen in client.messages.batches.list(limit=100):  # the newest first
            n = seen.request_counts
            if seen.created_at < since:
                return None
            size = n.processing + n.succeeded + n.errored + n.canceled + n.expired
            if seen.id not in known and size == len(batch["keys"]):
                return seen.id
    except TROUBLE as error:
        fail(f"the Batches API: {describe(error)}; a batch may be under way: the same command looks for it")


def read(client, id):
    """custom_id -> result, or None while the batch is being worked on"""
    try:
        if client.messages.batches.retrieve(id).processing_status != "ended":
            return None
        return {line.custom_id: line.result for line in client.messages.batches.results(id)}
    except anthropic.NotFoundError:  # it is kept for 29 days: nothing of it is left
        return {}


def outcome(result):
    """-> message, error, one of them None. result: None where a batch ended without one for this row"""
    if result is not None and result.type == "succeeded":
        return getattr(result, "message", None), None
    error = getattr(getattr(result, "error", None), "error", None)  # errored, expired, canceled
    words = [getattr(result, "type", "lost"), getattr(error, "type", ""), getattr(error, "message", "")]
    return None, " ".join(" ".join(map(str, words)).split())[:200]
