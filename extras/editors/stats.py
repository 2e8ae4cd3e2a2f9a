"""Are the edits minimal? How much they change, and which ones diff.py's gate would keep:

    python edit.py stats FILE
"""
if __name__ == "__main__":
    raise SystemExit("stats.py is a part of: python edit.py stats")

import itertools, math, re
from collections import Counter
from dataclasses import dataclass
from statistics import median

import diff
from common import load_tokenizer
from extras.editors.desk import edits_of
from extras.report.show_diffs import draw
from extras.tokens import token_texts
from plumbing.command_line import load_config
from plumbing.files import ABOVE_0, AT_LEAST_0, COUNT, check_input, check_numbers, read_jsonl
from plumbing.paint import in_colour, plain
from plumbing.ranks import say


@dataclass(frozen=True)
class Config:
    data: str = "out/edits.jsonl"  # edits by any editor: instruction, input, original, edited
    tokenizer: str = ""            # a model's folder or hub name; empty: words are counted instead
    max_changed: float = diff.Config.max_changed  # the gate of diff.py, to try values of it here
    max_tokens: int = diff.Config.max_tokens      # of prompt + answer, or words of an answer;
                                   # longer pairs are counted, but not aligned
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


def align_row(row, tokenizer, *, gaps=False, **limits):
    """-> (original, edited, original_changed, edited_changed), and what diff.py's gate says of it.

    The first two are ids; without a tokenizer they are words. Masks of a pair that is too long are
    None. limits: max_tokens, max_changed"""
    if tokenizer:
        pair, why = diff.diff_row(row, tokenizer, gaps=gaps, **limits)
        names = ("original_ids", "edited_ids", "original_changed", "edited_changed")
        return tuple(pair.get(name) for name in names), why
    original = words_of(row["original"])
    edited = words_of(row["edited"])
    why = diff.gate(original, edited, max_tokens=limits["max_tokens"])
    if why == "too long":
        return (original, edited, None, None), why
    masks = diff.align(original, edited, gaps=gaps)
    return (original, edited, *masks), diff.gate(original, edited, *masks, **limits)


def show_gate(count, verdicts, failed):
    """What diff.py's gate says of the rows, and why editors failed"""
    line = f"{count} rows: {verdicts.pop(None, 0)} edits pass the gate"
    for why, rows in verdicts.most_common():
        line += f", {rows} {why}"
    say(f"{line}, {failed.total()} failed")
    for why, rows in failed.most_common(9):
        say(f"{rows:8}  failed: {plain(why)[:100]}")


def show_people(rows):
    """What each person of the human editor's page did. Rows of other editors have no name."""
    by_person = {}
    for row in rows:
        for edit in edits_of(row):
            if edit["who"]:
                by_person.setdefault(edit["who"], []).append(edit)
    for who, edits in sorted(by_person.items()):
        seconds = [edit["seconds"] for edit in edits if edit["seconds"] is not None]
        time = f", median {median(seconds):.0f} s a row" if seconds else ""
        unchanged = sum(bool(edit["unchanged"]) for edit in edits)
        say(f"{plain(who)}: {len(edits)} rows, nothing to change in {unchanged}{time}")


def changed_tokens(row, edited, tokenizer, limits):
    """Which tokens of the original this edit changes -> list of 0/1, None if it is too long.

    Where text was only inserted, the token after it counts (diff.py's gaps)."""
    edit = {name: row.get(name) for name in ("id", "instruction", "input", "original", "cut")}
    edit["edited"] = edited
    pair, _ = align_row(edit, tokenizer, gaps=True, **limits)
    return pair[2]


def with_error(measure, counts):
    """A measure of summed counts, and its standard error by the jackknife over the rows -> text.

    counts: one Counter per row. measure(Counter) -> float, or None where it is not defined"""
    total = Counter()
    for count in counts:
        total.update(count)
    value = measure(total)
    if value is None:
        return "not defined"
    left_out = []
    for count in counts:
        rest = Counter(total)
        rest.subtract(count)
        left_out.append(measure(rest))
    n = len(counts)
    if n < 2 or None in left_out:
        return f"{value:.2f} ± ?"
    mean = sum(left_out) / n
    variance = (n - 1) / n * sum((x - mean) ** 2 for x in left_out)
    return f"{value:.2f} ± {math.sqrt(variance):.2f}"


