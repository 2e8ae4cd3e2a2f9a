"""What all pages share: one style, one frame, text that is safe in HTML, tokens painted by reward.

A page loads nothing, and only the editor's page has a script."""
if __name__ == "__main__":
    raise SystemExit("pages.py is a part of: python diff.py show")

import html
from pathlib import Path

from plumbing.files import replacing, whole_characters
from plumbing.paint import plain
from plumbing.ranks import fail, say

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
SHOW_MARK = "<!-- a page of show -->"


def safe(text):
    """Any value as text for HTML: escaped, control characters visible, no lone surrogates"""
    return whole_characters(html.escape(plain(str(text))))


def document(mark, title, body):
    """A complete page. body: its HTML; mark: an HTML comment by which is_ours() knows our pages"""
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
    """True if we may write this file without asking: it does not exist, or it begins with mark"""
    path = Path(path)
    if not path.exists():
        return True
    return mark in path.read_text(encoding="utf-8", errors="replace")[:200]


def heat(texts, rewards, scale, changed=None):
    """Tokens painted by reward -> HTML. Blue is good, red is bad; a larger |r_t| is deeper.

    texts: one string per token; "" (part of a character) is not drawn. rewards: r_t, None where a
    token has none. scale: the |r_t| of the deepest colour. changed: 0/1 per token; 1 underlines."""
    spans = []
    for t, (text, r) in enumerate(zip(texts, rewards)):
        if text:
            is_changed = changed is not None and changed[t]
            spans.append(token_span(text, r, scale, is_changed))
    return f"<div class=heat>{''.join(spans)}</div>"


def token_span(text, r, scale, is_changed):
    """One token of heat(), with its reward as a tooltip"""
    share = 0.0  # of the deepest colour, -1..1
    if r is not None and scale:
        share = max(-1.0, min(1.0, r / scale))
    tone = "--good" if share > 0 else "--bad"
    background = f"rgb(var({tone}) / {0.75 * abs(share):.2f})"

    note = "no reward here" if r is None else f"{r:+.3f}"
    mark = ' class="changed"' if is_changed else ""
    shown = safe(text).replace("\n", "↵\n")
    return f'<span{mark} title="{note}" style="background:{background}">{shown}</span>'


# ---------------------------------------------------------------- the pages of the two `show` words

def question_html(row):
    """The instruction of a row and its input; an input of 300 characters or more is folded away"""
    shown = f"<p class=text><b>{safe(row.get('instruction', ''))}</b></p>"
    more = row.get("input") or ""
    if len(more) >= 300:
        shown += (f"<details><summary>input, {len(more)} characters</summary>"
                  f"<p class=text>{safe(more)}</p></details>")
    elif more:
        shown += f"<p class='text quiet'>{safe(more)}</p>"
    return shown


def write_show_page(path, title, legend, sections, overwrite):
    """Write a page of sections, each (heading, its HTML). legend: HTML. Without overwrite, only a
    page of show is replaced."""
    if Path(path).suffix != ".html":
        fail(f"--html={path} must end in .html")
    if not overwrite and not is_ours(path, SHOW_MARK):
        fail(f"--html={path} is no page of show's; choose another, or replace it with "
             "--overwrite=true")
    body = [f"<h1>{safe(title)}</h1><p class=quiet>{legend}</p>"]
    for heading, content in sections:
        body.append(f"<section><h2>{safe(heading)}</h2>{content}</section>")
    if not sections:
        body.append("<p>Nothing to show.</p>")
    with replacing(path) as file:
        file.write(document(SHOW_MARK, title, "\n".join(body)))
    rows = "row" if len(sections) == 1 else "rows"
    say(f"{path}: {len(sections)} {rows}")
