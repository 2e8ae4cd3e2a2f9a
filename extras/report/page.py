"""The page of `python evaluate.py report`: figures as inline SVG, tokens painted by reward, and
where each number comes from.

No script, nothing loaded, light and dark. All text that a model or a person wrote goes through
safe()."""
if __name__ == "__main__":
    raise SystemExit("page.py is a part of: python evaluate.py report")

import json, math, statistics

from evaluate import mean_and_error
from extras.pages import document, heat, safe
from extras.report.arms import (FINE, GAMMA_0, RLHF, RM_FINE, RM_RLHF, RM_TOKEN, TOKEN, arms,
                                as_html, checkpoints, pm)
from plumbing.record import record_of

MARK = "<!-- the report of evaluate.py -->"
COLOURS = {TOKEN: 0, FINE: 1, RLHF: 2, GAMMA_0: 3, RM_TOKEN: 0, RM_FINE: 1, RM_RLHF: 2}


# ---------------------------------------------------------------- figures: inline SVG

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


class Plot:
    """Axes and what is drawn on them: data coordinates in, SVG out"""

    left = 48  # margins in pixels
    right = 14
    top = 34
    bottom = 40

    def __init__(self, title, xlabel, xs, ys, width=500, height=250):
        """xs, ys: all values that the axes have to cover; width, height: in pixels"""
        self.title = title
        self.xlabel = xlabel
        self.width = width
        self.height = height
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

    def line(self, xs, ys, colour, style=""):
        self.parts.append(f'<polyline points="{self.coordinates(xs, ys)}" class="line {style}" '
                          f'style="stroke:{colour}"/>')

    def band(self, xs, low, high, colour):
        outline = self.coordinates([*xs, *xs[::-1]], [*low, *high[::-1]])
        self.parts.append(f'<polygon points="{outline}" style="fill:{colour}" class="band"/>')

    def dot(self, x, y, colour, size=3.4, hollow=False, note=""):
        cx, cy = self.at(x, y)
        fill = "var(--page)" if hollow else colour
        self.parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{size}" '
                          f'style="stroke:{colour};fill:{fill}" class="dot">'
                          f'<title>{safe(note)}</title></circle>')

    def rule(self, y, words, end=False):
        """A dotted line across, behind everything else; end: its words are at the right end"""
        x0, cy = self.at(self.x_range[0], y)
        x1 = self.width - self.right
        x = x1 if end else x0 + 5
        side = "end" if end else ""
        line = f'<line x1="{x0:.1f}" x2="{x1}" y1="{cy:.1f}" y2="{cy:.1f}" class="rule"/>'
        text = f'<text x="{x:.1f}" y="{cy - 5:.1f}" class="{side}">{safe(words)}</text>'
        self.parts.insert(0, line + text)

    def grid(self):
        """Horizontal lines with the numbers of the y axis, and the ticks of the x axis"""
        grid = []
        for y in self.y_ticks:
            x0, cy = self.at(self.x_range[0], y)
            x1 = self.width - self.right
            grid.append(f'<line x1="{x0}" x2="{x1}" y1="{cy:.1f}" y2="{cy:.1f}" class="grid"/>')
            grid.append(f'<text x="{x0 - 7}" y="{cy + 4:.1f}" class="end">{short(y)}</text>')
        first, last = self.x_range
        for x in self.x_ticks:
            if first - 1e-9 <= x <= last + 1e-9:
                cx, cy = self.at(x, self.y_range[0])
                grid.append(f'<line x1="{cx:.1f}" x2="{cx:.1f}" y1="{cy:.1f}" y2="{cy + 4:.1f}" '
                            'class="tick"/>')
                grid.append(f'<text x="{cx:.1f}" y="{cy + 17:.1f}" class="mid">{short(x)}</text>')
        return "".join(grid)

    def svg(self):
        title = safe(self.title)
        middle = (self.left + self.width - self.right) / 2
        return (f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{title}">'
                f'<text x="0" y="14" class="title">{title}</text>{self.grid()}'
                f'{"".join(self.parts)}'
                f'<text x="{middle}" y="{self.height - 4}" class="mid quiet">{safe(self.xlabel)}'
                '</text></svg>')


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


