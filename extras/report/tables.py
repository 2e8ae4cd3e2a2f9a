"""`python evaluate.py report`: the paper's three tables with ours beside them, and a page of figures, from run folders.

What it reads, and nothing else; what is not there is shown as missing ("-"), never guessed:

    <folder>/<run>/run.json, metrics.jsonl, samples.jsonl    of sft.py, reward_model.py, ppo.py
    <folder>/<run>/annotations.jsonl                         evaluate.py judge: the run's model, for Table 1
    <folder>/<run>[/step_N]/val_annotations.jsonl            the same on other questions, for those kept along training
    <folder>/<ppo>/step_N/annotations.jsonl                  ... in their place where there are none
    <folder>/<reward model>/rewards.json                     evaluate.py rewards --out=...
    <folder>/bag_of_tokens.json                              {"accuracy": ...}: a reward that reads no prompt

Runs of the same name in different folders are seeds of one arm. What an arm is called in the paper follows from its
run.json: the level of PPO, and whether its reward model learnt from edits (diffs) or from preferences. The page is made
in page.py.
"""
import json
import re
import statistics
from pathlib import Path

from evaluate import paired, read_annotations, win_rate
from extras.pages import is_ours
from extras.report.arms import (FINE, PAPER_ACCURACY, PAPER_WIN, RLHF, RM_RLHF, RM_TOKEN, TOKEN,
                                arms, as_markdown, as_text, checkpoints, duration, each,
                                label_of, over_seeds, pm, rank, summed)
from extras.report.page import MARK, page
from plumbing.files import check_input, replacing, whole_characters
from plumbing.ranks import fail, say
from plumbing.record import logged, record_of


# ---------------------------------------------------------------- runs

def read_runs(folders):
    """The runs in and below the folders -> list of dict: path, name, seed (the folder that holds it), kind, label..."""
    found = {}
    for folder in map(Path, folders):
        below = sorted(path for path in (*folder.glob("*/"), *folder.glob("*/*/"))
                       if not re.match(r"(step|checkpoint)_|.*\.tmp$", path.name))
        for path in [folder, *below]:
            if any((path / name).exists() for name in ("run.json", "annotations.jsonl", "rewards.json")):
                found.setdefault(path.resolve(), path)
    runs = [read_run(path) for path in found.values()]
    for run in runs:
        run["label"] = label_of(run, runs)
    named = {(run["label"], run["name"]) for run in runs}
    for run in runs:  # two arms of one kind, an ablation: tell them apart by their folders
        if len({name for label, name in named if label == run["label"]}) > 1:
            run["label"] += f" ({run['name']})"
    return runs


def read_run(path):
    record, config = record_of(path), record_of(path).get("config", {})
    kind = "ppo" if "policy" in config else "reward model" if "loss" in config else "sft" if "lr" in config else "other"
    try:
        rewards = json.loads((path / "rewards.json").read_text()) if (path / "rewards.json").exists() else []
    except ValueError as error:
        fail(f"{path / 'rewards.json'}: not JSON ({error}); make it again: python evaluate.py rewards")
    metrics = [row for row in logged(path / "metrics.jsonl") if isinstance(row.get("step"), int)]
    kept = {int(folder.name[5:]): folder for folder in path.glob("step_*") if folder.name[5:].isdigit()}
    steps = 1 + max((row["step"] for row in metrics), default=-1)
    along = "val_annotations.jsonl" if (path / "val_annotations.jsonl").exists() else "annotations.jsonl"
    kept = {step: kept[step] for step in sorted(kept)} | {steps: path}
    answers = record_of(path / "annotations.jsonl").get("config", {}).get("outputs", "")
    model = record_of(path / Path(answers).name).get("config", {}).get("model", "") if answers else ""
    judged = re.fullmatch(r"step_(\d+)", Path(model).name)  # chosen among those kept; else the last
    return dict(path=path, name=path.name, seed=str(path.parent), kind=kind, record=record, config=config,
                metrics=metrics, steps=steps, samples=logged(path / "samples.jsonl"), rewards=rewards,
                annotations=annotations_of(path / "annotations.jsonl"), judged_at=int(judged[1]) if judged else steps,
                along={step: rate(annotations_of(folder / along)) for step, folder in kept.items()})


def annotations_of(path):
    return read_annotations(path) if path.exists() else None


def rate(annotations):
    figures = win_rate(row["preference"] for row in annotations or [])
    return figures if figures["n_total"] else None


def seconds_until(run, steps):
    """Training time of the first steps; where not every step was logged, at the mean of those that were"""
    times = [row["seconds"] for row in run["metrics"] if row["step"] < steps and "seconds" in row]
    return statistics.fmean(times) * steps if times else None


# ---------------------------------------------------------------- tables: title, header, rows, note

