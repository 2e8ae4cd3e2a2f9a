"""The page of `python evaluate.py report`: what came out, the plots, tokens painted by reward, and
where each number comes from.

No script, nothing loaded, light and dark. All text that a model or a person wrote goes through
safe()."""
if __name__ == "__main__":
    raise SystemExit("page.py is a part of: python evaluate.py report")

import json, math, statistics

from evaluate import mean_and_error
from extras.pages import document, safe
from extras.report.arms import (FINE, GAMMA_0, RLHF, RM_FINE, RM_RLHF, RM_TOKEN, SFT, TOKEN, arms,
                                as_html, checkpoints, larger_error, pm)
from extras.report.painted import before_and_after, heatmaps
from extras.report.plots import MARK, SHORT, Plot, colours, legend, mean_of_5
from plumbing.record import record_of


# ---------------------------------------------------------------- along training

# name of the file -> title, y axis
TRAINING = {"win_rate": ("Win rate against the reference", "%"),
            "reward": ("Reward, each run on its own scale", "0: the first step, 1: the highest"),
            "kl": ("KL from the starting policy", "nats per response"),
            "length": ("Length of a response", "tokens")}


def training_lines(runs):
    """Win rate, reward, KL and length along training -> {name: seed_lines()}"""
    groups = arms(runs, "ppo")
    return {"win_rate": win_rate_lines(groups, runs), "reward": seed_lines(groups, scaled_reward),
            "kl": seed_lines(groups, metric("kl")),
            "length": seed_lines(groups, metric("response_length"))}


def training_plots(runs):
    """-> {name: Plot} of what there is. All have the same steps on their x axis"""
    paint = colours(arms(runs, "ppo"))
    lines = training_lines(runs)
    last = max((steps[-1] for found in lines.values() for steps, *_ in found.values()), default=0)
    return {name: training_plot(name, found, paint, last) for name, found in lines.items() if found}


def training_plot(name, lines, paint, last):
    """lines: of seed_lines(); paint: label -> colour; last: the highest step on the x axis"""
    title, ylabel = TRAINING[name]
    edges = [edge for _, _, low, high in lines.values() for edge in low + high]
    keys = [(label, paint[label]) for label in lines]
    plot = Plot(title, "step", ylabel, [0, last], edges, right=88, keys=keys)

    # The bands first, so that no band hides a line.
    for label, (steps, _, low, high) in lines.items():
        if low != high:
            plot.band(steps, low, high, paint[label])
    ends = []
    for label, (steps, mean, low, high) in lines.items():
        if name != "win_rate" and len(steps) >= 10:
            if low == high:  # one seed, no band: each step, faintly
                plot.line(steps, mean, paint[label], width=1, opacity=0.3)
            mean = mean_of_5(mean)
        plot.line(steps, mean, paint[label])
        if label in SHORT:
            ends.append((SHORT[label], mean[-1], paint[label]))
        if name == "win_rate":
            for step, y in zip(steps, mean):
                plot.dot(step, y, paint[label], note=f"{label}, step {step}: {y:.1f}")

    # The reference wins half of the comparisons with itself.
    if name == "win_rate" and plot.y_range[0] <= 50 <= plot.y_range[1]:
        plot.rule(50)
        ends.append(("the reference", 50, "var(--quiet)"))
    plot.name_ends(ends)
    return plot


def curves(runs):
    """The plots of training_plots(), for the page"""
    groups = arms(runs, "ppo")
    plots = training_plots(runs)
    panels = []
    for name, (title, _) in TRAINING.items():
        if name in plots:
            panels.append(plots[name].html())
        else:
            panels.append(f"<p class=missing>{safe(title)}: nothing of it in these folders</p>")

    seeds = max((len(mine) for mine in groups.values()), default=0)
    note = "One seed; the band of a win rate is its standard error, faint lines are single steps."
    if seeds > 1:
        note = f"Lines: the mean of {seeds} seeds; bands: lowest to highest."
    note += (" Reward, KL and length: means of five steps. Dotted: the reference, which wins half "
             "against itself.")
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
            if is_number(row.get(name)):
                found[row["step"]] = row[name]
        return found
    return read


def is_number(x):
    return isinstance(x, (int, float)) and math.isfinite(x)


def scaled_reward(run):
    """{step: reward}, scaled so that the first is 0 and the highest is 1"""
    rewards = metric("reward")(run)
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


# ---------------------------------------------------------------- reward hacking

