"""`python evaluate.py report`: the paper's three tables with ours beside them, and one page of figures, from run folders alone.

What it reads, and nothing else; what is not there is shown as missing ("-"), never guessed:

    <folder>/<run>/run.json, metrics.jsonl, samples.jsonl        of sft.py, reward_model.py, ppo.py
    <folder>/<run>/annotations.jsonl                             evaluate.py judge, on the run's final model
    <folder>/<ppo>/step_N/annotations.jsonl                      the same, on the models kept along training
    <folder>/<reward model>/rewards.json                         evaluate.py rewards --out=...
    <folder>/bag_of_tokens.json                                  {"accuracy": ...}: a reward that reads no prompt

Runs of the same name in different folders are seeds of one arm. What an arm is called in the paper follows from its run.json:
the level of PPO, and whether its reward model learnt from edits (diffs) or from preferences.
"""
import html, json, math, re, statistics
from pathlib import Path

from common import check_input, fail, logged, record_of, replacing, say
from diff import plain
from evaluate import mean_and_error, paired, read_annotations, win_rate

MARK = "<!-- the report of evaluate.py -->"
TOKEN, FINE, RLHF, SFT = "Fine-grained Token-level PPO", "Fine-grained PPO", "PPO-RLHF", "SFT"
RM_TOKEN, RM_FINE, RM_RLHF = "RM w/ Fine-grained dataset, token level", "RM w/ Fine-grained dataset", "RM w/o Fine-grained dataset"
PAPER_WIN = {TOKEN: "51.6 ± 1.8", FINE: "51.2 ± 1.8", RLHF: "46.5 ± 1.8"}
PAPER_ACCURACY = {RM_FINE: "85.2 ± 1.8", RM_RLHF: "58.2 ± 1.8"}
ORDER = [TOKEN, FINE, RLHF, RM_TOKEN, RM_FINE, RM_RLHF]  # the order of rows, and of colours


# ---------------------------------------------------------------- runs

def read_runs(folders):
    """The runs in and below the folders given -> list of dict: path, name, seed (the folder that holds it), kind, label, ..."""
    found = {}
    for folder in map(Path, folders):
        below = sorted(p for p in (*folder.glob("*/"), *folder.glob("*/*/")) if not re.match(r"(step|checkpoint)_|.*\.tmp$", p.name))
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
    record = record_of(path)
    config = record.get("config", {})
    kind = "ppo" if "policy" in config else "reward model" if "loss" in config else "sft" if "lr" in config else "other"
    rewards = json.loads((path / "rewards.json").read_text()) if (path / "rewards.json").exists() else []
    metrics = [row for row in logged(path / "metrics.jsonl") if isinstance(row.get("step"), int)]
    folders = {int(p.name[5:]): p for p in path.glob("step_*") if p.name[5:].isdigit()}
    return dict(path=path, name=path.name, seed=str(path.parent), kind=kind, record=record, config=config, metrics=metrics,
                samples=logged(path / "samples.jsonl"), rewards=rewards if isinstance(rewards, list) else [rewards],
                annotations=annotations_of(path), along={step: annotations_of(folders[step]) for step in sorted(folders)})


def annotations_of(path):
    return read_annotations(path / "annotations.jsonl") if (path / "annotations.jsonl").exists() else None


def sibling(run, field, runs):
    """The run of the same seed that a config field of this run names, or None"""
    name = Path(str(run["config"].get(field, ""))).name
    return next((other for other in runs if other["seed"] == run["seed"] and other["name"] == name), None)


def label_of(run, runs):
    """The paper's name of a run"""
    def from_edits(rm):
        return "diff" in Path(str(rm["config"].get("data", ""))).name
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


def arms(runs, *kinds):
    """label -> its runs, one per seed, in the paper's order"""
    labels = {run["label"]: None for run in runs if run["kind"] in kinds}
    return {label: [run for run in runs if run["label"] == label and run["kind"] in kinds]
            for label in sorted(labels, key=lambda label: (rank(label), label))}


def rank(label):
    return next((i for i, known in enumerate(ORDER) if label == known or label.startswith(known + " (")), len(ORDER))


def rate(annotations):
    return win_rate(row["preference"] for row in annotations) if annotations else None


def checkpoints(run, runs):
    """[(steps done, figures of win_rate)]: the policy it began from, the models kept, the last"""
    start = sibling(run, "policy", runs)
    last = 1 + max((row["step"] for row in run["metrics"]), default=-1)
    found = {0: rate(start["annotations"]) if start else None} | {step: rate(rows) for step, rows in run["along"].items()}
    found[last] = rate(run["annotations"])
    return [(step, figures) for step, figures in found.items() if figures and figures["win_rate"] is not None]


