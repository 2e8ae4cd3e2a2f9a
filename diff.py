"""Stage 2. Which tokens did the edit change? edits.jsonl -> diffs.jsonl: pairs of token sequences with U_0 / U_1 masks.

    python diff.py out/edits.jsonl --tokenizer=out/sft             # -> out/diffs.jsonl
    python diff.py show out/edits.jsonl --tokenizer=out/sft --n=5  # pairs in the terminal: [-removed-] {+added+}
    python diff.py show out/edits.jsonl --html=out/diffs.html      # the same as a page

U_0, the unchanged part, is a longest common subsequence of the two token sequences; U_1 is the rest, on each side. (The
paper writes U_0 = {t : a_t^i = a_t^j}; once something was inserted or deleted, only an alignment makes sense of that.)
Both answers end in EOS unless the row's `cut` names them, so EOS is a token like any other and is usually in U_0.

Nothing is cut to fit. Cutting both answers at one length would put untouched tokens into U_1: an insertion pushes as
many of the edited answer's last tokens over the edge, and the original's, left without a partner, would be punished.
Pairs that are too long, identical, empty or changed beyond `max_changed` are dropped and counted, and so are failed
edits (edited: null).
"""
import json, sys
from dataclasses import dataclass

from common import encode_prompt, encode_response, load_tokenizer, tokenizer_hash
from plumbing.command_line import extra, load_config
from plumbing.files import check_input, check_model, check_numbers, read_jsonl, replacing
from plumbing.ranks import fail, say
from plumbing.record import begin, finish


@dataclass(frozen=True)
class Config:
    data: str = "out/edits.jsonl"   # rows: id, instruction, input, original (y_l), edited (y_w, or null: it failed)
    tokenizer: str = "out/sft"      # folder (or hub name) of the model whose tokens count: reward model's and policy's
    out: str = "out/diffs.jsonl"
    gaps: bool = False              # ours, see align(): so that Eq. 4 can punish an omission
    max_tokens: int = 512           # of prompt + answer; longer pairs are dropped (the paper's preset: 512)
    max_changed: float = 1.0        # drop pairs with a larger share of changed tokens; 1: keep rewrites too
    seed: int = 0                   # nothing here is random
    overwrite: bool = False
    allow_changed_code: bool = False        # continue a run whose stage file or common.py changed


# ---------------------------------------------------------------- the alignment

def lcs_length(a, b):
    """Length of a longest common subsequence, a bit per token of a (Hyyro 2004): a zero in v is a step of the length"""
    places = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    v = whole = (1 << len(a)) - 1
    for token in b:
        u = v & places.get(token, 0)
        v = ((v + u) | (v - u)) & whole
    return len(a) - v.bit_count()


def common_pairs(a, b):
    """Index pairs (i, j), a[i] == b[j], of a longest common subsequence with as few contiguous runs as any longest has.

    Dynamic programming over prefixes: best[i][j] scores a[:i] against b[:j], run[i][j] the same with a[i-1] on b[j-1].
    A pair is worth MATCH, beginning a new run costs 1. An optimal path makes len(a) - L deletions and len(b) - L
    insertions, so it stays in a narrow band about the diagonal; the rest is not computed."""
    L, n, m = lcs_length(a, b), len(a), len(b)
    MATCH, NEVER = n + m + 2, -(n + m + 2) ** 2
    best, run = ([[NEVER] * (m + 1) for _ in range(n + 1)] for _ in range(2))
    best[0][0] = 0
    for i in range(n + 1):
        for j in range(max(0, i - (n - L)), min(m, i + (m - L)) + 1):
            if i and j and a[i - 1] == b[j - 1]:
                run[i][j] = MATCH + max(run[i - 1][j - 1], best[i - 1][j - 1] - 1)
            best[i][j] = max(best[i][j], run[i][j], best[i - 1][j] if i else NEVER, best[i][j - 1] if j else NEVER)
    pairs, i, j, inside = [], n, m, False
    while i and j:
        if inside or best[i][j] == run[i][j]:
            inside = run[i][j] == MATCH + run[i - 1][j - 1]  # did the pair before belong to the same run?
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return pairs[::-1]


