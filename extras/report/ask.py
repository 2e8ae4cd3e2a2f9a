"""`python evaluate.py ask`: the answers of several models to an instruction, in the terminal.

    python evaluate.py ask --model=out/sft,out/ppo --reward_model=out/rm "List four fruits."

Side by side, or below each other where the terminal is too narrow. A model draws what evaluate.py
decode draws for the same row of a file with the same seed.
"""
if __name__ == "__main__":
    raise SystemExit("ask.py is a part of: python evaluate.py ask")

import math, re, shutil, sys, unicodedata
from itertools import groupby, zip_longest

import torch
from transformers import AutoConfig

from common import (decode_response, encode_prompt, end_ids, generate, load_model, load_tokenizer,
                    pack, reward_level, row_uniforms, setup, token_heads, tokenizer_hash,
                    total_rewards, unsharded)
from extras.tokens import token_texts
from plumbing.models import check_fits, check_model
from plumbing.paint import paint, plain
from plumbing.ranks import fail

NARROWEST = 24  # columns of one answer; with fewer the answers are below each other
GAP = " | "
COLOUR_OFF = "\033[0m"


# ---------------------------------------------------------------- the answers

def check(cfg):
    """What can be wrong before a model is loaded -> the models' tokenizers, the level of the reward
    model (None without one)"""
    if not cfg.model:
        fail("ask needs models: --model=out/sft,out/ppo")
    for path in cfg.model:
        check_model(path, "model", "python sft.py, or python ppo.py")
    if cfg.reward_model:
        check_model(cfg.reward_model, "reward_model", "python reward_model.py")
    tokenizers = []
    for path in cfg.model:
        tokenizer = load_tokenizer(path)
        check_fits(path, "model", 0, vocabulary=len(tokenizer))
        tokenizers.append(tokenizer)
    if not cfg.reward_model:
        return tokenizers, None

    own = load_tokenizer(cfg.reward_model)
    check_fits(cfg.reward_model, "reward_model", 0, head="saved", vocabulary=len(own))
    for path, tokenizer in zip(cfg.model, tokenizers):
        if tokenizer_hash(tokenizer) != tokenizer_hash(own):
            fail(f"--reward_model={cfg.reward_model} has another tokenizer than --model={path}; it "
                 "scores a model's own ids")
        if tokenizer.prompt_format != own.prompt_format:
            fail(f"--reward_model={cfg.reward_model} was trained on prompts of "
                 f"{own.prompt_format}, --model={path} on prompts of {tokenizer.prompt_format}")
    return tokenizers, reward_level(cfg.reward_model)


def positions(path):
    """The longest row that a model can read, in tokens"""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


def instructions(cfg):
    """Those of the command line, or the lines of stdin, one by one"""
    if cfg.data:
        yield from cfg.data
        return
    lines = sys.stdin or ()  # None, if it was closed
    if hasattr(lines, "reconfigure"):
        lines.reconfigure(errors="replace")
    if sys.stdin and sys.stdin.isatty():
        print("one instruction per line; Ctrl-D ends", file=sys.stderr)
    for line in lines:
        if line.strip():
            yield line.strip()


def sample(cfg, path, model, tokenizer, prompt, number, device):
    """The ids that a model answers to the numbered instruction"""
    if prompt is None:
        fail(f"--model={path}: its chat template cannot take the text of a special token; change "
             "the instruction")
    room = positions(path)
    if cfg.reward_model:
        room = min(room, positions(cfg.reward_model))
    room -= len(prompt)
    if room < 1:
        fail(f"--model={path}: an instruction of {len(prompt)} tokens leaves no room for an answer")
    length = min(cfg.response_len, room)

    prompt_ids, prompt_mask, _ = pack([prompt], [[]], device)                          # [1, P]
    uniforms = row_uniforms(length, cfg.seed, number)[None]                            # [1, length]
    with unsharded(model):
        ids, _ = generate(model, prompt_ids, prompt_mask, max_new_tokens=length,
                          eos_id=end_ids(tokenizer), temperature=cfg.temperature,
                          top_p=cfg.top_p, uniforms=uniforms)                          # [1, T]
    return ids[0].tolist()