def seconds_until(run, steps):
    """Training time of the first steps; where not every step was logged, at the mean of those that were"""
    times = [row["seconds"] for row in run["metrics"] if row["step"] < steps and "seconds" in row]
    return statistics.fmean(times) * steps if times else None


# ---------------------------------------------------------------- tables

def pm(mean, error, digits=1):
    return "-" if mean is None else f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def over_seeds(values, errors=(None,)):
    """One seed: its value and error. Several: their mean, and the error that their spread tells"""
    values = [value for value in values if value is not None]
    return pm(values[0], errors[0]) if len(values) == 1 else pm(*mean_and_error(values))


def summed(figures, name):
    """over_seeds of one of the figures, with its standard_error; "-" where there are none"""
    return over_seeds([f[name] for f in figures], [f["standard_error"] for f in figures]) if figures else "-"


def duration(seconds):
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def each(values, show=lambda value: f"{value:.1f}"):
    return ", ".join("-" if value is None else show(value) for value in values)


def table_1(runs):
    rows, groups = [], {label: [] for label in PAPER_WIN} | arms(runs, "ppo") | arms(runs, "sft", "other")
    for label in sorted(groups, key=rank):
        figures = [rate(run["annotations"]) for run in groups[label]]
        known = [f for f in figures if f]
        if known or label in PAPER_WIN:
            rows.append([label, PAPER_WIN.get(label, "-"), summed(known, "win_rate"), each([f and f["win_rate"] for f in figures]) or "-",
                         str(sum(f["n_total"] for f in known)) if known else "-"])
    judged = [run["annotations"][0] for run in runs if run["annotations"]]
    names = " and ".join(sorted({str(row.get("generator_1", "?")) for row in judged})) or "-"
    rows.insert(sum(label in PAPER_WIN and rank(label) < rank(RLHF) for label in [row[0] for row in rows]),
                [f"the reference: Davinci003; ours: {names}", "50.0", "50.0", "", ""])
    judges = " and ".join(sorted({str(row.get("annotator", "?")) for row in judged})) or "-"
    unparsed = sum(row["preference"] is None for run in runs for row in run["annotations"] or [])
    return ("Table 1. Win rate against the reference (%)", ["Model", "Paper", "Ours", "Each seed", "Pairs"], rows,
            f"Judge: Claude in the paper, here {judges}. {unparsed} pairs without a readable verdict are not counted. {SEEDS}")


SEEDS = "± is the standard error: over pairs where there is one seed, over seeds where there are several."


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
        interval = f"{one['low']:+.1f} to {one['high']:+.1f}" if one.get("low") is not None else "-"
        differences = [f["difference"] for f in found]
        rows.append([f"{a} − {b}", paper, summed(found, "difference"), each(differences, lambda x: f"{x:+.1f}") or "-", interval])
    return ("Differences in win rate (points), on the same questions", ["", "Paper", "Ours", "Each seed", "95% (one seed)"], rows,
            "The paper's are differences of its Table 1, with no error given. Ours are paired: both models answered the same questions. "
            + SEEDS)


def table_2(runs, folders):
    rows, groups = [], arms(runs, "reward model")
    def of(runs, kind):
        return [f for run in runs for f in [f for f in run["rewards"] if f.get("kind") == kind][:1]]
    for label in sorted({*groups, *PAPER_ACCURACY}, key=lambda label: (rank(label), label)):
        mine = groups.get(label, [])
        rows.append([label, PAPER_ACCURACY.get(label, "-"), summed(of(mine, "preferences"), "accuracy"), summed(of(mine, "edits"), "accuracy"),
                     each([f["accuracy"] for f in of(mine, "preferences")]) or "-"])
    originals, edits = of(runs, "preferences"), of(runs, "edits")
    if originals or edits:
        rows.append(["the longer answer wins", "-", *(f"{found[0]['longer_wins']:.1f}" if found else "-" for found in (originals, edits)), "-"])
        rows.append(["always the edited one", "-", "-", "100.0" if edits else "-", "-"])
    bags = [json.loads((folder / "bag_of_tokens.json").read_text()) for folder in sorted({run["path"].parent for run in runs} | set(map(Path, folders)))
            if (folder / "bag_of_tokens.json").exists()]
    if bags:
        shares = [100 * bag["accuracy"] for bag in bags]
        errors = [100 * bag["standard_error"] if bag.get("standard_error") else None for bag in bags]
        rows.append(["a bag of tokens, without the prompt", "-", over_seeds(shares, errors), "-", each(shares)])
    return ("Table 2. Accuracy of the reward model (%)", ["Model", "Paper", "Original pairs", "Edited pairs", "Each seed, original"], rows,
            "The paper's figure is on its evaluation set; ours, on pairs of the original kind with true labels, is the one to compare. "
            "On edited pairs the order alone gives 100%. " + SEEDS)