SEEDS = "± is the standard error: over pairs where there is one seed, over seeds where there are several."


def table_1(runs):
    rows, groups = [], {label: [] for label in PAPER_WIN} | arms(runs, "ppo") | arms(runs, "sft", "other")
    judged = [run["annotations"][0] for run in runs if run["annotations"]]
    references, judges = (" and ".join(sorted({str(row.get(name, "?")) for row in judged})) or "-"
                          for name in ("generator_1", "annotator"))
    for label in sorted(groups, key=rank):
        if label == RLHF:  # where the paper has it
            rows.append([f"the reference: Davinci003; ours: {references}", "50.0", "50.0", "", "", ""])
        figures = [rate(run["annotations"]) for run in groups[label]]
        known = [f for f in figures if f]
        steps = each([run["annotations"] and run["judged_at"] for run in groups[label] if run["kind"] == "ppo"], str)
        if known or label in PAPER_WIN:
            pairs = str(sum(f["n_total"] for f in known) or "-")
            rows.append([label, PAPER_WIN.get(label, "-"), summed(known, "win_rate"),
                         each([f and f["win_rate"] for f in figures]), steps, pairs])
    unparsed = sum(row["preference"] is None for run in runs for row in run["annotations"] or [])
    header = ["Model", "Paper", "Ours", "Each seed", "PPO steps", "Pairs"]
    return ("Table 1. Win rate against the reference (%)", header, rows, f"Judge: Claude in the paper, here {judges}. "
            f"{unparsed} pairs without a readable verdict are not counted. {SEEDS}")


def table_paired(runs, seed):
    groups, rows = arms(runs, "ppo"), []
    for a, b, paper in ((TOKEN, RLHF, "+5.1"), (FINE, RLHF, "+4.7"), (TOKEN, FINE, "+0.4")):
        found = []
        for run in groups.get(a, []):
            other = next((r for r in groups.get(b, []) if r["seed"] == run["seed"]), None)
            mine, theirs = run["annotations"], other and other["annotations"]
            if mine and theirs and [row["output_1"] for row in mine] == [row["output_1"] for row in theirs]:
                found.append(paired(*([row["preference"] for row in rows] for rows in (mine, theirs)), seed=seed))
        one = found[0] if len(found) == 1 else {}
        rows.append([f"{a} − {b}", paper, summed(found, "difference"),
                     each([f["difference"] for f in found], "{:+.1f}".format),
                     f"{one['low']:+.1f} to {one['high']:+.1f}" if one.get("low") is not None else "-"])
    header = ["", "Paper", "Ours", "Each seed", "95% (one seed)"]
    return ("Differences in win rate (points), on the same questions", header, rows, "The paper's are differences of "
            "its Table 1, with no error given. Ours are paired: both models answered the same questions. " + SEEDS)


def table_2(runs, folders):
    def of(runs, kind):
        return [f for run in runs for f in [f for f in run["rewards"] if f.get("kind") == kind][:1]]
    rows, groups = [], arms(runs, "reward model")
    for label in sorted({*groups, *PAPER_ACCURACY}, key=lambda label: (rank(label), label)):
        originals, edits = (of(groups.get(label, []), kind) for kind in ("preferences", "edits"))
        rows.append([label, PAPER_ACCURACY.get(label, "-"), summed(originals, "accuracy"), summed(edits, "accuracy"),
                     each([f["accuracy"] for f in originals])])
    originals, edits = of(runs, "preferences"), of(runs, "edits")
    if originals or edits:
        longer = (f"{found[0]['longer_wins']:.1f}" if found else "-" for found in (originals, edits))
        rows.append(["the longer answer wins", "-", *longer, "-"])
        rows.append(["always the edited one", "-", "-", "100.0" if edits else "-", "-"])
    places = sorted({run["path"].parent for run in runs} | set(map(Path, folders)))
    bags = [json.loads(file.read_text()) for place in places if (file := place / "bag_of_tokens.json").exists()]
    if bags:
        shares = [100 * bag["accuracy"] for bag in bags]
        errors = [100 * bag["standard_error"] if bag.get("standard_error") else None for bag in bags]
        rows.append(["a bag of tokens, without the prompt", "-", over_seeds(shares, errors), "-", each(shares)])
    header = ["Model", "Paper", "Original pairs", "Edited pairs", "Each seed, original"]
    return ("Table 2. Accuracy of the reward model (%)", header, rows, "The paper's figure is on its evaluation set; "
            "ours, on held-out pairs of the original kind, is the one to compare. On edited pairs the order alone "
            "gives 100%. " + SEEDS)


