"""The arms of a report: the paper's name of each run, which runs are seeds of one arm, and how
figures and tables are written."""
if __name__ == "__main__":
    raise SystemExit("arms.py is a part of: python evaluate.py report")

import html, math, re
from pathlib import Path

from evaluate import mean_and_error
from extras.pages import safe
from plumbing.paint import plain

# The paper's names of its arms
TOKEN = "Fine-grained Token-level PPO"
GAMMA_0 = "Fine-grained Token-level PPO, gamma 0 (ours)"
FINE = "Fine-grained PPO"
RLHF = "PPO-RLHF"
SFT = "SFT"
RM_TOKEN = "RM w/ Fine-grained dataset, token level"
RM_FINE = "RM w/ Fine-grained dataset"
RM_RLHF = "RM w/o Fine-grained dataset"
ORDER = [TOKEN, GAMMA_0, FINE, RLHF, RM_TOKEN, RM_FINE, RM_RLHF]  # the order of rows

# Where demo.sh and paper.sh put each arm
FOLDERS = {TOKEN: "ppo_token", GAMMA_0: "ppo_gamma0", FINE: "ppo_fine", RLHF: "ppo_rlhf",
           SFT: "sft", RM_TOKEN: "rm_token", RM_FINE: "rm_edited", RM_RLHF: "rm_original"}

# The paper's figures, in percent
PAPER_WIN = {TOKEN: "51.6 ± 1.8", FINE: "51.2 ± 1.8", RLHF: "46.5 ± 1.8"}
PAPER_ACCURACY = {RM_FINE: "85.2 ± 1.8", RM_RLHF: "58.2 ± 1.8"}


# ---------------------------------------------------------------- arms

def sibling(run, field, runs):
    """The run of the same seed that a config field of this run names, or None"""
    name = Path(str(run["config"].get(field, ""))).name
    for other in runs:
        if other["seed"] == run["seed"] and other["name"] == name:
            return other
    return None


def label_of(run, runs):
    """The paper's name of a run, or the name of its folder if the paper has no such arm"""
    if run["kind"] == "reward model":
        return reward_model_label(run)
    if run["kind"] == "ppo":
        return ppo_label(run, sibling(run, "reward_model", runs))
    if run["kind"] == "sft":
        return SFT
    return run["name"]


def reward_model_label(run):
    """The name of a row of Table 2"""
    if run["config"]["loss"] in ("eq3", "eq4"):
        return RM_TOKEN
    return RM_FINE if learned_from_edits(run) else RM_RLHF


def ppo_label(run, reward_model):
    """The paper's name of an arm, Section 3.1. reward_model: the run of its reward model, None if
    that is not among the runs"""
    if run["config"].get("level") == "token":
        return GAMMA_0 if run["config"].get("gamma") == 0 else TOKEN
    if reward_model is None:  # then only the demo's names tell
        return {"ppo_fine": FINE, "ppo_rlhf": RLHF}.get(run["name"], run["name"])
    if reward_model["config"].get("loss") != "sequence":
        return run["name"]
    return FINE if learned_from_edits(reward_model) else RLHF


def learned_from_edits(reward_model):
    """True if the pairs were edits. The record says it; without that, a data file's name does"""
    data = reward_model["config"].get("data") or []  # older records have one path
    files = [data] if isinstance(data, str) else data
    return reward_model["record"].get("edits", any("diff" in Path(file).name for file in files))


def tell_apart(runs):
    """Runs with the same label in folders of different names are different arms, such as an
    ablation: their label gets the folder's name. The folder with the name of demo.sh keeps the
    paper's label alone, so that an arm next to it changes no other."""
    names = {}
    for run in runs:
        names.setdefault(run["label"], set()).add(run["name"])
    for run in runs:
        label = run["label"]
        if len(names[label]) > 1 and run["name"] != FOLDERS.get(label):
            run["label"] += f" ({run['name']})"


def paper_order(label):
    """The place of a label in the paper's order; labels that the paper does not have come last"""
    for place, known in enumerate(ORDER):
        if label == known or label.startswith(known + " ("):
            return place
    return len(ORDER)


def arms(runs, *kinds):
    """Runs of these kinds -> dict: label -> its runs, one per seed; labels in the paper's order"""
    found = {}
    in_order = sorted(runs, key=lambda run: (paper_order(run["label"]), run["label"]))
    for run in in_order:  # sorted() is stable, so seeds keep their order
        if run["kind"] in kinds:
            found.setdefault(run["label"], []).append(run)
    return found


def checkpoints(run, runs):
    """The judged models along a PPO run -> [(steps done, figures of win_rate)]: the policy it
    started from at 0, the models it kept, the last one"""
    start = sibling(run, "policy", runs)
    found = {0: None}
    if start is not None:
        found[0] = start["win_rates"][start["steps"]]
    found |= run["win_rates"]
    return [(step, figures) for step, figures in found.items() if figures]


# ---------------------------------------------------------------- cells

