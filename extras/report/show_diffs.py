"""Pairs with their edits marked, in a terminal or as a page: python diff.py show

    python diff.py show out/edits.jsonl --tokenizer=out/sft --n=5   # [-removed-] {+added+}
    python diff.py show out/edits.jsonl --html=out/diffs.html       # the same as a page
"""
if __name__ == "__main__":
    raise SystemExit("show_diffs.py is a part of: python diff.py show")

from dataclasses import dataclass
from shutil import get_terminal_size

from common import load_tokenizer
from diff import Config as DiffConfig
from diff import EDIT_FIELDS, align, changed_share, diff_row
from extras.pages import question_html, safe, write_show_page
from extras.tokens import token_texts
from plumbing.command_line import load_config
from plumbing.files import ANY, COUNT, check_input, check_numbers, read_jsonl
from plumbing.models import check_model
from plumbing.paint import in_colour, plain
from plumbing.ranks import say


@dataclass(frozen=True)
class Config:
    data: str = "out/edits.jsonl"
    tokenizer: str = "out/sft"      # folder (or hub name) of the model whose tokens are shown
    gaps: bool = False              # also mark the tokens that diff.py --gaps=true puts into U_1
    n: int = 5                      # pairs
    max_tokens: int = DiffConfig.max_tokens     # prompt + answer; longer pairs are not shown
    html: str | None = None         # a page to write, instead of the terminal
    seed: int = 0                   # unused; every stage has one
    overwrite: bool = False         # replace a file that is no page of ours


# ---------------------------------------------------------------- both answers as one text

def segments(original_texts, original_changed, edited_texts, edited_changed, blamed=()):
    """Both answers as one text -> list of [kind, text]

    kind: "-" removed, "+" added, " " in both, "~" in both, but in U_1 because of a gap.
    texts: one string per token (tokens.token_texts). changed: the masks without gaps. blamed: the
    positions in the original of the "~" tokens."""
    spans = []
    i = 0
    j = 0
    while i < len(original_texts) or j < len(edited_texts):
        # The next token: all that was removed at this place, then all that was added, then a pair
        # of unchanged tokens.
        if i < len(original_texts) and original_changed[i]:
            kind = "-"
            text = original_texts[i]
            i += 1
        elif j < len(edited_texts) and edited_changed[j]:
            kind = "+"
            text = edited_texts[j]
            j += 1
        else:
            kind = "~" if i in blamed else " "
            text = original_texts[i]
            i += 1
            j += 1

        # It joins the last segment if that is of the same kind.
        if spans and spans[-1][0] == kind:
            spans[-1][1] += text
        else:
            spans.append([kind, text])
    return spans


# kind of a segment -> what is printed before and after it, and its colour in a terminal
MARKS = {"-": ("[-", "-]", "\033[31m"), "+": ("{+", "+}", "\033[32m"),
         "~": ("<~", "~>", "\033[33m"), " ": ("", "", "")}
RESET = "\033[0m"


def draw(original_texts, original_changed, edited_texts, edited_changed, *, blamed=(), width=100,
         color=True):
    """Both answers as one text for a terminal, as in the paper's Figures 3 to 5, wrapped at width:
    [-removed-] red, {+added+} green, <~in U_1 because of a gap~> yellow. Arguments as in
    segments(). Control characters are made visible."""
    lines = [""]
    column = 0
    spans = segments(original_texts, original_changed, edited_texts, edited_changed, blamed)
    for kind, text in spans:
        left, right, paint = MARKS[kind]
        for number, line in enumerate((left + plain(text) + right).split("\n")):
            if number > 0:
                lines.append("")
                column = 0
            for word in spaced_words(line):
                if column and column + len(word.rstrip()) > width:
                    lines.append("")
                    column = 0
                column += len(word)
                if paint and color and word:
                    word = f"{paint}{word}{RESET}"
                lines[-1] += word
    return "\n".join(line.rstrip() for line in lines)


