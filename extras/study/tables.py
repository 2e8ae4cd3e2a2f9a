"""The tables of EXPERIMENTS.md, from the run folders of extras/study/study.sh alone.

    python extras/study/tables.py --data=out/study --out=EXPERIMENTS.md

It replaces the text between the two marks in EXPERIMENTS.md.
Read are metrics.jsonl, run.json, rewards.json and RUN.cpu.jsonl. Means over seeds with their
standard error; where there is one seed, its value and the error over its pairs.
"""

import json, sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import mean_and_error
from extras.report.arms import pm
from plumbing.command_line import load_config
from plumbing.files import check_input, replacing
from plumbing.ranks import fail, say
from plumbing.record import logged, record_of

BEGIN, END = "<!-- tables: python extras/study/tables.py -->", "<!-- end of the tables -->"
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


def read_reward_model(folder):
    """What the tables need of one reward model's folder"""
    cpu, record = Path(f"{folder}.cpu.jsonl"), record_of(folder)
    return dict(
        figures=json.loads((folder / "rewards.json").read_text()),
        config=record["config"],
        pairs=record["pairs"],
        metrics=logged(folder / "metrics.jsonl"),
        cpu_min=sum(row["cpu_s"] for row in logged(cpu) if row["stage"] == "reward_model.py") / 60,
    )


def runs_of(folder):
    """arm -> its runs, one per seed: <folder>/seed*/<arm>/rewards.json"""
    found = {}
    for path in sorted(Path(folder).glob("seed*/*/rewards.json")):
        found.setdefault(path.parent.name, []).append(read_reward_model(path.parent))
    return found


def cell_over_seeds(values, errors, digits):
    """[value per seed] -> "mean ± its standard error over seeds"; one seed: its value and its own
    error"""
    if None in values or not values:
        return "-"
    return (
        pm(values[0], errors[0], digits)
        if len(values) == 1
        else pm(*mean_and_error(values), digits)
    )


def cell(runs, name, digits=3):
    """A group of token figures, as in evaluate.py rewards, over the runs of an arm"""
    groups = [(run["figures"][0].get("tokens") or {}).get(name) for run in runs]
    if None in groups:
        return "-"
    errors = [g["standard_error"] for g in groups]
    return cell_over_seeds([g["auroc"] for g in groups], errors, digits)


def spread(runs, name):
    """Mean r of a group, and for U_0 its standard deviation over tokens"""
    groups = [run["figures"][0]["tokens"][name] for run in runs]
    if any(g["mean"] is None for g in groups):
        return "-"
    mean = sum(g["mean"] for g in groups) / len(groups)
    return f"{mean:+.2f}" + (
        f" (sd {sum(g['sd'] for g in groups) / len(groups):.2f})" if "sd" in groups[0] else ""
    )


def table(header, rows):
    def line(cells):
        return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def losses(title, folder, *, spans=False, alike=True):
    """One row per loss; alike: all on the same pairs and steps"""
    arms = runs_of(folder)
    if not arms:
        return ""
    rows = []
    for arm in [arm for arm in NAMES if arm in arms]:
        runs = arms[arm]
        first = [run["figures"][0] for run in runs]
        setting = [
            runs[0]["pairs"],
            f"{1 + runs[0]['metrics'][-1]['step']} of {runs[0]['config']['batch']}",
            f"{runs[0]['config']['lr']:g} ({runs[0]['config'].get('head_lr_factor', 1.0):g})",
        ]
        accuracy = cell_over_seeds(
            [f["accuracy"] for f in first], [f["standard_error"] for f in first], 1
        )
        rows.append(
            [
                NAMES[arm],
                *([] if alike else setting),
                accuracy,
                cell(runs, "removed"),
                cell(runs, "added"),
                *([cell(runs, "error_spans")] if spans else []),
                spread(runs, "unchanged"),
                spread(runs, "eos"),
                len(runs),
                f"{sum(run['cpu_min'] for run in runs) / len(runs):.1f}",
            ]
        )
    run = next(iter(arms.values()))[0]
    of, steps = run["figures"][0], 1 + run["metrics"][-1]["step"]
    config = run["config"]
    same = (f"{run['pairs']} pairs, {steps} steps of {config['batch']}, lr {config['lr']:g}; "
            "tested on ")
    note = (
        f"{same if alike else 'Tested on '}{of['n']} others. CPU minutes: of the training. "
        f"Longer answer wins: {of['longer_wins']:.1f}%."
    )
    header = [
        "loss",
        *([] if alike else ["pairs", "steps", "lr (head: times)"]),
        "accuracy, %",
        "AUROC removed",
        "AUROC added",
        *(["AUROC marked spans"] if spans else []),
        "r on U_0",
        "r at EOS",
        "seeds",
        "CPU min",
    ]
    return f"### {title}\n\n{table(header, rows)}\n\n{note}\n"


