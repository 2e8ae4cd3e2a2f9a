"""Answers with their tokens painted by r_t, in the terminal or as a page: python reward_model.py show

    python reward_model.py show --model=out/rm a.jsonl,b.jsonl                       # answers of one or two files
    python reward_model.py show --model=out/rm out/edits.jsonl --html=out/rewards.html     # a page, pairs side by side
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from common import (encode_prompt, encode_response, fail, load_model, load_tokenizer, pack, read_jsonl, setup,
                    token_heads)
from extras.checks import check_input, check_model, check_numbers
from extras.command_line import load_config
from diff import align, plain
from extras.pages import rewards_page, token_texts
from reward_model import reward_level


@dataclass(frozen=True)
class ShowConfig:
    model: str = "out/rm"
    data: list[str] = ()            # one or two files of answers: outputs.jsonl (output), edits.jsonl (both answers)
    n: int = 3                      # rows
    html: str | None = None         # a page to write, instead of the terminal
    seed: int = 0                   # nothing here is random
    overwrite: bool = False         # replace a file that is no page of ours


def paint(texts, rewards, scale):
    """Tokens on red (bad) to green (good), for a terminal of 256 colours; without colour: r_t behind the strong ones"""
    if not sys.stdout.isatty():
        return "".join(plain(t) + (f"({r:+.1f})" if abs(r) > 0.3 * scale else "") for t, r in zip(texts, rewards))

    def background(r):
        pale = 5 - min(5, round(abs(r) / scale * 5))  # 0..5 in the colour cube
        return 16 + 36 * (5 if r < 0 else pale) + 6 * (5 if r > 0 else pale) + pale
    return "".join(f"\033[30;48;5;{background(r)}m{plain(t)}\033[0m" for t, r in zip(texts, rewards))


NAMES = ("output", "original", "edited")


def question(row):
    return row["instruction"], row.get("input") or ""


@torch.no_grad()
def show(cfg):
    """Paint the first n answers of each file by r_t: those of one row below one another, or side by side in a page"""
    check_model(cfg.model, "model", "python reward_model.py")
    level = reward_level(cfg.model)
    check_numbers(cfg, "n")
    for path in cfg.data or fail("show needs one or two files of answers"):
        check_input(path, "data", "python evaluate.py decode, or python edit.py")
    files, tokenizer = [read_jsonl(path, {"instruction": str}) for path in cfg.data], load_tokenizer(cfg.model)
    for path, file in zip(cfg.data, files):
        if not any(isinstance(file[0].get(name), str) for name in NAMES):
            fail(f"{path} holds no answers to show: its rows need output, or original and edited")
    device, mesh, dtype = setup()
    model, rows = load_model(cfg.model, device, mesh, dtype, head="saved", frozen=True), []
    for number, first in enumerate(files[0][:cfg.n]):
        answers = []  # title, R, texts of the tokens, r_t, changed: 0/1 each or None
        k = sum(question(row) == question(first) for row in files[0][:number])  # a question may stand there twice
        about = [[row for row in file if question(row) == question(first)][k:k + 1] for file in files]
        for path, row in ((path, row) for path, rows_of in zip(cfg.data, about) for row in rows_of):
            ids = {name: encode_response(tokenizer, row[name], eos=name not in (row.get("cut") or []))
                   for name in NAMES if row.get(name)}
            both = "original" in ids and "edited" in ids
            changed = dict(zip(("original", "edited"), align(ids["original"], ids["edited"]))) if both else {}
            for name, answer in ids.items():
                r = token_heads(model, *pack([encode_prompt(tokenizer, row)], [answer], device))[0].tolist()
                R = r[-1] if level == "sequence" else sum(r) / len(r)  # a sequence model's r_t score the prefixes
                title = f"{Path(path).parent.name}/{Path(path).name}" + f" {name}" * (name != "output")
                answers.append((title, R, token_texts(tokenizer, answer), r, changed.get(name)))
        rows.append((first, answers))
    if cfg.html:
        return rewards_page(cfg.html, cfg.model, rows, cfg.overwrite)
    for row, answers in rows:
        print(f"\n{plain(row['instruction'])}  {plain(row.get('input') or '')}")
        scale = max((abs(r) for _, _, _, rewards, _ in answers for r in rewards), default=0) or 1.0
        for title, R, texts, rewards, _ in answers:
            print(f"{title}: R = {R:+.3f}\n  {paint(texts, rewards, scale)}")


def main(argv):
    show(load_config(ShowConfig, "reward_model.show", argv))
