"""The report's plots as SVG, on the page and as files.

On the page a colour is a variable of style.css, so the plots are light and dark like the page. In a
file it is the light colour itself: such a file can be put anywhere. Text that a model or a person
wrote goes through safe()."""
if __name__ == "__main__":
    raise SystemExit("plots.py is a part of: python evaluate.py report")

import math, re, statistics, textwrap

from extras.pages import STYLE, safe
from extras.report.arms import FINE, GAMMA_0, RLHF, RM_FINE, RM_RLHF, RM_TOKEN, TOKEN

MARK = "<!-- the report of evaluate.py -->"
COLOURS = {TOKEN: 0, FINE: 1, RLHF: 2, GAMMA_0: 3, RM_TOKEN: 0, RM_FINE: 1, RM_RLHF: 2}
SHORT = {TOKEN: "token level", GAMMA_0: "gamma 0", FINE: "fine-grained", RLHF: "RLHF"}


# ---------------------------------------------------------------- colours

def colours(labels):
    """label -> its colour, the same in every figure. style.css sets the variables --c0 .. --c7 for
    light and dark: 0 to 2 are the paper's arms, 3 is ours at gamma 0, 4 to 7 all others"""
    others = [label for label in labels if label not in COLOURS]
    numbers = {}
    for label in labels:
        if label in COLOURS:
            numbers[label] = COLOURS[label]
        else:
            numbers[label] = 4 + others.index(label) % 4
    return {label: f"var(--c{number})" for label, number in numbers.items()}


def light(svg):
    """The variables of style.css, replaced by the light colours"""
    values = {}
    for name, value in re.findall(r"(--[\w-]+): (#\w+|\d+ \d+ \d+)", STYLE.split("@media")[0]):
        values[name] = value.replace(" ", ",")
    return re.sub(r"var\((--[\w-]+)\)", lambda found: values.get(found[1], found[0]), svg)


def legend(groups):
    keys = []
    for label, colour in colours(groups).items():
        keys.append(f'<span><i style="background:{colour}"></i>{safe(label)}</span>')
    return f"<p class=legend>{''.join(keys)}</p>"


# ---------------------------------------------------------------- numbers

def ticks(low, high, count=4):
    """Round numbers that cover low..high, in at most about count steps"""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    for factor in (1, 2, 2.5, 5, 10):
        if span / (factor * step) <= count:
            step *= factor
            break
    first = math.floor(low / step + 1e-9) * step
    steps = math.ceil((high - first) / step - 1e-9)
    return [first + i * step for i in range(steps + 1)]


def short(x):
    return f"{x:.6g}" if abs(x) < 1e4 else f"{x:.3g}"


def mean_of_5(ys):
    """Each number -> the mean of it and of up to two on either side"""
    return [statistics.fmean(ys[max(0, i - 2):i + 3]) for i in range(len(ys))]


def apart(ys, gap):
    """Heights -> the same, those closer than the gap moved apart, as little as it takes"""
    order = sorted(range(len(ys)), key=lambda i: ys[i])
    ys = list(ys)
    for _ in range(100):
        for above, below in zip(order, order[1:]):
            lack = gap - (ys[below] - ys[above])
            if lack > 0:
                ys[above] -= lack / 2
                ys[below] += lack / 2
    return ys


# ---------------------------------------------------------------- the plot

