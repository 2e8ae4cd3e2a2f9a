"""Stage 2. Which tokens did the edit change? Pairs of token sequences with masks of U_0 and U_1.

    python diff.py out/edits.jsonl --tokenizer=out/sft             # -> out/diffs.jsonl
    python diff.py show out/edits.jsonl --tokenizer=out/sft --n=5  # pairs in the terminal:
                                                                   # [-removed-] {+added+}
    python diff.py show out/edits.jsonl --html=out/diffs.html      # the same as a page

U_0, the unchanged part, is a longest common subsequence of the two token sequences. U_1 is the
rest, on each side:

    original    List  of   fruits  :  tea     pear            EOS
    edited      List  of   fruits  :  apple   pear  and  fig  EOS
    U_0          *    *      *     *           *               *
    U_1                               *              *    *

(The paper writes U_0 = {t : a_t^i = a_t^j}. After an insertion or a deletion, the same t no longer
means the same token, so an alignment is needed.) Both answers end in EOS unless the row's `cut`
field lists them as truncated. EOS is a token like any other and is usually in U_0.

Nothing is truncated to fit. If both answers were truncated to N tokens, an insertion of k tokens
would cut the last k tokens off the edited answer only. The same tokens of the original would then
look deleted, and would be punished. Instead, pairs that are too long, identical, empty, or changed
beyond `max_changed` are dropped and counted. So are failed edits (edited: null).
"""
import json, math, sys
from collections import Counter
from dataclasses import dataclass

from common import encode_prompt, encode_response, load_tokenizer, tokenizer_hash
from plumbing.command_line import extra, load_config
from plumbing.files import (ABOVE_0, ANY, COUNT, check_input, check_numbers, read_jsonl, replacing)
from plumbing.models import check_model
from plumbing.ranks import fail, say
from plumbing.record import begin, finish

@dataclass(frozen=True)
class Config:
    data: str = "out/edits.jsonl"   # rows: id, instruction, input, original (y_l) and edited (y_w,
                                    # or null: the edit failed)
    tokenizer: str = "out/sft"      # folder or hub name of the model whose tokenizer is used: that
                                    # of the reward model and of the policy
    out: str = "out/diffs.jsonl"
    gaps: bool = False              # our addition, see align(): lets Eq. 4 punish an omission
    max_tokens: int = 512           # prompt + answer; longer pairs are dropped (the paper's preset)
    max_changed: float = 1.0        # pairs with a larger share of changed tokens are dropped;
                                    # 1: rewritten answers are kept, too
    seed: int = 0                   # unused; every stage has one
    overwrite: bool = False
    allow_changed_code: bool = False        # continue a run whose stage file or common.py changed

# ---------------------------------------------------------------- the alignment

def lcs_length(a, b):
    """Length of a longest common subsequence of two lists, by bits (Hyyro 2004): after each token
    of b, bit i of v is 0 where the length grows at a[i]."""
    places = {}  # token -> the bits of its positions in a
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | (1 << i)

    all_bits = (1 << len(a)) - 1
    v = all_bits
    for token in b:
        u = v & places.get(token, 0)
        v = ((v + u) | (v - u)) & all_bits
    return len(a) - v.bit_count()

# The ways to leave a cell of common_pairs(); without any of them, a token of b is inserted.
PAIR = 1      # the cell's best score pairs a[i-1] with b[j-1] ...
CONTINUE = 2  # ... and such a pair continues the run of the pair before it
DELETE = 4    # a[i-1] is deleted

