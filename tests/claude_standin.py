"""A stand-in for Anthropic's Messages API, for the tests only: real HTTP on 127.0.0.1, three words
that it corrects, faults by turn.

    with Standin(fault=lambda prompt, turn: "429" if turn == 1 else "") as claude:
        ... claude.url, claude.asked, claude.most

fault(prompt, turn) -> "" or a status ("429", "529", "401", ...), drop, one of BROKEN, truncate,
refusal, empty, preamble, wrong_tag;
in a batch also errored, expired. turn counts how often that prompt was asked, from 1."""

import json, re, threading, time
from collections import Counter
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MENDS = {"teh": "the", "wrong": "right", "bad": "good"}
KINDS = {
    "400": "invalid_request_error",
    "401": "authentication_error",
    "404": "not_found_error",
    "429": "rate_limit_error",
    "500": "api_error",
    "529": "overloaded_error",
}
BROKEN = {
    "garbage": b'{"id": "msg_',
    "html": b"<html>upstream error</html>",
    "no_utf8": b"\xff\xfe{",
    "null": b"null",
    "no_usage": b'{"content": [{"type": "text", "text": "x"}], "stop_reason": "end_turn"}',
    "no_text": b'{"content": [{"type": "text"}], "stop_reason": "end_turn", '
    b'"usage": {"input_tokens": 1, "output_tokens": 1}}',
}


def mended(text):
    return re.sub(r"\b(teh|wrong|bad)\b", lambda word: MENDS[word[0]], text)


class Standin(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def __init__(
        self,
        fault=lambda prompt, turn: "",
        delay=0.0,
        batch_seconds=0.3,
        retry_after="0.01",
        lose_create=(),
        trouble=lambda action: "",
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.delay, self.batch_seconds, self.retry_after = (
            fault,
            delay,
            batch_seconds,
            retry_after,
        )
        self.lose_create = list(
            lose_create
        )  # the numbers (from 1) of batches that are made, but whose answer is lost
        # "create", "list", "retrieve" or "results" of a batch -> a status or wire fault
        self.trouble = trouble
        self.url, self.lock = f"http://127.0.0.1:{self.server_port}", threading.Lock()
        self.asked, self.answered, self.headers, self.limits, self.batches = (
            Counter(),
            Counter(),
            [],
            [],
            {},
        )
        self.now = self.most = 0

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):  # a client that was killed
        pass

    def message(self, request):
        """-> status, body of one request"""
        prompt, prefilled = (
            request["messages"][0]["content"],
            request["messages"][-1]["role"] == "assistant",
        )
        with self.lock:
            self.asked[prompt] += 1
            self.limits.append(request["max_tokens"])
            fault = self.fault(prompt, self.asked[prompt])
            self.answered[prompt] += not fault
        if fault.isdigit() or fault in ("errored", "expired", "drop", *BROKEN):
            kind = KINDS.get(fault, "api_error")
            return fault, {
                "type": "error",
                "error": {"type": kind, "message": f"Injected {kind}."},
                "request_id": "req_1",
            }
        text = mended(re.search(r"^Response: (.*?)\n\nPlease make minimal", prompt, re.S | re.M)[1])
        text = f"\n\n{text}" if prefilled else f"<edited>{text}</edited>"
        text = {
            "empty": " \n",
            "refusal": "",
            "truncate": text[: len(text) // 2],
            "preamble": "Here is the edited answer:\n\n" + text,
            "wrong_tag": text.replace("edited>", "result>"),
        }.get(fault, text)
        stop = {"truncate": "max_tokens", "refusal": "refusal"}.get(fault, "end_turn")
        return "200", {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": request["model"],
            "stop_reason": stop,
            "content": [
                {"type": "thinking", "thinking": "", "signature": "x"},
                {"type": "text", "text": text},
            ],
            "stop_sequence": None,
            "usage": {"input_tokens": len(prompt) // 4, "output_tokens": len(text) // 4},
        }

    def describe(self, id):
        made, requests, _ = self.batches[id]
        ended, n = time.time() - made > self.batch_seconds, len(requests)
        return {
            "id": id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": {
                "processing": 0 if ended else n,
                "succeeded": n if ended else 0,
                "errored": 0,
                "canceled": 0,
                "expired": 0,
            },
            "created_at": datetime.fromtimestamp(made, timezone.utc).isoformat(),
            "expires_at": "2100-01-01T00:00:00Z",
            "ended_at": None,
            "cancel_initiated_at": None,
            "archived_at": None,
            "results_url": f"{self.url}/v1/messages/batches/{id}/results" if ended else None,
        }

    def results(self, id):
        """Made once, in another order than asked"""
        if self.batches[id][2] is None:
            lines = []
            for request in reversed(self.batches[id][1]):
                status, body = self.message(request["params"])
                result = (
                    {"type": "succeeded", "message": body}
                    if status == "200"
                    else {"type": "expired"}
                    if status == "expired"
                    else {"type": "errored", "error": body}
                )
                lines.append(
                    json.dumps({"custom_id": request["custom_id"], "result": result}) + "\n"
                )
            self.batches[id][2] = "".join(lines)
        return self.batches[id][2]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.handle_request(None)

    def do_POST(self):
        self.handle_request(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def handle_request(self, body):
        world, parts = self.server, self.path.partition("?")[0].split("/")[1:]
        with world.lock:
            world.headers.append(dict(self.headers))
        if parts == ["v1", "messages"]:
            with world.lock:
                world.now += 1
                world.most = max(world.most, world.now)
            time.sleep(world.delay)
            status, reply = world.message(body)
            with world.lock:
                world.now -= 1
            return self.send(status, reply)
        if parts == ["v1", "messages", "count_tokens"]:
            return self.send(
                world.fault("", 0) or "200",
                {"input_tokens": len(body["messages"][0]["content"]) // 3},
            )
        action = (
            "results"
            if parts[-1] == "results"
            else "create"
            if body
            else "retrieve"
            if parts[3:]
            else "list"
        )
        if trouble := world.trouble(action):
            return self.send(
                trouble,
                {
                    "type": "error",
                    "error": {"type": KINDS.get(trouble, ""), "message": "Injected."},
                },
            )
        if action == "create":
            id = f"msgbatch_{len(world.batches) + 1}"
            world.batches[id] = [time.time(), body["requests"], None]
            return self.send(
                "drop" if len(world.batches) in world.lose_create else "200", world.describe(id)
            )
        if action == "list":
            return self.send(
                "200",
                {
                    "data": [world.describe(id) for id in reversed(world.batches)],
                    "has_more": False,
                    "first_id": None,
                    "last_id": None,
                },
            )
        if action == "results":
            return self.send("200", world.results(parts[3]))
        self.send("200", world.describe(parts[3]))

    def send(self, status, reply):
        data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        data = BROKEN.get(status, data)
        self.send_response(int(status) if status.isdigit() else 200)
        headers = {
            "content-type": "text/html" if status == "html" else "application/json",
            "content-length": str(len(data)),
        }
        if status in ("429", "500", "529"):
            wait = self.server.retry_after
            headers |= wait if isinstance(wait, dict) else {"retry-after": wait}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if status == "drop" else data)
        self.close_connection = status == "drop"

    def log_message(self, *_):
        pass


if __name__ == "__main__":  # for the tests that kill: python claude_standin.py -> its address
    with Standin(delay=0.02) as standin:
        print(standin.url, flush=True)
        threading.Event().wait()
