"""`python evaluate.py rewards`: held-out pairs are scored here, reward_figures.py makes the figures"""
import json
from pathlib import Path

import torch

from common import RANK, deal, fail, load_model, load_tokenizer, pack, say, setup, token_heads, total
from extras.checks import check_fits, check_input, check_model, check_numbers
from extras.runs import begin, finish, replacing
from evaluate import tell
from extras.reward_figures import figures_of, read_held_out
from reward_model import reward_level


@torch.no_grad()
def score(path, level, prompts, responses, micro_batch, dtype):
    """A reward model's R of each response, and its r_t (lists). A sequence model has no token rewards: what each token
    adds to the score of the prefix stands for them. All ranks."""
    device, mesh, dtype = setup(dtype)
    model = load_model(path, device, mesh, dtype, head="saved", frozen=True)
    n, T, lengths = len(responses), max(map(len, responses)), [len(p) + len(a) for p, a in zip(prompts, responses)]
    R, r = torch.zeros(n, device=device), torch.zeros(n, T, device=device)
    for part in deal(range(n), lengths, micro_batch):
        packed = pack([prompts[i] for i in part or [0]], [responses[i] for i in part or [0]], device)
        heads, T_i = token_heads(model, *packed), packed[2].sum(1, keepdim=True)            # [B, T], [B, 1]. All ranks
        whole = heads.sum(1, keepdim=True) / T_i if level == "token" else heads.gather(1, T_i - 1)  # [1], or the last r
        if level == "sequence":
            heads = heads - token_heads(model, *packed, before=True)                        # all ranks
        if part:
            R[part], r[part, :heads.shape[1]] = whole[:, 0], heads
    R, r = total(R).tolist(), total(r).tolist()  # each row is 0 but on its rank
    return R, [row[:len(ids)] for row, ids in zip(r, responses)]


def write_rewards(cfg):
    check_model(cfg.reward_model, "reward_model", "python reward_model.py")
    for path in cfg.data or fail("rewards needs held-out files: evaluate.py rewards data/toy/pref_heldout.jsonl"):
        check_input(path, "data", "python data/toy/prepare.py, or python edit.py")
    check_numbers(cfg, "max_tokens", "micro_batch", "resamples")
    if cfg.out and Path(cfg.out).suffix != ".json":
        fail(f"--out={cfg.out} must end in .json; the report looks for {cfg.reward_model}/rewards.json")
    level, tokenizer = reward_level(cfg.reward_model), load_tokenizer(cfg.reward_model)
    files = [read_held_out(path, tokenizer, cfg.max_tokens) for path in cfg.data]
    pairs = [pair for file in files for pair in file["pairs"]]  # (row, prompt, better, worse), the last three as ids
    longest = max(len(prompt) + max(len(w), len(l)) for _, prompt, w, l in pairs)
    check_fits(cfg.reward_model, "reward_model", longest)
    if cfg.out and begin(cfg, free=("micro_batch", "json"), inputs=[*cfg.data, cfg.reward_model]):
        return say(f"{cfg.out} is finished; nothing to do")
    prompts, answers = [pair[1] for pair in pairs] * 2, [pair[2] for pair in pairs] + [pair[3] for pair in pairs]
    R, r = score(cfg.reward_model, level, prompts, answers, cfg.micro_batch, cfg.dtype)             # all ranks
    found, start = [], 0
    for file in files:
        n = len(file["pairs"])
        w, l = slice(start, start + n), slice(len(pairs) + start, len(pairs) + start + n)
        figures = figures_of(file, R[w], R[l], r[w], r[l], tokenizer, cfg.resamples, cfg.seed)
        found.append(dict(reward_model=cfg.reward_model, level=level) | figures)
        start += n
    if cfg.out and RANK == 0:
        with replacing(cfg.out) as file:
            json.dump(found, file, indent=1)
        finish(cfg)
    say(json.dumps(found, indent=1)) if cfg.json else tell({figures["data"]: figures for figures in found})