def pm(mean, error, digits=1, sign=""):
    """ "mean ± error"; the mean alone if there is no error; "-" if there is no mean. sign="+": a
    positive mean has its sign, too"""
    if mean is None:
        return "-"
    cell = f"{mean:{sign}.{digits}f}"
    if error is not None:
        cell += f" ± {error:.{digits}f}"
    return cell


def over_seeds(values, errors=(None,), sign=""):
    """One seed: its value and its own error. Several: their mean and its standard error"""
    return pm(*mean_over_seeds(values, errors), sign=sign)


def larger_error(over_seeds, errors):
    """What a difference has to exceed to be called one: the standard error over the seeds, or, if
    that is larger, the one over pairs that follows from the seeds' own errors. Two or three seeds
    can agree by chance. None if neither is known"""
    known = [error for error in errors if error is not None]
    over_pairs = math.hypot(*known) / len(known) if known else None
    return max((error for error in (over_seeds, over_pairs) if error is not None), default=None)


def mean_over_seeds(values, errors):
    """over_seeds() as numbers: (mean, error), each None where it is not known"""
    values = [value for value in values if value is not None]
    if len(values) == 1:
        return values[0], errors[0]
    return mean_and_error(values)


def figure_over_seeds(figures, name, sign=""):
    """over_seeds() of one entry of these figures, which also hold its standard_error"""
    if not figures:
        return "-"
    values = [f[name] for f in figures]
    return over_seeds(values, [f["standard_error"] for f in figures], sign)


def each(values, show="{:.1f}".format):
    """The value of every seed, "-" for None"""
    cells = ["-" if value is None else show(value) for value in values]
    return ", ".join(cells) or "-"


def duration(seconds):
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- a table as text, Markdown, HTML

def without_idle_columns(table, *may_be_empty):
    """A table without "Each seed" where there is one seed (it repeats the mean), and without those
    of the columns may_be_empty in which there is nothing"""
    title, header, rows, note = table
    kept = []
    for i, name in enumerate(header):
        cells = [row[i] for row in rows]
        is_repeat = name.startswith("Each seed") and not any("," in cell for cell in cells)
        is_empty = name in may_be_empty and all(cell in ("-", "") for cell in cells)
        if not is_repeat and not is_empty:
            kept.append(i)
    rows = [[row[i] for i in kept] for row in rows]
    return title, [header[i] for i in kept], rows, note


def number_columns(table):
    """For each column: does it hold numbers alone? They are aligned at the right"""
    _, header, rows, _ = table
    columns = [[str(row[i]) for row in rows] for i in range(len(header))]
    return [i > 0 and all(re.match(r"[-+−]?\d|-|$", cell) for cell in column)
            for i, column in enumerate(columns)]


def as_text(table):
    """table: (title, header, rows, note) -> text in columns"""
    title, header, rows, note = table
    numbers = number_columns(table)
    cells = [[one_line(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = []
        for cell, width, is_number in zip(row, widths, numbers):
            padded.append(cell.rjust(width) if is_number else cell.ljust(width))
        lines.append("  ".join(padded).rstrip())
    underline = "-" * len(lines[0])
    return "\n".join([title, "", lines[0], underline, *lines[1:], "", note])


def as_markdown(table):
    title, header, rows, note = table
    lines = [f"**{title}**", ""]
    lines.append(markdown_row(header))
    lines.append("|" + "".join("---:|" if number else "---|" for number in number_columns(table)))
    lines += map(markdown_row, rows)
    return "\n".join([*lines, "", note])


def markdown_row(cells):
    """One row. A cell with "|", a newline or markup cannot break the table"""
    escaped = [html.escape(one_line(cell), quote=False).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def one_line(cell):
    return plain(str(cell)).replace("\n", " ")


def as_html(table, small=False):
    title, header, rows, note = table
    numbers = number_columns(table)
    columns = [[str(row[i]) for row in rows] for i in range(len(header))]
    errors = [max((len(cell.partition(" ± ")[2]) for cell in column), default=0)
              for column in columns]
    head = "".join(html_cell("th", *cell) for cell in zip(header, numbers, errors))
    body = []
    for row in rows:
        cells = "".join(html_cell("td", *cell) for cell in zip(row, numbers, errors))
        body.append(f"<tr>{cells}</tr>")
    size = "small" if small else "plain"
    return (f"<figure><h3>{safe(title)}</h3><div class=wide><table class={size}>"
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
            f"<figcaption>{safe(note)}</figcaption></figure>")


def html_cell(tag, cell, is_number, width):
    """One cell. width: of the longest error in its column; all errors get it, so that the numbers
    before them stand below each other"""
    if not is_number:
        return f"<{tag}>{safe(cell)}</{tag}>"
    if tag == "th" or not width:
        return f"<{tag} class=number>{safe(cell)}</{tag}>"
    mean, mark, error = str(cell).partition(" ± ")
    style = f"width:calc({width}ch + 1.3em)"
    return (f"<{tag} class=number>{safe(mean)}<span class=error style='{style}'>"
            f"{safe((mark + error).strip())}</span></{tag}>")
