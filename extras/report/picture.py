"""One answer three times as an SVG file: plain, edited, painted by r_t. reward_model.py show --svg

The colours are the light ones of style.css on a ground of their own, so the file can be put
anywhere. It has no script and no font. Text that a model or a person wrote goes through safe()."""
if __name__ == "__main__":
    raise SystemExit("picture.py is a part of: python reward_model.py show --svg")

import textwrap

from extras.pages import safe
from extras.report.painted import with_end
from extras.report.plots import light
from extras.report.show_diffs import segments

MARK = "<!-- a picture of reward_model.py show -->"

# In pixels
PANEL = 262    # the width of one of the three answers
GAP = 28       # between two of them
EDGE = 20      # around everything
LINE = 20      # from one line to the next
LETTER = 7.8   # the width of a letter, which textLength makes true in any font
SMALL = 5.8    # and of a digit of a reward


def picture(row, original, edited):
    """row: of edits.jsonl; original, edited: the answers of show_rewards.score_answers() -> SVG"""
    scale = max(map(abs, original["rewards"]), default=0) or 1.0
    panels = [("An answer", [(row["original"], "")]),
              ("Minimally edited", edited_pieces(original, edited)),
              ("Its tokens by reward r_t", painted_pieces(original, scale))]

    # The instruction above the three answers, a legend below them
    width = 3 * PANEL + 2 * GAP
    parts = []
    y = 0
    for line in textwrap.wrap(row["instruction"], 95):
        y += LINE
        parts.append(words(0, y, line, "--ink", weight=600))
    top = y + 2 * LINE
    bottom = top
    for number, (title, pieces) in enumerate(panels):
        left = number * (PANEL + GAP)
        parts.append(words(left, top, title, "--quiet", size=12))
        drawn, end = flow(pieces, left, top + 1.3 * LINE)
        parts += drawn
        bottom = max(bottom, end)
    for number in (1, 2):
        x = number * (PANEL + GAP) - GAP / 2
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 12}" y2="{bottom:.1f}" '
                     'style="stroke:var(--grid)"/>')
    bottom += 1.6 * LINE
    parts.append(words(0, bottom, "Middle: what the annotator strikes out and adds. Right: red is "
                       "bad, blue is good, deeper is stronger; the strongest have their number.",
                       "--quiet", size=11.5))

    height = bottom + 2 * EDGE
    title = safe(f"{row['instruction']} An answer, the same with minimal edits, and its tokens "
                 "coloured by their reward")
    return light(f'{MARK}\n<svg xmlns="http://www.w3.org/2000/svg" width="{width + 2 * EDGE}" '
                 f'height="{height:.0f}" viewBox="{-EDGE} {-EDGE} {width + 2 * EDGE} {height:.0f}" '
                 f'role="img" aria-label="{title}" font-family="system-ui, Helvetica, Arial, '
                 f'sans-serif"><title>{title}</title><rect x="{-EDGE}" y="{-EDGE}" width="100%" '
                 'height="100%" rx="6" style="fill:var(--page);stroke:var(--grid)"/>'
                 f'{"".join(parts)}</svg>\n')


def edited_pieces(original, edited):
    """Both answers as one text -> pieces of flow(): what was removed, what was added"""
    spans = segments(original["tokens"], original["changed"], edited["tokens"], edited["changed"])
    style = {"-": "fill:rgb(var(--bad));fill-opacity:.25", "+": "fill:rgb(var(--good));"
             "fill-opacity:.25"}
    return [(text, style.get(kind, ""), kind) for kind, text in spans]


def painted_pieces(answer, scale):
    """The tokens of an answer -> pieces of flow(): each with its colour, the strongest with their
    number. scale: the |r_t| of the deepest colour; it goes with the square root, as on the pages"""
    pieces = []
    for text, r in zip(with_end(answer["tokens"]), answer["rewards"]):
        tone = "--good" if r > 0 else "--bad"
        depth = 0.75 * min(1.0, abs(r) / scale) ** 0.5
        number = f"{r:+.1f}" if abs(r) > scale / 2 else ""
        shown = text.replace("\n", "↵\n")
        pieces.append((shown, f"fill:rgb(var({tone}));fill-opacity:{depth:.2f}", "", number))
    return pieces


def flow(pieces, left, y):
    """Lay pieces out in a panel, at spaces where a line is too long -> their SVG, the y of the last
    line. A piece: text, the style of its ground ("": none), then "-" to strike it out, a number"""
    parts = []
    x = left
    for text, style, *more in pieces:
        kind, number = [*more, "", ""][:2]
        for k, line in enumerate(text.split("\n")):
            if k > 0:
                x = left
                y += LINE
            for word in line.replace(" ", " \0").split("\0"):
                if x > left and x + LETTER * len(word.rstrip()) > left + PANEL:
                    x = left
                    y += LINE
                if word:
                    parts.append(painted_word(x, y, word, style, kind == "-"))
                    x += LETTER * len(word)
            if number and k == 0:
                parts.append(words(x + 2, y - 2, number, "--ink", size=9.5, letter=SMALL))
                x += SMALL * len(number) + 4
    return parts, y


def painted_word(x, y, word, style, is_struck):
    """A word of an answer on its ground"""
    width = LETTER * len(word)
    ground = ""
    if style:
        ground = (f'<rect x="{x:.1f}" y="{y - 14:.1f}" width="{width:.1f}" height="18" rx="2" '
                  f'style="{style}"/>')
    strike = ""
    if is_struck:
        strike = (f'<line x1="{x:.1f}" x2="{x + width:.1f}" y1="{y - 4.5:.1f}" y2="{y - 4.5:.1f}" '
                  'style="stroke:var(--ink)"/>')
    return ground + words(x, y, word, "--ink", letter=LETTER) + strike


def words(x, y, text, colour, *, size=13, weight=400, letter=None):
    """Text; with a width per letter it is monospaced, and so wide in any font"""
    more = ""
    if letter:
        more = (f' textLength="{letter * len(text):.1f}" lengthAdjust="spacingAndGlyphs" '
                'font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"')
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
            f'xml:space="preserve"{more} style="fill:var({colour})">{safe(text)}</text>')