def legend(groups):
    keys = []
    for label, colour in colours(groups).items():
        keys.append(f'<span><i style="background:{colour}"></i>{safe(label)}</span>')
    return f"<p class=legend>{''.join(keys)}</p>"


# ---------------------------------------------------------------- along training

def curves(runs):
    """Win rate, reward, KL and length along training: a line per arm, seeds as bands"""
    groups = arms(runs, "ppo")
    paint = colours(groups)

    win_rates = win_rate_lines(groups, runs)
    rewards = seed_lines(groups, scaled_reward)
    kls = seed_lines(groups, metric("kl"))
    lengths = seed_lines(groups, metric("response_length"))
    panels = [
        panel("Win rate, % (± standard error, or the range of seeds)", win_rates, paint, wins=True),
        panel("Reward, each run on its own scale: 0 first, 1 highest", rewards, paint),
        panel("KL from the starting policy, nats per response", kls, paint),
        panel("Length of a response, tokens", lengths, paint)]

    seeds = max((len(mine) for mine in groups.values()), default=0)
    note = "One seed."
    if seeds > 1:
        note = f"Lines: the mean of {seeds} seeds; bands: lowest to highest."
    if any((run["path"] / "val_annotations.jsonl").exists() for run in runs):
        note += (" Win rates are on the questions that a step was chosen on, not on those of "
                 "Table 1.")
    panels = f"<div class=grid2>{''.join(panels)}</div>"
    return f"{legend(groups)}{panels}<figcaption>{note}</figcaption>"


def metric(name):
    """-> a function: run -> {step: the number of this name in metrics.jsonl}"""
    def read(run):
        found = {}
        for row in run["metrics"]:
            if isinstance(row.get(name), (int, float)):
                found[row["step"]] = row[name]
        return found
    return read


def scaled_reward(run):
    """{step: reward}, scaled so that the first is 0 and the highest is 1"""
    rewards = {row["step"]: row["reward"] for row in run["metrics"] if "reward" in row}
    if not rewards:
        return {}
    first = rewards[min(rewards)]
    span = (max(rewards.values()) - first) or 1
    return {step: (reward - first) / span for step, reward in rewards.items()}


def win_rate_lines(groups, runs):
    """seed_lines() of the win rates; an arm with one seed gets its standard error as its band"""
    def read(run):
        return {step: figures["win_rate"] for step, figures in checkpoints(run, runs)}

    lines = seed_lines(groups, read)
    for label, (steps, mean, _, _) in lines.items():
        if len(groups[label]) == 1:
            judged = dict(checkpoints(groups[label][0], runs))
            errors = [judged[step]["standard_error"] or 0 for step in steps]
            low = [y - error for y, error in zip(mean, errors)]
            high = [y + error for y, error in zip(mean, errors)]
            lines[label] = steps, mean, low, high
    return lines


def seed_lines(groups, read):
    """read: run -> {step: y}. -> {label: (steps, mean, lowest, highest over its seeds)}; an arm
    without any value is left out"""
    lines = {}
    for label, mine in groups.items():
        seeds = [read(run) for run in mine]
        line = across_seeds([seed for seed in seeds if seed])
        steps = line[0]
        if steps:
            lines[label] = line
    return lines


def across_seeds(seeds):
    """[{step: y}], one per seed -> steps that all have, and there the mean, lowest and highest"""
    if not seeds:
        return [], [], [], []
    steps = sorted(set.intersection(*map(set, seeds)))
    columns = [[seed[step] for seed in seeds] for step in steps]
    mean = [statistics.fmean(column) for column in columns]
    return steps, mean, list(map(min, columns)), list(map(max, columns))


def panel(title, lines, paint, *, wins=False):
    """A plot of seed_lines(). paint: label -> colour; wins: these are win rates, with a dot for
    each judged model and a line at 50"""
    if not lines:
        return f"<p class=missing>{safe(title)}: nothing of it in these folders</p>"
    all_steps = []
    edges = []
    for steps, _, low, high in lines.values():
        all_steps += steps
        edges += low + high
    plot = Plot(title, "step", all_steps, edges)

    # The bands first, so that no band hides a line.
    for label, (steps, _, low, high) in lines.items():
        if low != high:
            plot.band(steps, low, high, paint[label])
    for label, (steps, mean, _, _) in lines.items():
        plot.line(steps, mean, paint[label])
        if wins:
            for step, y in zip(steps, mean):
                plot.dot(step, y, paint[label], note=f"{label}, step {step}: {y:.1f}")
    if wins and plot.y_range[0] <= 50 <= plot.y_range[1]:
        plot.rule(50, "the reference")
    return plot.svg()