def common_pairs(a, b):
    """Index pairs (i, j) with a[i] == b[j]: of the longest common subsequences, one that has the
    fewest contiguous runs. Ties: see align().

    Dynamic programming over prefixes. best[j] in row i is the best score of a[:i] against b[:j];
    run[j] is the best score in which a[i-1] is paired with b[j-1]. A pair scores MATCH, and each
    run costs 1. Two rows of scores are kept, and one byte per cell for the walk back: two unrelated
    answers of 4,000 tokens take 16 MB. A longest subsequence of length L deletes len(a) - L tokens
    and inserts len(b) - L. So its path stays in a narrow band, and the other cells are never
    computed. Here L is 3, with one deletion and two insertions (o: the path, +: the band, a step
    along the diagonal: a pair):

                   p  x  r  s  y        b
                o  +  +  .  .  .
             p  +  o  o  +  .  .        (p, p); x is inserted
             q  .  +  o  +  +  .        q is deleted
             r  .  .  +  o  +  +        (r, r)
        a    s  .  .  .  +  o  o        (s, s); y is inserted
    """
    n = len(a)
    m = len(b)
    L = lcs_length(a, b)
    deletions = n - L
    insertions = m - L
    MATCH = n + m + 2  # a longer subsequence is always better: all runs together cost less
    NEVER = -math.inf

    # Row 0: one side is empty, so no pair, no run, score 0.
    best = [0 if j <= insertions else NEVER for j in range(m + 1)]
    run = [NEVER] * (m + 1)
    steps = [bytearray(m + 1)]

    # The rest of the band: a pair continues a run or begins one; or one token has no partner.
    for i in range(1, n + 1):
        best_before = best
        run_before = run
        best = [NEVER] * (m + 1)
        run = [NEVER] * (m + 1)
        step = bytearray(m + 1)
        if i <= deletions:
            best[0] = 0
        token = a[i - 1]
        first = max(1, i - deletions)
        last = min(m, i + insertions)
        highest = best[first - 1]
        for j in range(first, last + 1):
            way = 0
            without = best_before[j]  # a[i-1] is deleted
            if without >= highest:
                highest = without
                way = DELETE
            if token == b[j - 1]:
                continued = run_before[j - 1]
                begun = best_before[j - 1] - 1
                run[j] = MATCH + max(continued, begun)
                if continued >= begun:
                    way |= CONTINUE
                if run[j] >= highest:
                    highest = run[j]
                    way |= PAIR
            best[j] = highest
            step[j] = way
        steps.append(step)

    # Walk back along an optimal path: pair if possible, else delete from a, else insert from b.
    pairs = []
    i = n
    j = m
    in_run = False  # must this pair be taken, because the one after it continues its run?
    while i > 0 and j > 0:
        way = steps[i][j]
        if in_run or way & PAIR:
            in_run = bool(way & CONTINUE)
            i -= 1
            j -= 1
            pairs.append((i, j))
        elif way & DELETE:
            i -= 1
        else:
            j -= 1
    pairs.reverse()
    return pairs

def align(original, edited, *, gaps=False):
    """U_0 and U_1 of Section 2.2: two token sequences (lists of int) -> original_changed,
    edited_changed (lists of 0/1, as long as they are): 1 = in U_1.

    The unchanged tokens are a longest common subsequence: the common beginning and end, and between
    them one with as few contiguous runs as possible. Ties: going backwards, two tokens are paired
    if an optimal alignment pairs them; if none does, prefer to delete from the original. So the
    same texts always give the same masks.

    gaps=True: where text was only inserted (or only deleted), the side without it has no U_1, and
    Eq. 4 cannot punish the omission. Then the unchanged token at that place counts as changed, too.
    It is the action at the place where the other answer acted differently. In this example tea was
    replaced, and plum inserted, so EOS came too early:

        original  red  tea   fig        EOS     original_changed  0 1 0   0   gaps=True  0 1 0   1
        edited    red  pear  fig  plum  EOS     edited_changed    0 1 0 1 0              0 1 0 1 0
    """
    n = len(original)
    m = len(edited)

    # The common beginning and the common end.
    shorter = min(n, m)
    head = 0
    while head < shorter and original[head] == edited[head]:
        head += 1
    tail = 0
    while tail < shorter - head and original[n - 1 - tail] == edited[m - 1 - tail]:
        tail += 1

    # All unchanged tokens, as index pairs in order.
    kept = [(k, k) for k in range(head)]
    for i, j in common_pairs(original[head:n - tail], edited[head:m - tail]):
        kept.append((head + i, head + j))
    for k in range(tail, 0, -1):
        kept.append((n - k, m - k))

    # The rest is changed; with gaps, so is an unchanged token after a pure insertion or deletion.
    original_changed = [1] * n
    edited_changed = [1] * m
    last_i = -1
    last_j = -1
    for i, j in kept:
        removed = i - last_i - 1  # tokens since the last unchanged one
        added = j - last_j - 1
        original_changed[i] = int(gaps and added > 0 and removed == 0)
        edited_changed[j] = int(gaps and removed > 0 and added == 0)
        last_i = i
        last_j = j
    return original_changed, edited_changed

# ---------------------------------------------------------------- rows

EDIT_FIELDS = {"instruction": str, "input": (str, type(None)), "original": str,
               "edited": (str, type(None))}

