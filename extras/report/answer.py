"""What came out, in three sentences: who wins, which reward model is right, who fooled theirs."""
if __name__ == "__main__":
    raise SystemExit("answer.py is a part of: python evaluate.py report")

import statistics

from extras.report.arms import (FINE, ORDER, RLHF, RM_FINE, RM_RLHF, RM_TOKEN, SFT, arms,
                                figure_over_seeds, larger_error, mean_over_seeds, paper_order)
from extras.report.page import score_paths, verdict
from extras.report.tables import ceilings, column, differences, rate, reward_figures


def sentences(runs, seed):
    """Three sentences about these runs, from the numbers of the tables. seed: of the bootstrap"""
    found = [who_wins(runs, seed), which_is_right(runs), who_fooled_theirs(runs)]
    return [sentence.replace(", gamma 0 (ours)", " at gamma 0 (ours)") for sentence in found]


def paper_arms(labels):
    """The paper's arms and ours at gamma 0, in order: an ablation beside them is in the tables. If
    there are only others, those"""
    known = [label for label in labels if label in (*ORDER, SFT)]
    return sorted(known or labels, key=paper_order)


def listed(words):
    """ "a, b and c" """
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


# ---------------------------------------------------------------- win rates

def who_wins(runs, seed):
    """The first arm that was judged, and the others next to it"""
    groups = arms(runs, "ppo") | arms(runs, "sft", "other")
    judged = {}
    for label, mine in groups.items():
        figures = [rate(run["annotations"]) for run in mine]
        figures = [one for one in figures if one]
        if figures:
            judged[label] = figures
    if not judged:
        return "No answers were judged, so there is no win rate."

    first, *others = paper_arms(judged)
    said = f"{first} wins {figure_over_seeds(judged[first], 'win_rate')}% against the reference"
    if len(judged[first]) > 1:
        said += f" (the mean of {len(judged[first])} seeds)"
    if others:
        found = []
        for label in others:
            mean = statistics.fmean(column(judged[label], "win_rate"))
            found.append(compared(label, mean, differences(groups[first], groups[label], seed)))
        said += f": {listed(found)}"
    best = ceilings(runs)
    if best:
        said += f"; answers without a flaw would win {figure_over_seeds(best, 'win_rate')}%"
    return f"{said}."


def compared(label, mean, found):
    """How the first arm compares with this one, which wins so many percent. found: differences()
    of the two"""
    known = [one for one in found if one["difference"] is not None]
    if not known:
        return f"{label} wins {mean:.1f}% (on other questions)"
    errors = column(known, "standard_error")
    difference, error = mean_over_seeds(column(known, "difference"), errors)
    larger = larger_error(error, errors)
    if error is not None and abs(difference) <= 2 * larger:
        why = f"{difference:+.1f} ± {error:.1f}"
        if larger > error:
            why += f" over seeds, ± {larger:.1f} over pairs"
        return f"not clearly different from {label} ({mean:.1f}; {why})"
    size = f"{abs(difference):.1f}" if error is None else f"{abs(difference):.1f} ± {error:.1f}"
    where = "above" if difference > 0 else "below"
    return f"{size} points {where} {label} ({mean:.1f})"


# ---------------------------------------------------------------- reward models

OWNERS = {RM_TOKEN: "The token-level reward model", RM_FINE: f"The reward model of {FINE}",
          RM_RLHF: f"The reward model of {RLHF}"}


def which_is_right(runs):
    """On how many held-out pairs the reward models are right, and whether the token-level one finds
    what the edits removed"""
    groups = arms(runs, "reward model")
    for kind, pairs in (("preferences", "held-out pairs"), ("edits", "held-out edited pairs")):
        figures = {label: reward_figures(mine, kind) for label, mine in groups.items()}
        figures = {label: found for label, found in figures.items() if found}
        if figures:
            break
    else:
        return "No reward model was measured on held-out pairs."

    first, *others = paper_arms(figures)
    said = (f"{OWNERS.get(first, first)} is right on "
            f"{figure_over_seeds(figures[first], 'accuracy')}% of the {pairs}")
    if others:
        found = []
        for label in others:
            mean = statistics.fmean(column(figures[label], "accuracy"))
            owner = OWNERS.get(label, label).replace("The reward model of", "that of")
            found.append(f"{owner} on {mean:.1f}%")
        said += f" ({listed(found)})"

    # Only the token-level one has rewards of tokens.
    found = []
    for edited in reward_figures(groups.get(RM_TOKEN, []), "edits"):
        removed = (edited.get("tokens") or {}).get("removed") or {}
        if removed.get("auroc") is not None:
            found.append(removed["auroc"])
    if found and first == RM_TOKEN:
        said += (f", and it finds the tokens that the edits removed with an AUROC of "
                 f"{statistics.fmean(found):.2f} (0.5 is chance)")
    return f"{said}."


# ---------------------------------------------------------------- reward hacking

def who_fooled_theirs(runs):
    """In which arms the judge followed the reward model's score along training, in which not"""
    paths = score_paths(runs)
    if not paths:
        return ("Whether a policy fooled its reward model is not known: no models were judged "
                "along training.")
    groups = {}  # verdict -> labels; the good ones first
    verdicts = {label: verdict(paths[label]) for label in paper_arms(paths)}
    for tone in ("", "warn", "bad"):
        for label, (its_tone, _, words) in verdicts.items():
            if its_tone == tone:
                groups.setdefault(words, []).append(label)
    found = []
    for words, labels in groups.items():
        words = words.replace("the score", "the reward model's score", 1)
        found.append(f"in {listed(labels)} {words}")
    said = "; ".join(found)
    return f"{said[0].upper()}{said[1:]}."