# ---------------------------------------------------------------- reward hacking

def hacking(runs):
    """The judge's win rate against the reward model's score: a panel per arm, a path per seed"""
    groups = arms(runs, "ppo")
    paint = colours(groups)
    paths = {}
    for label, mine in groups.items():
        found = [score_path(run, runs) for run in mine]
        found = [path for path in found if len(path) > 1]
        if found:
            paths[label] = found
    if not paths:
        return ("<p class=missing>needs annotations of models kept along training (in step_N of "
                "the runs)</p>")

    # All panels have the same win rates on their axis.
    rates = []
    for of_arm in paths.values():
        rates += [figures["win_rate"] for path in of_arm for _, _, figures in path]
    panels = []
    for label, of_arm in paths.items():
        panels.append(hacking_panel(label, of_arm, rates, paint[label]))
    note = ("Win rate before the judge (%, the same axis in all panels) against the reward model's "
            "score; a line per seed, from the starting policy (ring) to the last step (large dot). "
            "Up and to the right is learning; to the right alone, or down, is a policy that fools "
            "its reward model: said where the win rate has not risen by its standard error, or has "
            "fallen from its best by two.")
    return f"<div class=grid3>{''.join(panels)}</div><figcaption>{note}</figcaption>"


def score_path(run, runs):
    """The judged models along a PPO run -> [(step, score, figures of win_rate)]. The score is the
    mean reward of the three rollout steps just before it, for the starting policy of the first"""
    rewards = {}
    for row in run["metrics"]:
        if isinstance(row.get("reward"), (int, float)):
            rewards[row["step"]] = row["reward"]
    path = []
    for step, figures in checkpoints(run, runs):
        near = [0] if step == 0 else range(step - 3, step)
        scores = [rewards[s] for s in near if s in rewards]
        if scores:
            path.append((step, statistics.fmean(scores), figures))
    return path


def hacking_panel(label, paths, rates, colour):
    """rates: the win rates that the axis has to cover"""
    tone, figures, words = verdict(paths)
    scores = [score for path in paths for _, score, _ in path]
    plot = Plot(label, "score by its own reward model →", scores, rates, 330, 270)
    left, right = plot.x_range
    pad = 0.06 * ((right - left) or 1)
    plot.x_range = left - pad, right + pad
    start = statistics.fmean(path[0][2]["win_rate"] for path in paths)
    plot.rule(start, "where it began", end=True)

    for path in paths:
        scores = [score for _, score, _ in path]
        wins = [f["win_rate"] for _, _, f in path]
        plot.line(scores, wins, colour, "thin")
        for i, (step, score, f) in enumerate(path):
            win_rate = pm(f["win_rate"], f["standard_error"])
            note = f"step {step}: score {score:.3f}, win rate {win_rate}"
            size = 2.6
            if i == 0:
                size = 4
            elif i == len(path) - 1:
                size = 6
            plot.dot(score, f["win_rate"], colour, size, hollow=i == 0, note=note)
    return (f"<div>{plot.svg()}<p class='verdict {tone}'>{safe(figures)}<br>"
            f"<b>{safe(words)}</b></p></div>")


def verdict(paths):
    """The paths of one arm, one per seed -> (tone: "bad", "warn" or "", figures, words)"""
    score = statistics.fmean(path[-1][1] - path[0][1] for path in paths)
    won, error = gain(paths, 0, -1)
    figures = f"score {score:+.2f}, win rate {won:+.1f} ± {error:.1f}"
    if score <= 0:
        return "", figures, "the score did not rise"
    if won < error:
        return "bad", figures, "the score rose, the judge did not follow: reward hacking"

    # From its best step on, did the win rate fall by two standard errors?
    mean = {}
    for i in range(min(map(len, paths))):
        mean[i] = statistics.fmean(path[i][2]["win_rate"] for path in paths)
    best = max(mean, key=mean.get)
    fell, fall_error = gain(paths, best, -1)
    if fell < -2 * fall_error:
        step = paths[0][best][0]
        figures += f"; since step {step} {fell:+.1f} ± {fall_error:.1f}"
        return "warn", figures, f"the judge followed to step {step}, then fell back: over-optimised"
    return "", figures, "the judge follows the score"


