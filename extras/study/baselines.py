"""What can be said of people's edits without a reward model? The figures that a reward model has to
beat.

    python extras/study/baselines.py --train=data/paradetox/edits_train.jsonl \\
        --data=data/paradetox/edits_test.jsonl --tokenizer=out/sft

accuracy   which of the two answers is the edited one?
    surface     fewer spaces before punctuation; if equal, more capital letters; if equal, half
                right. No word is read.
    shorter     the answer with fewer tokens; equal: half right
tokens     AUROC, as in `evaluate.py rewards`: which tokens of the original did the edit remove, and
           which did it add?
    surface     the same, token by token: punctuation after a space, a small letter at the beginning
    rare        how rare the token is in the answers of the train file
    bag         how often the token was changed where it occurred in the train file: a lexicon that
                ignores the order
people     rewrites of one text by several people (rows of the train file with the same original):
           AUROC of "the share of the others who removed this token"
"""

import re, sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import encode_response, load_tokenizer, mean_and_error, token_texts
from diff import EDIT_FIELDS, align
from extras.report.rewards import auroc, token_auroc
from plumbing.command_line import load_config
from plumbing.files import check_input, read_jsonl, write_jsonl
from plumbing.ranks import fail, say


@dataclass(frozen=True)
class Config:
    train: str = "data/paradetox/edits_train.jsonl"  # edits to count tokens in
    data: str = "data/paradetox/edits_test.jsonl"  # edits to test on
    tokenizer: str = "out/sft"
    limit: int = 0  # only so many rows of the train file, as a reward model has seen; 0: all
    out: str | None = None  # a JSONL file for the one row of figures
    resamples: int = 100  # of the pairs, for the standard error of an AUROC
    seed: int = 0  # their draws


def read_edit_pairs(path, tokenizer, limit=0):
    """-> [(original text, edited text, original ids, edited ids, original_changed,
    edited_changed)]"""
    rows = [
        row for row in read_jsonl(path, EDIT_FIELDS) if row["edited"] not in (None, row["original"])
    ]
    pairs = []
    for row in rows[: limit or None]:
        l, w = (encode_response(tokenizer, row[name]) for name in ("original", "edited"))
        pairs.append((row["original"], row["edited"], l, w, *align(l, w)))
    if not pairs:
        fail(f"{path}: no pairs in it")
    return pairs


def surface(text):
    """Larger is more carefully written: no spaces before punctuation first, capital letters
    second"""
    return -len(re.findall(r"\s[.,!?;:']", text)), sum(c.isupper() for c in text)


def won(better, worse):
    """Is it right that `better` is larger? 100, 50 for a draw, 0"""
    return 100.0 if better > worse else 50.0 if better == worse else 0.0


def careless(texts):
    """1 for a token that surface() would fix, by the token and its place alone; texts: one per
    token"""
    return [
        float(bool(re.match(r"\s[.,!?;:']", text)) or (k == 0 and text[:1].islower()))
        for k, text in enumerate(texts)
    ]


def changes(pairs, ids, changed):
    """How often each token stood in the answers, and how often it was changed there; the fields'
    places in a pair"""
    stood, was = Counter(), Counter()
    for pair in pairs:
        stood.update(pair[ids])
        was.update(token for token, c in zip(pair[ids], pair[changed]) if c)
    return stood, was


def main(cfg):
    for flag in ("train", "data", "tokenizer"):
        check_input(getattr(cfg, flag), flag, "data/*/prepare.py (tokenizer: python sft.py)")
    tokenizer = load_tokenizer(cfg.tokenizer)
    train = read_edit_pairs(cfg.train, tokenizer, cfg.limit)
    test = read_edit_pairs(cfg.data, tokenizer)
    figures = dict(data=cfg.data, train=cfg.train, n=len(test), n_train=len(train))
    for name, right in (
        ("surface", [won(surface(w), surface(l)) for l, w, *_ in test]),
        ("shorter", [won(-len(w), -len(l)) for _, _, l, w, *_ in test]),
    ):
        figures[f"accuracy_{name}"], figures[f"accuracy_{name}_error"] = mean_and_error(right)
    for side, ids, changed, sign in (("removed", 2, 4, 1), ("added", 3, 5, -1)):
        stood, was = changes(train, ids, changed)
        share = was.total() / stood.total()
        scores = {
            "rare": lambda tokens: [-stood[t] for t in tokens],
            "bag": lambda tokens: [
                (was[t] + 2 * share) / (stood[t] + 2) for t in tokens
            ],  # prior: two tokens
            "surface": lambda tokens: [sign * s for s in careless(token_texts(tokenizer, tokens))],
        }
        for name, score in scores.items():
            tokens = [
                (s, bool(c), i)
                for i, pair in enumerate(test)
                for s, c in zip(score(pair[ids]), pair[changed])
            ]
            figures[f"{side}_{name}"] = token_auroc(tokens, resamples=cfg.resamples, seed=cfg.seed)
    others = defaultdict(list)  # original -> the masks of its rewrites
    for l, _, _, _, changed, _ in train:
        others[l].append(changed)
    shared = [masks for masks in others.values() if len(masks) > 1]
    if shared:
        agree = [
            ((sum(column) - own) / (len(column) - 1), bool(own))
            for masks in shared
            for column in zip(*masks)
            for own in column
        ]
        figures["removed_people"] = dict(
            auroc=auroc(*map(torch.tensor, zip(*agree))), texts=len(shared)
        )
    for name, value in figures.items():
        say(f"{name:26}{value}")
    if cfg.out:
        write_jsonl(cfg.out, [figures])


if __name__ == "__main__":
    main(load_config(Config, "edit"))
