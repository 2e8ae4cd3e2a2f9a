"""Are the edits minimal? What diff.py's gate would keep, and how much they change: python edit.py stats FILE"""
import re, sys
from collections import Counter
from dataclasses import dataclass
from statistics import median

import diff
from common import load_tokenizer, token_texts
from extras.report.show_diffs import draw
from plumbing.command_line import load_config
from plumbing.files import check_input, read_jsonl
from plumbing.paint import plain
from plumbing.ranks import say


@dataclass(frozen=True)
class Config:
    data: str = "out/edits.jsonl"  # anybody's edits: instruction, input, original, edited
    tokenizer: str = ""            # a model's folder or hub name; empty: words are counted instead
    max_changed: float = diff.Config.max_changed  # the gate of diff.py, to be tried out here
    max_tokens: int = diff.Config.max_tokens      # of prompt + answer; needs the tokenizer
    n: int = 10                    # how many of the most changed are drawn


def operations(original_changed, edited_changed):
    """The edits of a pair as a person counts them: runs of changed tokens -> Counter of insert, delete, replace"""
    kinds, i, j = Counter(), 0, 0
    while i < len(original_changed) or j < len(edited_changed):
        at = i, j
        while i < len(original_changed) and original_changed[i]:
            i += 1
        while j < len(edited_changed) and edited_changed[j]:
            j += 1
        if (i, j) != at:
            kinds["insert" if i == at[0] else "delete" if j == at[1] else "replace"] += 1
        i, j = i + 1, j + 1  # both sides stand at an unchanged token, the same one
    return kinds


def encode_pair(row, tokenizer):
    """-> ids and masks of both sides, the prompt's length. Without a tokenizer: words, with the space before them."""
    if tokenizer:
        pair = diff.diff_row(row, tokenizer)
        names = ("original_ids", "edited_ids", "original_changed", "edited_changed")
        return [pair[name] for name in names], len(pair["prompt_ids"])
    sides = [re.findall(r"\s*\S+|\s+$", row[side]) + [""] for side in ("original", "edited")]  # "": EOS
    return [*sides, *diff.align(*sides)], None


def show_stats(rows, tokenizer_path, *, max_changed=Config.max_changed, max_tokens=Config.max_tokens, n=Config.n):
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
    failed, verdicts, kinds, pairs = Counter(), Counter(), Counter(), []
    for row in rows:
        if row["edited"] is None:
            failed[str(row.get("error") or "no reason given")] += 1
            continue
        sides, prompt_length = encode_pair(row, tokenizer)
        room = max_tokens - prompt_length if tokenizer else None
        verdicts[diff.gate(*sides, max_changed=max_changed, max_tokens=room)] += 1
        kinds += operations(*sides[2:])
        pairs.append((diff.changed_share(*sides[2:]), len(sides[1]) - len(sides[0]), row, sides))
    say(f"{len(rows)} rows: {verdicts.pop(None, 0)} edits pass the gate"
        + "".join(f", {count} {why}" for why, count in verdicts.most_common()) + f", {failed.total()} failed"
        + "".join(f"\n{count:8}  failed: {plain(why)[:100]}" for why, count in failed.most_common(9)))
    if not pairs:
        return
    unit = "tokens" if tokenizer else "words"
    shares, longer = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    say(f"changed share of the {unit}: mean {sum(shares) / len(pairs):.1%}, median {median(shares):.1%}")
    tenths = Counter(min(9, int(10 * share)) for share in shares)
    for tenth in range(10):
        say(f"{10 * tenth:4}-{10 * tenth + 10:3}% {tenths[tenth]:7} {'#' * -(-50 * tenths[tenth] // len(pairs))}")
    say("operations: " + ", ".join(f"{kinds[kind]} {kind}" for kind in ("insert", "delete", "replace")))
    say(f"change of length in {unit}: mean {sum(longer) / len(pairs):+.1f}, median {median(longer):+g}; "
        f"{sum(x > 0 for x in longer)} longer, {longer.count(0)} equal, {sum(x < 0 for x in longer)} shorter")
    for share, _, row, sides in sorted(pairs, key=lambda pair: -pair[0])[:n]:
        texts = [token_texts(tokenizer, ids) for ids in sides[:2]] if tokenizer else sides[:2]
        say(f"\n{plain(str(row.get('id', '')))}  {plain(row['instruction'])[:90]}  ({share:.0%} changed)")
        say(draw(texts[0], sides[2], texts[1], sides[3], color=sys.stdout.isatty()))


def main(argv):
    cfg = load_config(Config, "edit.stats", argv)
    check_input(cfg.data, "data", "python edit.py")
    rows = read_jsonl(cfg.data, diff.EDIT_FIELDS)
    show_stats(rows, cfg.tokenizer, max_changed=cfg.max_changed, max_tokens=cfg.max_tokens, n=cfg.n)