def gain(paths, first, last):
    """-> the points of win rate won between two places of the paths (a mean over the seeds), and
    the standard error of that"""
    gains = [path[last][2]["win_rate"] - path[first][2]["win_rate"] for path in paths]
    mean, error = mean_and_error(gains)
    if error is None:  # one seed: the errors of both win rates together
        errors = [paths[0][i][2]["standard_error"] or 0 for i in (first, last)]
        error = math.hypot(*errors)
    return mean, error


# ---------------------------------------------------------------- calibration

def calibrations(runs):
    """Do the reward models know when they are right? "" where no run has a calibration"""
    groups = arms(runs, "reward model")
    paint = colours(groups)
    panels = []
    for kind, title in (("preferences", "Held-out pairs of the original kind"),
                        ("edits", "Held-out edited pairs")):
        lines = calibration_lines(groups, kind)
        if lines:
            panels.append(calibration_panel(f"{title}: share right", lines, paint))
    if not panels:
        return ""
    note = "On the dashed line σ(R₁ − R₂) means what it says; below it the model is too sure."
    panels = f"<div class=grid2>{''.join(panels)}</div>"
    return f"{legend(groups)}{panels}<figcaption>{note}</figcaption>"


def calibration_lines(groups, kind):
    """[(label, bins)] of all runs, for the files with this kind of pairs"""
    lines = []
    for label, mine in groups.items():
        for run in mine:
            for figures in run["rewards"]:
                calibration = figures.get("calibration") or {}
                if figures.get("kind") == kind and calibration.get("bins"):
                    lines.append((label, calibration["bins"]))
    return lines


def calibration_panel(title, lines, paint):
    accuracies = [b["accuracy"] for _, bins in lines for b in bins]
    plot = Plot(title, "confidence σ(|R₁ − R₂|)", [0.5, 1.0], [min(0.5, *accuracies), 1.0])
    plot.line([0.5, 1], [0.5, 1], "var(--grid)", "dashed")
    for label, bins in lines:
        confidences = [b["confidence"] for b in bins]
        plot.line(confidences, [b["accuracy"] for b in bins], paint[label], "thin")
        for b in bins:
            right = f"{b['accuracy']:.2f} right at {b['confidence']:.2f}"
            note = f"{label}: {right} (n={b['n']})"
            plot.dot(b["confidence"], b["accuracy"], paint[label], note=note)
    return plot.svg()


# ---------------------------------------------------------------- tokens painted by reward

def heatmaps(runs, prompts=3):
    """Answers of all arms of one seed to the same prompts: some of the last step, one of the
    first"""
    groups = arms(runs, "ppo")
    runs = [run for mine in groups.values() for run in mine if run["samples"]]
    if not runs:
        return "<p class=missing>no samples.jsonl in these folders</p>"
    seed = min(run["seed"] for run in runs)
    runs = [run for run in runs if run["seed"] == seed]
    by_run = [samples_by_key(run) for run in runs]

    # What all arms answered, in the order of the first; if there is nothing, what the first did
    shared = set.intersection(*map(set, by_run)) or set(by_run[0])
    in_order = [key for key in by_run[0] if key in shared]
    first = min(step for step, _, _ in shared)
    last = max(step for step, _, _ in shared)
    shown = [key for key in in_order if key[0] == last][:prompts]
    if first < last:
        shown += [key for key in in_order if key[0] == first][:1]

    blocks = []
    for key in shown:
        answers = []
        for run, samples in zip(runs, by_run):
            if key in samples:
                answers.append(painted_answer(run, samples[key]))
        answers = f"<div class=grid3>{''.join(answers)}</div>"
        blocks.append(f"<div class=sample>{prompt_of(key, seed)}{answers}</div>")
    note = ("What PPO is paid at each token, the end of the answer among them: blue for a positive "
            "reward, red for a negative one, each arm on its own scale. Point at a token for its "
            "number.")
    return f"{''.join(blocks)}<figcaption>{note}</figcaption>"


def samples_by_key(run):
    """{(step, instruction, input): row of samples.jsonl}"""
    found = {}
    for sample in run["samples"]:
        key = sample["step"], sample["instruction"], sample.get("input") or ""
        found[key] = sample
    return found


