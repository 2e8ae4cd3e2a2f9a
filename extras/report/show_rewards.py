"""Answers with their tokens painted by r_t, in the terminal or as a page: python reward_model.py show

    python reward_model.py show --model=out/rm a.jsonl,b.jsonl      # answers of one or two files
    python reward_model.py show --model=out/rm out/edits.jsonl --html=out/rewards.html   # a page
"""
from dataclasses import dataclass
from pathlib import Path

import torch

from common import (encode_prompt, encode_response, load_model, load_tokenizer, pack, reward_level,
                    setup, token_heads, token_texts, total_rewards)
from diff import align
from extras.pages import document, heat, is_ours, safe
from plumbing.command_line import load_config
from plumbing.files import check_input, check_model, check_numbers, read_jsonl, replacing
from plumbing.paint import paint, plain
from plumbing.ranks import fail, say

MARK = "<!-- a page of show -->"
NAMES = ("output", "original", "edited")


@dataclass(frozen=True)
class Config:
    model: str = "out/rm"
    data: list[str] = ()            # one or two files of answers: outputs.jsonl or edits.jsonl
    n: int = 3                      # rows
    html: str | None = None         # a page to write, instead of the terminal
    seed: int = 0                   # unused; every stage has one
    overwrite: bool = False         # replace a file that is no page of ours


# ---------------------------------------------------------------- the answers

def asked(row):
    return row["instruction"], row.get("input") or ""


def rows_about(files, number):
    """The rows of all files about the same question as the numbered row of the first file. A
    question may occur twice; then the k-th rows belong together."""
    first = files[0][number]
    k = sum(asked(row) == asked(first) for row in files[0][:number])
    found = []
    for file in files:
        same = [row for row in file if asked(row) == asked(first)]
        found.append(same[k] if k < len(same) else None)
    return found


def score_answers(model, level, tokenizer, path, row, device):
    """The answers of a row -> list of (title, R, texts of the tokens, r_t, changed: 0/1 or None)"""
    ids = {}
    for name in NAMES:
        if row.get(name):
            complete = name not in (row.get("cut") or [])
            ids[name] = encode_response(tokenizer, row[name], eos=complete)
    changed = {}
    if "original" in ids and "edited" in ids:
        changed["original"], changed["edited"] = align(ids["original"], ids["edited"])

    answers = []
    prompt = encode_prompt(tokenizer, row)
    for name, answer in ids.items():
        packed = pack([prompt], [answer], device)
        r = token_heads(model, *packed)  # a sequence model's r_t score the prefixes
        R = total_rewards(r, packed[2], level).item()
        title = f"{Path(path).parent.name}/{Path(path).name}"
        if name != "output":
            title += f" {name}"
        texts = token_texts(tokenizer, answer)
        answers.append((title, R, texts, r[0].tolist(), changed.get(name)))
    return answers


def largest(answers):
    """The largest |r_t| of some answers"""
    return max((abs(r) for _, _, _, rewards, _ in answers for r in rewards), default=0) or 1.0


@torch.no_grad()
def show(cfg):
    """Paint the first n answers of each file: those of one row below each other, or side by side in
    a page"""
    check_model(cfg.model, "model", "python reward_model.py")
    level = reward_level(cfg.model)
    check_numbers(cfg, "n")
    if not cfg.data:
        fail("show needs one or two files of answers")
    for path in cfg.data:
        check_input(path, "data", "python evaluate.py decode, or python edit.py")
    files = [read_jsonl(path, {"instruction": str}) for path in cfg.data]
    for path, file in zip(cfg.data, files):
        if not any(isinstance(file[0].get(name), str) for name in NAMES):
            fail(f"{path} holds no answers to show: its rows need output, or original and edited")

    tokenizer = load_tokenizer(cfg.model)
    device, mesh, dtype = setup()
    model = load_model(cfg.model, device, mesh, dtype, head="saved", frozen=True)
    shown = []
    for number, first in enumerate(files[0][:cfg.n]):
        answers = []
        for path, row in zip(cfg.data, rows_about(files, number)):
            if row:
                answers += score_answers(model, level, tokenizer, path, row, device)
        shown.append((first, answers))

    if cfg.html:
        return rewards_page(cfg.html, cfg.model, shown, cfg.overwrite)
    for row, answers in shown:
        print(f"\n{plain(row['instruction'])}  {plain(row.get('input') or '')}")
        scale = largest(answers)
        for title, R, texts, rewards, _ in answers:
            print(f"{title}: R = {R:+.3f}\n  {paint(texts, rewards, scale)}")


# ---------------------------------------------------------------- pages of show

def question(row):
    """The instruction; a long input folded away"""
    shown = f"<p class=text><b>{safe(row.get('instruction', ''))}</b></p>"
    more = row.get("input") or ""
    if not more:
        return shown
    return (f"{shown}<details><summary>input, {len(more)} characters</summary>"
            f"<p class=text>{safe(more)}</p></details>")


def write_page(path, title, legend, sections, overwrite):
    """A page of sections (heading, its HTML); only a page of ours is replaced without being asked"""
    if Path(path).suffix != ".html":
        fail(f"--html={path} must end in .html")
    if not overwrite and not is_ours(path, MARK):
        fail(f"--html={path} is no page of show's; choose another, or replace it with "
             "--overwrite=true")
    body = [f"<h1>{safe(title)}</h1><p class=quiet>{legend}</p>"]
    for heading, content in sections:
        body.append(f"<section><h2>{safe(heading)}</h2>{content}</section>")
    if not sections:
        body.append("<p>Nothing to show.</p>")
    with replacing(path) as file:
        file.write(document(MARK, title, "\n".join(body)))
    say(f"{path}: {len(sections)} " + ("row" if len(sections) == 1 else "rows"))


def rewards_page(path, model, rows, overwrite=False):
    """rows: (row, answers), answers as score_answers gives them"""
    sections = []
    for number, (row, answers) in enumerate(rows, 1):
        scale = largest(answers)
        painted = []
        for title, R, texts, rewards, changed in answers:
            heading = f"<h3>{safe(title)} <span class=quiet>R = {R:+.3f}</span></h3>"
            painted.append(f"<div>{heading}{heat(texts, rewards, scale, changed)}</div>")
        heading = f"{row.get('id') or number}  (deepest colour: {scale:.2f})"
        sections.append((heading, f"{question(row)}<div class=pair>{''.join(painted)}</div>"))
    legend = ("<span style='background:rgb(var(--bad) / .6)'>bad</span> "
              "<span style='background:rgb(var(--good) / .6)'>good</span>, each row on its own "
              "scale; underlined: changed by the edit. Point at a token for its r.")
    write_page(path, f"What each token is worth to {model}", legend, sections, overwrite)


def main(argv):
    show(load_config(Config, "reward_model.show", argv))
