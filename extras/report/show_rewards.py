"""Answers with their tokens painted by r_t, in a terminal or as a page: reward_model.py show

    python reward_model.py show --model=out/rm a.jsonl,b.jsonl      # answers of several files
    python reward_model.py show --model=out/rm out/edits.jsonl --html=out/rewards.html   # a page
    python reward_model.py show --model=out/rm a.jsonl,b.jsonl --n=20 --json=out/painted.json
    python reward_model.py show --model=out/rm out/edits.jsonl --row=3 --svg=out/picture.svg

evaluate.py report shows one prompt before and after PPO, from a painted.json next to the runs.
"""
if __name__ == "__main__":
    raise SystemExit("show_rewards.py is a part of: python reward_model.py show")

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from common import (encode_prompt, encode_response, load_model, load_tokenizer, pack, reward_level,
                    setup, token_heads, total_rewards)
from diff import align
from extras.pages import heat, is_ours, question_html, safe, write_show_page
from extras.report.picture import MARK as PICTURE_MARK
from extras.report.picture import picture
from extras.tokens import token_texts
from plumbing.command_line import load_config
from plumbing.files import (ANY, COUNT, check_input, check_numbers, read_jsonl, replacing,
                            whole_characters)
from plumbing.models import check_fits, check_model
from plumbing.paint import paint, plain
from plumbing.ranks import fail, say

NAMES = ("output", "original", "edited")  # the fields of a row that hold an answer
MADE_BY = "reward_model.py show"          # how a file of --json begins


@dataclass(frozen=True)
class Config:
    model: str = "out/rm"
    data: list[str] = ()            # files of answers: outputs.jsonl or edits.jsonl
    n: int = 3                      # rows
    row: int = 1                    # the first of them, as it is numbered in the first file
    html: str | None = None         # a page to write, instead of the terminal
    json: str | None = None         # the same as numbers, instead of the terminal
    svg: str | None = None          # a picture of one row of edits: plain, edited, painted
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
    """The answers of a row -> list of dicts: file, field, text, R, tokens, rewards (r_t), changed
    (0/1 per token, or None). Empty if the model has no prompt for the row: its text holds a special
    token"""
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
        answers.append(dict(file=str(path), field=name, text=row[name], R=R,
                            tokens=token_texts(tokenizer, answer), rewards=r[0].tolist(),
                            changed=changed.get(name)))
    return answers


def title_of(answer):
    """run/outputs.jsonl, and the field where a file has more than one"""
    path = Path(answer["file"])
    title = f"{path.parent.name}/{path.name}"
    return title if answer["field"] == "output" else f"{title} {answer['field']}"


def largest_reward(scored):
    """The largest |r_t| of all rows, which has the deepest colour: so the rows compare"""
    sizes = []
    for _, answers in scored:
        for answer in answers:
            sizes += map(abs, answer["rewards"])
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
    check_numbers(cfg, n=COUNT, row=COUNT, seed=ANY)
    if not cfg.data:
        fail("show needs files of answers")
    if cfg.json and not cfg.overwrite and not is_ours(cfg.json, f'"made_by": "{MADE_BY}"'):
        fail(f"--json={cfg.json} is no file of show's; choose another, or replace it with "
             "--overwrite=true")
    if cfg.svg and not cfg.overwrite and not is_ours(cfg.svg, PICTURE_MARK):
        fail(f"--svg={cfg.svg} is no picture of show's; choose another, or replace it with "
             "--overwrite=true")
    for path in cfg.data:
        check_input(path, "data", "python evaluate.py decode, or python edit.py")
    fields = {"instruction": str, "input": (str, type(None))}
    files = [read_jsonl(path, fields) for path in cfg.data]
    for path, file in zip(cfg.data, files):
        if not any(isinstance(file[0].get(name), str) for name in NAMES):
            fail(f"{path} holds no answers to show: its rows need output, or original and edited")
    if cfg.row > len(files[0]):
        fail(f"--row={cfg.row}: {cfg.data[0]} has {len(files[0])} rows")
    if cfg.svg and not has_an_edit(files[0][cfg.row - 1]):
        fail(f"--svg needs an edit: row {cfg.row} of {cfg.data[0]} has none; name another --row of "
             "a file of edits")

    # Score the answers of all files, question by question.
    tokenizer = load_tokenizer(cfg.model)
    device, mesh, dtype = setup()
    model = load_model(cfg.model, device, mesh, dtype, head="saved", frozen=True)
    scored = []
    start = cfg.row - 1
    for number, first in list(enumerate(files[0]))[start:start + cfg.n]:
        answers = []
        for path, row in zip(cfg.data, rows_about(files, number)):
            if row:
                answers += score_answers(model, level, tokenizer, path, row, device)
        scored.append((first, answers))

    if cfg.html:
        rewards_page(cfg, scored)
    if cfg.json:
        write_numbers(cfg, scored, level)
    if cfg.svg:
        write_picture(cfg, *scored[0])
    if not cfg.html and not cfg.json and not cfg.svg:
        print_rewards(scored)