def spaced_words(line):
    """A line split behind each space, so that a word keeps the space after it"""
    return line.replace(" ", " \0").split("\0")


# ---------------------------------------------------------------- the pairs

def pairs_to_show(cfg, rows, tokenizer):
    """rows: (number, row). The first n whose answers are not too long -> list of (row, what
    both_sides returns)"""
    found = []
    too_long = 0
    for number, row in rows:
        if len(found) == cfg.n:
            break
        pair, why = diff_row(row, tokenizer, max_tokens=cfg.max_tokens)
        if why == "too long":
            too_long += 1
        else:
            found.append((row, both_sides(number, pair, tokenizer, cfg.gaps)))
    if too_long:
        say(f"{too_long} pairs longer than --max_tokens={cfg.max_tokens} are not shown")
    return found


def both_sides(number, pair, tokenizer, gaps):
    """The number of a row of edits.jsonl and its diff_row() -> its title, and the five arguments of
    segments()"""
    original_ids = pair["original_ids"]
    edited_ids = pair["edited_ids"]
    masks = align(original_ids, edited_ids, gaps=gaps)

    # The k-th unchanged token of the original is the k-th of the edited answer. A gap can put it
    # into U_1 on either side.
    blamed = set()
    if gaps:
        original_kept = unchanged(pair["original_changed"])
        edited_kept = unchanged(pair["edited_changed"])
        for i, j in zip(original_kept, edited_kept):
            if masks[0][i] or masks[1][j]:
                blamed.add(i)

    title = f"row {number} · {changed_share(*masks):.0%} changed"
    original_texts = token_texts(tokenizer, original_ids)
    edited_texts = token_texts(tokenizer, edited_ids)
    return title, (original_texts, pair["original_changed"], edited_texts, pair["edited_changed"],
                   blamed)


def unchanged(mask):
    """The positions with 0"""
    return [t for t, changed in enumerate(mask) if not changed]


# ---------------------------------------------------------------- show

def show_pairs(cfg):
    """The first n changed pairs of an edits file"""
    check_numbers(cfg, n=COUNT, max_tokens=COUNT, seed=ANY)
    check_input(cfg.data, "data", "python edit.py")
    check_model(cfg.tokenizer, "tokenizer", "python sft.py", weights=False)
    tokenizer = load_tokenizer(cfg.tokenizer)
    rows = read_jsonl(cfg.data, EDIT_FIELDS)
    changed = [(number, row) for number, row in enumerate(rows, 1)
               if row["edited"] not in (None, row["original"])]
    pairs = pairs_to_show(cfg, changed, tokenizer)
    if cfg.html:
        diff_page(cfg, pairs)
    else:
        print_pairs(pairs)


def print_pairs(pairs):
    width = get_terminal_size().columns
    color = in_colour()
    for row, (title, (*sides, blamed)) in pairs:
        print(f"\n{title} · {plain(row['instruction'])}")
        print(draw(*sides, blamed=blamed, width=width, color=color))


def diff_page(cfg, pairs):
    tags = {"-": "del", "+": "ins", "~": "mark"}
    sections = []
    has_gaps = False
    for row, (title, sides) in pairs:
        parts = []
        for kind, text in segments(*sides):
            shown = safe(text)
            if kind in tags:
                shown = f"<{tags[kind]}>{shown}</{tags[kind]}>"
            parts.append(shown)
            has_gaps = has_gaps or kind == "~"
        content = f"{question_html(row)}<p class=text>{''.join(parts)}</p>"
        sections.append((title, row.get("id", ""), content))

    legend = "<del>removed</del> <ins>added</ins>, the rest unchanged; changed: share of the tokens"
    if has_gaps:
        legend += "; <mark>unchanged, but in U_1 because of a gap</mark>"
    title = f"What the edits changed: {cfg.data}"
    write_show_page(cfg.html, title, legend, sections, cfg.overwrite)


def main(argv):
    show_pairs(load_config(Config, "diff.show", argv))
