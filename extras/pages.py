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


def is_ours(path, *marks):
    """True if we may write this file without asking: it does not exist, or it begins with a mark"""
    path = Path(path)
    if not path.exists():
        return True
    begin = path.read_text(encoding="utf-8", errors="replace")[:200]
    return any(mark in begin for mark in marks)


def heat(texts, rewards, scale, changed=None, numbers=False):
    """Tokens painted by reward -> HTML. Blue is good, red is bad; a larger |r_t| is deeper.

    texts: one string per token; "" (part of a character) is not drawn. rewards: r_t, None where a
    token has none. scale: the |r_t| of the deepest colour. The colour goes with the square root of
    |r_t|: else one large r_t makes all others white. changed: 0/1 per token; 1 underlines.
    numbers: also write r_t behind each token with more than half of the scale."""
    spans = []
    for t, (text, r) in enumerate(zip(texts, rewards)):
        if text:
            is_changed = changed is not None and changed[t]
            is_strong = numbers and r is not None and abs(r) > scale / 2
            spans.append(token_span(text, r, scale, is_changed, is_strong))
    return f"<div class=heat>{''.join(spans)}</div>"


def token_span(text, r, scale, is_changed, is_strong):
    """One token of heat(), with its reward as a tooltip. is_strong: style.css draws data-r"""
    share = 0.0  # of the deepest colour, 0..1
    if r is not None and scale:
        share = min(1.0, abs(r) / scale) ** 0.5
    tone = "--good" if r is not None and r > 0 else "--bad"
    background = f"rgb(var({tone}) / {0.75 * share:.2f})"

    # The number belongs before the line break of a token that ends in one.
    note = "no reward here" if r is None else f"{r:+.3f}"
    mark = ' class="changed"' if is_changed else ""
    if is_strong:
        mark += f' data-r="{r:+.1f}"'
    shown = safe(text).replace("\n", "↵\n")
    line_break = "\n" if shown.endswith("\n") else ""
    return (f'<span{mark} title="{note}" style="background:{background}">'
            f"{shown.removesuffix(line_break)}</span>{line_break}")


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
    """Write a page of sections, each (heading, id of the row or "", its HTML). legend: HTML.
    Without overwrite, only a page of show is replaced."""
    if Path(path).suffix != ".html":
        fail(f"--html={path} must end in .html")
    if not overwrite and not is_ours(path, SHOW_MARK):
        fail(f"--html={path} is no page of show's; choose another, or replace it with "
             "--overwrite=true")
    body = [f"<h1>{safe(title)}</h1><p class=quiet>{legend}</p>"]
    for heading, name, content in sections:
        small = f" <small>{safe(name)}</small>" if name else ""
        body.append(f"<section><h2>{safe(heading)}{small}</h2>{content}</section>")
    if not sections:
        body.append("<p>Nothing to show.</p>")
    with replacing(path) as file:
        file.write(document(SHOW_MARK, title, "\n".join(body)))
    rows = "row" if len(sections) == 1 else "rows"
    say(f"{path}: {len(sections)} {rows}")
