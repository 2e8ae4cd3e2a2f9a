"""What `python evaluate.py rewards` measures: is R right, does it know it, does r_t find what people changed?"""
import math, statistics
from collections import Counter, defaultdict

import torch

from common import encode_prompt, encode_response, fail, read_jsonl
from extras.pages import token_texts
from diff import align
from evaluate import mean_and_error


def read_held_out(path, tokenizer, max_tokens):
    """A file of preferences or edits -> data, kind, pairs (row, prompt, better answer, worse), what was dropped"""
    kind = "edits" if "edited" in read_jsonl(path, {})[0] else "preferences"
    fields = {"original": str, "edited": (str, type(None))} if kind == "edits" else {
        "output_1": str, "output_2": str, "preference": (1, 2)}
    pairs, dropped = [], Counter()
    for row in read_jsonl(path, {"instruction": str} | fields):
        w, l = ("edited", "original") if kind == "edits" else ("output_1", "output_2")[::3 - 2 * int(row["preference"])]
        if row[w] is None or row[w] == row[l]:
            dropped["failed edit" if row[w] is None else "identical"] += 1
            continue
        answers = (encode_response(tokenizer, row[x], eos=x not in (row.get("cut") or [])) for x in (w, l))
        pair = row, encode_prompt(tokenizer, row), *answers
        if pair[2] and pair[3] and len(pair[1]) + max(len(pair[2]), len(pair[3])) <= max_tokens:
            pairs.append(pair)
        else:
            dropped["empty or too long"] += 1
    dropped = dict(dropped)
    if not pairs:
        fail(f"{path}: no pair is left; dropped: {dropped}")
    return dict(data=path, kind=kind, pairs=pairs, dropped=dropped)


def figures_of(file, R_w, R_l, r_w, r_l, tokenizer, resamples, seed):
    """All figures of one file of read_held_out, from rewards R and token rewards r of its better and worse answers"""
    pairs = file["pairs"]
    figures = dict(data=file["data"], kind=file["kind"], dropped=file["dropped"], **pair_figures(pairs, R_w, R_l))
    if file["kind"] == "edits":  # edited_wins is by construction: with edits, the order alone tells
        tokens = token_figures(pairs, r_w, r_l, tokenizer, resamples=resamples, seed=seed)
        figures |= dict(edited_wins=100.0, tokens=tokens)
    return figures


def calibration(margins, bins=10):
    """Does sigma(R_w - R_l) mean what it says? Pairs by confidence in the likelier side, 0.5 to 1 -> ece, bins"""
    filled = defaultdict(list)
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 500)))
        right = (margin > 0) + 0.5 * (margin == 0)
        filled[min(int((confidence - 0.5) * 2 * bins), bins - 1)].append((confidence, right))
    bins = [dict(confidence=statistics.fmean(c for c, _ in pairs), accuracy=statistics.fmean(a for _, a in pairs),
                 n=len(pairs)) for _, pairs in sorted(filled.items())]
    return dict(ece=sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / max(1, len(margins)), bins=bins)


def pair_figures(pairs, R_w, R_l):
    """pairs: (row, prompt, w, l); R: rewards of their better and worse answers -> figures, beside "the longer wins\""""
    margins = [w - l for w, l in zip(R_w, R_l)]
    accuracy, error = mean_and_error([100 * ((margin > 0) + 0.5 * (margin == 0)) for margin in margins])
    margin, margin_error = mean_and_error(margins)
    longer, longer_error = mean_and_error([100 * ((len(w) > len(l)) + 0.5 * (len(w) == len(l))) for *_, w, l in pairs])
    return dict(n=len(pairs), accuracy=accuracy, standard_error=error, margin=margin, margin_error=margin_error,
                longer_wins=longer, longer_wins_error=longer_error, calibration=calibration(margins))


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
