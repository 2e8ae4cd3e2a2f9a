"""What all pages share: text that is safe in HTML, one style, one frame, painted tokens. No page has
a script or loads anything (the editor's page has its own script)."""
import html
from pathlib import Path

from plumbing.files import whole_characters
from plumbing.paint import plain

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def safe(text):
    """Any text as text: markup escaped, control characters visible, lone surrogates replaced"""
    return whole_characters(html.escape(plain(str(text))))


def document(mark, title, body):
    """A whole page. mark: a comment that tells our own pages from other files"""
    return f"""<!doctype html>
{mark}
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{safe(title)}</title><style>{STYLE}</style></head><body>
{body}
</body></html>
"""


def is_ours(path, mark):
    """May this file be replaced without being asked? It does not exist, or is a page of ours."""
    path = Path(path)
    return not path.exists() or mark in path.read_text(encoding="utf-8", errors="replace")[:200]


def heat(texts, rewards, scale, changed=None):
    """Tokens on blue (good) and red (bad), as strong as their reward.

    texts: one string per token, "" for a part of a character; rewards: r_t, None where there is
    none; scale: the |r_t| with the deepest colour; changed: 0/1 each, underlined where 1"""
    spans = []
    for k, (text, r) in enumerate(zip(texts, rewards)):
        if not text:
            continue
        share = max(-1.0, min(1.0, r / scale)) if r is not None and scale else 0.0
        tone = "--good" if share > 0 else "--bad"
        note = "no reward here" if r is None else f"{r:+.3f}"
        mark = ' class="changed"' if changed and changed[k] else ""
        shown = safe(text).replace("\n", "↵\n")
        spans.append(f'<span{mark} title="{note}" '
                     f'style="background:rgb(var({tone}) / {0.75 * abs(share):.2f})">{shown}</span>')
    return f"<div class=heat>{''.join(spans)}</div>"