def changed_share(original_changed, edited_changed):
    """The share of the tokens of both sides that are in U_1, 0 to 1"""
    changed = sum(original_changed) + sum(edited_changed)
    return changed / max(1, len(original_changed) + len(edited_changed))

def gate(original_ids, edited_ids, original_changed=(), edited_changed=(), *, max_changed=1.0,
         max_tokens=None):
    """Reason to drop a pair ("empty", "identical", "too long" or "changed share"), or None. Without
    the masks, it says what is known before the alignment. max_tokens: the room for an answer,
    without the prompt; None: any length."""
    shorter, longer = sorted((len(original_ids), len(edited_ids)))
    if shorter < 2:  # EOS alone
        return "empty"
    if original_ids == edited_ids:
        return "identical"
    if max_tokens is not None and longer > max_tokens:
        return "too long"
    if changed_share(original_changed, edited_changed) > max_changed:
        return "changed share"
    return None

def encode_row(row, tokenizer):
    """A row of edits.jsonl -> the same with its ids. Its other fields are kept."""
    cut = row.get("cut") or []
    pair = dict(row)
    pair["prompt_ids"] = encode_prompt(tokenizer, row)
    pair["edited_ids"] = encode_response(tokenizer, row["edited"], eos="edited" not in cut)
    pair["original_ids"] = encode_response(tokenizer, row["original"], eos="original" not in cut)
    return pair

def diff_row(row, tokenizer, *, gaps=False, max_tokens=None, max_changed=1.0):
    """A row of edits.jsonl -> a row of diffs.jsonl, and the reason to drop it, or None. A pair that
    is too long is not aligned: it has no masks. max_tokens: of prompt + answer"""
    pair = encode_row(row, tokenizer)
    ids = (pair["original_ids"], pair["edited_ids"])
    prompt_ids = pair["prompt_ids"]
    room = None if max_tokens is None else max_tokens - len(prompt_ids or [])
    why = gate(*ids, max_tokens=room)
    if why == "too long":
        return pair, why
    masks = align(*ids, gaps=gaps)
    pair["edited_changed"] = masks[1]
    pair["original_changed"] = masks[0]
    if prompt_ids is None:
        return pair, "special token in the prompt"
    return pair, gate(*ids, *masks, max_changed=max_changed, max_tokens=room)

# ---------------------------------------------------------------- the stage

def check(cfg):
    """What can be wrong before anything is written -> rows, tokenizer"""
    check_input(cfg.data, "data", "python edit.py")
    check_model(cfg.tokenizer, "tokenizer", "python sft.py", weights=False)
    check_numbers(cfg, max_tokens=COUNT, max_changed=(ABOVE_0[0], 1), seed=ANY)
    return read_jsonl(cfg.data, EDIT_FIELDS), load_tokenizer(cfg.tokenizer)

def main(cfg):
    rows, tokenizer = check(cfg)
    if begin(cfg, "diff", inputs=[cfg.data], tokenizer_hash=tokenizer_hash(tokenizer),
             prompt_format=tokenizer.prompt_format):
        return say(f"{cfg.out} is finished; nothing to do")

    # Align each pair; write it, or drop and count it.
    dropped = Counter()
    shares = []
    with replacing(cfg.out) as file:
        for row in rows:
            if row["edited"] is None:
                why = "failed edit"
            else:
                pair, why = diff_row(row, tokenizer, gaps=cfg.gaps, max_tokens=cfg.max_tokens,
                                     max_changed=cfg.max_changed)
            if why:
                dropped[why] += 1
                continue
            shares.append(changed_share(pair["original_changed"], pair["edited_changed"]))
            file.write(json.dumps(pair) + "\n")
        if not shares:
            fail(f"{cfg.data}: no pair is left to learn from; dropped: {dict(dropped)}")

    share = sum(shares) / len(shares)
    counts = "".join(f", {n} {why}" for why, n in sorted(dropped.items()))
    say(f"{cfg.out}: {len(shares)} pairs of {len(rows)} rows{counts}; "
        f"{share:.1%} of the tokens changed; next: python reward_model.py --data={cfg.out} "
        f"--model={cfg.tokenizer}")
    finish(cfg, pairs=len(shares), dropped=dict(dropped), changed_share=share)

if __name__ == "__main__":
    if sys.argv[1:2] == ["show"]:
        extra("report.show_diffs", "diff.py show").main(sys.argv[2:])
    else:
        main(load_config(Config, "diff"))
