"""edit.py --editor=human: a page for a person, served to this machine only.

Each save is written to edits.jsonl at once."""
import json, os, re, secrets, sys, threading, time, webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from extras.pages import STYLE
from plumbing.ranks import say

# Seconds for which a row is reserved for the tab that shows it. An open tab renews this every 20
# seconds, a hidden one every 60.
LEASE = 150
ACTIONS = ("next", "row", "save", "undo", "alive", "finish")
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'")
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
           "X-Frame-Options": "DENY", "Content-Security-Policy": POLICY}


class Desk:
    """Which rows are open, which tab shows which row, how often a row was saved.

    With this no tab overwrites the text of another one that it has not seen. The methods next, row,
    save, undo and alive are called by the page, with these arguments; each returns its JSON reply.
    """

    def __init__(self, rows, done, save):
        self.rows = rows  # key -> row
        self.done = done  # key -> row of edits.jsonl
        self.save_row = save
        self.keys = list(rows)
        self.leases = {}  # key -> (tab, time of its last call)
        self.versions = dict.fromkeys(rows, 0)  # key -> number of saves
        self.lock = threading.Lock()

    def edited(self, key):
        return self.done.get(key, {}).get("edited")

    def show(self, key, tab):
        """The reply that makes a tab show a row; None: there is no row for it"""
        # A tab has one row only: forget the one it had before.
        self.leases = {key: lease for key, lease in self.leases.items() if lease[0] != tab}

        row = None
        if key is not None:
            self.leases[key] = (tab, time.monotonic())
            names = ("id", "instruction", "input", "original")
            row = {name: self.rows[key][name] for name in names}
            row["edited"] = self.edited(key)
            row["version"] = self.versions[key]
            row["number"] = self.keys.index(key) + 1
        done = sum(self.edited(key) is not None for key in self.keys)
        return {"row": row, "done": done, "total": len(self.keys)}

    def next(self, tab, skipped=()):
        """The first open row that no other tab has, skipped ones last. None: nothing is left."""
        def is_free(key):
            owner, since = self.leases.get(key, (tab, 0))
            return owner == tab or time.monotonic() - since > LEASE

        free = [key for key in self.keys if self.edited(key) is None and is_free(key)]
        skipped = set(skipped)
        in_order = sorted(free, key=lambda key: key in skipped)  # stable: rows keep their order
        return self.show(in_order[0] if in_order else None, tab)

    def row(self, tab, id, step=0):
        """Another row, `step` rows after this one"""
        return self.show(self.keys[max(0, self.keys.index(id) + step)], tab)

    def save(self, tab, id, version, edited):
        """Write the text, unless the row was saved since this tab read it"""
        if version != self.versions[id]:
            return {"conflict": self.edited(id), "version": self.versions[id]}

        # A browser's text field turns all line ends into "\n": restore those of the original.
        original = self.rows[id]["original"]
        in_browser = original.replace("\r\n", "\n").replace("\r", "\n")
        if edited == in_browser:
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
        """The tab still shows this row"""
        self.leases[id] = (tab, time.monotonic())
        return {}


def make_server(desk, token, finished):
    """A server on a free port of 127.0.0.1. token: only an address with it is answered. finished:
    an event, set when the person presses finish."""
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = page.replace("/* style.css */", STYLE).encode()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body=b"", kind="text/plain"):
            self.send_response(status)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def allowed(self):
            # Another site can make its own name point at 127.0.0.1: then the Host header shows it.
            host = self.headers.get("Host", "").rpartition(":")[0]
            given = self.path.lstrip("/").partition("/")[0]
            right_token = secrets.compare_digest(given.encode(), token.encode())
            return host in ("127.0.0.1", "localhost") and right_token

        def do_GET(self):
            if self.allowed() and self.path == f"/{token}/":
                self.answer(200, page, "text/html")
            else:
                self.answer(404)

        def do_POST(self):
            action = self.path.rpartition("/")[2]
            size = self.headers.get("Content-Length") or "0"
            known = action in ACTIONS and re.fullmatch(r"\d{1,7}", size)
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
            except OSError as error:  # a full disk: tell the person before more text is written
                return self.answer(500, f"not saved: {error.strerror}".encode())
            self.answer(200, json.dumps(reply).encode(), "application/json")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


def serve(rows, done, save, stop):
    """Serve the page until the person presses finish, or until Ctrl-C sets `stop`.

    save(key, edited, error) writes a row and puts it into done."""
    finished = threading.Event()
    token = secrets.token_urlsafe(16)
    server = make_server(Desk(rows, done, save), token, finished)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    url = f"http://127.0.0.1:{server.server_port}/{token}/"
    say(f"edit at {url}\n(Ctrl-C here ends; run the same command again to continue)")
    has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform != "linux" or has_screen:
        webbrowser.open(url)
    while not finished.is_set() and not stop.wait(0.2):
        pass
    server.shutdown()