class Plot:
    """Axes and what is drawn on them: data coordinates in, SVG out"""

    left = 46  # margins in pixels
    top = 26
    bottom = 42

    def __init__(self, title, xlabel, ylabel, xs, ys, *, width=500, height=250, right=14, keys=()):
        """xs, ys: all values that the axes have to cover; width, height, right (a margin): in
        pixels; keys: (label, colour) for the legend of the file"""
        self.title = title
        self.xlabel = xlabel
        self.ylabel = ylabel
        self.width = width
        self.height = height
        self.right = right
        self.keys = list(keys)
        self.x_ticks = ticks(min(xs), max(xs), 5)
        self.y_ticks = ticks(min(ys), max(ys))
        self.x_range = min(xs), max(xs)
        self.y_range = self.y_ticks[0], self.y_ticks[-1]
        self.parts = []

    def at(self, x, y):
        """Data coordinates -> pixels, from the upper left corner"""
        x0, x1 = self.x_range
        y0, y1 = self.y_range
        across = (x - x0) / ((x1 - x0) or 1)
        down = (y1 - y) / ((y1 - y0) or 1)
        cx = self.left + across * (self.width - self.left - self.right)
        cy = self.top + down * (self.height - self.top - self.bottom)
        return cx, cy

    def coordinates(self, xs, ys):
        pairs = [self.at(x, y) for x, y in zip(xs, ys)]
        return " ".join(f"{cx:.1f},{cy:.1f}" for cx, cy in pairs)

    def line(self, xs, ys, colour, *, width=2, opacity=1, dashed=False):
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<polyline points="{self.coordinates(xs, ys)}" fill="none" '
                          f'stroke-width="{width}" stroke-linejoin="round" opacity="{opacity}"'
                          f'{dashes} style="stroke:{colour}"/>')

    def band(self, xs, low, high, colour):
        outline = self.coordinates([*xs, *xs[::-1]], [*low, *high[::-1]])
        self.parts.append(f'<polygon points="{outline}" opacity="0.16" style="fill:{colour}"/>')

    def dot(self, x, y, colour, size=3.4, hollow=False, note=""):
        cx, cy = self.at(x, y)
        fill = "var(--page)" if hollow else colour
        self.parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{size}" stroke-width="1.8" '
                          f'style="stroke:{colour};fill:{fill}"><title>{safe(note)}</title>'
                          '</circle>')

    def rule(self, y):
        """A dotted line across, behind everything else"""
        self.parts.insert(0, self.across(y, "stroke:var(--rule)", ' stroke-dasharray="2 3"'))

    def across(self, y, style, dashes=""):
        cy = self.at(self.x_range[0], y)[1]
        return (f'<line x1="{self.left}" x2="{self.width - self.right}" y1="{cy:.1f}" '
                f'y2="{cy:.1f}" style="{style}"{dashes}/>')

    def name_ends(self, ends):
        """Names at the right end of lines. ends: (name, y, colour). Names move a little where they
        would touch; if that is not enough, there are none, and the legend has to do"""
        heights = [self.at(0, y)[1] for _, y, _ in ends]
        places = apart(heights, 16)
        if any(abs(place - height) > 20 for place, height in zip(places, heights)):
            return
        x = self.width - self.right + 7
        for (name, _, colour), place in zip(ends, places):
            self.parts.append(text(x, place + 4, name, colour=colour))

    def axes(self):
        """Horizontal lines with the numbers of the y axis, and the ticks of the x axis"""
        parts = []
        for y in self.y_ticks:
            cy = self.at(self.x_range[0], y)[1]
            parts.append(self.across(y, "stroke:var(--grid)"))
            parts.append(text(self.left - 7, cy + 4, short(y), "end"))
        first, last = self.x_range
        for x in self.x_ticks:
            if first - 1e-9 <= x <= last + 1e-9:
                cx, cy = self.at(x, self.y_range[0])
                parts.append(f'<line x1="{cx:.1f}" x2="{cx:.1f}" y1="{cy:.1f}" y2="{cy + 4:.1f}" '
                             'style="stroke:var(--rule)"/>')
                parts.append(text(cx, cy + 5, short(x), "middle", below=True))
        middle = (self.left + self.width - self.right) / 2
        parts.append(text(middle, self.height - 4, self.xlabel, "middle"))
        parts.append(text(0, 11, self.ylabel))
        return "".join(parts)

    def html(self, below=""):
        """The plot on the page, its title above it. below: HTML"""
        return (f'<div class=plot><h4>{safe(self.title)}</h4><svg viewBox="0 0 {self.width} '
                f'{self.height}" style="--width:{self.width}" role="img" '
                f'aria-label="{safe(self.title)}">{self.axes()}{"".join(self.parts)}</svg>'
                f"{below}</div>")

    def file(self):
        """The plot as a file of its own, with its title and legend above it"""
        head = []
        y = 0
        for line in textwrap.wrap(self.title, self.width // 8):
            y += 17
            head.append(text(0, y, line, colour="var(--ink)", bold=True))
        y += 4
        for label, colour in self.keys:
            y += 16
            head.append(f'<line x1="0" x2="18" y1="{y - 4}" y2="{y - 4}" stroke-width="3" '
                        f'style="stroke:{colour}"/>')
            head.append(text(25, y, label))
        y += 12
        height = self.height + y
        return light(f'{MARK}\n<svg xmlns="http://www.w3.org/2000/svg" width="{self.width + 24}" '
                     f'height="{height + 24}" viewBox="-12 -12 {self.width + 24} {height + 24}" '
                     'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="11.5">'
                     '<rect x="-12" y="-12" width="100%" height="100%" style="fill:var(--page)"/>'
                     f'{"".join(head)}<g transform="translate(0 {y})">{self.axes()}'
                     f'{"".join(self.parts)}</g></svg>\n')


def text(x, y, words, anchor="start", *, colour="var(--quiet)", bold=False, below=False):
    """Words in a plot. Their baseline is at y, or, below: one line under it"""
    drop = ' dy="1em"' if below else ""
    weight = ' font-weight="600" font-size="13"' if bold else ""
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{drop}{weight} '
            f'style="fill:{colour}">{safe(words)}</text>')
