"""edit.py --editor=human: a page for a person, served to this machine only.

What is typed is on the disk at once, as a draft; each save is a row of edits.jsonl at once. What
the page may do is decided in extras/editors/desk.py; here are the server and its address. The
address stays the same when the run continues, so a page that is open continues, too."""
if __name__ == "__main__":
    raise SystemExit("page.py is a part of: python edit.py --editor=human")

import json, os, re, secrets, socket, sys, threading, webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from extras.editors.desk import Desk, edits_of, open_rows
from extras.editors.drafts import Drafts, read_drafts
from extras.pages import STYLE
from plumbing.files import COUNT, SHARE, check_numbers
from plumbing.ranks import fail, say

POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
          "connect-src 'self'; base-uri 'none'; form-action 'none'")
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
           "X-Frame-Options": "DENY", "Content-Security-Policy": POLICY}


# ---------------------------------------------------------------- what can be wrong

def check(cfg):
    """fail() if the page cannot be served with these fields -> the text of the guide"""
    check_numbers(cfg, port=(0, 65_535), annotators=COUNT, shared=SHARE)
    if cfg.port and not is_free(cfg.port):
        fail(f"--port={cfg.port} is in use or not allowed here; choose another (0: a free one)")
    if not cfg.guide:
        return ""
    try:
        return Path(cfg.guide).read_text(encoding="utf-8-sig")
    except OSError as error:
        fail(f"--guide={cfg.guide}: {error.strerror}; it is a text file that the page shows")
    except UnicodeDecodeError:
        fail(f"--guide={cfg.guide} is not UTF-8 text; save it as UTF-8")


def is_free(port):
    """Can a server use this port of 127.0.0.1?"""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
        return True
    except OSError:
        return False


# ---------------------------------------------------------------- the server

def make_server(desk, token, port=0):
    """A server on 127.0.0.1. token: only an address with it is answered; port 0: a free one."""
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
            known = action in Desk.ACTIONS and re.fullmatch(r"\d{1,7}", size)
            if not self.allowed() or not known:
                return self.answer(404)

            try:
                arguments = json.loads(self.rfile.read(int(size)))
                with desk.lock:
                    reply = getattr(desk, action)(**arguments)
            except (ValueError, TypeError, KeyError, AttributeError):
                return self.answer(400)
            except OSError as error:  # a full disk: tell the person before more text is written
                return self.answer(500, f"not saved: {error.strerror}".encode())
            self.answer(200, json.dumps(reply).encode(), "application/json")
            if desk.is_over:
                desk.finished.set()  # the reply is out: the run may end

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server


# ---------------------------------------------------------------- its address

def remembered(path):
    """The port and the token of this run's earlier page, if it had one; else 0 and a new token"""
    try:
        kept = json.loads(path.read_text())
        return int(kept["port"]), str(kept["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, secrets.token_urlsafe(16)


def remember(path, port, token):
    """Only this user may read the file: who knows the token can edit"""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"port": port, "token": token}, file)


def tell_address(port, token):
    url = f"http://127.0.0.1:{port}/{token}/"
    user = os.environ.get("USER", "USER")
    say(f"edit at {url}")
    say(f"from another machine, first: ssh -N -L {port}:127.0.0.1:{port} "
        f"{user}@{socket.gethostname()}")
    say("(Ctrl-C here ends; run the same command again to continue)")
    has_screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform != "linux" or has_screen:
        webbrowser.open(url)


def drafts_path(cfg):
    return Path(f"{cfg.out}.drafts.jsonl")


def todo(cfg, rows, done):
    """The rows that need a person: without an edit, or with a change of an edit that its person has
    not saved -> dict. (Text of a person whose row somebody else has saved holds up no run.)"""
    left = open_rows(rows, done, cfg.annotators, cfg.shared)
    for (key, who), draft in read_drafts(drafts_path(cfg)).items():
        people = [edit["who"] for edit in edits_of(done.get(key))]
        if draft.text is not None and key in rows and who in people:
            left[key] = rows[key]
    return left


def serve(cfg, rows, done, save, stop):
    """Serve the page until all people have pressed Finish, or until Ctrl-C sets `stop`. They
    are the human annotators of Section 2.1.

    save(key, edited, error, facts) writes a row and puts it into done; facts: further fields."""
    guide = check(cfg)
    drafts = Drafts(drafts_path(cfg))
    desk = Desk(rows, done, save, drafts, annotators=cfg.annotators, share=cfg.shared, guide=guide)

    # The same address as before, where that is possible.
    address = Path(f"{cfg.out}.page.json")
    port, token = remembered(address)
    port = cfg.port or (port if is_free(port) else 0)
    server = make_server(desk, token, port)
    remember(address, server.server_port, token)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if desk.shared:
        say(f"{len(desk.shared)} of {len(rows)} rows are for each of {cfg.annotators} people, the "
            "others for one of them")
    tell_address(server.server_port, token)
    while not desk.finished.is_set() and not stop.wait(0.2):
        pass

    # No call may write after this: edits.jsonl is compacted next.
    server.shutdown()
    desk.lock.acquire()
    drafts.close()
    if not todo(cfg, rows, done):
        address.unlink()
