"""The baseline that cannot read the prompt: which of two answers is better, by how often each token
stands in them.

    d=out/demo/data
    python extras/study/bag_of_tokens.py --train=out/demo/edits.jsonl \\
        --data=$d/pref_heldout.jsonl --tokenizer=$d/model

Logistic regression on the difference of the two answers' token counts, prompts left out. In the
toy world an item is right for one category and wrong for the others: what a bag knows is length,
asides and closings. A reward model that is no better than this has not learnt to read the
prompt.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import encode_response, load_tokenizer
from plumbing.command_line import load_config
from plumbing.files import check_input, read_jsonl, write_jsonl
from plumbing.ranks import fail, say


@dataclass(frozen=True)
class Config:
    # pairs to learn from: pref.jsonl, or edits.jsonl (an edit beats its y_l)
    train: str = "data/toy/pref.jsonl"
    data: str = "data/toy/pref_heldout.jsonl"  # pairs to test on
    tokenizer: str = "data/toy/model"
    out: str | None = None  # a JSONL file for the one row of figures
    l2: float = 1e-3  # weight of |w|^2 / 2 next to the mean loss


def read_answer_pairs(path):
    """-> [(better answer, worse answer)]; edits that failed or changed nothing are left out"""
    rows = read_jsonl(path, {})
    if "edited" in rows[0]:
        rows = read_jsonl(path, {"original": str, "edited": (str, type(None))})
        pairs = [
            (row["edited"], row["original"])
            for row in rows
            if row["edited"] not in (None, row["original"])
        ]
        if not pairs:
            fail(f"{path}: no pairs in it")
        return pairs
    rows = read_jsonl(path, {"output_1": str, "output_2": str, "preference": (1, 2)})
    return [
        (row[f"output_{int(row['preference'])}"], row[f"output_{int(3 - row['preference'])}"])
        for row in rows
    ]


def count_differences(pairs, tokenizer):
    """Token counts of the better answer minus those of the worse, [pairs, V] in float64"""
    differences = torch.zeros(len(pairs), len(tokenizer), dtype=torch.float64)
    for row, (better, worse) in zip(differences, pairs):
        for answer, sign in ((better, 1.0), (worse, -1.0)):
            ids = torch.tensor(encode_response(tokenizer, answer))
            row.index_add_(0, ids, torch.full((len(ids),), sign, dtype=torch.float64))
    return differences


def fit(differences, l2):
    """-> the weights [V] of the regression without intercept (a pair has no first side); convex,
    hence no seed"""
    weights = torch.zeros(differences.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -F.logsigmoid(differences @ weights).mean() + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def main(cfg):
    for flag in ("train", "data", "tokenizer"):
        check_input(getattr(cfg, flag), flag, "python data/toy/prepare.py (edits: python edit.py)")
    train = read_answer_pairs(cfg.train)
    test = read_answer_pairs(cfg.data)
    tokenizer = load_tokenizer(cfg.tokenizer)
    margins = count_differences(test, tokenizer) @ fit(count_differences(train, tokenizer), cfg.l2)
    right = (margins > 0).double() + (margins == 0).double() / 2  # no opinion: half right
    accuracy = right.mean().item()
    error = (right.std() / len(right) ** 0.5).item() if len(right) > 1 else 0.0
    say(f"bag of tokens, prompt unread: {100 * accuracy:.1f} +- {100 * error:.1f}% of {len(test)} "
        "pairs")
    row = dict(
        name="bag_of_tokens", accuracy=accuracy, standard_error=error, n=len(test), train=cfg.train
    )
    if cfg.out:
        write_jsonl(cfg.out, [row | {"data": cfg.data}])


if __name__ == "__main__":
    main(load_config(Config, "bag_of_tokens"))