def table_3(runs):
    def steps_of(run):
        return 1 + max((row["step"] for row in run["metrics"]), default=-1)
    def best(run):
        along = [(figures["win_rate"], -step) for step, figures in checkpoints(run, runs) if step]
        return (max(along)[0], -max(along)[1]) if along else (None, None)
    def reached(run, target):
        return next((step for step, f in checkpoints(run, runs) if step and target is not None and f["win_rate"] >= target), None)
    def row(name, step, paper, found):  # found: (run, steps or None) of each seed
        known = [(run, steps) for run, steps in found if steps]
        times = [seconds_until(run, steps) for run, steps in known]
        mean = statistics.fmean(times) if times and None not in times else None
        missed = f" ({len(found) - len(known)} of {len(found)} never)" if len(known) < len(found) else ""
        return [name, step, paper, (each([s for _, s in found], str) or "-") + missed, duration(mean),
                "-" if mean is None else f"{mean / 3600:.3f}"]
    rms, ppos = arms(runs, "reward model"), arms(runs, "ppo")
    rows = [row("RLHF", "RM", "0.2", [(run, steps_of(run)) for run in rms.get(RM_RLHF, [])]),
            row("Fine-grained RLHF", "RM", "0.3", [(run, steps_of(run)) for run in rms.get(RM_TOKEN, [])])]
    for label in {RLHF: 0, TOKEN: 0, FINE: 0} | ppos:
        rows.append(row(f"{label}, to its own best", "PPO", {RLHF: "4", TOKEN: "2"}.get(label, "-"),
                        [(run, best(run)[1]) for run in ppos.get(label, [])]))
    for label, target in ((TOKEN, RLHF), (TOKEN, FINE), (FINE, RLHF)):
        targets = {run["seed"]: best(run)[0] for run in ppos.get(target, [])}
        rows.append(row(f"{label}, to the best of {target}", "PPO", "-",
                        [(run, reached(run, targets[run["seed"]])) for run in ppos.get(label, []) if targets.get(run["seed"])]))
    return ("Table 3. Training efficiency", ["Model", "Step", "Paper, h", "Our steps, each seed", "Our time", "h"], rows,
            "Best: the highest win rate of the models that were kept along training (the judge's own noise included), so steps are known to "
            "the nearest kept model. Time: training alone, mean of the seeds, on the hardware named below.")


def table_rewards(runs):
    rows = []
    def figure(tokens, name, digits):
        group = tokens.get(name) or {}
        return pm(group.get("auroc", group.get("mean")), group.get("standard_error", group.get("sd")), digits)
    for run in (run for mine in arms(runs, "reward model").values() for run in mine):
        for f in run["rewards"]:
            rows.append([f"{Path(run['seed']).name}/{run['name']}", Path(str(f.get("data", "?"))).name, str(f.get("n", "-")),
                         pm(f.get("accuracy"), f.get("standard_error")), pm((f.get("calibration") or {}).get("ece"), None, 3),
                         *(figure(f.get("tokens") or {}, name, 3) for name in ("removed", "added", "error_spans")),
                         *(figure(f.get("tokens") or {}, name, 2) for name in ("unchanged", "eos"))])
    return ("Reward models, closer", ["Run", "Data", "Pairs", "Accuracy, %", "ECE", "AUROC removed", "AUROC added", "AUROC spans",
                                      "r on U₀ (± sd)", "r at EOS"], rows,
            "AUROC: does −r find the tokens that people took away (removed) or marked as wrong (spans), r those they put in (added); "
            "0.5 is chance. For a sequence model, the differences of its prefix scores stand for r.")


def as_text(table):
    title, header, rows, note = table
    cells = [[plain(str(cell)).replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:], "", note])


def as_markdown(table):
    title, header, rows, note = table
    def line(row):
        return "| " + " | ".join(html.escape(plain(str(cell)), quote=False).replace("\n", " ").replace("|", "\\|") for cell in row) + " |"
    return "\n".join([f"**{title}**", "", line(header), "|" + "---|" * len(header), *map(line, rows), "", note])


