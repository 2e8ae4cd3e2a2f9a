"""The tables of `python evaluate.py report`: the paper's three with ours next to them, from runs.

They read these files of the run folders and nothing else. What is missing is shown as "-", never
guessed:

    <folder>/<run>/run.json, metrics.jsonl, samples.jsonl   of sft.py, reward_model.py, ppo.py
    <folder>/<run>/annotations.jsonl                        verdicts on the run's model, for Table 1
    <folder>/<run>[/step_N]/val_annotations.jsonl           verdicts along training, on val.jsonl
    <folder>/<run>/step_N/annotations.jsonl                 used along training if there are none
    <folder>/<reward model>/rewards.json                    of evaluate.py rewards --out=...
    <folder>/bag_of_tokens.json                             {"accuracy": ...}: it reads no prompt

Runs of the same name in different folders are seeds of one arm. The paper's name of an arm follows
from its run.json: the level of PPO, and whether the reward model was trained on edits or on
preferences. answer.py says in three sentences what the tables show; write.py writes the report.
"""
if __name__ == "__main__":
    raise SystemExit("tables.py is a part of: python evaluate.py report")

import json, re, statistics
from pathlib import Path

from evaluate import paired, read_annotations, win_rate
from extras.report.arms import (FINE, GAMMA_0, PAPER_ACCURACY, PAPER_WIN, RLHF, RM_RLHF, RM_TOKEN,
                                TOKEN, arms, checkpoints, duration, each, figure_over_seeds,
                                label_of, over_seeds, paper_order, pm, tell_apart,
                                without_idle_columns)
from plumbing.ranks import fail
from plumbing.record import logged, record_of

RUN_FILES = ("run.json", "annotations.jsonl", "rewards.json")  # a folder with one of them is a run


# ---------------------------------------------------------------- runs

def read_runs(folders):
    """The runs in and up to two levels below the folders -> list of read_run() with their label"""
    found = {}
    for folder in map(Path, folders):
        for path in [folder, *folders_below(folder)]:
            if any((path / name).exists() for name in RUN_FILES):
                found.setdefault(path.resolve(), path)
    runs = [read_run(path) for path in found.values()]
    for run in runs:
        run["label"] = label_of(run, runs)
    tell_apart(runs)
    return runs


def folders_below(folder):
    """One and two levels down, sorted; not the checkpoints of a run"""
    below = sorted([*folder.glob("*/"), *folder.glob("*/*/")])
    return [path for path in below if not re.match(r"(step|checkpoint)_|.*\.tmp$", path.name)]


def read_run(path):
    """A run folder -> dict

    path, name, seed     the folder, its name, the folder that holds it
    kind                 "ppo", "reward model", "sft" or "other"
    record, config       run.json, and its config
    metrics, samples     rows of metrics.jsonl and samples.jsonl
    steps                how many steps are logged
    rewards              rewards.json: a list, one dict of figures per file of pairs
    annotations          rows of annotations.jsonl, or None
    judged_at            the steps done by the model that these rows judge
    win_rates            {steps done: figures of win_rate, or None} of the kept models and the last
    """
    record = record_of(path)
    metrics = [row for row in logged(path / "metrics.jsonl") if isinstance(row.get("step"), int)]
    steps = 1 + max((row["step"] for row in metrics), default=-1)
    run = dict(path=path, name=path.name, seed=str(path.parent))
    run["record"] = record
    run["config"] = record.get("config", {})
    run["kind"] = kind_of(run["config"])
    run["metrics"] = metrics
    run["samples"] = logged(path / "samples.jsonl")
    run["steps"] = steps
    run["rewards"] = read_rewards(path / "rewards.json")
    run["annotations"] = annotations_of(path / "annotations.jsonl")
    run["judged_at"] = judged_step(path, steps)
    run["win_rates"] = win_rates_along(path, steps)
    return run


