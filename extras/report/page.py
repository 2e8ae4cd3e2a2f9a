"""The page of `python evaluate.py report`: figures as inline SVG, token heatmaps, where each number came from.

No script, nothing from outside, light and dark; all text that a model or a person wrote goes through safe()."""
import json
import math
import statistics

from common import mean_and_error
from extras.pages import document, heat, safe
from extras.report.arms import ORDER, arms, as_html, checkpoints, pm
from plumbing.record import record_of

MARK = "<!-- the report of evaluate.py -->"


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
        points = self.points([*xs, *xs[::-1]], [*low, *high[::-1]])
        self.parts.append(f'<polygon points="{points}" style="fill:{colour}" class="band"/>')

    def dot(self, x, y, colour, size=3.4, hollow=False, note=""):
        cx, cy = self.at(x, y)
        fill = "var(--page)" if hollow else colour
        self.parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{size}" style="stroke:{colour};fill:{fill}" '
                          f'class="dot"><title>{safe(note)}</title></circle>')

    def rule(self, y, words, end=False):
        x0, cy = self.at(self.x_range[0], y)
        x1 = self.width - self.right
        x, side = (x1, "end") if end else (x0 + 5, "")
        self.parts.insert(0, f'<line x1="{x0:.1f}" x2="{x1}" y1="{cy:.1f}" y2="{cy:.1f}" class="rule"/>'
                             f'<text x="{x:.1f}" y="{cy - 5:.1f}" class="{side}">{safe(words)}</text>')

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
    others = [label for label in labels if label not in ORDER]
    numbers = {label: ORDER.index(label) % 3 if label in ORDER else 3 + others.index(label) % 5 for label in labels}
    return {label: f"var(--c{number})" for label, number in numbers.items()}


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
    if any((run["path"] / "val_annotations.jsonl").exists() for run in runs):
        note += " Win rates are on the questions that a step was chosen on, not on those of Table 1."
    return legend(groups) + f"<div class=grid2>{''.join(panels)}</div><figcaption>{note}</figcaption>"


def legend(groups):
    paint = colours(groups)
    keys = (f'<span><i style="background:{paint[label]}"></i>{safe(label)}</span>' for label in groups)
    return f"<p class=legend>{''.join(keys)}</p>"


def path_of(run, runs):
    """[(step, mean reward of the rollouts just before it, figures of win_rate)] along a PPO run"""
    rewards = {row["step"]: row["reward"] for row in run["metrics"] if isinstance(row.get("reward"), (int, float))}
    near = {step: [rewards[s] for s in ([0] if step == 0 else range(step - 3, step)) if s in rewards]
            for step, _ in checkpoints(run, runs)}
    return [(step, statistics.fmean(near[step]), figures) for step, figures in checkpoints(run, runs) if near[step]]


def verdict(paths):
    """One arm's paths, one per seed -> (how bad: "bad", "warn" or ""), figures, words"""
    def gain(first, last):  # points of win rate, and their error
        mean, error = mean_and_error([path[last][2]["win_rate"] - path[first][2]["win_rate"] for path in paths])
        errors = (paths[0][i][2]["standard_error"] or 0 for i in (first, last))
        return mean, math.hypot(*errors) if error is None else error
    score = statistics.fmean(path[-1][1] - path[0][1] for path in paths)
    won, error = gain(0, -1)
    steps = range(min(map(len, paths)))
    best = max(steps, key=lambda i: statistics.fmean(path[i][2]["win_rate"] for path in paths))
    fell, fall_error = gain(best, -1)
    figures = f"score {score:+.2f}, win rate {won:+.1f} ± {error:.1f}"
    if score <= 0:
        return "", figures, "the score did not rise"
    if won < error:
        return "bad", figures, "the score rose, the judge did not follow: reward hacking"
    if fell < -2 * fall_error:
        figures += f"; since step {paths[0][best][0]} {fell:+.1f} ± {fall_error:.1f}"
        return "warn", figures, f"the judge followed to step {paths[0][best][0]}, then fell back: over-optimised"
    return "", figures, "the judge follows the score"