def table_3(runs, target=None):
    def best(run):  # -> its highest win rate, and the first step that has it
        along = [(figures["win_rate"], -step) for step, figures in checkpoints(run, runs) if step]
        return (max(along)[0], -max(along)[1]) if along else (None, None)

    def reached(run, score):
        return next((step for step, f in checkpoints(run, runs) if step and f["win_rate"] >= score), None)

    def row(name, step, paper, found):  # found: (run, steps or None) of each seed
        known = [(run, steps) for run, steps in found if steps]
        times = [seconds_until(run, steps) for run, steps in known]
        mean = statistics.fmean(times) if times and None not in times else None
        missed = f" ({len(found) - len(known)} of {len(found)} never)" if len(known) < len(found) else ""
        return [name, step, paper, each([steps for _, steps in found], str) + missed, duration(mean),
                "-" if mean is None else f"{mean / 3600:.3f}"]

    rms, ppos = arms(runs, "reward model"), arms(runs, "ppo")
    rows = [row(name, "RM", paper, [(run, run["steps"]) for run in rms.get(label, [])])
            for name, label, paper in (("RLHF", RM_RLHF, "0.2"), ("Fine-grained RLHF", RM_TOKEN, "0.3"))]
    for label in {RLHF: 0, TOKEN: 0, FINE: 0} | ppos:
        found = [(run, best(run)[1]) for run in ppos.get(label, [])]
        rows.append(row(f"{label}, to its own best", "PPO", {RLHF: "4", TOKEN: "2"}.get(label, "-"), found))
    for label, other in ((TOKEN, RLHF), (TOKEN, FINE), (FINE, RLHF)):
        scores = {run["seed"]: best(run)[0] for run in ppos.get(other, [])}
        found = [(run, reached(run, scores[run["seed"]])) for run in ppos.get(label, []) if scores.get(run["seed"])]
        rows.append(row(f"{label}, to the best of {other}", "PPO", "-", found))
    for label in ppos if target is not None else []:
        rows.append(row(f"{label}, to {target:g}%", "PPO", "-", [(run, reached(run, target)) for run in ppos[label]]))
    header = ["Model", "Step", "Paper, h", "Our steps, each seed", "Our time", "h"]
    return ("Table 3. Training efficiency", header, rows,
            "Best: the highest win rate of the models that were kept along training (the judge's own noise included), "
            "so steps are known to the nearest kept model. Time: training alone, mean of the seeds, on the hardware "
            "named below.")


def table_rewards(runs):
    def figure(f, name, digits):
        group = (f.get("tokens") or {}).get(name) or {}
        return pm(group.get("auroc", group.get("mean")), group.get("standard_error", group.get("sd")), digits)
    rows = [[f"{Path(run['seed']).name}/{run['name']}", Path(str(f.get("data", "?"))).name, str(f.get("n", "-")),
             pm(f.get("accuracy"), f.get("standard_error")), pm((f.get("calibration") or {}).get("ece"), None, 3),
             *(figure(f, name, 3) for name in ("removed", "added", "error_spans")),
             *(figure(f, name, 2) for name in ("unchanged", "eos"))]
            for mine in arms(runs, "reward model").values() for run in mine for f in run["rewards"]]
    header = ["Run", "Data", "Pairs", "Accuracy, %", "ECE", "AUROC removed", "AUROC added", "AUROC spans",
              "r on U₀ (± sd)", "r at EOS"]
    return ("Reward models, closer", header, rows, "AUROC: does −r find the tokens that people took away (removed) or "
            "marked as wrong (spans), r those they put in (added); 0.5 is chance. For a sequence model, the "
            "differences of its prefix scores stand for r.")


# ---------------------------------------------------------------- the report

def write_report(cfg):
    if not cfg.data:
        fail("report needs run folders, or folders that hold them: python evaluate.py report out")
    for path in cfg.data:
        check_input(path, "data", "bash demo.sh")
    out = Path(cfg.out)
    if out.suffix != ".html":
        fail(f"--out={out} must end in .html")
    for path, mark in ((out, MARK), (out.with_suffix(".md"), "**Table 1. ")):
        if not cfg.overwrite and not is_ours(path, mark):
            fail(f"{path} is no report of ours; choose another --out, or replace it with --overwrite=true")
    runs = read_runs(cfg.data)
    if not runs:
        fail(f"no run in {', '.join(cfg.data)} (no run.json, annotations.jsonl, rewards.json); bash demo.sh makes one")
    tables = [table_1(runs), table_paired(runs, cfg.seed), table_2(runs, cfg.data), table_3(runs, cfg.target)]
    closer = table_rewards(runs)
    say("\n\n\n".join(map(as_markdown if cfg.markdown else as_text, tables)))
    markdown = "\n\n".join(map(as_markdown, [*tables, closer])) + "\n"
    for path, text in ((out, page(runs, tables, closer)), (out.with_suffix(".md"), markdown)):
        with replacing(path) as file:
            file.write(whole_characters(text))
    say(f"\n{out} and {out.with_suffix('.md')}")