def kind_of(config):
    """The kind of a run. It shows in its fields: all but "other" have lr, so the order matters"""
    if "policy" in config:
        return "ppo"
    if "loss" in config:
        return "reward model"
    if "lr" in config:
        return "sft"
    return "other"


def read_rewards(file):
    if not file.exists():
        return []
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        fail(f"{file}: not JSON ({error}); make it again: python evaluate.py rewards")


def annotations_of(path):
    return read_annotations(path) if path.exists() else None


def judged_step(path, steps):
    """The steps done by the model that annotations.jsonl judges: step_N, if `evaluate.py best`
    chose one, else all. Found by the records: annotations -> their outputs -> the model of those"""
    judged = record_of(path / "annotations.jsonl")
    outputs = judged.get("config", {}).get("outputs", "")
    if not outputs:
        return steps
    decoded = record_of(path / Path(outputs).name)
    model = decoded.get("config", {}).get("model", "")
    chosen = re.fullmatch(r"step_(\d+)", Path(model).name)
    return int(chosen[1]) if chosen else steps


def win_rates_along(path, steps):
    """{steps done: figures of win_rate, or None}: the models kept in step_N, and the last one"""
    kept = {}
    for folder in path.glob("step_*"):
        number = folder.name.removeprefix("step_")
        if number.isdigit():
            kept[int(number)] = folder
    folders = {step: kept[step] for step in sorted(kept)}
    folders[steps] = path

    name = "annotations.jsonl"
    if (path / "val_annotations.jsonl").exists():
        name = "val_annotations.jsonl"
    return {step: rate(annotations_of(folder / name)) for step, folder in folders.items()}


def rate(annotations):
    """Figures of win_rate, or None where nothing was judged"""
    figures = win_rate(row["preference"] for row in annotations or [])
    return figures if figures["n_total"] else None


def seconds_until(run, steps):
    """Training time of the first steps. Steps without a log line count as the mean of the others"""
    first = [row for row in run["metrics"] if row["step"] < steps]
    times = [row["seconds"] for row in first if "seconds" in row]
    if not times:
        return None
    return statistics.fmean(times) * steps


# ---------------------------------------------------------------- tables: title, header, rows, note

SEEDS = ("± is the standard error: over pairs where there is one seed, over seeds where there are "
         "several.")
JUDGES = {"gold": "gold, the toy world's count of flaws"}
REFERENCES = {"reference": "the toy world's"}


def table_1(runs):
    """Table 1: win rates against the reference"""
    groups = {label: [] for label in PAPER_WIN}
    groups |= arms(runs, "ppo")
    groups |= arms(runs, "sft", "other")
    judged = [run["annotations"] for run in runs if run["annotations"]]
    references = values_of(judged, "generator_1", REFERENCES)
    judges = values_of(judged, "annotator", JUDGES)

    rows = []
    for label in sorted(groups, key=paper_order):
        if label == RLHF:  # the paper has the reference here
            name = f"the reference: Davinci003, here {references}"
            rows.append([name, "50.0", "50.0", "", "", ""])
        figures = [rate(run["annotations"]) for run in groups[label]]
        if any(figures) or label in PAPER_WIN:
            rows.append(win_rate_row(label, groups[label], figures))

    unparsed = 0
    for annotations in judged:
        unparsed += sum(row["preference"] is None for row in annotations)
    # What is known of the truth: only the toy world's judge counts flaws.
    known = ceilings(runs)
    if known:
        cell = figure_over_seeds(known, "win_rate")
        seeds = each(column(known, "win_rate"))
        rows.insert(0, ["the ceiling: answers without a flaw", "-", cell, seeds, "", ""])

    header = ["Model", "Paper", "Ours", "Each seed", "PPO steps", "Pairs"]
    note = (f"Judge: Claude in the paper, here {judges}. {unparsed} pairs without a readable "
            f"verdict are not counted. {SEEDS}")
    return without_idle_columns(("Table 1. Win rate against the reference (%)", header, rows, note))


