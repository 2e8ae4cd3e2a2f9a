"""edit.py --editor=human: a page for a person, served to this machine only. A save is a row in edits.jsonl at once."""
import json, os, re, secrets, sys, threading, time, webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from extras.pages import STYLE
from plumbing.ranks import say

LEASE = 150  # seconds a row stays reserved for the tab that shows it; it calls every 20, a hidden tab every 60
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY",
           "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                                      "connect-src 'self'; base-uri 'none'; form-action 'none'"}


class Desk:
    """Which rows are open, which tab has which, how often a row was saved: so that no tab overwrites another unseen"""

    def __init__(self, rows, done, save):
        self.rows, self.done, self.save_row = rows, done, save
        self.keys, self.leases, self.versions, self.lock = list(rows), {}, dict.fromkeys(rows, 0), threading.Lock()

    def edited(self, key):
        return self.done.get(key, {}).get("edited")

    def show(self, key, tab):
        self.leases = {other: lease for other, lease in self.leases.items() if lease[0] != tab}  # a tab holds one row
        if key is not None:
            self.leases[key] = (tab, time.monotonic())
        row = key and {name: self.rows[key][name] for name in ("id", "instruction", "input", "original")} \
            | {"edited": self.edited(key), "version": self.versions[key], "number": self.keys.index(key) + 1}
        return {"row": row,
                "done": sum(self.edited(key) is not None for key in self.keys), "total": len(self.keys)}

    def next(self, tab, skipped=()):
        """The first open row that no other tab has, the skipped ones last. None: all is done, or with other tabs"""
        def free(key):
            owner, since = self.leases.get(key, (tab, 0))
            return owner == tab or time.monotonic() - since > LEASE
        free_keys = [key for key in self.keys if self.edited(key) is None and free(key)]
        return self.show(next((key for key in free_keys if key not in set(skipped)), next(iter(free_keys), None)), tab)

    def row(self, tab, id, step=0):
        return self.show(self.keys[max(0, self.keys.index(id) + step)], tab)

    def save(self, tab, id, version, edited):
        if version != self.versions[id]:
            return {"conflict": self.edited(id), "version": self.versions[id]}
        original = self.rows[id]["original"]
        unix = original.replace("\r\n", "\n").replace("\r", "\n")  # what a browser's text field makes of it
        if edited == unix:
            edited = original
        elif "\r\n" in original:
            edited = edited.replace("\n", "\r\n")
        self.versions[id] += 1
        self.save_row(id, edited)
        return {"saved": True}

    def undo(self, tab, id):
        """Take a save back: the row is open again, with its text in the field"""
        text = self.edited(id)
        self.versions[id] += 1
        self.save_row(id, None, "taken back by the editor")
        reply = self.show(id, tab)
        reply["row"]["edited"] = text
        return reply

    def alive(self, tab, id):
        self.leases[id] = (tab, time.monotonic())
        return {}


def make_server(desk, token, finished):
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = page.replace("/* style.css */", STYLE).encode()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body=b"", kind="text/plain"):
            self.send_response(status)
            headers = {**HEADERS, "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def allowed(self):  # the Host header: a name that was made to point at 127.0.0.1 is another site's
            host = self.headers.get("Host", "").rpartition(":")[0]
            given = self.path.lstrip("/").partition("/")[0]
            return host in ("127.0.0.1", "localhost") and secrets.compare_digest(given.encode(), token.encode())

        def do_GET(self):
            if self.allowed() and self.path == f"/{token}/":
                self.answer(200, page, "text/html")
            else:
                self.answer(404)

        def do_POST(self):
            action, size = self.path.rpartition("/")[2], self.headers.get("Content-Length") or "0"
            known = action in ("next", "row", "save", "undo", "alive", "finish") and re.fullmatch(r"\d{1,7}", size)
            if not self.allowed() or not known:
                return self.answer(404)
            try:
                arguments = json.loads(self.rfile.read(int(size)))
                if action == "finish":
                    finished.set()
                    return self.answer(200, b"{}", "application/json")
                with desk.lock:
                    reply = getattr(desk, action)(**arguments)
            except (ValueError, TypeError, KeyError):
                return self.answer(400)
            except OSError as error:  # a full disk: the person must hear of it before writing on
                return self.answer(500, f"not saved: {error.strerror}".encode())
            self.answer(200, json.dumps(reply).encode(), "application/json")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


def serve(rows, done, save, stop):
    """Until the person presses finish, or Ctrl-C. save(key, edited, error) writes a row and puts it into done."""
    finished, token = threading.Event(), secrets.token_urlsafe(16)
    server = make_server(Desk(rows, done, save), token, finished)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{token}/"
    say(f"edit at {url}\n(Ctrl-C here ends; the same command goes on where you stopped)")
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)
    while not finished.is_set() and not stop.wait(0.2):
        pass
    server.shutdown()
