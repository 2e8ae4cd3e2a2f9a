"""The tables of EXPERIMENTS.md, from the run folders of extras/study/study.sh alone.

    python extras/study/tables.py --data=out/study --out=EXPERIMENTS.md

It replaces the text between the two marks in EXPERIMENTS.md. It reads metrics.jsonl, run.json,
rewards.json and RUN.cpu.jsonl. The figures are means over seeds with their standard error; if there
is only one seed, its value and the error over its pairs.
"""
import json, sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from evaluate import mean_and_error
from extras.report.arms import pm
from plumbing.command_line import load_config
from plumbing.files import check_input, replacing
from plumbing.ranks import fail, say
from plumbing.record import logged, record_of

BEGIN = "<!-- tables: python extras/study/tables.py -->"
END = "<!-- end of the tables -->"
NAMES = {
    "sequence": "sequence level",
    "eq3": "Eq. 3",
    "eq4": "Eq. 4",
    "eq4_gaps": "Eq. 4, gaps",
    "anchor_003": "Eq. 4 + anchor 0.03",
    "anchor_003_gaps": "Eq. 4 + anchor 0.03, gaps",
    "anchor_01": "Eq. 4 + anchor 0.1",
    "anchor_01_gaps": "Eq. 4 + anchor 0.1, gaps",
    "anchor_03": "Eq. 4 + anchor 0.3",
    "anchor_03_gaps": "Eq. 4 + anchor 0.3, gaps",
    "anchor_1_gaps": "Eq. 4 + anchor 1, gaps",
    "anchor_1_gaps_all": "Eq. 4 + anchor 1, gaps",
    "anchor_10_gaps_all": "Eq. 4 + anchor 10, gaps",
}


@dataclass(frozen=True)
class Config:
    data: str = "out/study"
    out: str = "EXPERIMENTS.md"
    overwrite: bool = False


# ---------------------------------------------------------------- what the run folders say

def read_reward_model(folder):
    """What the tables need of one reward model's folder"""
    record = record_of(folder)
    cpu_s = 0.0
    for row in logged(Path(f"{folder}.cpu.jsonl")):
        if row["stage"] == "reward_model.py":
            cpu_s += row["cpu_s"]
    return dict(figures=json.loads((folder / "rewards.json").read_text()), config=record["config"],
                pairs=record["pairs"], metrics=logged(folder / "metrics.jsonl"), cpu_min=cpu_s / 60)


def runs_by_arm(folder):
    """arm -> its runs, one per seed: <folder>/seed*/<arm>/rewards.json"""
    found = {}
    for path in sorted(Path(folder).glob("seed*/*/rewards.json")):
        runs = found.setdefault(path.parent.name, [])
        runs.append(read_reward_model(path.parent))
    return found


# ---------------------------------------------------------------- cells

def cell_over_seeds(figures, name, digits):
    """A figure of each seed -> "mean ± standard error over seeds"; of one seed: its own error"""
    values = [figure[name] for figure in figures]
    if not values or None in values:
        return "-"
    if len(values) == 1:
        return pm(values[0], figures[0]["standard_error"], digits)
    return pm(*mean_and_error(values), digits)


def auroc_cell(runs, name):
    """The AUROC of a group of tokens ("removed", ...), as in evaluate.py rewards"""
    groups = [(run["figures"][0].get("tokens") or {}).get(name) for run in runs]
    if None in groups:
        return "-"
    return cell_over_seeds(groups, "auroc", 3)


def reward_cell(runs, name):
    """The mean r of a group of tokens and, where it is known, the standard deviation over tokens"""
    groups = [run["figures"][0]["tokens"][name] for run in runs]
    if any(group["mean"] is None for group in groups):
        return "-"
    mean = sum(group["mean"] for group in groups) / len(groups)
    if "sd" not in groups[0]:
        return f"{mean:+.2f}"
    sd = sum(group["sd"] for group in groups) / len(groups)
    return f"{mean:+.2f} (sd {sd:.2f})"


def cpu_cell(runs):
    minutes = sum(run["cpu_min"] for run in runs) / len(runs)
    return f"{minutes:.1f}"


def steps_of(run):
    return 1 + run["metrics"][-1]["step"]