def ceilings(runs):
    """ceiling() of each seed that has one"""
    found = {run["seed"]: ceiling(run["annotations"]) for run in runs if run["annotations"]}
    return [figures for figures in found.values() if figures]


def ceiling(annotations):
    """win_rate of answers without flaws, where the judge's scores are minus the number of flaws:
    they win, or draw with a reference without flaws. None for another judge"""
    if annotations[0].get("annotator") != "gold" or "scores" not in annotations[0]:
        return None
    return win_rate(2 if row["scores"][0] < 0 else 1.5 for row in annotations)


def values_of(judged, name, known):
    """All values of a field in the first annotation of each run: "a and b", or "-". known: what is
    written for some of them"""
    values = {str(annotations[0].get(name, "?")) for annotations in judged}
    return " and ".join(known.get(value, value) for value in sorted(values)) or "-"


def win_rate_row(label, mine, figures):
    """A row of Table 1. mine: the runs of the arm; figures: win_rate of each, or None"""
    known = [f for f in figures if f]
    rates = [f["win_rate"] if f else None for f in figures]
    steps = []
    for run in mine:
        if run["kind"] == "ppo":
            steps.append(run["judged_at"] if run["annotations"] else None)
    pairs = sum(f["n_total"] for f in known)
    ours = figure_over_seeds(known, "win_rate")
    row = [label, PAPER_WIN.get(label, "-"), ours]
    return [*row, each(rates), each(steps, str), str(pairs or "-")]


def table_paired(runs, seed):
    """Differences between two arms on the same questions. seed: of the bootstrap"""
    groups = arms(runs, "ppo")
    rows = []
    pairs = [(TOKEN, RLHF, "+5.1"), (FINE, RLHF, "+4.7"), (TOKEN, FINE, "+0.4")]
    if GAMMA_0 in groups:
        pairs += [(GAMMA_0, FINE, "-"), (GAMMA_0, TOKEN, "-")]
    for a, b, paper in pairs:
        found = differences(groups.get(a, []), groups.get(b, []), seed)
        interval = "-"
        if len(found) == 1 and found[0]["low"] is not None:
            interval = f"{found[0]['low']:+.1f} to {found[0]['high']:+.1f}"
        ours = figure_over_seeds(found, "difference", sign="+")
        seeds = each(column(found, "difference"), "{:+.1f}".format)
        rows.append([f"{a} − {b}", paper, ours, seeds, interval])
    header = ["", "Paper", "Ours", "Each seed", "95% (one seed)"]
    note = ("The paper's are differences of its Table 1, with no error given. Ours are paired: "
            f"both models answered the same questions. {SEEDS}")
    title = "Differences in win rate (points), on the same questions"
    return without_idle_columns((title, header, rows, note), "95% (one seed)")


def differences(runs, others, seed):
    """paired() of the runs of one arm with those of another, seed by seed. A seed is left out if
    either run was not judged, or if they were judged against different answers"""
    found = []
    for run in runs:
        same_seed = [other for other in others if other["seed"] == run["seed"]]
        mine = run["annotations"]
        theirs = same_seed[0]["annotations"] if same_seed else None
        if not mine or not theirs:
            continue
        if column(mine, "output_1") == column(theirs, "output_1"):
            a = column(mine, "preference")
            b = column(theirs, "preference")
            found.append(paired(a, b, seed=seed))
    return found


def column(rows, name):
    return [row[name] for row in rows]