@torch.no_grad()
def score(reward_model, level, prompt, ids, device):
    """A reward model's R of an answer, and its r_t. A sequence model has no token rewards: its r_t
    are the differences between consecutive prefix scores."""
    packed = pack([prompt], [ids], device)
    response_mask = packed[2]
    heads = token_heads(reward_model, *packed)                                         # [1, T]
    R = total_rewards(heads, response_mask, level).item()
    if level == "sequence":
        heads = heads - token_heads(reward_model, *packed, before=True)
    return R, heads[0].tolist()


def ask(cfg):
    tokenizers, level = check(cfg)
    device, mesh, dtype = setup(cfg.dtype)
    models = [load_model(path, device, mesh, dtype, frozen=True) for path in cfg.model]
    reward_model = None
    if cfg.reward_model:
        reward_model = load_model(cfg.reward_model, device, mesh, dtype, head="saved", frozen=True)

    for number, instruction in enumerate(instructions(cfg)):
        # Each answer: the model, its ids, R and r_t.
        answers = []
        for path, tokenizer, model in zip(cfg.model, tokenizers, models):
            prompt = encode_prompt(tokenizer, dict(instruction=instruction, input=cfg.input))
            ids = sample(cfg, path, model, tokenizer, prompt, number, device)
            R, r = None, []
            if reward_model:
                R, r = score(reward_model, level, prompt, ids, device)
            answers.append((path, tokenizer, ids, R, r))

        # One scale for all answers: the largest |r_t| has the deepest colour.
        sizes = [abs(x) for *_, r in answers for x in r]
        scale = max(sizes, default=0) or 1.0
        print(f"\n{plain(instruction)}  {plain(cfg.input)}".rstrip() + "\n")
        show([as_text(*answer, scale) for answer in answers])


def as_text(path, tokenizer, ids, R, r, scale):
    """An answer under its title, painted if it has rewards"""
    notes = [] if R is None else [f"R = {R:+.3f}"]
    notes.append(f"length {len(ids)}")
    if ids[-1] not in end_ids(tokenizer):
        notes.append("cut")
    if R is None:
        shown = plain(decode_response(tokenizer, ids))
    else:
        shown = paint(token_texts(tokenizer, ids), r, scale)
    return f"{plain(path)}\n{', '.join(notes)}\n\n{shown}"


# ---------------------------------------------------------------- the terminal

def show(texts):
    """Print painted texts side by side, below each other where the terminal is too narrow"""
    terminal = shutil.get_terminal_size().columns
    width = (terminal - len(GAP) * (len(texts) - 1)) // len(texts)
    if width < NARROWEST:
        for text in texts:
            print(text + "\n")
        return
    blocks = [wrap(cells(text), width) for text in texts]
    for lines in zip_longest(*blocks, fillvalue=[]):
        print(GAP.join(render(line, width) for line in lines).rstrip())


def cells(text):
    """Painted text -> its characters, each with the code of its colour ("": none)"""
    found = []
    code = ""
    for part in re.split("(\033\\[[0-9;]*m)", text):
        if part.startswith("\033"):
            code = "" if part == COLOUR_OFF else part
        else:
            found += [(c, code) for c in part]
    return found


def wrap(cells, width):
    """Cut cells into lines of at most `width` columns, at spaces where there are any"""
    lines = [[]]
    for cell in cells:
        if cell[0] == "\n":
            lines.append([])
            continue
        lines[-1].append(cell)
        while columns(lines[-1]) > width:
            line = lines[-1]
            spaces = [at for at, (c, _) in enumerate(line) if c == " "]
            if spaces:  # the space itself is dropped
                lines[-1:] = [line[:spaces[-1]], line[spaces[-1] + 1:]]
            else:
                lines[-1:] = [line[:-1], line[-1:]]
    return lines


def columns(line):
    """The columns that a line takes in a terminal: a Chinese character two, an accent none"""
    total = 0
    for c, _ in line:
        if unicodedata.category(c) in ("Mn", "Me", "Cf"):
            continue
        total += 2 if unicodedata.east_asian_width(c) in "WF" else 1
    return total


def render(line, width):
    """A line of cells -> text, filled with spaces. Each colour ends in its line."""
    text = ""
    for code, group in groupby(line, key=lambda cell: cell[1]):
        shown = "".join(c for c, _ in group)
        text += f"{code}{shown}{COLOUR_OFF}" if code else shown
    return text + " " * (width - columns(line))
