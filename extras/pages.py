"""Pictures of answers: the text of each token, and the pages of `diff.py show --html=FILE` and `reward_model.py show
--html=FILE`: self-contained, light and dark, scriptless."""
import html
from pathlib import Path

from common import decode_response, fail, say
from extras.runs import replacing
from diff import plain

MARK = "<!-- a page of show -->"
STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --ink: #1d1f23; --quiet: #686c74; --grid: #dfe0e2;
  --good: 52 118 200; --bad: 214 82 56; --blame: 176 137 43 }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #e4e5e8; --quiet: #9a9fa8; --grid: #2f333a;
  --good: 84 150 230; --bad: 226 104 78; --blame: 217 183 92 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 40px 24px 80px; max-width: 1080px; background: var(--page); color: var(--ink);
  font: 15px/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif }
h1 { font-size: 21px; line-height: 1.3; margin: 0 0 4px }
h2 { font-size: 14px; margin: 36px 0 4px; padding-top: 16px; border-top: 1px solid var(--grid) }
h3 { font-size: 13px; font-weight: 600; margin: 0 0 4px }
.quiet, summary { color: var(--quiet); font-size: 13px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 10px }
.pair { display: grid; gap: 20px 32px; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)) }
summary { cursor: pointer }
del, ins, mark, .tokens span { border-radius: 3px; padding: 1px 0; color: inherit }
del { background: rgb(var(--bad) / .25); text-decoration: line-through }
ins { background: rgb(var(--good) / .25); text-decoration: underline }
mark { background: rgb(var(--blame) / .3); text-decoration: underline dotted }
.tokens .changed { border-bottom: 2px solid var(--ink) }
"""


def token_texts(tokenizer, ids):
    """The text of each token, for pictures: joined they are the response. Part of a character is "" until the last."""
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = decode_response(tokenizer, [*ids[:end], tokenizer.eos_token_id])
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(done):] if whole else "")
        done = text if whole else done
    return texts


def safe(text):
    """Any text as text: markup escaped, control characters made visible, half surrogates replaced"""
    return html.escape(plain(str(text))).encode("utf-8", "replace").decode()


def prompt(row):
    """The instruction; a long input folded away"""
    more = row.get("input") or ""
    folded = f"<details><summary>input, {len(more)} characters</summary><p class=text>{safe(more)}</p></details>"
    shown = f"<p class='text quiet'>{safe(more)}</p>" if more and len(more) < 300 else folded if more else ""
    return f"<p class=text><b>{safe(row.get('instruction', ''))}</b></p>{shown}"


def write_page(path, title, legend, sections, overwrite):
    """One page of sections (heading, its HTML); only a page of ours is ever replaced unasked"""
    if Path(path).suffix != ".html":
        fail(f"--html={path} must end in .html")
    old = Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else MARK
    if MARK not in old[:200] and not overwrite:
        fail(f"--html={path} is no page of show's; choose another, or replace it with --overwrite=true")
    body = "".join(f"<section><h2>{safe(heading)}</h2>{content}</section>\n" for heading, content in sections)
    with replacing(path) as file:
        file.write(f"""<!doctype html>
{MARK}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{safe(title)}</title><style>{STYLE}</style></head><body>
<h1>{safe(title)}</h1><p class=quiet>{legend}</p>
{body or "<p>Nothing to show.</p>"}</body></html>
""")
    say(f"{path}: {len(sections)} " + ("row" if len(sections) == 1 else "rows"))


def diff_page(path, data, pairs, overwrite=False):
    """pairs: (heading, row, segments of diff.segments)"""
    tags = {"-": "del", "+": "ins", "~": "mark"}

    def paint(kind, text):
        return f"<{tags[kind]}>{safe(text)}</{tags[kind]}>" if kind in tags else safe(text)
    gaps = any(kind == "~" for _, _, spans in pairs for kind, _ in spans)
    legend = ("<del>removed</del> <ins>added</ins>, the rest unchanged"
              + "; <mark>unchanged, but blamed for a gap</mark>" * gaps)
    sections = [(heading, f"{prompt(row)}<p class=text>{''.join(paint(*span) for span in spans)}</p>")
                for heading, row, spans in pairs]
    write_page(path, f"What the edits changed: {data}", legend, sections, overwrite)


def rewards_page(path, model, rows, overwrite=False):
    """rows: (row, answers), an answer being (title, R, texts of its tokens, r_t, changed: 0/1 each or None)"""
    def answer(title, R, texts, rewards, changed, scale):
        tokens = []
        for k, (text, r) in enumerate(zip(texts, rewards)):
            shown = safe(text).replace("\n", "↵\n")
            tone, strength = "good" if r > 0 else "bad", .75 * abs(r) / scale
            tokens.append(f'<span{" class=changed" if changed and changed[k] else ""} title="{r:+.3f}" '
                          f'style="background:rgb(var(--{tone}) / {strength:.2f})">{shown}</span>' * bool(shown))
        heading = f"<h3>{safe(title)} <span class=quiet>R = {R:+.3f}</span></h3>"
        return f"<div>{heading}<p class='text tokens'>{''.join(tokens)}</p></div>"
    sections = []
    for number, (row, answers) in enumerate(rows, 1):
        scale = max((abs(r) for _, _, _, rewards, _ in answers for r in rewards), default=0) or 1.0
        painted = "".join(answer(*one, scale) for one in answers)
        heading = f"{row.get('id') or number}  (deepest colour: {scale:.2f})"
        sections.append((heading, f"{prompt(row)}<div class=pair>{painted}</div>"))
    legend = ("<span style='background:rgb(var(--bad) / .6)'>bad</span> <span style='background:rgb(var(--good) / .6)'>"
              "good</span>, each row on its own scale; underlined: changed by the edit. Point at a token for its r.")
    write_page(path, f"What each token is worth to {model}", legend, sections, overwrite)