def as_html(table, small=False):
    title, header, rows, note = table
    head = "".join(f"<th>{safe(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{safe(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (f"<figure><h3>{safe(title)}</h3><div class=wide><table{' class=small' if small else ''}><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div><figcaption>{safe(note)}</figcaption></figure>")


def safe(text):
    """Any text as text: markup escaped, control characters made visible"""
    return html.escape(plain(str(text)))


# ---------------------------------------------------------------- figures: inline SVG

def ticks(low, high, count=4):
    """Round numbers that cover low..high"""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(k for k in (1, 2, 2.5, 5, 10) if span / (k * step) <= count)
    first = math.floor(low / step + 1e-9) * step
    return [first + i * step for i in range(math.ceil((high - first) / step - 1e-9) + 1)]


def short(x):
    return f"{x:.6g}" if abs(x) < 1e4 else f"{x:.3g}"


class Plot:
    """Axes with room for lines: data coordinates in, SVG out"""

    def __init__(self, title, xlabel, xs, ys, width=500, height=250):
        self.title, self.xlabel, self.width, self.height, self.parts = title, xlabel, width, height, []
        self.left, self.right, self.top, self.bottom = 48, 14, 34, 40
        self.x_ticks, self.y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys))
        self.x_range, self.y_range = (min(xs), max(xs)), (self.y_ticks[0], self.y_ticks[-1])

    def at(self, x, y):
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        return (self.left + (x - x0) / ((x1 - x0) or 1) * (self.width - self.left - self.right),
                self.top + (y1 - y) / ((y1 - y0) or 1) * (self.height - self.top - self.bottom))

    def points(self, xs, ys):
        return " ".join("{:.1f},{:.1f}".format(*self.at(x, y)) for x, y in zip(xs, ys))

    def line(self, xs, ys, colour, style=""):
        self.parts.append(f'<polyline points="{self.points(xs, ys)}" class="line {style}" style="stroke:{colour}"/>')

    def band(self, xs, low, high, colour):
        self.parts.append(f'<polygon points="{self.points([*xs, *xs[::-1]], [*low, *high[::-1]])}" style="fill:{colour}" class="band"/>')

    def dot(self, x, y, colour, hollow=False, note=""):
        cx, cy = self.at(x, y)
        size, fill = (4, "var(--page)") if hollow else (3.4, colour)
        self.parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{size}" style="stroke:{colour};fill:{fill}" class="dot">'
                          f'<title>{safe(note)}</title></circle>')

    def rule(self, y, words):
        x0, cy = self.at(self.x_range[0], y)
        self.parts.insert(0, f'<line x1="{x0:.1f}" x2="{self.width - self.right}" y1="{cy:.1f}" y2="{cy:.1f}" class="rule"/>'
                             f'<text x="{x0 + 5:.1f}" y="{cy - 5:.1f}">{safe(words)}</text>')

    def svg(self):
        grid = []
        for y in self.y_ticks:
            x0, cy = self.at(self.x_range[0], y)
            grid.append(f'<line x1="{x0}" x2="{self.width - self.right}" y1="{cy:.1f}" y2="{cy:.1f}" class="grid"/>'
                        f'<text x="{x0 - 7}" y="{cy + 4:.1f}" class="end">{short(y)}</text>')
        for x in self.x_ticks:
            if self.x_range[0] - 1e-9 <= x <= self.x_range[1] + 1e-9:
                cx, cy = self.at(x, self.y_range[0])
                grid.append(f'<line x1="{cx:.1f}" x2="{cx:.1f}" y1="{cy:.1f}" y2="{cy + 4:.1f}" class="tick"/>'
                            f'<text x="{cx:.1f}" y="{cy + 17:.1f}" class="mid">{short(x)}</text>')
        middle = (self.left + self.width - self.right) / 2
        return (f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{safe(self.title)}">'
                f'<text x="0" y="14" class="title">{safe(self.title)}</text>{"".join(grid)}{"".join(self.parts)}'
                f'<text x="{middle}" y="{self.height - 4}" class="mid quiet">{safe(self.xlabel)}</text></svg>')


def colours(labels):
    """label -> its colour, the same in every figure; the variables are set for light and for dark"""
    paper = {label: ORDER.index(label) % 3 for label in labels if label in ORDER}
    others = [label for label in labels if label not in paper]
    return {label: f"var(--c{i})" for label, i in (paper | {label: 3 + i % 5 for i, label in enumerate(others)}).items()}


