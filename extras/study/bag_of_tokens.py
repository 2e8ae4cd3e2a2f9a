"""The baseline that cannot read the prompt: it says which of two answers is better from how
often each token occurs in them.

    d=out/demo/data
    python extras/study/bag_of_tokens.py --train=out/demo/edits.jsonl \\
        --data=$d/pref_heldout.jsonl --tokenizer=$d/model

Logistic regression on the difference of the two answers' token counts, without the prompts. In the
toy world an item is right for one category and wrong for the others, so a bag of tokens knows only
length, asides and closings. A reward model that is no better has not learnt to read the prompt.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import encode_response, load_tokenizer
from plumbing.command_line import load_config
from plumbing.files import AT_LEAST_0, check_input, check_numbers, read_jsonl, write_jsonl
from plumbing.ranks import fail, say


@dataclass(frozen=True)
class Config:
    train: str = "data/toy/pref.jsonl"         # pairs to learn from; in edits.jsonl the edit wins
    data: str = "data/toy/pref_heldout.jsonl"  # pairs to test on
    tokenizer: str = "data/toy/model"
    out: str | None = None                     # a JSONL file for the one row of figures
    l2: float = 1e-3                           # weight of |w|^2 / 2, added to the mean loss


def read_answer_pairs(path):
    """-> [(better answer, worse answer)]; edits that failed or changed nothing are left out"""
    rows = read_jsonl(path, {})
    if "edited" in rows[0]:
        rows = read_jsonl(path, {"original": str, "edited": (str, type(None))})
        pairs = [(row["edited"], row["original"]) for row in rows
                 if row["edited"] not in (None, row["original"])]
        if not pairs:
            fail(f"{path}: there are no pairs in it")
        return pairs

    pairs = []
    for row in read_jsonl(path, {"output_1": str, "output_2": str, "preference": (1, 2)}):
        if row["preference"] == 1:
            pairs.append((row["output_1"], row["output_2"]))
        else:
            pairs.append((row["output_2"], row["output_1"]))
    return pairs


def count_differences(pairs, tokenizer):
    """Token counts of the better answer minus those of the worse, [pairs, V] in float64"""
    differences = torch.zeros(len(pairs), len(tokenizer), dtype=torch.float64)
    for row, (better, worse) in zip(differences, pairs):  # row: [V], written in place
        for id in encode_response(tokenizer, better):
            row[id] += 1
        for id in encode_response(tokenizer, worse):
            row[id] -= 1
    return differences


def fit(differences, l2):
    """-> the weights [V] of the regression.

    No intercept, because the sides of a pair have no order. The loss is convex: no seed."""
    weights = torch.zeros(differences.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        margins = differences @ weights  # [pairs]
        loss = -F.logsigmoid(margins).mean() + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def main(cfg):
    check_numbers(cfg, l2=AT_LEAST_0)
    for flag in ("train", "data", "tokenizer"):
        check_input(getattr(cfg, flag), flag, "python data/toy/prepare.py (edits: python edit.py)")
    train = read_answer_pairs(cfg.train)
    test = read_answer_pairs(cfg.data)
    tokenizer = load_tokenizer(cfg.tokenizer)

    weights = fit(count_differences(train, tokenizer), cfg.l2)    # [V]
    margins = count_differences(test, tokenizer) @ weights        # [pairs]
    right = (margins > 0).double() + (margins == 0).double() / 2  # no opinion: half right

    accuracy = right.mean().item()
    error = 0.0
    if len(right) > 1:
        error = (right.std() / len(right)**0.5).item()
    say(f"bag of tokens, prompt unread: {100 * accuracy:.1f} +- {100 * error:.1f}% "
        f"of {len(test)} pairs")
    if cfg.out:
        row = dict(name="bag_of_tokens", accuracy=accuracy, standard_error=error, n=len(test),
                   train=cfg.train, data=cfg.data)
        write_jsonl(cfg.out, [row])


if __name__ == "__main__":
    main(load_config(Config, "bag_of_tokens"))