def markdown_line(cells):
    escaped = [str(cell).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def markdown_table(header, rows):
    lines = [markdown_line(header), "|" + "---|" * len(header)]
    lines += [markdown_line(row) for row in rows]
    return "\n".join(lines)


# ---------------------------------------------------------------- the tables

def table_of_losses(title, folder, *, spans=False, alike=True):
    """One row per loss. spans: also the spans that people marked. alike: all runs have the same
    pairs and steps, named in the note; otherwise each row has columns for them"""
    arms = runs_by_arm(folder)
    if not arms:
        return ""

    header = ["loss"]
    if not alike:
        header += ["pairs", "steps", "lr (head: times)"]
    header += ["accuracy, %", "AUROC removed", "AUROC added"]
    if spans:
        header.append("AUROC marked spans")
    header += ["r on U_0", "r at EOS", "seeds", "CPU min"]

    rows = []
    for arm, name in NAMES.items():
        if arm not in arms:
            continue
        runs = arms[arm]
        config = runs[0]["config"]
        row = [name]
        if not alike:
            row += [runs[0]["pairs"], f"{steps_of(runs[0])} of {config['batch']}",
                    f"{config['lr']:g} ({config.get('head_lr_factor', 1.0):g})"]
        row.append(cell_over_seeds([run["figures"][0] for run in runs], "accuracy", 1))
        row += [auroc_cell(runs, "removed"), auroc_cell(runs, "added")]
        if spans:
            row.append(auroc_cell(runs, "error_spans"))
        row += [reward_cell(runs, "unchanged"), reward_cell(runs, "eos")]
        row += [len(runs), cpu_cell(runs)]
        rows.append(row)

    run = next(iter(arms.values()))[0]
    config = run["config"]
    tested = run["figures"][0]
    note = "Tested on "
    if alike:
        note = (f"{run['pairs']} pairs, {steps_of(run)} steps of {config['batch']}, "
                f"lr {config['lr']:g}; tested on ")
    note += (f"{tested['n']} others. CPU minutes: of the training. "
             f"Longer answer wins: {tested['longer_wins']:.1f}%.")
    return f"### {title}\n\n{markdown_table(header, rows)}\n\n{note}\n"


def table_of_baselines(folder):
    """What needs no reward model, from extras/study/baselines.py"""
    files = [logged(path)[0] for path in Path(folder).glob("baselines_*.jsonl")]
    if not files:
        return ""
    files.sort(key=lambda figures: figures["n_train"])
    largest = files[-1]

    def aurocs(figures, name):
        removed = figures[f"removed_{name}"]
        added = figures[f"added_{name}"]
        return [pm(removed["auroc"], removed["standard_error"], 3),
                pm(added["auroc"], added["standard_error"], 3)]

    def accuracy(name):
        return pm(largest[f"accuracy_{name}"], largest[f"accuracy_{name}_error"])

    header = ["without a reward model", "accuracy, %", "AUROC removed", "AUROC added"]
    rows = [["spacing and capitals alone", accuracy("surface"), *aurocs(largest, "surface")],
            ["the shorter one wins", accuracy("shorter"), "-", "-"],
            ["rare in the train file", "-", *aurocs(largest, "rare")]]
    for figures in files:
        name = f"a bag of tokens, {figures['n_train']} pairs counted"
        rows.append([name, "-", *aurocs(figures, "bag")])
    people = largest.get("removed_people")
    if people:
        name = ("what others took out of the same text, "
                f"{people['texts']} texts of the train file")
        rows.append([name, "-", f"{people['auroc']:.3f}", "-"])
    return markdown_table(header, rows) + "\n"


def two_by_two(folder):
    """Trained on original or edited pairs, tested on original or edited pairs"""
    header = ["trained on", "accuracy on original pairs, true labels, %", "on edited pairs, %",
              "seeds", "CPU min"]
    names = {"rm_original": "original pairs, a quarter mislabelled", "rm_edited": "edited pairs"}
    arms = runs_by_arm(folder)
    rows = []
    for arm, trained_on in names.items():
        if arm not in arms:
            continue
        runs = arms[arm]
        row = [trained_on]
        for kind in ("preferences", "edits"):
            figures = [f for run in runs for f in run["figures"] if f["kind"] == kind]
            row.append(cell_over_seeds(figures, "accuracy", 1))
        rows.append([*row, len(runs), cpu_cell(runs)])
    if not rows:
        return ""
    return markdown_table(header, rows) + "\n"


def main(cfg):
    check_input(cfg.data, "data", "bash extras/study/study.sh")
    text = f"# Experiments\n\n{BEGIN}\n{END}\n"
    if Path(cfg.out).exists():
        text = Path(cfg.out).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        fail(f"--out={cfg.out} has no place for the tables: it needs the lines {BEGIN} and {END}, "
             "once each")

    data = Path(cfg.data)
    tables = [
        table_of_losses("ParaDetox, single runs on more pairs", data / "long", alike=False),
        table_of_losses("ParaDetox, every loss on the same few pairs", data / "people"),
        table_of_baselines(data / "people"),
        table_of_losses("QA-Feedback, every loss on the same few pairs", data / "qa", spans=True)]
    toy = two_by_two(data / "toy")
    if toy:
        title = "### The toy world: trained on x tested on, both at sequence level"
        tables.append(f"{title}\n\n{toy}")
    tables = [table for table in tables if table]
    if not tables:
        fail(f"--data={cfg.data} has no finished run; make them with: bash extras/study/study.sh")

    before = text.split(BEGIN)[0]
    after = text.split(END)[1]
    with replacing(cfg.out) as file:
        file.write(f"{before}{BEGIN}\n\n" + "\n".join(tables) + f"\n{END}{after}")
    say(f"{cfg.out}: {len(tables)} tables")


if __name__ == "__main__":
    main(load_config(Config, "evaluate"))
