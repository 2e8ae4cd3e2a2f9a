"""The report's answers, their tokens painted by reward: one prompt before and after PPO, and what
PPO was paid for along the way.

The report runs no model. r_t comes from samples.jsonl of ppo.py, and from painted.json next to the
runs, which reward_model.py show --json writes."""
if __name__ == "__main__":
    raise SystemExit("painted.py is a part of: python evaluate.py report")

import json
from pathlib import Path

from evaluate import points, win_rate
from extras.pages import heat, question_html, safe
from extras.report.arms import SFT, arms
from plumbing.ranks import fail


# ---------------------------------------------------------------- one prompt, before and after

def before_and_after(runs):
    """SFT's answer and that of the best arm to one prompt, painted by the token reward model, of
    the first seed that has a painted.json"""
    for seed in sorted({run["seed"] for run in runs}):
        painted = read_painted(Path(seed) / "painted.json")
        pair = sft_and_best([run for run in runs if run["seed"] == seed])
        if painted and pair:
            found = first_difference(painted["rows"], *pair)
            if found:
                return two_answers(*found, *pair, painted["reward_model"])
    return ("<p class=missing>needs painted.json next to the runs: reward_model.py show "
            "--json=FOLDER/painted.json, with outputs.jsonl of all arms (demo.sh does it)</p>")


def read_painted(file):
    """What reward_model.py show --json wrote, or None: there is none, or its rewards are not of
    tokens"""
    if not file.exists():
        return None
    try:
        painted = json.loads(file.read_text(encoding="utf-8"))
        return painted if painted["level"] == "token" else None
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{file} cannot be read ({error!r}); make it again: python reward_model.py show "
             f"--json={file}")


def sft_and_best(runs):
    """The runs of one seed -> the SFT run and the PPO run with the highest win rate, or None"""
    judged = [run for run in runs if run["annotations"]]
    starts = arms(judged, "sft").get(SFT, [])
    ppos = [run for mine in arms(judged, "ppo").values() for run in mine]
    if not starts or not ppos:
        return None

    def rate(run):
        return win_rate(row["preference"] for row in run["annotations"])["win_rate"] or 0
    return starts[0], max(ppos, key=rate)


def first_difference(rows, start, best):
    """The first of these rows on which the judge's verdicts on the two runs differ; if there is
    none, the first -> (row, answer of start, its preference, answer of best, its preference), or
    None. An answer that is not the judged one does not count."""
    verdicts = verdicts_of(start), verdicts_of(best)
    found = []
    for row in rows:
        question = row["instruction"], row.get("input") or ""
        mine = []
        for run, preferences in zip((start, best), verdicts):
            for answer in row["answers"]:
                key = *question, answer["text"]
                if Path(answer["file"]).parent.name == run["name"] and key in preferences:
                    mine += [answer, preferences[key]]
                    break
        if len(mine) == 4:
            found.append((row, *mine))
    differ = [one for one in found if one[2] != one[4]]
    return next(iter(differ + found), None)


def verdicts_of(run):
    """{(instruction, input, answer): preference}"""
    found = {}
    for row in run["annotations"]:
        key = row["instruction"], row.get("input") or "", row.get("output_2")
        if row["preference"] is not None:
            found.setdefault(key, row["preference"])
    return found


def two_answers(row, before, lost, after, won, start, best, reward_model):
    """Both answers of first_difference() side by side. lost, won: their preferences"""
    scale = max(map(abs, before["rewards"] + after["rewards"]), default=1)
    shown = []
    for when, run, answer, preference in (("Before", start, before, lost),
                                          ("After", best, after, won)):
        verdict = f"R = {answer['R']:+.2f}; {verdict_of(preference)}"
        painted = heat(with_end(answer["tokens"]), answer["rewards"], scale, numbers=True)
        heading = f"<h4>{when}: {safe(run['label'])} <em>{verdict}</em></h4>"
        shown.append(f"<div>{heading}{painted}</div>")
    chosen = "The first of the questions on which the judge's verdicts on these two differ."
    if lost == won:
        chosen = "The first question; these two have the same verdict on all that are here."
    note = (f"{chosen} Blue: a positive r, red: a negative one, to {safe(reward_model)}; deeper is "
            "stronger, and the strongest have their number.")
    return (f"{question_html(row)}<div class=pair>{''.join(shown)}</div>"
            f"<figcaption>{note}</figcaption>")


def verdict_of(preference):
    won = points(preference)
    if won == 50:
        return "a draw with the reference"
    return "won against the reference" if won > 50 else "lost against the reference"


def with_end(tokens):
    """The end of the answer, made visible where its token has no text"""
    return [*tokens[:-1], tokens[-1] or "∎"] if tokens else []


# ---------------------------------------------------------------- what PPO is paid for

def heatmaps(runs, prompts=3):
    """Answers of all arms of one seed to the same prompts: some of the last step, one of the first.
    All but one prompt are folded away"""
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
        is_open = " open" if key == shown[0] else ""
        blocks.append(f"<details class=sample{is_open}><summary>{prompt_of(key, seed)}</summary>"
                      f"<div class=grid3>{''.join(answers)}</div></details>")
    note = ("Answers that were sampled in training, and what PPO is paid for each token, the end "
            "of the answer among them: blue for a positive reward, red for a negative one, each "
            "arm on its own scale. The strongest have their number.")
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
        shown += f" <span class=quiet>{safe(more)}</span>"
    return f"{shown} <span class=quiet>step {step}, {safe(seed)}</span>"


def painted_answer(run, sample):
    """One answer of an arm, painted as PPO was paid for it: r_t at each token, or all of R at the
    last one"""
    tokens = with_end(sample["tokens"])
    R = f"R = {sample['reward']:+.2f}"
    rewards = sample["token_rewards"]
    if run["config"].get("level") == "sequence":
        R += ", all at the last token"
        rewards = [None] * (len(tokens) - 1) + [sample["reward"]]
    painted = heat(tokens, rewards, paid_scale(run), numbers=True)
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