def print_rewards(scored):
    """scored: [(row, its score_answers())]"""
    scale = largest_reward(scored)
    for row, answers in scored:
        print(f"\n{plain(row['instruction'])}  {plain(row.get('input') or '')}")
        for answer in answers:
            painted = paint(answer["tokens"], answer["rewards"], scale)
            print(f"{title_of(answer)}: R = {answer['R']:+.3f}\n  {painted}")


def rewards_page(cfg, scored):
    """The same as a page; tokens that the edit changed are underlined"""
    sections = []
    scale = largest_reward(scored)
    for number, (row, answers) in enumerate(scored, cfg.row):
        painted = []
        for answer in answers:
            heading = f"{safe(title_of(answer))} <span class=quiet>R = {answer['R']:+.3f}</span>"
            shown = heat(answer["tokens"], answer["rewards"], scale, answer["changed"],
                         numbers=True)
            painted.append(f"<div><h3>{heading}</h3>{shown}</div>")
        side_by_side = f"<div class=pair>{''.join(painted)}</div>"
        sections.append((f"row {number}", row.get("id", ""), question_html(row) + side_by_side))
    legend = ("<mark class=bad>bad</mark> <mark class=good>good</mark>; deeper is stronger, on one "
              f"scale for the page: deepest at {scale:.2f}. The strongest have their number; point "
              "at another token for its r.")
    if any(answer["changed"] for _, answers in scored for answer in answers):
        legend += " Underlined: changed by the edit."
    title = f"What each token is worth to {cfg.model}"
    write_show_page(cfg.html, title, legend, sections, cfg.overwrite)


def write_numbers(cfg, scored, level):
    """The same as JSON: made_by, reward_model, its level, and of each row its answers"""
    rows = []
    for row, answers in scored:
        rows.append(dict(instruction=row["instruction"], input=row.get("input") or "",
                         answers=answers))
    numbers = dict(made_by=MADE_BY, reward_model=cfg.model, level=level, rows=rows)
    with replacing(cfg.json) as file:
        file.write(whole_characters(json.dumps(numbers, ensure_ascii=False) + "\n"))
    say(f"{cfg.json}: {len(rows)} {'row' if len(rows) == 1 else 'rows'}")


def has_an_edit(row):
    """Does a row of edits.jsonl hold an answer that the edit changed?"""
    return bool(row.get("original") and row.get("edited")) and row["original"] != row["edited"]


def write_picture(cfg, row, answers):
    """The first answer of a row, its edit and its rewards as one SVG file"""
    sides = {answer["field"]: answer for answer in reversed(answers)}
    if "original" not in sides:
        fail(f"--svg: row {cfg.row} of {cfg.data[0]} holds a special token's text; name another")
    with replacing(cfg.svg) as file:
        file.write(whole_characters(picture(row, sides["original"], sides["edited"])))
    say(f"{cfg.svg}: row {cfg.row} of {cfg.data[0]}")


def main(argv):
    show_answers(load_config(Config, "reward_model.show", argv))