def table_2(runs, folders):
    """Table 2: accuracy of the reward models, and of what a reward model has to beat"""
    groups = arms(runs, "reward model")
    labels = sorted({*groups, *PAPER_ACCURACY}, key=lambda label: (paper_order(label), label))
    rows = []
    for label in labels:
        mine = groups.get(label, [])
        originals = reward_figures(mine, "preferences")
        edits = reward_figures(mine, "edits")
        row = [label, PAPER_ACCURACY.get(label, "-")]
        row.append(figure_over_seeds(originals, "accuracy"))
        row.append(figure_over_seeds(edits, "accuracy"))
        row.append(each(column(originals, "accuracy")))
        rows.append(row)

    # Two rules that read no word
    originals = reward_figures(runs, "preferences")
    edits = reward_figures(runs, "edits")
    if originals or edits:
        longer = [longer_wins(originals), longer_wins(edits)]
        always = "100.0" if edits else "-"
        rows.append(["the longer answer wins", "-", *longer, "-"])
        rows.append(["always the edited one", "-", "-", always, "-"])

    # A reward that reads no prompt
    places = {run["path"].parent for run in runs}
    bags = read_bags(places | set(map(Path, folders)))
    if bags:
        shares = [100 * bag["accuracy"] for bag in bags]
        errors = []
        for bag in bags:
            error = bag.get("standard_error")
            errors.append(100 * error if error else None)
        mean = over_seeds(shares, errors)
        rows.append(["a bag of tokens, without the prompt", "-", mean, "-", each(shares)])

    header = ["Model", "Paper", "Original pairs", "Edited pairs", "Each seed, original"]
    note = ("The paper's figure is on its evaluation set; ours, on held-out pairs of the original "
            "kind, is the one to compare. On edited pairs the order alone gives 100%. " + SEEDS)
    return without_idle_columns(("Table 2. Accuracy of the reward model (%)", header, rows, note))


def reward_figures(runs, kind):
    """Of each run the figures of its first file of this kind of pairs, "preferences" or "edits" """
    found = []
    for run in runs:
        of_kind = [figures for figures in run["rewards"] if figures.get("kind") == kind]
        found += of_kind[:1]
    return found


def longer_wins(figures):
    """How often the longer answer is the better one, in percent: the same for every model"""
    return f"{figures[0]['longer_wins']:.1f}" if figures else "-"