def overlap(count):
    """Of the tokens that at least one of two people changed, the share that both changed"""
    either = count["both"] + count["first"] + count["second"]
    return count["both"] / either if either else None


def kappa(count):
    """Cohen's kappa of "this token is to be changed": 1 is agreement, 0 is what chance gives"""
    n = count["both"] + count["first"] + count["second"] + count["neither"]
    if not n:
        return None
    first = (count["both"] + count["first"]) / n    # the share that the first person changed
    second = (count["both"] + count["second"]) / n
    by_chance = first * second + (1 - first) * (1 - second)
    if by_chance == 1:
        return None
    observed = (count["both"] + count["neither"]) / n
    return (observed - by_chance) / (1 - by_chance)


def show_agreement(rows, tokenizer, limits):
    """For each two people who edited the same rows: did they change the same tokens?"""
    counts_of = {}  # (who, who) -> one Counter of tokens per row
    same_text = Counter()
    for row in rows:
        edits = [edit for edit in edits_of(row) if edit["who"]]
        edits.sort(key=lambda edit: edit["who"])
        for first, second in itertools.combinations(edits, 2):
            masks = [changed_tokens(row, edit["edited"], tokenizer, limits)
                     for edit in (first, second)]
            if None in masks:
                continue
            count = Counter()
            for by_first, by_second in zip(*masks):
                names = {(1, 1): "both", (1, 0): "first", (0, 1): "second", (0, 0): "neither"}
                count[names[by_first, by_second]] += 1
            people = (first["who"], second["who"])
            counts_of.setdefault(people, []).append(count)
            same_text[people] += first["edited"] == second["edited"]

    unit = "tokens" if tokenizer else "words"
    for people, counts in sorted(counts_of.items()):
        names = " and ".join(map(plain, people))
        say(f"{names}, {len(counts)} rows edited by both: of the {unit} that either changed, both "
            f"changed {with_error(overlap, counts)}; kappa {with_error(kappa, counts)}; the same "
            f"text in {same_text[people]}")


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

    # Align every edit that is not too long, and ask the gate of diff.py.
    failed = Counter()
    verdicts = Counter()
    kinds = Counter()
    pairs = []  # (changed share, row, what align_row returns)
    longer = []
    for row in rows:
        if row["edited"] is None:
            failed[str(row.get("error") or "no reason given")] += 1
            continue
        pair, why = align_row(row, tokenizer, max_tokens=max_tokens, max_changed=max_changed)
        verdicts[why] += 1
        if why == "too long":
            continue
        original, edited, original_changed, edited_changed = pair
        kinds += operations(original_changed, edited_changed)
        share = diff.changed_share(original_changed, edited_changed)
        pairs.append((share, row, pair))
        longer.append(len(edited) - len(original))
    show_gate(len(rows), verdicts, failed)
    by_people = [row for row in rows if row.get("editor") == "human"]
    show_people(by_people)
    limits = dict(max_tokens=max_tokens, max_changed=max_changed)
    show_agreement(by_people, tokenizer, limits)
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
        say(draw(original, original_changed, edited, edited_changed, color=in_colour()))


def main(argv):
    cfg = load_config(Config, "edit.stats", argv)
    check_numbers(cfg, max_changed=(ABOVE_0[0], 1), max_tokens=COUNT, n=AT_LEAST_0)
    check_input(cfg.data, "data", "python edit.py")
    rows = read_jsonl(cfg.data, diff.EDIT_FIELDS)
    show_stats(rows, cfg.tokenizer, max_changed=cfg.max_changed, max_tokens=cfg.max_tokens, n=cfg.n)