def across_seeds(series):
    """[{x: y}, ...] one per seed -> xs, mean, low, high at the steps that all seeds have"""
    xs = sorted(set.intersection(*(set(one) for one in series))) if series else []
    columns = [[one[x] for one in series] for x in xs]
    return xs, [statistics.fmean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def curves(runs):
    """Win rate, reward, KL and length along training, arms overlaid, seeds as bands"""
    groups, panels = arms(runs, "ppo"), []
    paint = colours(groups)

    def own_scale(run):  # 0: the first step, 1: the highest
        rows = {row["step"]: row["reward"] for row in run["metrics"] if "reward" in row}
        first, top = rows[min(rows)] if rows else 0, max(rows.values(), default=1)
        return {step: (y - first) / ((top - first) or 1) for step, y in rows.items()}

    def metric(name):
        return lambda run: {row["step"]: row[name] for row in run["metrics"] if isinstance(row.get(name), (int, float))}

    def won(run):
        return {step: figures["win_rate"] for step, figures in checkpoints(run, runs)}

    for title, read in (("Win rate, % (± standard error, or the range of seeds)", won),
                        ("Reward, each run on its own scale: 0 first, 1 highest", own_scale),
                        ("KL from the starting policy, nats per response", metric("kl")),
                        ("Length of a response, tokens", metric("response_length"))):
        lines = {}
        for label, mine in groups.items():
            xs, mean, low, high = across_seeds([one for one in map(read, mine) if one])
            if len(mine) == 1 and "Win" in title and xs:
                errors = {s: f["standard_error"] or 0 for s, f in checkpoints(mine[0], runs)}
                low, high = [y - errors[x] for x, y in zip(xs, mean)], [y + errors[x] for x, y in zip(xs, mean)]
            if xs:
                lines[label] = xs, mean, low, high
        if not lines:
            panels.append(f"<p class=missing>{safe(title)}: nothing of it in these folders</p>")
            continue
        plot = Plot(title, "step", [x for xs, *_ in lines.values() for x in xs],
                    [y for _, _, low, high in lines.values() for y in low + high])
        for label, (xs, mean, low, high) in lines.items():
            if low != high:
                plot.band(xs, low, high, paint[label])
        for label, (xs, mean, low, high) in lines.items():
            plot.line(xs, mean, paint[label])
            for x, y in zip(xs, mean) if "Win" in title else []:
                plot.dot(x, y, paint[label], note=f"{label}, step {x}: {y:.1f}")
        if "Win" in title and plot.y_range[0] <= 50 <= plot.y_range[1]:
            plot.rule(50, "the reference")
        panels.append(plot.svg())
    seeds = max((len(mine) for mine in groups.values()), default=0)
    note = f"Lines: the mean of {seeds} seeds; bands: lowest to highest." if seeds > 1 else "One seed."
    return legend(groups) + f"<div class=grid2>{''.join(panels)}</div><figcaption>{note}</figcaption>"


def legend(groups):
    paint = colours(groups)
    keys = (f'<span><i style="background:{paint[label]}"></i>{safe(label)}</span>' for label in groups)
    return f"<p class=legend>{''.join(keys)}</p>"


def hacking(runs):
    """Reward-model score against the judge's win rate, one panel per arm, a path per seed"""
    groups, panels = arms(runs, "ppo"), []
    paint, paths = colours(groups), {}
    for label, mine in groups.items():
        for run in mine:
            rewards = {row["step"]: row["reward"] for row in run["metrics"] if isinstance(row.get("reward"), (int, float))}
            path = []
            for step, figures in checkpoints(run, runs):
                near = [rewards[s] for s in ([0] if step == 0 else range(step - 3, step)) if s in rewards]  # rollouts just before it
                if near:
                    path.append((step, statistics.fmean(near), figures))
            if len(path) > 1:
                paths.setdefault(label, []).append(path)
    if not paths:
        return "<p class=missing>needs annotations of models kept along training (&lt;run&gt;/step_N/annotations.jsonl)</p>"
    ys = [f["win_rate"] for of in paths.values() for path in of for _, _, f in path]
    for label, of in paths.items():
        plot = Plot(label, "score by its own reward model →", [x for path in of for _, x, _ in path], ys, 330, 270)
        pad = 0.06 * ((plot.x_range[1] - plot.x_range[0]) or 1)
        plot.x_range = plot.x_range[0] - pad, plot.x_range[1] + pad
        for path in of:
            xs, wins = [x for _, x, _ in path], [f["win_rate"] for _, _, f in path]
            plot.line(xs, wins, paint[label], "thin")
            for i, (step, x, f) in enumerate(path):
                note = f"step {step}: score {x:.3f}, win rate {pm(f['win_rate'], f['standard_error'])}"
                plot.dot(x, f["win_rate"], paint[label], hollow=i == 0, note=note)
        if plot.y_range[0] <= 50 <= plot.y_range[1]:
            plot.rule(50, "")
        score = mean_and_error([path[-1][1] - path[0][1] for path in of])
        won = mean_and_error([path[-1][2]["win_rate"] - path[0][2]["win_rate"] for path in of])
        error = won[1] if won[1] is not None else math.hypot(*(of[0][i][2]["standard_error"] or 0 for i in (0, -1)))
        words = ("the score rose, the judge did not follow: reward hacking" if score[0] > 0 and won[0] < error else
                 "the judge follows the score" if score[0] > 0 else "the score did not rise")
        tone = "verdict bad" if "hacking" in words else "verdict"
        panels.append(f"<div>{plot.svg()}<p class='{tone}'>score {score[0]:+.2f}, win rate {won[0]:+.1f} ± {error:.1f}<br><b>{words}</b></p></div>")
    return (f"<div class=grid3>{''.join(panels)}</div><figcaption>Win rate (%, the same axis in all panels) against the reward model's score; "
            "a line per seed, from the starting policy (ring) to the last step. Up and to the right is learning; to the right alone is a "
            "policy that fools its reward model: said where the win rate has not risen by its standard error.</figcaption>")


def calibrations(runs):
    """Do the reward models know when they are right?"""
    groups = arms(runs, "reward model")
    paint, panels = colours(groups), []
    for kind, title in (("preferences", "Held-out pairs of the original kind"), ("edits", "Held-out edited pairs")):
        lines = [(label, f["calibration"]["bins"]) for label, mine in groups.items() for run in mine
                 for f in run["rewards"] if f.get("kind") == kind and (f.get("calibration") or {}).get("bins")]
        if lines:
            lowest = min(0.5, *(b["accuracy"] for _, bins in lines for b in bins))
            plot = Plot(f"{title}: share right", "confidence σ(|R₁ − R₂|)", [0.5, 1.0], [lowest, 1.0])
            plot.line([0.5, 1], [0.5, 1], "var(--grid)", "dashed")
            for label, bins in lines:
                plot.line([b["confidence"] for b in bins], [b["accuracy"] for b in bins], paint[label], "thin")
                for b in bins:
                    note = f"{label}: {b['accuracy']:.2f} right at {b['confidence']:.2f} (n={b['n']})"
                    plot.dot(b["confidence"], b["accuracy"], paint[label], note=note)
            panels.append(plot.svg())
    note = "On the dashed line σ(R₁ − R₂) means what it says; below it the model is too sure."
    return legend(groups) + f"<div class=grid2>{''.join(panels)}</div><figcaption>{note}</figcaption>" if panels else ""


# ---------------------------------------------------------------- heatmaps

def heat(tokens, rewards, scale):
    """Tokens on blue (good) and red (bad), as strong as their reward"""
    spans = []
    for text, r in zip(tokens, rewards):
        if text:
            share = 0 if r is None or not scale else max(-1.0, min(1.0, r / scale))
            tone = "--good" if share > 0 else "--bad"
            shown = safe(text).replace("\n", "↵\n")
            colour = f"rgb(var({tone}) / {0.75 * abs(share):.2f})"
            spans.append(f'<span style="background:{colour}" title="{"no reward here" if r is None else f"{r:+.3f}"}">{shown}</span>')
    return f"<div class=heat>{''.join(spans)}</div>"


def paid(run, sample):
    """One answer of an arm, painted as PPO was paid for it: r_t at every token, or all of R at the last"""
    at_the_end = run["config"].get("level") == "sequence"
    sizes = sorted(abs(r) for s in run["samples"] for r in ([s["reward"]] if at_the_end else s["token_rewards"]))
    scale = sizes[int(0.98 * (len(sizes) - 1))] if sizes else 1  # a few outliers must not pale the rest
    tokens = list(sample["tokens"])
    if tokens and tokens[-1] == "":
        tokens[-1] = "∎"
    rewards = [None] * (len(tokens) - 1) + [sample["reward"]] if at_the_end else sample["token_rewards"]
    where = ", all at the last token" if at_the_end else ""
    return f"<div><h4>{safe(run['label'])} <em>R = {sample['reward']:+.2f}{where}</em></h4>{heat(tokens, rewards, scale)}</div>"


def heatmaps(runs, prompts=3):
    """The same prompt's answers across the arms of one seed: some of the last step, one of the first"""
    runs = [run for mine in arms(runs, "ppo").values() for run in mine if run["samples"]]
    if not runs:
        return "<p class=missing>no samples.jsonl in these folders</p>"
    seed = min(run["seed"] for run in runs)
    runs = [run for run in runs if run["seed"] == seed]
    by_run = [{(s["step"], s["instruction"], s.get("input") or ""): s for s in run["samples"]} for run in runs]
    shared = set.intersection(*map(set, by_run)) or set(by_run[0])
    first, last = min(key[0] for key in shared), max(key[0] for key in shared)
    shown = [key for key in by_run[0] if key in shared and key[0] == last][:prompts]
    shown += [key for key in by_run[0] if key in shared and key[0] == first][:1] if first < last else []
    blocks = []
    for key in shown:
        step, instruction, more = key
        answers = "".join(paid(run, samples[key]) for run, samples in zip(runs, by_run) if key in samples)
        more = f"<br><span class=quiet>{safe(more)}</span>" if more else ""
        blocks.append(f"<div class=sample><p><b>{safe(instruction)}</b>{more} <span class=quiet>step {step}, {safe(seed)}</span></p>"
                      f"<div class=grid3>{answers}</div></div>")
    return "".join(blocks) + ("<figcaption>What PPO is paid at each token: blue for a positive reward, red for a negative one, each arm on "
                              "its own scale; ∎ is the end of the answer. Point at a token for its number.</figcaption>")


# ---------------------------------------------------------------- where it comes from

def provenance(runs):
    rows = []
    for run in runs:
        record = run["record"]
        config = json.dumps(record.get("config", {}), indent=1)
        state = f"finished {record['finished']}" if record.get("finished") else "not finished"
        commit = f"{record.get('commit') or '-'}{' + changes' if record.get('dirty') else ''}"
        facts = [state, f"commit {commit}", f"{record.get('world_size', '-')} rank(s)", str(record.get("device", "-")),
                 f"torch {record.get('torch', '-')}", f"transformers {record.get('transformers', '-')}", f"{len(run['metrics'])} logged steps"]
        rows.append(f"<details><summary><b>{safe(run['path'])}</b> {safe(run['label'])}</summary><p class=quiet>{safe(' · '.join(facts))}</p>"
                    f"<pre>{safe(record.get('command', 'no run.json'))}</pre><pre>{safe(config)}</pre></details>")
        for name in ("annotations.jsonl", "rewards.json"):
            made = record_of(run["path"] / name)
            if made:
                rows.append(f"<details class=sub><summary>{safe(run['path'] / name)}</summary><pre>{safe(made.get('command', '-'))}</pre>"
                            f"<pre>{safe(json.dumps(made.get('config', {}), indent=1))}</pre></details>")
    return "".join(rows)


STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --ink: #1d1f23; --quiet: #686c74; --grid: #dfe0e2; --rule: #9a9ea6;
  --good: 52 118 200; --bad: 214 82 56; --serif: Georgia, "Times New Roman", "DejaVu Serif", serif;
  --mono: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; --c0: #2467ad; --c1: #26886b; --c2: #c8553d;
  --c3: #8465a8; --c4: #b0892b; --c5: #4a4f57; --c6: #c0578f; --c7: #5a8f29 }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --ink: #e4e5e8; --quiet: #9a9fa8; --grid: #2f333a; --rule: #6d727c; --good: 84 150 230; --bad: 226 104 78;
    --c0: #6ba8e5; --c1: #5dbd9d; --c2: #ec8a6f; --c3: #b59ad6; --c4: #d9b75c; --c5: #b9bec7; --c6: #e48dbb; --c7: #9acb66 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 48px 24px 80px; max-width: 1080px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums }
h1 { font: 600 27px/1.25 var(--serif); margin: 0 0 6px }
h2 { font: 600 19px/1.3 var(--serif); margin: 56px 0 14px; padding-top: 14px; border-top: 1px solid var(--grid) }
h3 { font-size: 15px; font-weight: 600; margin: 0 0 8px }
h4 { font-size: 13px; font-weight: 600; margin: 0 0 4px }
h4 em { display: block; color: var(--quiet); font-style: normal; font-weight: 400 }
figure { margin: 0 0 34px }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink) }
th { text-align: left; font-weight: 500; color: var(--quiet); border-bottom: 1px solid var(--rule) }
th, td { padding: 5px 18px 5px 0; white-space: nowrap; vertical-align: top }
td:first-child { white-space: normal }
tbody tr:first-child td { padding-top: 8px }
tbody tr:last-child td { padding-bottom: 8px }
table.small { font-size: 12px }
table.small th, table.small td { padding-right: 12px; white-space: nowrap }
figcaption, .quiet, .missing { color: var(--quiet); font-size: 13px }
figcaption { margin-top: 8px; max-width: 84ch }
.missing { font-style: italic }
.grid2, .grid3 { display: grid; gap: 26px 34px; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)) }
.grid3 { gap: 26px; grid-template-columns: repeat(auto-fit, minmax(min(290px, 100%), 1fr)) }
svg { width: 100%; height: auto; display: block; overflow: visible }
svg text { font-size: 11.5px; fill: var(--quiet) }
svg .title { font-size: 13px; font-weight: 600; fill: var(--ink) }
.end { text-anchor: end }
.mid { text-anchor: middle }
.grid { stroke: var(--grid) }
.tick { stroke: var(--rule) }
.rule { stroke: var(--rule); stroke-dasharray: 2 3 }
.line { fill: none; stroke-width: 2; stroke-linejoin: round }
.thin { stroke-width: 1.4; opacity: .8 }
.dashed { stroke-dasharray: 5 4 }
.band { opacity: .16 }
.dot { stroke-width: 1.8 }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0 0 14px; font-size: 13.5px }
.legend i { display: inline-block; width: 18px; height: 3px; margin-right: 7px; vertical-align: middle; border-radius: 2px }
.verdict { margin: 6px 0 0; font-size: 13px; color: var(--quiet) }
.verdict b { color: var(--ink); font-weight: 600 }
.bad b { color: rgb(var(--bad)) }
.sample { margin: 0 0 26px; padding-left: 14px; border-left: 2px solid var(--grid) }
.sample p { margin: 0 0 8px; white-space: pre-wrap }
.heat { font: 13px/1.75 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere }
.heat span { border-radius: 2px; padding: 1px 0 }
details { margin: 4px 0 }
details.sub { margin-left: 20px }
summary { cursor: pointer }
pre { font: 12px/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 6px 18px; color: var(--quiet) }
"""


def page(runs, tables, closer):
    missing = "<p class=missing>no rewards.json in these folders</p>"
    sections = [("The paper's tables, and ours", "".join(map(as_html, tables))), ("Along training", curves(runs)),
                ("Which arm fooled its reward model?", hacking(runs)), ("What each token is paid", heatmaps(runs)),
                ("The reward models", as_html(closer, small=True) + calibrations(runs) if closer[2] else missing),
                ("Where the numbers come from", provenance(runs))]
    seeds = sorted({run["seed"] for run in runs})
    return f"""<!doctype html>
{MARK}
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Fine-grained RLHF: report</title><style>{STYLE}</style></head><body>
<h1>Aligning language models via fine-grained supervision</h1>
<p class=quiet>{len(runs)} runs in {safe(", ".join(seeds))}</p>
{"".join(f"<section><h2>{safe(title)}</h2>{body}</section>" for title, body in sections)}
</body></html>
"""


def write_report(cfg):
    for path in cfg.data or fail("report needs run folders, or folders that hold them: python evaluate.py report out"):
        check_input(path, "data", "bash demo.sh")
    out = Path(cfg.out)
    if out.suffix != ".html":
        fail(f"--out={out} must end in .html")
    if out.exists() and not cfg.overwrite and MARK not in out.read_text(encoding="utf-8", errors="replace")[:200]:
        fail(f"{out} is no report of ours; choose another --out, or replace it with --overwrite=true")
    runs = read_runs(cfg.data)
    if not runs:
        fail(f"no runs in {', '.join(cfg.data)} (no run.json, annotations.jsonl or rewards.json); make them with: bash demo.sh")
    tables = [table_1(runs), table_paired(runs, cfg.seed), table_2(runs, cfg.data), table_3(runs)]
    closer = table_rewards(runs)
    say(("\n\n\n" if not cfg.markdown else "\n\n").join(map(as_markdown if cfg.markdown else as_text, tables)))
    for path, text in ((out, page(runs, tables, closer)), (out.with_suffix(".md"), "\n\n".join(map(as_markdown, [*tables, closer])) + "\n")):
        with replacing(path) as file:
            file.write(text.encode("utf-8", "replace").decode())
    say(f"\n{out} and {out.with_suffix('.md')}")