def align(original, edited, *, gaps=False):
    """Two token sequences (lists of int) -> original_changed, edited_changed (lists of 0/1): 1 = in U_1.

    The unchanged tokens are a longest common subsequence: the common beginning and end first, between them one with as
    few contiguous runs as there can be. Ties are decided from the end: two tokens are paired if such an alignment pairs
    them, otherwise the original's is dropped if one can do without it. The same texts always give the same masks.

    gaps=True: where something was only inserted (or deleted), the side without it has no U_1, and Eq. 4 could not blame
    its omission. Then the unchanged token that stands there counts as changed too: it is the action taken in the state
    in which the other answer acted differently (an EOS that came too early, say)."""
    n, m = len(original), len(edited)
    head = 0
    while head < min(n, m) and original[head] == edited[head]:
        head += 1
    tail = 0
    while tail < min(n, m) - head and original[n - 1 - tail] == edited[m - 1 - tail]:
        tail += 1
    between = common_pairs(original[head:n - tail], edited[head:m - tail])
    kept = [*((i, i) for i in range(head)), *((head + i, head + j) for i, j in between),
            *((n - k, m - k) for k in range(tail, 0, -1))]
    original_changed, edited_changed = [1] * n, [1] * m
    before = (-1, -1)
    for i, j in kept:
        removed, added = i - before[0] - 1, j - before[1] - 1  # tokens between this unchanged token and the last one
        original_changed[i] = int(gaps and added > 0 and removed == 0)
        edited_changed[j] = int(gaps and removed > 0 and added == 0)
        before = (i, j)
    return original_changed, edited_changed


def gate(original_ids, edited_ids, original_changed, edited_changed, *, max_changed=1.0, max_tokens=None):
    """Why a pair must not be learnt from: "empty", "identical", "too long", "changed share"; None: it may.
    max_tokens is the answers' room, without the prompt."""
    if len(original_ids) < 2 or len(edited_ids) < 2:  # EOS alone
        return "empty"
    if original_ids == edited_ids:
        return "identical"
    if max_tokens is not None and max(len(original_ids), len(edited_ids)) > max_tokens:
        return "too long"
    if changed_share(original_changed, edited_changed) > max_changed:
        return "changed share"
    return None


def changed_share(original_changed, edited_changed):
    """The share of the tokens of both sides that are in U_1"""
    return (sum(original_changed) + sum(edited_changed)) / max(1, len(original_changed) + len(edited_changed))


def diff_row(row, tokenizer, gaps=False):
    """A row of edits.jsonl -> a row of diffs.jsonl; its other fields pass through"""
    cut = row.get("cut") or []
    original_ids = encode_response(tokenizer, row["original"], eos="original" not in cut)
    edited_ids = encode_response(tokenizer, row["edited"], eos="edited" not in cut)
    original_changed, edited_changed = align(original_ids, edited_ids, gaps=gaps)
    return row | dict(prompt_ids=encode_prompt(tokenizer, row), edited_ids=edited_ids, original_ids=original_ids,
                      edited_changed=edited_changed, original_changed=original_changed)


# ---------------------------------------------------------------- the stage

EDIT_FIELDS = {"instruction": str, "input": (str, type(None)), "original": str, "edited": (str, type(None))}


def main(cfg):
    check_input(cfg.data, "data", "python edit.py")
    check_model(cfg.tokenizer, "tokenizer", "python sft.py", weights=False)
    if not 0 < cfg.max_changed <= 1:
        fail(f"--max_changed is a share, above 0 and at most 1, got {cfg.max_changed}")
    check_numbers(cfg, "max_tokens")
    rows = read_jsonl(cfg.data, EDIT_FIELDS)
    tokenizer = load_tokenizer(cfg.tokenizer)
    if begin(cfg, "diff", inputs=[cfg.data], tokenizer_hash=tokenizer_hash(tokenizer)):
        return say(f"{cfg.out} is finished; nothing to do")

    dropped, shares = {}, []
    with replacing(cfg.out) as file:
        for row in rows:
            pair = row["edited"] is not None and diff_row(row, tokenizer, cfg.gaps)
            why = "failed edit" if not pair else gate(
                pair["original_ids"], pair["edited_ids"], pair["original_changed"], pair["edited_changed"],
                max_changed=cfg.max_changed, max_tokens=cfg.max_tokens - len(pair["prompt_ids"]))
            if why:
                dropped[why] = dropped.get(why, 0) + 1
                continue
            shares.append(changed_share(pair["original_changed"], pair["edited_changed"]))
            file.write(json.dumps(pair) + "\n")
        if not shares:
            fail(f"{cfg.data}: no pair is left to learn from; dropped: {dropped}")
    share, counts = sum(shares) / len(shares), "".join(f", {n} {why}" for why, n in sorted(dropped.items()))
    say(f"{cfg.out}: {len(shares)} pairs of {len(rows)} rows{counts}; {share:.1%} of the tokens changed")
    finish(cfg, pairs=len(shares), dropped=dropped, changed_share=share)


if __name__ == "__main__":
    if sys.argv[1:2] == ["show"]:
        extra("report.show_diffs", "diff.py show").main(sys.argv[2:])
    else:
        main(load_config(Config, "diff"))
