"""Are the edits minimal? How much they change, and which ones diff.py's gate would keep:

    python edit.py stats FILE
"""
import math, re, sys
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
    data: str = "out/edits.jsonl"  # edits by any editor: instruction, input, original, edited
    tokenizer: str = ""            # a model's folder or hub name; empty: words are counted instead
    max_changed: float = diff.Config.max_changed  # the gate of diff.py, to try values of it here
    max_tokens: int = diff.Config.max_tokens      # of prompt + answer; needs the tokenizer
    n: int = 10                    # how many of the most changed answers are drawn


def operations(original_changed, edited_changed):
    """The edits of a pair as a person counts them -> Counter of insert, delete, replace.

    Each run of changed tokens is one edit. The masks have as many unchanged tokens on both sides:
    the k-th of one is the k-th of the other."""
    kinds = Counter()
    i = 0
    j = 0
    while i < len(original_changed) or j < len(edited_changed):
        # The run of changed tokens that begins here, on both sides.
        i_start = i
        j_start = j
        while i < len(original_changed) and original_changed[i]:
            i += 1
        while j < len(edited_changed) and edited_changed[j]:
            j += 1

        if i > i_start and j > j_start:
            kinds["replace"] += 1
        elif i > i_start:
            kinds["delete"] += 1
        elif j > j_start:
            kinds["insert"] += 1

        # Both sides are now at an unchanged token, the same one.
        i += 1
        j += 1
    return kinds


def words_of(text):
    """Words with the space before them, and "" at the end in place of EOS"""
    return re.findall(r"\s*\S+|\s+$", text) + [""]


def align_row(row, tokenizer):
    """-> (original, edited, original_changed, edited_changed), the prompt's length in tokens.

    The first two are ids; without a tokenizer they are words, and the length is None."""
    if tokenizer:
        pair = diff.diff_row(row, tokenizer)
        names = ("original_ids", "edited_ids", "original_changed", "edited_changed")
        return tuple(pair[name] for name in names), len(pair["prompt_ids"])
    original = words_of(row["original"])
    edited = words_of(row["edited"])
    return (original, edited, *diff.align(original, edited)), None


def show_gate(count, verdicts, failed):
    """What diff.py's gate says of the rows, and why editors failed"""
    line = f"{count} rows: {verdicts.pop(None, 0)} edits pass the gate"
    for why, rows in verdicts.most_common():
        line += f", {rows} {why}"
    say(f"{line}, {failed.total()} failed")
    for why, rows in failed.most_common(9):
        say(f"{rows:8}  failed: {plain(why)[:100]}")


def show_histogram(shares):
    tenths = Counter(min(9, int(10 * share)) for share in shares)
    for tenth in range(10):
        bar = "#" * math.ceil(50 * tenths[tenth] / len(shares))
        say(f"{10 * tenth:4}-{10 * tenth + 10:3}% {tenths[tenth]:7} {bar}")


def show_stats(rows, tokenizer_path, *, max_changed=Config.max_changed,
               max_tokens=Config.max_tokens, n=Config.n):
    """Print the figures of edits.jsonl's rows, then the n most changed answers"""
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
    unit = "tokens" if tokenizer else "words"

    # Align every edit and ask the gate of diff.py.
    failed = Counter()
    verdicts = Counter()
    kinds = Counter()
    pairs = []  # (changed share, row, what align_row returns)
    longer = []
    for row in rows:
        if row["edited"] is None:
            failed[str(row.get("error") or "no reason given")] += 1
            continue
        pair, prompt_length = align_row(row, tokenizer)
        original, edited, original_changed, edited_changed = pair
        room = max_tokens - prompt_length if tokenizer else None
        verdicts[diff.gate(*pair, max_changed=max_changed, max_tokens=room)] += 1
        kinds += operations(original_changed, edited_changed)
        share = diff.changed_share(original_changed, edited_changed)
        pairs.append((share, row, pair))
        longer.append(len(edited) - len(original))
    show_gate(len(rows), verdicts, failed)
    if not pairs:
        return

    # How much the edits change.
    shares = [share for share, _, _ in pairs]
    mean = sum(shares) / len(shares)
    say(f"changed share of the {unit}: mean {mean:.1%}, median {median(shares):.1%}")
    show_histogram(shares)
    counts = [f"{kinds[kind]} {kind}" for kind in ("insert", "delete", "replace")]
    say(f"operations: {', '.join(counts)}")
    mean = sum(longer) / len(longer)
    say(f"change of length in {unit}: mean {mean:+.1f}, median {median(longer):+g}; "
        f"{sum(x > 0 for x in longer)} longer, {longer.count(0)} equal, "
        f"{sum(x < 0 for x in longer)} shorter")

    # The most changed answers.
    for share, row, pair in sorted(pairs, key=lambda entry: -entry[0])[:n]:
        original, edited, original_changed, edited_changed = pair
        if tokenizer:
            original = token_texts(tokenizer, original)
            edited = token_texts(tokenizer, edited)
        id = plain(str(row.get("id", "")))
        say(f"\n{id}  {plain(row['instruction'])[:90]}  ({share:.0%} changed)")
        say(draw(original, original_changed, edited, edited_changed, color=sys.stdout.isatty()))


def main(argv):
    cfg = load_config(Config, "edit.stats", argv)
    check_input(cfg.data, "data", "python edit.py")
    rows = read_jsonl(cfg.data, diff.EDIT_FIELDS)
    show_stats(rows, cfg.tokenizer, max_changed=cfg.max_changed, max_tokens=cfg.max_tokens, n=cfg.n)