def prompt_of(key, seed):
    step, instruction, more = key
    shown = f"<b>{safe(instruction)}</b>"
    if more:
        shown += f"<br><span class=quiet>{safe(more)}</span>"
    return f"<p>{shown} <span class=quiet>step {step}, {safe(seed)}</span></p>"


def painted_answer(run, sample):
    """One answer of an arm, painted as PPO was paid for it: r_t at each token, or all of R at the
    last one"""
    tokens = list(sample["tokens"])
    if tokens and tokens[-1] == "":
        tokens[-1] = "∎"
    R = f"R = {sample['reward']:+.2f}"
    rewards = sample["token_rewards"]
    if run["config"].get("level") == "sequence":
        R += ", all at the last token"
        rewards = [None] * (len(tokens) - 1) + [sample["reward"]]
    painted = heat(tokens, rewards, paid_scale(run))
    return f"<div><h4>{safe(run['label'])} <em>{R}</em></h4>{painted}</div>"


def paid_scale(run):
    """The |reward| with the deepest colour: 98% are smaller, so a few outliers do not make all
    other tokens pale"""
    sizes = []
    for sample in run["samples"]:
        if run["config"].get("level") == "sequence":
            sizes.append(abs(sample["reward"]))
        else:
            sizes += map(abs, sample["token_rewards"])
    if not sizes:
        return 1
    sizes.sort()
    return sizes[int(0.98 * (len(sizes) - 1))]


# ---------------------------------------------------------------- where it comes from

def provenance(runs):
    """The record of every run, and of the files made from it, folded away"""
    blocks = []
    for run in runs:
        title = f"<b>{safe(run['path'])}</b> {safe(run['label'])}"
        blocks.append(record_details(title, run["record"], "run", facts_of(run)))
        for name in ("outputs.jsonl", "annotations.jsonl", "val_annotations.jsonl", "rewards.json"):
            made = record_of(run["path"] / name)
            if made:
                blocks.append(record_details(safe(run["path"] / name), made, "sub"))
    return "".join(blocks)


def facts_of(run):
    """One line: when, from which commit, on what a run was made"""
    record = run["record"]
    finished = "not finished"
    if record.get("finished"):
        finished = f"finished {record['finished']}"
    commit = f"commit {record.get('commit') or '-'}"
    if record.get("dirty"):
        commit += " + changes"
    facts = [finished, commit]
    facts.append(f"{record.get('world_size') or '-'} rank(s)")
    facts.append(str(record.get("device") or "-"))
    facts.append(f"torch {record.get('torch') or '-'}")
    facts.append(f"transformers {record.get('transformers') or '-'}")
    facts.append(f"{len(run['metrics'])} logged steps")
    return " · ".join(facts)


def record_details(title, record, style, facts=""):
    """title: HTML; style: a class of style.css"""
    command = record.get("command", "no run.json")
    config = json.dumps(record.get("config", {}), indent=1)
    return (f"<details class={style}><summary>{title}</summary><p class=quiet>{safe(facts)}</p>"
            f"<pre>{safe(command)}</pre><pre>{safe(config)}</pre></details>")


# ---------------------------------------------------------------- the page

def page(runs, tables, closer):
    """The page as HTML. runs: of tables.read_runs; tables: the paper's, each (title, header, rows,
    note); closer: the table of all reward models"""
    reward_models = "<p class=missing>no rewards.json in these folders</p>"
    if closer[2]:
        reward_models = as_html(closer, small=True) + calibrations(runs)
    sections = {"Which arm fooled its reward model?": hacking(runs),
                "Along training": curves(runs),
                "The paper's tables, and ours": "".join(map(as_html, tables)),
                "What each token is paid": heatmaps(runs),
                "The reward models": reward_models,
                "Where the numbers come from": provenance(runs)}

    seeds = sorted({run["seed"] for run in runs})
    body = ["<h1>Aligning language models via fine-grained supervision</h1>"]
    body.append(f"<p class=quiet>{len(runs)} runs in {safe(', '.join(seeds))}</p>")
    for title, content in sections.items():
        body.append(f"<section><h2>{safe(title)}</h2>{content}</section>")
    return document(MARK, "Fine-grained RLHF: report", "".join(body))
