"""The arms of a report: what a run is called in the paper, which runs are seeds of one arm, and how
a figure and a table are written."""
import html
from pathlib import Path

from common import mean_and_error
from extras.pages import safe
from plumbing.paint import plain

TOKEN, FINE, RLHF, SFT = "Fine-grained Token-level PPO", "Fine-grained PPO", "PPO-RLHF", "SFT"
RM_TOKEN = "RM w/ Fine-grained dataset, token level"
RM_FINE, RM_RLHF = "RM w/ Fine-grained dataset", "RM w/o Fine-grained dataset"
PAPER_WIN = {TOKEN: "51.6 ± 1.8", FINE: "51.2 ± 1.8", RLHF: "46.5 ± 1.8"}
PAPER_ACCURACY = {RM_FINE: "85.2 ± 1.8", RM_RLHF: "58.2 ± 1.8"}
ORDER = [TOKEN, FINE, RLHF, RM_TOKEN, RM_FINE, RM_RLHF]  # the order of rows, and of colours


# ---------------------------------------------------------------- arms

def sibling(run, field, runs):
    """The run of the same seed that a config field of this run names, or None"""
    name = Path(str(run["config"].get(field, ""))).name
    return next((other for other in runs if other["seed"] == run["seed"] and other["name"] == name), None)


def label_of(run, runs):
    """The paper's name of a run"""
    def from_edits(rm):
        return rm["record"].get("edits", "diff" in Path(str(rm["config"].get("data", ""))).name)
    if run["kind"] == "reward model":
        return RM_TOKEN if run["config"]["loss"] in ("eq3", "eq4") else RM_FINE if from_edits(run) else RM_RLHF
    if run["kind"] == "ppo":
        rm = sibling(run, "reward_model", runs)
        if run["config"].get("level") == "token":
            return TOKEN
        if rm and rm["config"].get("loss") == "sequence":
            return FINE if from_edits(rm) else RLHF
        return run["name"] if rm else {"ppo_fine": FINE, "ppo_rlhf": RLHF}.get(run["name"], run["name"])
    return SFT if run["kind"] == "sft" else run["name"]


def rank(label):
    return next((i for i, known in enumerate(ORDER) if label == known or label.startswith(known + " (")), len(ORDER))


def arms(runs, *kinds):
    """label -> its runs, one per seed, in the paper's order"""
    found = {}
    for run in sorted(runs, key=lambda run: (rank(run["label"]), run["label"])):  # stable: seeds stay in their order
        if run["kind"] in kinds:
            found.setdefault(run["label"], []).append(run)
    return found


def checkpoints(run, runs):
    """[(steps done, figures of win_rate)]: the policy it began from, the models kept, the last"""
    start = sibling(run, "policy", runs)
    found = {0: start["along"][start["steps"]] if start else None} | run["along"]
    return [(step, figures) for step, figures in found.items() if figures]


# ---------------------------------------------------------------- cells

def pm(mean, error, digits=1):
    return "-" if mean is None else f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def over_seeds(values, errors=(None,)):
    """One seed: its value and error. Several: their mean, and the error that their spread tells"""
    values = [value for value in values if value is not None]
    return pm(values[0], errors[0]) if len(values) == 1 else pm(*mean_and_error(values))


def summed(figures, name):
    """over_seeds of one of the figures, with its standard_error; "-" where there are none"""
    return over_seeds([f[name] for f in figures], [f["standard_error"] for f in figures]) if figures else "-"


def each(values, show=lambda value: f"{value:.1f}"):
    return ", ".join("-" if value is None else show(value) for value in values) or "-"


def duration(seconds):
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- a table as text, Markdown, HTML

def as_text(table):
    title, header, rows, note = table
    cells = [[plain(str(cell)).replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:], "", note])


def as_markdown(table):
    title, header, rows, note = table
    def line(row):
        cells = (html.escape(plain(str(cell)), quote=False).replace("\n", " ").replace("|", "\\|") for cell in row)
        return f"| {' | '.join(cells)} |"
    return "\n".join([f"**{title}**", "", line(header), "|" + "---|" * len(header), *map(line, rows), "", note])


def as_html(table, small=False):
    title, header, rows, note = table
    head = "".join(f"<th>{safe(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (f"<figure><h3>{safe(title)}</h3><div class=wide><table class={'small' if small else 'plain'}>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div><figcaption>{safe(note)}</figcaption>"
            "</figure>")
