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
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import encode_response, load_tokenizer
from diff import EDIT_FIELDS, align
from evaluate import mean_and_error
from extras.report.rewards import auroc, token_auroc
from extras.tokens import token_texts
from plumbing.command_line import load_config
from plumbing.files import (ANY, AT_LEAST_0, COUNT, check_input, check_numbers, read_jsonl,
                            write_jsonl)
from plumbing.ranks import fail, say


@dataclass(frozen=True)
class Config:
    train: str = "data/paradetox/edits_train.jsonl"  # edits to count tokens in
    data: str = "data/paradetox/edits_test.jsonl"    # edits to test on
    tokenizer: str = "out/sft"
    limit: int = 0          # use only so many rows of the train file, as a reward model did; 0: all
    out: str | None = None  # a JSONL file for the one row of figures
    resamples: int = 100    # of the pairs, for the standard error of an AUROC
    seed: int = 0           # of the resampling


class Edit(NamedTuple):
    original: str
    edited: str
    removed_ids: list       # ids of the original, EOS included
    added_ids: list         # ids of the edited answer, EOS included
    removed: list           # per id of the original: was it removed?
    added: list             # per id of the edited answer: was it added?


def read_edit_pairs(path, tokenizer, limit=0):
    """-> list of Edit; edits that failed or changed nothing are left out. limit 0: all of them"""
    rows = [row for row in read_jsonl(path, EDIT_FIELDS)
            if row["edited"] not in (None, row["original"])]
    if not rows:
        fail(f"{path}: there are no pairs in it")
    if limit:
        rows = rows[:limit]
    edits = []
    for row in rows:
        original_ids = encode_response(tokenizer, row["original"])
        edited_ids = encode_response(tokenizer, row["edited"])
        removed, added = align(original_ids, edited_ids)
        edits.append(Edit(row["original"], row["edited"], original_ids, edited_ids, removed, added))
    return edits


# ---------------------------------------------------------------- which answer?

def surface(text):
    """Larger is more carefully written: no spaces before punctuation, then capital letters"""
    spaces = len(re.findall(r"\s[.,!?;:']", text))
    capitals = sum(character.isupper() for character in text)
    return -spaces, capitals


def won(better, worse):
    """Is it right that `better` is larger? 100, 50 for a draw, 0"""
    if better == worse:
        return 50.0
    return 100.0 if better > worse else 0.0


# ---------------------------------------------------------------- which tokens?

def careless(texts):
    """1.0 for each token that surface() would change, else 0.0. texts: the text of each token"""
    found = []
    for place, text in enumerate(texts):
        spaced = bool(re.match(r"\s[.,!?;:']", text))
        small_start = place == 0 and text[:1].islower()
        found.append(float(spaced or small_start))
    return found


def count_changes(edits, side):
    """How often each token occurs in the answers, and how often it was changed there.

    side: "removed" counts in the originals, "added" in the edited answers"""
    occurred = Counter()
    was_changed = Counter()
    for edit in edits:
        ids = getattr(edit, f"{side}_ids")
        occurred.update(ids)
        was_changed.update(id for id, changed in zip(ids, getattr(edit, side)) if changed)
    return occurred, was_changed


def token_figures(train, test, side, tokenizer, cfg):
    """-> {"rare", "bag", "surface": AUROC and its error} of one side, "removed" or "added" """
    occurred, was_changed = count_changes(train, side)
    share = was_changed.total() / occurred.total()

    def rare(ids):
        return [-occurred[id] for id in ids]

    def bag(ids):  # the prior: two more occurrences, changed as often as the average token
        return [(was_changed[id] + 2 * share) / (occurred[id] + 2) for id in ids]

    def by_surface(ids):  # an edit removes what is careless, and adds what is not
        sign = 1 if side == "removed" else -1
        return [sign * score for score in careless(token_texts(tokenizer, ids))]

    figures = {}
    for name, score in dict(rare=rare, bag=bag, surface=by_surface).items():
        tokens = []  # (score, changed, number of the pair)
        for number, edit in enumerate(test):
            scores = score(getattr(edit, f"{side}_ids"))
            for s, changed in zip(scores, getattr(edit, side)):
                tokens.append((s, bool(changed), number))
        figures[name] = token_auroc(tokens, resamples=cfg.resamples, seed=cfg.seed)
    return figures


def agreement(edits):
    """Several people rewrote one text: does "the others removed it" tell who removed a token?

    -> dict of auroc and texts, None if no text has two rewrites"""
    rewrites = defaultdict(list)  # original -> the mask of each person
    for edit in edits:
        rewrites[edit.original].append(edit.removed)
    shared = [masks for masks in rewrites.values() if len(masks) > 1]
    if not shared:
        return None

    scores = []
    removed = []
    for masks in shared:
        for token in zip(*masks):  # one token, each person's verdict
            for own in token:
                scores.append((sum(token) - own) / (len(token) - 1))
                removed.append(bool(own))
    return dict(auroc=auroc(torch.tensor(scores), torch.tensor(removed)), texts=len(shared))


def main(cfg):
    check_numbers(cfg, limit=AT_LEAST_0, resamples=COUNT, seed=ANY)
    for flag in ("train", "data", "tokenizer"):
        check_input(getattr(cfg, flag), flag, "data/*/prepare.py (tokenizer: python sft.py)")
    tokenizer = load_tokenizer(cfg.tokenizer)
    train = read_edit_pairs(cfg.train, tokenizer, cfg.limit)
    test = read_edit_pairs(cfg.data, tokenizer)
    figures = dict(data=cfg.data, train=cfg.train, n=len(test), n_train=len(train))

    # Which of the two answers is the edited one?
    careful_wins = [won(surface(edit.edited), surface(edit.original)) for edit in test]
    shorter_wins = [won(-len(edit.added_ids), -len(edit.removed_ids)) for edit in test]
    for name, right in dict(surface=careful_wins, shorter=shorter_wins).items():
        mean, error = mean_and_error(right)
        figures[f"accuracy_{name}"] = mean
        figures[f"accuracy_{name}_error"] = error

    # Which tokens did it change?
    for side in ("removed", "added"):
        for name, figure in token_figures(train, test, side, tokenizer, cfg).items():
            figures[f"{side}_{name}"] = figure
    people = agreement(train)
    if people:
        figures["removed_people"] = people

    for name, value in figures.items():
        say(f"{name:26}{value}")
    if cfg.out:
        write_jsonl(cfg.out, [figures])


if __name__ == "__main__":
    main(load_config(Config, "edit"))
