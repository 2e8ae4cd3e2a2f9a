"""Answers with their tokens painted by r_t, in a terminal or as a page: reward_model.py show

    python reward_model.py show --model=out/rm a.jsonl,b.jsonl      # answers of one or two files
    python reward_model.py show --model=out/rm out/edits.jsonl --html=out/rewards.html   # a page
"""
if __name__ == "__main__":
    raise SystemExit("show_rewards.py is a part of: python reward_model.py show")

from dataclasses import dataclass
from pathlib import Path

import torch

from common import (encode_prompt, encode_response, load_model, load_tokenizer, pack, reward_level,
                    setup, token_heads, total_rewards)
from diff import align
from extras.pages import heat, question_html, safe, write_show_page
from extras.tokens import token_texts
from plumbing.command_line import load_config
from plumbing.files import ANY, COUNT, check_input, check_numbers, read_jsonl
from plumbing.models import check_fits, check_model
from plumbing.paint import paint, plain
from plumbing.ranks import fail

NAMES = ("output", "original", "edited")  # the fields of a row that hold an answer


@dataclass(frozen=True)
class Config:
    model: str = "out/rm"
    data: list[str] = ()            # one or two files of answers: outputs.jsonl or edits.jsonl
    n: int = 3                      # rows
    html: str | None = None         # a page to write, instead of the terminal
    seed: int = 0                   # unused; every stage has one
    overwrite: bool = False         # replace a file that is no page of ours


# ---------------------------------------------------------------- the answers

def question_of(row):
    return row["instruction"], row.get("input") or ""


def rows_about(files, number):
    """The rows of all files about the same question as the numbered row of the first file, None
    where a file has none. If a question occurs more than once, its k-th rows belong together."""
    question = question_of(files[0][number])
    k = sum(question_of(row) == question for row in files[0][:number])
    found = []
    for file in files:
        same = [row for row in file if question_of(row) == question]
        found.append(same[k] if k < len(same) else None)
    return found


def score_answers(model, level, tokenizer, path, row, device):
    """The answers of a row -> list of (title, R, texts of the tokens, r_t, changed: 0/1 or None).
    Empty if the model has no prompt for the row: its text holds a special token"""
    ids = {}
    for name in NAMES:
        if row.get(name):
            is_complete = name not in (row.get("cut") or [])  # a cut answer has no EOS
            ids[name] = encode_response(tokenizer, row[name], eos=is_complete)
    changed = {}
    if "original" in ids and "edited" in ids:
        changed["original"], changed["edited"] = align(ids["original"], ids["edited"])

    answers = []
    prompt = encode_prompt(tokenizer, row)
    if prompt is None:
        return answers
    for name, answer in ids.items():
        packed = pack([prompt], [answer], device)
        response_mask = packed[2]  # [1, T]
        r = token_heads(model, *packed)  # [1, T]; a sequence model's r_t score the prefixes
        R = total_rewards(r, response_mask, level).item()
        title = f"{Path(path).parent.name}/{Path(path).name}"
        if name != "output":
            title += f" {name}"
        texts = token_texts(tokenizer, answer)
        answers.append((title, R, texts, r[0].tolist(), changed.get(name)))
    return answers


def largest_reward(answers):
    """The largest |r_t| in the answers of score_answers(), which has the deepest colour"""
    sizes = [abs(r) for _, _, _, rewards, _ in answers for r in rewards]
    return max(sizes, default=0) or 1.0


# ---------------------------------------------------------------- show

@torch.no_grad()
def show_answers(cfg):
    """Paint the answers about the first n questions of the first file: below each other in the
    terminal, side by side on a page"""
    # Check the files before the model is loaded.
    check_model(cfg.model, "model", "python reward_model.py")
    check_fits(cfg.model, "model", 0, head="saved")
    level = reward_level(cfg.model)
    check_numbers(cfg, n=COUNT, seed=ANY)
    if not cfg.data:
        fail("show needs one or two files of answers")
    for path in cfg.data:
        check_input(path, "data", "python evaluate.py decode, or python edit.py")
    fields = {"instruction": str, "input": (str, type(None))}
    files = [read_jsonl(path, fields) for path in cfg.data]
    for path, file in zip(cfg.data, files):
        if not any(isinstance(file[0].get(name), str) for name in NAMES):
            fail(f"{path} holds no answers to show: its rows need output, or original and edited")

    # Score the answers of all files, question by question.
    tokenizer = load_tokenizer(cfg.model)
    device, mesh, dtype = setup()
    model = load_model(cfg.model, device, mesh, dtype, head="saved", frozen=True)
    scored = []
    for number, first in enumerate(files[0][:cfg.n]):
        answers = []
        for path, row in zip(cfg.data, rows_about(files, number)):
            if row:
                answers += score_answers(model, level, tokenizer, path, row, device)
        scored.append((first, answers))

    if cfg.html:
        rewards_page(cfg, scored)
    else:
        print_rewards(scored)


def print_rewards(scored):
    """scored: [(row, its score_answers())]"""
    for row, answers in scored:
        print(f"\n{plain(row['instruction'])}  {plain(row.get('input') or '')}")
        scale = largest_reward(answers)
        for title, R, texts, rewards, _ in answers:
            print(f"{title}: R = {R:+.3f}\n  {paint(texts, rewards, scale)}")


def rewards_page(cfg, scored):
    """The same as a page; tokens that the edit changed are underlined"""
    sections = []
    for number, (row, answers) in enumerate(scored, 1):
        scale = largest_reward(answers)
        painted = []
        for title, R, texts, rewards, changed in answers:
            heading = f"<h3>{safe(title)} <span class=quiet>R = {R:+.3f}</span></h3>"
            painted.append(f"<div>{heading}{heat(texts, rewards, scale, changed)}</div>")
        heading = f"{row.get('id') or number}  (deepest colour: {scale:.2f})"
        side_by_side = f"<div class=pair>{''.join(painted)}</div>"
        sections.append((heading, question_html(row) + side_by_side))
    legend = ("<span style='background:rgb(var(--bad) / .6)'>bad</span> "
              "<span style='background:rgb(var(--good) / .6)'>good</span>, each row on its own "
              "scale; underlined: changed by the edit. Point at a token for its r.")
    title = f"What each token is worth to {cfg.model}"
    write_show_page(cfg.html, title, legend, sections, cfg.overwrite)


def main(argv):
    show_answers(load_config(Config, "reward_model.show", argv))