def read_bags(folders):
    files = [folder / "bag_of_tokens.json" for folder in sorted(folders)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def table_3(runs, target=None):
    """Table 3: steps and hours of training. target: a win rate in percent that every arm is timed
    to"""
    reward_models = arms(runs, "reward model")
    ppos = arms(runs, "ppo")
    rows = []

    # The reward models: all steps
    trained = [("RLHF", RM_RLHF, "0.2 h"), ("Fine-grained RLHF", RM_TOKEN, "0.3 h")]
    for name, label, paper in trained:
        found = [(run, run["steps"]) for run in reward_models.get(label, [])]
        rows.append(time_row(name, "RM", paper, found))

    # Each arm to its own best: the paper's first, then all others
    for label in dict.fromkeys([RLHF, TOKEN, FINE, *ppos]):
        found = [(run, best_step(run, runs)[0]) for run in ppos.get(label, [])]
        paper = {RLHF: "4 h", TOKEN: "2 h"}.get(label, "-")
        rows.append(time_row(f"{label}, to its own best", "PPO", paper, found))

    # Each arm to the best of another, seed by seed
    pairs = [(TOKEN, RLHF), (TOKEN, FINE), (FINE, RLHF)]
    if GAMMA_0 in ppos:
        pairs.append((GAMMA_0, FINE))
    for label, other in pairs:
        goals = {run["seed"]: best_step(run, runs)[1] for run in ppos.get(other, [])}
        found = []
        for run in ppos.get(label, []):
            goal = goals.get(run["seed"])
            if goal:
                found.append((run, first_step_with(goal, run, runs)))
        rows.append(time_row(f"{label}, to the best of {other}", "PPO", "-", found))

    if target is not None:
        for label, mine in ppos.items():
            found = [(run, first_step_with(target, run, runs)) for run in mine]
            rows.append(time_row(f"{label}, to {target:g}%", "PPO", "-", found))

    header = ["Model", "Step", "Paper", "Our steps, each seed", "Our time"]
    note = ("Best: the highest win rate of the models that were kept along training (the judge's "
            "own noise included), so steps are known to the nearest kept model. Time: training "
            "alone, mean of the seeds, on the hardware named below.")
    return "Table 3. Training efficiency", header, rows, note


def best_step(run, runs):
    """-> (first step with the run's highest win rate, that win rate); (None, None) if not judged"""
    trained = [(step, f["win_rate"]) for step, f in checkpoints(run, runs) if step]
    if not trained:
        return None, None
    return max(trained, key=lambda pair: (pair[1], -pair[0]))


def first_step_with(goal, run, runs):
    """The first kept step whose win rate is at least the goal (percent), or None"""
    for step, figures in checkpoints(run, runs):
        if step and figures["win_rate"] >= goal:
            return step
    return None


def time_row(name, stage, paper, found):
    """A row of Table 3. found: (run, steps) of each seed; steps is None where it never got there"""
    reached = [(run, steps) for run, steps in found if steps]
    each_seed = each([steps for _, steps in found], str)
    if len(reached) < len(found):
        each_seed += f" ({len(found) - len(reached)} of {len(found)} never)"
    row = [name, stage, paper, each_seed]

    times = [seconds_until(run, steps) for run, steps in reached]
    if not times or None in times:
        return [*row, "-"]
    return [*row, duration(statistics.fmean(times))]


def table_rewards(runs):
    """All figures of all reward models, for the page"""
    rows = []
    for mine in arms(runs, "reward model").values():
        for run in mine:
            pairs = [figures for figures in run["rewards"] if figures.get("kind") != "probe"]
            rows += [rewards_row(run, figures) for figures in pairs]
    header = ["Run", "Data", "Pairs", "Accuracy, %", "ECE", "AUROC removed", "AUROC added",
              "AUROC spans", "r on U₀ (± sd)", "r at EOS"]
    note = ("AUROC: does −r find the tokens that people took away (removed) or marked as wrong "
            "(spans), r those they put in (added); 0.5 is chance. ECE: expected calibration error, "
            "between how sure the model is of a pair and how often it is right. U₀: the tokens "
            "that both answers share; EOS: the token that ends an answer. For a sequence model, "
            "the differences of its prefix scores stand for r.")
    table = "Reward models, closer", header, rows, note
    return without_idle_columns(table, *header[5:])


def table_probe(runs):
    """After the same prefix, is r of the better token above r of the worse one?"""
    found = {}  # kind of the worse one -> label of the arm -> its figures, one per seed
    groups = arms(runs, "reward model")
    for label, mine in groups.items():
        for figures in reward_figures(mine, "probe"):
            for share in figures["shares"]:
                found.setdefault(share["worse"], {}).setdefault(label, []).append(share)

    labels = [label for label in groups if any(label in row for row in found.values())]
    rows = []
    for kind, row in found.items():
        rows.append([kind, *[figure_over_seeds(row.get(label, []), "right") for label in labels]])
    header = ["The worse continuation", *labels]
    note = ("50% is chance. Two continuations of one prefix, compared at the first token that "
            "differs. The policy meets these choices; pair accuracy hides them. For a sequence "
            f"model, the differences of its prefix scores stand for r. {SEEDS}")
    return "The probe: the better token above the worse one (%)", header, rows, note


def rewards_row(run, figures):
    """A row of table_rewards: the figures of one run on one file of pairs"""
    data = Path(str(figures.get("data", "?"))).name
    accuracy = pm(figures.get("accuracy"), figures.get("standard_error"))
    calibration = figures.get("calibration") or {}
    name = f"{Path(run['seed']).name}/{run['name']}"
    row = [name, data, str(figures.get("n", "-")), accuracy]
    row.append(pm(calibration.get("ece"), None, 3))

    tokens = figures.get("tokens") or {}
    for name in ("removed", "added", "error_spans"):
        group = tokens.get(name) or {}
        row.append(pm(group.get("auroc"), group.get("standard_error"), 3))
    for name in ("unchanged", "eos"):
        group = tokens.get(name) or {}
        row.append(pm(group.get("mean"), group.get("sd"), 2))
    return row