def score_paths(runs):
    """{label: score_path() of each seed}, of the arms whose models were judged along training"""
    paths = {}
    for label, mine in arms(runs, "ppo").items():
        found = [score_path(run, runs) for run in mine]
        found = [path for path in found if len(path) > 1]
        if found:
            paths[label] = found
    return paths


def hacking_plots(runs):
    """The judge's win rate against the reward model's score -> {label: Plot}, a path per seed"""
    paths = score_paths(runs)
    paint = colours(arms(runs, "ppo"))

    # All plots have the same win rates on their axis.
    rates = []
    for of_arm in paths.values():
        rates += [figures["win_rate"] for path in of_arm for _, _, figures in path]
    width = 500 if len(paths) in (2, 4) else 330
    plots = {}
    for label, of_arm in paths.items():
        plots[label] = hacking_plot(label, of_arm, rates, paint[label], width)
    return plots


def hacking(runs):
    """The plots of hacking_plots(), for the page, and what they say"""
    plots = hacking_plots(runs)
    if not plots:
        return ("<p class=missing>needs annotations of models kept along training (in step_N of "
                "the runs)</p>")
    panels = []
    for label, paths in score_paths(runs).items():
        tone, figures, words = verdict(paths)
        said = f"<p class='verdict {tone}'>{safe(figures)}<br><b>{safe(words)}</b></p>"
        panels.append(plots[label].html(said))
    note = ("Win rate before the judge (the same axis in all) against the reward model's score; a "
            "line per seed, from the starting policy (ring; dotted: its win rate) to the last step "
            "(large dot). Up and to the right is learning; to the right alone, or down, is a "
            "policy that fools its reward model: said where the win rate has not risen by its "
            "standard error (the larger of that over seeds and that over pairs), or has fallen "
            "from its best by two.")
    grid = "grid2" if len(plots) in (2, 4) else "grid3"
    return f"<div class={grid}>{''.join(panels)}</div><figcaption>{note}</figcaption>"


def score_path(run, runs):
    """The judged models along a PPO run -> [(step, score, figures of win_rate)]. The score is the
    mean reward of the three rollout steps just before it, for the starting policy of the first"""
    rewards = metric("reward")(run)
    path = []
    for step, figures in checkpoints(run, runs):
        near = [0] if step == 0 else range(step - 3, step)
        scores = [rewards[s] for s in near if s in rewards]
        if scores:
            path.append((step, statistics.fmean(scores), figures))
    return path


