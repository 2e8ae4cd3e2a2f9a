"""Do the token rewards find what people changed? The token figures of `evaluate.py rewards`."""
if __name__ == "__main__":
    raise SystemExit("rewards.py is a part of: python evaluate.py rewards")

import statistics

import torch

from diff import align
from extras.tokens import token_texts


def auroc(scores, positive, weights=None):
    """The probability that a positive scores above a negative; a tie counts half.

    scores, positive (bool or 0/1): [N]; weights: how often each counts, [N]. None if there is no
    positive or no negative."""
    if weights is None:
        weights = torch.ones(len(scores))
    weights = weights.double()
    rank = scores.unique(return_inverse=True)[1]  # [N]; equal scores share a rank
    ranks = int(rank.max()) + 1 if len(rank) else 0

    # At each rank: the positives, the negatives, and the negatives below it; all [ranks].
    positives = torch.bincount(rank, weights * positive.bool(), ranks).double()
    negatives = torch.bincount(rank, weights * ~positive.bool(), ranks).double()
    below = negatives.cumsum(0) - negatives
    won = positives * (below + negatives / 2)
    comparisons = positives.sum() * negatives.sum()
    if not comparisons:
        return None
    return (won.sum() / comparisons).item()


def token_auroc(tokens, *, resamples, seed):
    """tokens: [(score, is positive, number of its pair)] -> dict: auroc over all of them, its
    standard_error, positives, tokens.

    The error comes from drawing pairs again with replacement: the tokens of one pair are not
    independent, so they are drawn together."""
    if not tokens:
        return dict(auroc=None, standard_error=None, positives=0, tokens=0)
    scores = torch.tensor([score for score, _, _ in tokens])
    positive = torch.tensor([is_positive for _, is_positive, _ in tokens])
    pair = torch.tensor([number for _, _, number in tokens])
    value = auroc(scores, positive)

    # A resample without positives or without negatives has no AUROC and is left out.
    resampled = []
    if value is not None:
        pairs = int(pair.max()) + 1
        draw = torch.Generator().manual_seed(seed)
        for _ in range(resamples):
            drawn = torch.randint(pairs, (pairs,), generator=draw)
            times = torch.bincount(drawn, minlength=pairs)  # [pairs]
            again = auroc(scores, positive, times[pair])
            if again is not None:
                resampled.append(again)

    error = statistics.stdev(resampled) if len(resampled) > 1 else None
    return dict(auroc=value, standard_error=error, positives=int(positive.sum()),
                tokens=len(tokens))


def in_spans(texts, spans):
    """The kinds of error that each token touches -> one set per token.

    texts: one string per token; spans: [start, end, kind], counted in characters."""
    kinds = []
    end = 0
    for text in texts:
        start = end
        end += len(text)
        touched = set()
        for span_start, span_end, kind in spans:
            if text and span_start < end and start < span_end:
                touched.add(kind)
        kinds.append(touched)
    return kinds


def token_figures(pairs, r_w, r_l, tokenizer, *, resamples, seed):
    """pairs: [(row, prompt, edited ids, original ids)]; r_w, r_l: r_t of the edited and of the
    original answers, one list per pair -> dict of figures

    removed:     AUROC of -r_t for the tokens of the original that the edit removed
    added:       AUROC of r_t for the tokens of the edited answer that the edit added
    unchanged:   mean and standard deviation of r_t on U_0, both sides together
    eos:         mean of r_t at EOS
    error_spans: AUROC of -r_t for the tokens in spans that a row marks as wrong, all kinds together
                 and each kind alone; only if there are such rows"""
    removed = []  # (score, is positive, number of the pair)
    added = []
    marked = []  # (score, kinds of error, number of the pair)
    unchanged = []  # r_t
    eos = []
    for i, (row, _, ids_w, ids_l) in enumerate(pairs):
        rewards_w = r_w[i]
        rewards_l = r_l[i]
        changed_l, changed_w = align(ids_l, ids_w)

        # What the edit removed, added and left
        for r, changed in zip(rewards_l, changed_l):
            removed.append((-r, bool(changed), i))
        for r, changed in zip(rewards_w, changed_w):
            added.append((r, bool(changed), i))
        for r, changed in zip(rewards_l + rewards_w, changed_l + changed_w):
            if not changed:
                unchanged.append(r)

        # EOS; a cut answer has none
        if ids_w[-1] == tokenizer.eos_token_id:
            eos.append(rewards_w[-1])
        if ids_l[-1] == tokenizer.eos_token_id:
            eos.append(rewards_l[-1])

        # What the row marks as wrong in the original
        if row.get("error_spans"):
            texts = token_texts(tokenizer, ids_l)
            kinds_of = in_spans(texts, row["error_spans"])
            for r, kinds, text in zip(rewards_l, kinds_of, texts):
                if text:
                    marked.append((-r, kinds, i))

    figures = {}
    figures["removed"] = token_auroc(removed, resamples=resamples, seed=seed)
    figures["added"] = token_auroc(added, resamples=resamples, seed=seed)
    figures["unchanged"] = dict(mean=None, sd=None, tokens=len(unchanged))
    if unchanged:
        figures["unchanged"]["mean"] = statistics.fmean(unchanged)
        figures["unchanged"]["sd"] = statistics.pstdev(unchanged)
    figures["eos"] = dict(mean=None, n=len(eos))
    if eos:
        figures["eos"]["mean"] = statistics.fmean(eos)
    if marked:
        figures["error_spans"] = span_figures(marked, resamples, seed)
    return figures


def span_figures(marked, resamples, seed):
    """marked: [(score, kinds of error, number of its pair)] -> token_auroc() of all kinds together,
    and of each kind its AUROC against the tokens in no span at all"""
    tokens = [(score, bool(kinds), i) for score, kinds, i in marked]
    figures = token_auroc(tokens, resamples=resamples, seed=seed)
    for name in sorted(set.union(*(kinds for _, kinds, _ in marked))):
        some = []
        for score, kinds, i in marked:
            if name in kinds or not kinds:
                some.append((score, name in kinds, i))
        figures[name] = token_auroc(some, resamples=0, seed=seed)["auroc"]
    return figures