def hacking(runs):
    """The judge's win rate against the reward model's score, one panel per arm, a path per seed"""
    groups = arms(runs, "ppo")
    paint, panels = colours(groups), []
    paths = {label: [path for run in mine if len(path := path_of(run, runs)) > 1] for label, mine in groups.items()}
    paths = {label: of for label, of in paths.items() if of}
    if not paths:
        return "<p class=missing>needs annotations of models kept along training (in step_N of the runs)</p>"
    rates = [figures["win_rate"] for of in paths.values() for path in of for _, _, figures in path]
    for label, of in paths.items():
        tone, figures, words = verdict(of)
        plot = Plot(label, "score by its own reward model →", [x for path in of for _, x, _ in path], rates, 330, 270)
        pad = 0.06 * ((plot.x_range[1] - plot.x_range[0]) or 1)
        plot.x_range = plot.x_range[0] - pad, plot.x_range[1] + pad
        plot.rule(statistics.fmean(path[0][2]["win_rate"] for path in of), "where it began", end=True)
        for path in of:
            plot.line([x for _, x, _ in path], [f["win_rate"] for _, _, f in path], paint[label], "thin")
            for i, (step, x, f) in enumerate(path):
                note = f"step {step}: score {x:.3f}, win rate {pm(f['win_rate'], f['standard_error'])}"
                size = 4 if i == 0 else 6 if i == len(path) - 1 else 2.6
                plot.dot(x, f["win_rate"], paint[label], size, hollow=i == 0, note=note)
        panels.append(f"<div>{plot.svg()}<p class='verdict {tone}'>{safe(figures)}<br><b>{safe(words)}</b></p></div>")
    return (f"<div class=grid3>{''.join(panels)}</div><figcaption>Win rate before the judge (%, the same axis in all "
            "panels) against the reward model's score; a line per seed, from the starting policy (ring) to the last "
            "step (large dot). Up and to the right is learning; to the right alone, or down, is a policy that fools "
            "its reward model: said where the win rate has not risen by its standard error, or has fallen from its "
            "best by two.</figcaption>")


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

def paid(run, sample):
    """One answer of an arm, painted as PPO was paid for it: r_t at every token, or all of R at the last"""
    at_the_end = run["config"].get("level") == "sequence"
    sizes = sorted(abs(r) for s in run["samples"] for r in ([s["reward"]] if at_the_end else s["token_rewards"]))
    scale = sizes[int(0.98 * (len(sizes) - 1))] if sizes else 1  # a few outliers must not pale the rest
    tokens = list(sample["tokens"])
    if tokens and tokens[-1] == "":
        tokens[-1] = "∎"
    rewards = [None] * (len(tokens) - 1) + [sample["reward"]] if at_the_end else sample["token_rewards"]
    R = f"R = {sample['reward']:+.2f}" + ", all at the last token" * at_the_end
    return f"<div><h4>{safe(run['label'])} <em>{R}</em></h4>{heat(tokens, rewards, scale)}</div>"


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
        question = f"<p><b>{safe(instruction)}</b>{more} <span class=quiet>step {step}, {safe(seed)}</span></p>"
        blocks.append(f"<div class=sample>{question}<div class=grid3>{answers}</div></div>")
    note = ("What PPO is paid at each token, the end of the answer among them: blue for a positive reward, red for a "
            "negative one, each arm on its own scale. Point at a token for its number.")
    return f"{''.join(blocks)}<figcaption>{note}</figcaption>"


# ---------------------------------------------------------------- where it comes from

def provenance(runs):
    def details(title, record, facts="", kind="run"):
        config = json.dumps(record.get("config", {}), indent=1)
        return (f"<details class={kind}><summary>{title}</summary><p class=quiet>{safe(facts)}</p>"
                f"<pre>{safe(record.get('command', 'no run.json'))}</pre><pre>{safe(config)}</pre></details>")
    rows = []
    for run in runs:
        record = run["record"]
        known = {name: record.get(name) or "-" for name in ("commit", "world_size", "device", "torch", "transformers")}
        facts = [f"finished {record['finished']}" if record.get("finished") else "not finished",
                 f"commit {known['commit']}" + " + changes" * bool(record.get("dirty")),
                 f"{known['world_size']} rank(s)", str(known["device"]), f"torch {known['torch']}",
                 f"transformers {known['transformers']}", f"{len(run['metrics'])} logged steps"]
        rows.append(details(f"<b>{safe(run['path'])}</b> {safe(run['label'])}", record, " · ".join(facts)))
        for name in ("outputs.jsonl", "annotations.jsonl", "val_annotations.jsonl", "rewards.json"):
            if made := record_of(run["path"] / name):
                rows.append(details(safe(run["path"] / name), made, kind="sub"))
    return "".join(rows)


def page(runs, tables, closer):
    missing = "<p class=missing>no rewards.json in these folders</p>"
    sections = [("Which arm fooled its reward model?", hacking(runs)), ("Along training", curves(runs)),
                ("The paper's tables, and ours", "".join(map(as_html, tables))),
                ("What each token is paid", heatmaps(runs)),
                ("The reward models", as_html(closer, small=True) + calibrations(runs) if closer[2] else missing),
                ("Where the numbers come from", provenance(runs))]
    seeds = sorted({run["seed"] for run in runs})
    body = [f"<h1>Aligning language models via fine-grained supervision</h1>"
            f"<p class=quiet>{len(runs)} runs in {safe(', '.join(seeds))}</p>"]
    for title, content in sections:
        body.append(f"<section><h2>{safe(title)}</h2>{content}</section>")
    return document(MARK, "Fine-grained RLHF: report", "".join(body))