def hacking_plot(label, paths, rates, colour, width):
    """rates: the win rates that the axis has to cover"""
    scores = [score for path in paths for _, score, _ in path]
    plot = Plot(label, "score by its own reward model →", "win rate, %", scores, rates, width=width,
                height=270)
    left, right = plot.x_range
    pad = 0.06 * ((right - left) or 1)
    plot.x_range = left - pad, right + pad
    plot.rule(statistics.fmean(path[0][2]["win_rate"] for path in paths))

    for path in paths:
        scores = [score for _, score, _ in path]
        wins = [f["win_rate"] for _, _, f in path]
        plot.line(scores, wins, colour, width=1.4, opacity=0.8)
        for i, (step, score, f) in enumerate(path):
            win_rate = pm(f["win_rate"], f["standard_error"])
            note = f"step {step}: score {score:.3f}, win rate {win_rate}"
            size = 2.6
            if i == 0:
                size = 4
            elif i == len(path) - 1:
                size = 6
            plot.dot(score, f["win_rate"], colour, size, hollow=i == 0, note=note)
    return plot


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
    the larger_error() of that"""
    gains = []
    errors = []  # of each seed: those of both win rates together
    for path in paths:
        before, after = path[first][2], path[last][2]
        gains.append(after["win_rate"] - before["win_rate"])
        errors.append(math.hypot(before["standard_error"] or 0, after["standard_error"] or 0))
    mean, error = mean_and_error(gains)
    return mean, larger_error(error, errors)


# ---------------------------------------------------------------- calibration

CALIBRATION = {"preferences": "Held-out pairs of the original kind",
               "edits": "Held-out edited pairs"}


def calibration_plots(runs):
    """Do the reward models know when they are right? -> {kind of pairs: Plot}"""
    groups = arms(runs, "reward model")
    paint = colours(groups)
    plots = {}
    for kind, title in CALIBRATION.items():
        lines = calibration_lines(groups, kind)
        if lines:
            plots[kind] = calibration_plot(title, lines, paint)
    return plots


def calibrations(runs):
    """The plots of calibration_plots(), for the page; "" where no run has a calibration"""
    panels = [plot.html() for plot in calibration_plots(runs).values()]
    if not panels:
        return ""
    note = ("On the dashed line σ(|R₁ − R₂|), how sure the model is of a pair, is how often it is "
            "right; below the line it is too sure.")
    panels = f"<div class=grid2>{''.join(panels)}</div>"
    return f"{legend(arms(runs, 'reward model'))}{panels}<figcaption>{note}</figcaption>"


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


def calibration_plot(title, lines, paint):
    accuracies = [b["accuracy"] for _, bins in lines for b in bins]
    keys = {label: paint[label] for label, _ in lines}
    plot = Plot(title, "confidence σ(|R₁ − R₂|)", "share right", [0.5, 1.0],
                [min(0.5, *accuracies), 1.0], keys=keys.items())
    plot.line([0.5, 1], [0.5, 1], "var(--rule)", dashed=True)
    for label, bins in lines:
        confidences = [b["confidence"] for b in bins]
        plot.line(confidences, [b["accuracy"] for b in bins], paint[label], width=1.4, opacity=0.8)
        for b in bins:
            right = f"{b['accuracy']:.2f} right at {b['confidence']:.2f}"
            note = f"{label}: {right} (n={b['n']})"
            plot.dot(b["confidence"], b["accuracy"], paint[label], note=note)
    return plot


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
                blocks.append(record_details(name, made, "sub"))
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

WORDS = {
    SFT: "supervised fine-tuning: the policy that PPO starts from",
    RLHF: "PPO; one reward for an answer, from a reward model that learnt from preference pairs",
    FINE: "PPO; one reward for an answer, from a reward model that learnt from edits",
    TOKEN: "PPO; a reward for every token, from a reward model that learnt which tokens the edits "
           "changed (Eq. 4)",
    GAMMA_0: "the same, but each token answers for its own reward only; not in the paper",
    f"{RM_RLHF}, {RM_FINE}, {RM_TOKEN}": "the reward models (RM) of these three, in this order",
    "win rate": "how often the judge prefers the answer to the reference's; a draw counts half",
    "r, R": "the reward of a token, and of an answer: the mean of its r (Eq. 1)",
    "U₀, U₁": "the tokens that both answers of a pair share, and all others",
    "EOS": "the token that ends an answer (∎)",
    "KL": "how far the policy has moved from where it started (Kullback-Leibler divergence)",
    "AUROC": "how often a token of one kind scores above one of the other; 0.5 is chance",
    "ECE": "expected calibration error: between how sure a reward model is and how often it is "
           "right; 0 is best"}


def glossary():
    rows = [f"<dt>{safe(name)}</dt><dd>{safe(meaning)}</dd>" for name, meaning in WORDS.items()]
    return ("<details class=words><summary>What the names and abbreviations mean</summary>"
            f"<dl>{''.join(rows)}</dl></details>")


def page(runs, tables, closer, answer):
    """The page as HTML. runs: of tables.read_runs; tables: the paper's, each (title, header, rows,
    note); closer: the table of all reward models; answer: sentences, of answer.sentences"""
    reward_models = "<p class=missing>no rewards.json in these folders</p>"
    if closer[2]:
        reward_models = as_html(closer, small=True) + calibrations(runs)
    sections = {"One prompt, before and after": before_and_after(runs),
                "Along training": curves(runs),
                "Which arm fooled its reward model?": hacking(runs),
                "The paper's tables, and ours": "".join(map(as_html, tables)),
                "What each token is paid": heatmaps(runs),
                "The reward models": reward_models,
                "Where the numbers come from": provenance(runs)}

    # A folder of data has a run.json, too, but it is no run.
    number = sum(run["kind"] != "other" or bool(run["annotations"]) for run in runs)
    seeds = sorted({run["seed"] for run in runs})
    body = ["<h1>Aligning language models via fine-grained supervision</h1>"]
    body.append(f"<p class=quiet>{number} runs in {safe(', '.join(seeds))}</p>")
    for sentence in answer:
        unbroken = safe(sentence).replace(" ± ", "&nbsp;±&nbsp;")
        body.append(f"<p class=answer>{unbroken}</p>")
    body.append(glossary())
    for title, content in sections.items():
        body.append(f"<section><h2>{safe(title)}</h2>{content}</section>")
    return document(MARK, "Fine-grained RLHF: report", "".join(body))