def baselines(folder):
    """What needs no reward model, from extras/study/baselines.py"""
    found = sorted(
        (logged(path)[0] for path in Path(folder).glob("baselines_*.jsonl")),
        key=lambda f: f["n_train"],
    )
    if not found:
        return ""

    def aurocs(f, name):
        groups = [f[f"{side}_{name}"] for side in ("removed", "added")]
        return [pm(group["auroc"], group["standard_error"], 3) for group in groups]

    def accuracy(name):
        return pm(found[-1][f"accuracy_{name}"], found[-1][f"accuracy_{name}_error"])

    rows = [
        ["spacing and capitals alone", accuracy("surface"), *aurocs(found[-1], "surface")],
        ["the shorter one wins", accuracy("shorter"), "-", "-"],
        ["rare in the train file", "-", *aurocs(found[-1], "rare")],
    ]
    rows += [
        [f"a bag of tokens, {f['n_train']} pairs counted", "-", *aurocs(f, "bag")] for f in found
    ]
    people = found[-1].get("removed_people")
    if people:
        rows.append(
            [
                f"what others took out of the same text, {people['texts']} texts of the train file",
                "-",
                f"{people['auroc']:.3f}",
                "-",
            ]
        )
    return (
        table(["without a reward model", "accuracy, %", "AUROC removed", "AUROC added"], rows)
        + "\n"
    )


def two_by_two(folder):
    """Trained on original or edited pairs, tested on original or edited pairs"""
    rows = []
    for name, trained in (
        ("rm_original", "original pairs, a quarter mislabelled"),
        ("rm_edited", "edited pairs"),
    ):
        runs = [
            read_reward_model(path.parent)
            for path in sorted(Path(folder).glob(f"seed*/{name}/rewards.json"))
        ]
        if runs:
            cells = []
            for kind in ("preferences", "edits"):
                found = [f for run in runs for f in run["figures"] if f["kind"] == kind]
                cells.append(
                    cell_over_seeds(
                        [f["accuracy"] for f in found], [f["standard_error"] for f in found], 1
                    )
                )
            rows.append(
                [
                    trained,
                    *cells,
                    len(runs),
                    f"{sum(run['cpu_min'] for run in runs) / len(runs):.1f}",
                ]
            )
    header = [
        "trained on",
        "accuracy on original pairs, true labels, %",
        "on edited pairs, %",
        "seeds",
        "CPU min",
    ]
    return table(header, rows) + "\n" if rows else ""


def main(cfg):
    check_input(cfg.data, "data", "bash extras/study.sh")
    text = (
        Path(cfg.out).read_text(encoding="utf-8")
        if Path(cfg.out).exists()
        else f"# Experiments\n\n{BEGIN}\n{END}\n"
    )
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        fail(f"--out={cfg.out} has no place for the tables: it needs the lines {BEGIN} and {END}, "
             "once")
    data = Path(cfg.data)
    parts = [
        losses("ParaDetox, single runs on more pairs", data / "long", alike=False),
        losses("ParaDetox, every loss on the same few pairs", data / "people"),
        baselines(data / "people"),
        losses("QA-Feedback, every loss on the same few pairs", data / "qa", spans=True),
    ]
    toy = two_by_two(data / "toy")
    parts.append(
        f"### The embedded world: trained on x tested on, both at sequence level\n\n{toy}"
        if toy
        else ""
    )
    if not any(parts):
        fail(f"--data={cfg.data} holds no finished run; make them with: bash extras/study.sh")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    with replacing(cfg.out) as file:
        file.write(
            f"{before}{BEGIN}\n\n" + "\n".join(part for part in parts if part) + f"\n{END}{after}"
        )
    say(f"{cfg.out}: {sum(bool(part) for part in parts)} tables")


if __name__ == "__main__":
    main(load_config(Config, "evaluate"))
