"""Pairs with their edits marked, in the terminal or as a page: python diff.py show

    python diff.py show out/edits.jsonl --tokenizer=out/sft --n=5   # [-removed-] {+added+}
    python diff.py show out/edits.jsonl --html=out/diffs.html       # the same as a page
"""
import sys
from dataclasses import dataclass
from shutil import get_terminal_size

from common import load_tokenizer, token_texts
from diff import EDIT_FIELDS, align, changed_share, diff_row
from extras.pages import safe
from extras.report.show_rewards import question, write_page
from plumbing.command_line import load_config
from plumbing.files import check_input, check_model, check_numbers, read_jsonl
from plumbing.paint import plain


@dataclass(frozen=True)
class Config:
    data: str = "out/edits.jsonl"
    tokenizer: str = "out/sft"      # folder (or hub name) of the model whose tokens are shown
    gaps: bool = False              # also mark the tokens that diff.py --gaps=true puts into U_1
    n: int = 5                      # pairs
    html: str | None = None         # a page to write, instead of the terminal
    seed: int = 0                   # unused; every stage has one
    overwrite: bool = False         # replace a file that is no page of ours


# ---------------------------------------------------------------- both answers as one text

def segments(original_texts, original_changed, edited_texts, edited_changed, blamed=()):
    """Both answers as one text -> list of [kind, text]: "-" removed, "+" added, " " in both, "~" in
    both, but in U_1 because of a gap.

    texts: one string per token (common.token_texts). The masks are those without gaps. blamed: the
    positions, in the original, of unchanged tokens that gaps would put into U_1 on either side."""
    spans = []
    i = 0
    j = 0
    while i < len(original_texts) or j < len(edited_texts):
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
        if spans and spans[-1][0] == kind:
            spans[-1][1] += text
        else:
            spans.append([kind, text])
    return spans


MARKS = {"-": ("[-", "-]", "\033[31m"), "+": ("{+", "+}", "\033[32m"),
         "~": ("<~", "~>", "\033[33m"), " ": ("", "", "")}


def draw(original_texts, original_changed, edited_texts, edited_changed, *, blamed=(), width=100,
         color=True):
    """Both answers as one text for the terminal, wrapped at width: [-removed-] red, {+added+} green,
    <~blamed~> yellow. Arguments as in segments(). Control characters are made visible."""
    lines = [""]
    column = 0
    spans = segments(original_texts, original_changed, edited_texts, edited_changed, blamed)
    for kind, text in spans:
        left, right, paint = MARKS[kind]
        for number, line in enumerate((left + plain(text) + right).split("\n")):
            if number:
                lines.append("")
                column = 0
            for word in line.replace(" ", " \0").split("\0"):  # a word keeps the space after it
                if column and column + len(word.rstrip()) > width:
                    lines.append("")
                    column = 0
                painted = paint and color and word
                lines[-1] += f"{paint}{word}\033[0m" if painted else word
                column += len(word)
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------- the pairs

def picture(row, tokenizer, gaps):
    """A row of edits.jsonl -> its title, and the arguments of segments() and draw()"""
    pair = diff_row(row, tokenizer)
    original_ids = pair["original_ids"]
    edited_ids = pair["edited_ids"]
    masks = align(original_ids, edited_ids, gaps=gaps)

    # The k-th unchanged token of one side is the k-th of the other.
    blamed = set()
    if gaps:
        kept_original = unchanged(pair["original_changed"])
        kept_edited = unchanged(pair["edited_changed"])
        for i, j in zip(kept_original, kept_edited):
            if masks[0][i] or masks[1][j]:
                blamed.add(i)

    title = f"{row.get('id', '')}  ({changed_share(*masks):.0%} of the tokens changed)"
    return title, (token_texts(tokenizer, original_ids), pair["original_changed"],
                   token_texts(tokenizer, edited_ids), pair["edited_changed"], blamed)


def unchanged(mask):
    return [t for t, changed in enumerate(mask) if not changed]


def show(cfg):
    """The first n changed pairs of an edits file"""
    check_numbers(cfg, "n")
    check_input(cfg.data, "data", "python edit.py")
    check_model(cfg.tokenizer, "tokenizer", "python sft.py", weights=False)
    tokenizer = load_tokenizer(cfg.tokenizer)
    rows = [row for row in read_jsonl(cfg.data, EDIT_FIELDS)
            if row["edited"] not in (None, row["original"])][:cfg.n]
    if cfg.html:
        return diff_page(cfg, rows, tokenizer)
    for row in rows:
        title, (*pair, blamed) = picture(row, tokenizer, cfg.gaps)
        print(f"\n{plain(title)}  {plain(row['instruction'])}")
        width = get_terminal_size().columns
        print(draw(*pair, blamed=blamed, width=width, color=sys.stdout.isatty()))


def diff_page(cfg, rows, tokenizer):
    tags = {"-": "del", "+": "ins", "~": "mark"}
    sections = []
    has_gaps = False
    for row in rows:
        title, pair = picture(row, tokenizer, cfg.gaps)
        parts = []
        for kind, text in segments(*pair):
            has_gaps = has_gaps or kind == "~"
            tag = tags.get(kind)
            parts.append(f"<{tag}>{safe(text)}</{tag}>" if tag else safe(text))
        sections.append((title, f"{question(row)}<p class=text>{''.join(parts)}</p>"))
    legend = "<del>removed</del> <ins>added</ins>, the rest unchanged"
    if has_gaps:
        legend += "; <mark>unchanged, but in U_1 because of a gap</mark>"
    write_page(cfg.html, f"What the edits changed: {cfg.data}", legend, sections, cfg.overwrite)


def main(argv):
    show(load_config(Config, "diff.show", argv))
