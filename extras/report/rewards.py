"""Do the token rewards find what people changed? The token figures of `python evaluate.py rewards`"""
import statistics

import torch

from common import token_texts
from diff import align


def auroc(scores, positive, weights=None):
    """P(a positive scores above a negative), ties half; [N] each, weights: how often each counts. None: no such pair"""
    weights = torch.ones(len(scores), dtype=torch.float64) if weights is None else weights.double()
    rank = scores.unique(return_inverse=True)[1]  # equal scores share a rank
    ranks = int(rank.max()) + 1 if len(rank) else 0
    p, n = (torch.bincount(rank, weights * side, ranks).double() for side in (positive.bool(), ~positive.bool()))
    below = n.cumsum(0) - n
    return ((p * (below + n / 2)).sum() / (p.sum() * n.sum())).item() if p.sum() and n.sum() else None


def token_auroc(tokens, *, resamples, seed):
    """tokens: (score, positive, pair) each. -> AUROC over all of them, and its standard error by resampling pairs: the
    tokens of a pair come and go together, for they are not independent"""
    if not tokens:
        return dict(auroc=None, standard_error=None, positives=0, tokens=0)
    scores, positive, pair = (torch.tensor(column) for column in zip(*tokens))
    value, pairs, again = auroc(scores, positive), int(pair.max()) + 1, []
    draw = torch.Generator().manual_seed(seed)
    for _ in range(resamples if value is not None else 0):
        times = torch.bincount(torch.randint(pairs, (pairs,), generator=draw), minlength=pairs)
        again.append(auroc(scores, positive, times[pair]))
    again = [x for x in again if x is not None]
    return dict(auroc=value, standard_error=statistics.stdev(again) if len(again) > 1 else None,
                positives=int(positive.sum()), tokens=len(tokens))


def in_spans(texts, spans):
    """Which kinds of error each token touches. texts: one per token; spans: [start, end, kind] in characters"""
    kinds, end = [], 0
    for text in texts:
        start, end = end, end + len(text)
        kinds.append({span[2] for span in spans if span[0] < end and start < span[1]} if text else set())
    return kinds


def token_figures(pairs, r_w, r_l, tokenizer, *, resamples, seed):
    """pairs: (row, prompt, edited ids, original ids); r_w, r_l: their token rewards (lists of lists) -> figures, nested

    removed: AUROC of -r_t for the tokens of the original that the edit took away; added: of r_t for those it put in;
    error_spans: of -r_t for the tokens inside the spans that the row marks as wrong, where rows have them. unchanged:
    r_t on U_0. eos: r_t at EOS."""
    removed, added, marked, unchanged, eos = [], [], [], [], []
    for i, ((row, _, ids_w, ids_l), of_w, of_l) in enumerate(zip(pairs, r_w, r_l)):
        changed_l, changed_w = align(ids_l, ids_w)
        removed += [(-r, bool(changed), i) for r, changed in zip(of_l, changed_l)]
        added += [(r, bool(changed), i) for r, changed in zip(of_w, changed_w)]
        unchanged += [r for r, changed in zip(of_l + of_w, changed_l + changed_w) if not changed]
        eos += [of[-1] for of, ids in ((of_w, ids_w), (of_l, ids_l)) if ids[-1] == tokenizer.eos_token_id]
        if row.get("error_spans"):
            texts = token_texts(tokenizer, ids_l)
            kinds_of = in_spans(texts, row["error_spans"])
            marked += [(-r, kinds, i) for r, kinds, text in zip(of_l, kinds_of, texts) if text]
    options = dict(resamples=resamples, seed=seed)
    figures = dict(removed=token_auroc(removed, **options), added=token_auroc(added, **options),
                   unchanged=dict(mean=statistics.fmean(unchanged) if unchanged else None,
                                  sd=statistics.pstdev(unchanged) if unchanged else None, tokens=len(unchanged)),
                   eos=dict(mean=statistics.fmean(eos) if eos else None, n=len(eos)))
    if marked:
        figures["error_spans"] = token_auroc([(r, bool(kinds), i) for r, kinds, i in marked], **options)
        for name in sorted(set.union(*(kinds for _, kinds, _ in marked))):  # one kind against tokens in no span at all
            some = [(r, name in kinds, i) for r, kinds, i in marked if not kinds or name in kinds]
            figures["error_spans"][name] = token_auroc(some, resamples=0, seed=seed)["auroc"]
    return figures
