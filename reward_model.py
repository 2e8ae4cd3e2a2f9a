"""Stage 3. The reward model r_phi(s_t, a_t): what each token is worth, learnt from pairs.

    python reward_model.py                                        # Eq. 4 on out/diffs.jsonl -> out/rm
    python reward_model.py --loss=sequence data/toy/pref.jsonl    # the baseline: a reward per answer, preference pairs
    torchrun --nproc_per_node=8 reward_model.py
    python reward_model.py show --model=out/rm a.jsonl,b.jsonl    # answers of one or two files, tokens painted by r_t
    python reward_model.py show --model=out/rm out/edits.jsonl --html=out/rewards.html     # a page, pairs side by side

R(tau) = (1/T) sum_t r_t [1], p(w > l) = sigma(R_w - R_l) [2]. U_0: the unchanged, U_1: the changed tokens (diff.py).

    eq3       -log sigma( sum_U0 r_w / T_w - sum_U0 r_l / T_l  +  sum_U1 r_w / T_w - sum_U1 r_l / T_l )     the exact
    eq4       -log sigma(                                         sum_U1 r_w / T_w - sum_U1 r_l / T_l )     the paper's
    sequence  -log sigma( r_w at its last token - r_l at its last token )                                   the baseline

In [3] the paper writes sum_U0 once, as if r_t were equal on both sides; it is not (the states differ behind the first
edit), so eq3 keeps both sums. Eq. 4 never trains r_t on U_0, which PPO will sum all the same: `anchor` pulls it to 0
(ours, off by default).
"""
import sys, time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from common import (cosine, my_micro_batches, encode_prompt, encode_response, load_model, load_tokenizer,
                    mean_rewards, optimizer_step, rows_at, sequence_rewards, setup, tokenizer_hash,
                    total_rewards, upcast)
from plumbing.command_line import extra, load_config
from plumbing.files import check_fits, check_input, check_model, check_numbers, read_jsonl
from plumbing.ranks import fail, say, total
from plumbing.record import (begin, finish, load_checkpoint, log_metrics, progress, record_of,
                             save_checkpoint, save_model, trim_logs)


@dataclass(frozen=True)
class Config:
    model: str = "out/sft"          # backbone: the SFT model; a new head, zero
    data: str = "out/diffs.jsonl"   # pairs from diff.py; for loss=sequence also preferences (pref.jsonl)
    out: str = "out/rm"
    loss: Literal["sequence", "eq3", "eq4"] = "eq4"
    anchor: float = 0.0             # weight of the mean of r_t^2 over U_0, per pair (try 0.1); not for loss=sequence
    eval_data: str | None = None    # held-out pairs: a pref or a diffs file
    eval_every: int = 0             # steps between evaluations; 0: at the end only
    epochs: int = 1
    steps: int | None = None        # instead of epochs: so that arms with more and fewer pairs train as long
    batch: int = 16                 # pairs per optimizer step, all ranks together
    micro_batch: int = 4            # pairs per forward and rank; changes memory and speed only
    lr: float = 3e-6                # peak; linear warm-up, then cosine to 0
    warmup: float = 0.03            # share of the steps
    head_lr_factor: float = 1.0     # the new head's rate is lr times this; below 1 r_t stays small, the backbone learns
    max_tokens: int = 512           # prompt + answer; longer pairs are dropped and counted
    max_grad_norm: float | None = 1.0       # None: no clipping
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto: bfloat16 on GPU. Weights are float32
    activation_checkpointing: bool = False  # a third more computing for much less memory
    log_every: int = 1              # steps between lines of metrics.jsonl
    resume_every: int = 100         # steps between checkpoints
    seed: int = 0                   # order of pairs
    overwrite: bool = False
    allow_changed_code: bool = False        # continue a run whose stage file or common.py changed


# ---------------------------------------------------------------- the equations

def pair_terms(r_w, response_w, changed_w, r_l, response_l, changed_l):
    """The three terms inside Eq. 3's sigma, [B] each: u0, u1_w, u1_l; R_w - R_l = u0 + u1_w - u1_l.

    r: rewards per token [B, T] (w and l may differ in T); response: mask of real tokens; changed: 1 = in U_1. What
    stands outside the response is ignored. u0 = sum_U0 r_w / T_w - sum_U0 r_l / T_l is what Eq. 4 drops."""
    w, l = changed_w.bool(), changed_l.bool()
    u1_w, u1_l = mean_rewards(r_w.masked_fill(~w, 0), response_w), mean_rewards(r_l.masked_fill(~l, 0), response_l)
    u0 = mean_rewards(r_w.masked_fill(w, 0), response_w) - mean_rewards(r_l.masked_fill(l, 0), response_l)
    return u0, u1_w, u1_l


def pair_losses(r_w, response_w, changed_w, r_l, response_l, changed_l, *, loss, anchor=0.0):
    """Loss of each pair [B]; arguments as in pair_terms. loss: "sequence", "eq3" [3] or "eq4" [4]. anchor adds
    anchor * mean of r_t^2 over the U_0 tokens of both sides together, if any. ValueError: anchor with sequence."""
    if loss == "sequence":
        if anchor:
            raise ValueError("anchor pulls token rewards to 0; a sequence reward has none")
        return -F.logsigmoid(sequence_rewards(r_w, response_w) - sequence_rewards(r_l, response_l))
    u0, u1_w, u1_l = pair_terms(r_w, response_w, changed_w, r_l, response_l, changed_l)
    losses = -F.logsigmoid({"eq3": u0 + u1_w - u1_l, "eq4": u1_w - u1_l}[loss])
    if anchor:
        unchanged_w, unchanged_l = response_w.bool() & ~changed_w.bool(), response_l.bool() & ~changed_l.bool()
        squares = r_w.masked_fill(~unchanged_w, 0).square().sum(1) + r_l.masked_fill(~unchanged_l, 0).square().sum(1)
        losses = losses + anchor * squares / (unchanged_w.sum(1) + unchanged_l.sum(1)).clamp(min=1)
    return losses


# ---------------------------------------------------------------- pairs

def read_pairs(path, flag, tokenizer, max_tokens, *, masks_needed=False):
    """A diffs or a pref file -> pairs (prompt, w, l, changed_w, changed_l), lists of ids and 0/1; the number of rows.

    A pref file has no U_1: its masks are all 1, and Eq. 3 and 4 refuse it. Diffs of another tokenizer are refused."""
    ids = {name: list for name in ("prompt_ids", "edited_ids", "original_ids", "edited_changed", "original_changed")}
    if "edited_ids" in read_jsonl(path, {})[0]:
        if not record_of(path):
            fail(f"{path}: {path}.run.json, which names its tokenizer, is missing; make both with: python diff.py")
        if record_of(path)["tokenizer_hash"] != tokenizer_hash(tokenizer):
            fail(f"--{flag}={path} was made with another tokenizer than the model's; make it again: "
                 "python diff.py --tokenizer=MODEL")
        rows, V = read_jsonl(path, ids), len(tokenizer)
        pairs = [tuple(row[name] for name in ids) for row in rows]
        for number, (prompt, w, l, changed_w, changed_l) in enumerate(pairs, 1):
            if len(w) != len(changed_w) or len(l) != len(changed_l):
                fail(f"{path}:{number}: a mask is not as long as its ids; make the file again: python diff.py")
            if not all(type(i) is int and 0 <= i < V for i in (*prompt, *w, *l)):
                fail(f"{path}:{number}: holds ids that no token has; make the file again: python diff.py")
    elif masks_needed:
        fail(f"--{flag}={path} has no edited_ids, so no U_1: --loss=eq3 and eq4 learn from diff.py's output "
             "(sequence takes both)")
    else:
        fields = {"instruction": str, "input": (str, type(None)), "output_1": str, "output_2": str}
        rows, pairs = read_jsonl(path, fields | {"preference": (1, 2)}), []
        for row in rows:
            w, l = ("output_1", "output_2") if row["preference"] == 1 else ("output_2", "output_1")
            w, l = (encode_response(tokenizer, row[name], eos=name not in (row.get("cut") or [])) for name in (w, l))
            pairs.append((encode_prompt(tokenizer, row), w, l, [1] * len(w), [1] * len(l)))
    fitting = [pair for pair in pairs if pair[1] and pair[2] and pair_length(pair) <= max_tokens]
    return fitting or fail(f"--{flag}={path}: no pair fits in max_tokens={max_tokens}"), len(rows)


def pair_length(pair):
    """Positions that a pair needs: its prompt and the longer answer"""
    return len(pair[0]) + max(len(pair[1]), len(pair[2]))


def pair_cost(pair):
    """Tokens that a pair costs: its prompt, once, and both answers"""
    return len(pair[0]) + len(pair[1]) + len(pair[2])


def score_pairs(model, pairs, device):
    """Both answers of each pair in one forward -> r_w, response_w, changed_w, r_l, response_l, changed_l, [B, T] each.

    A prompt is computed once for all its answers: they stand behind it in one row, and a token sees the prompt and what
    goes before it in its own answer. All ranks."""
    prompts, w, l, changed_w, changed_l = zip(*pairs)
    rows, places = {}, []  # prompt -> its row: ids, positions, branch (0: prompt, 1..: answers); where an answer begins
    for prompt, answer in zip(prompts * 2, w + l):
        P, key = len(prompt), tuple(prompt)
        ids, positions, branches = rows.setdefault(key, (list(prompt), list(range(P)), [0] * P))
        places.append((list(rows).index(key), len(ids)))
        ids += answer
        positions += range(P, P + len(answer))
        branches += [branches[-1] + 1] * len(answer)
    S, T, B = max(len(ids) for ids, _, _ in rows.values()), max(map(len, w + l)), len(pairs)
    ids, positions, branch = (
        torch.tensor([row[k] + [padding] * (S - len(row[k])) for row in rows.values()], device=device)
        for k, padding in enumerate((0, 0, -1)))                                            # [rows, S] each
    seen = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])                 # [rows, S (query), S (key)]
    seen = (seen & torch.ones_like(seen).tril())[:, None]                                   # [rows, 1, S, S]
    heads = upcast(model(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False).logits[..., 0])
    row, start = torch.tensor(places, device=device).T[..., None]                           # [2B, 1] each
    t = torch.arange(T, device=device)
    response = t < torch.tensor([[len(answer)] for answer in w + l], device=device)         # [2B, T]
    r = heads[row, (start + t).clamp(max=S - 1)].masked_fill(~response, 0)
    changed = torch.tensor([c + [0] * (T - len(c)) for c in changed_w + changed_l], device=device)
    return r[:B], response[:B], changed[:B], r[B:], response[B:], changed[B:]


@torch.no_grad()
def evaluate(model, pairs, cfg, device):
    """-> accuracy (a tie is half), mean margin R_w - R_l and loss over held-out pairs. All ranks."""
    level = "sequence" if cfg.loss == "sequence" else "token"
    sums, lengths = torch.zeros(3, dtype=torch.float64, device=device), [pair_cost(pair) for pair in pairs]
    for part in my_micro_batches(range(len(pairs)), lengths, cfg.micro_batch * 2):
        r_w, response_w, _, r_l, response_l, _ = score_pairs(model, [pairs[i] for i in part or [0]], device)
        margin = total_rewards(r_w, response_w, level) - total_rewards(r_l, response_l, level)
        accuracy = (margin > 0).double() + 0.5 * (margin == 0)
        sums += torch.stack([accuracy.sum(), margin.sum(), -F.logsigmoid(margin).sum()]).double() * bool(part)
    accuracy, margin, loss = (total(sums) / len(pairs)).tolist()  # all ranks
    return dict(eval_accuracy=accuracy, eval_margin=margin, eval_loss=loss)


# ---------------------------------------------------------------- the stage

def main(cfg):
    # ---------------------------------------------------------------- inputs
    check_model(cfg.model, "model", "python sft.py")
    check_input(cfg.data, "data", "python edit.py, then python diff.py")
    if cfg.eval_data:
        check_input(cfg.eval_data, "eval_data", "python diff.py, or data/*/prepare.py")
    check_numbers(cfg, "epochs", "steps", "batch", "micro_batch", "max_tokens", "log_every", "resume_every")
    if cfg.head_lr_factor <= 0:
        fail(f"--head_lr_factor must be above 0, got {cfg.head_lr_factor}: with a head of zeros nothing would learn")
    if cfg.anchor and cfg.loss == "sequence":
        fail("--anchor pulls token rewards to 0; with --loss=sequence there are none: leave it at 0")
    tokenizer = load_tokenizer(cfg.model)
    pairs, read = read_pairs(cfg.data, "data", tokenizer, cfg.max_tokens, masks_needed=cfg.loss != "sequence")
    held_out = read_pairs(cfg.eval_data, "eval_data", tokenizer, cfg.max_tokens)[0] if cfg.eval_data else []
    lengths = [pair_cost(pair) for pair in pairs]
    check_fits(cfg.model, "model", max(pair_length(pair) for pair in pairs + held_out))
    if begin(cfg, "reward_model", unimportant=("micro_batch", "resume_every", "log_every"), pairs=len(pairs),
             inputs=[cfg.model, cfg.data, *([cfg.eval_data] if cfg.eval_data else [])],
             edits=any(0 in pair[3] for pair in pairs)):  # with masks; the report tells the paper's arms by it
        return say(f"{cfg.out} is finished; nothing to do")

    # ---------------------------------------------------------------- model
    device, mesh, dtype = setup(cfg.dtype)
    model = load_model(cfg.model, device, mesh, dtype, head="zero", checkpointing=cfg.activation_checkpointing)
    optimizer = torch.optim.AdamW([dict(params=model.base_model.parameters(), lr_factor=1.0),
                                   dict(params=model.score.parameters(), lr_factor=cfg.head_lr_factor)],
                                  lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    rows = cfg.steps * cfg.batch if cfg.steps else len(pairs) * cfg.epochs  # pairs seen, in all epochs
    steps = -(-rows // cfg.batch)
    level = "sequence" if cfg.loss == "sequence" else "token"
    done = load_checkpoint(cfg.out, model, optimizer)
    trim_logs(cfg.out, done)
    going_on = f", going on after step {done}" if done else ""
    say(f"{len(pairs)} of {read} pairs fit, {steps} steps of {cfg.batch}{going_on}")

    # ---------------------------------------------------------------- loop
    for step in progress(range(done, steps), "reward model", steps):
        started = time.time()
        batch = rows_at(step * cfg.batch, min((step + 1) * cfg.batch, rows), len(pairs), cfg.seed)
        sums = torch.zeros(7, dtype=torch.float64, device=device)
        for part in my_micro_batches(batch, lengths, cfg.micro_batch):
            scored = score_pairs(model, [pairs[i] for i in part or batch[:1]], device)  # all ranks: none left: weight 0
            losses = pair_losses(*scored, loss=cfg.loss, anchor=cfg.anchor)                 # [B]
            (losses.sum() / len(batch) * bool(part)).backward()  # the mean over the pairs of the whole batch
            with torch.no_grad():
                r_w, response_w, _, r_l, response_l, _ = scored
                margin = total_rewards(r_w, response_w, level) - total_rewards(r_l, response_l, level)
                r_eos = (sequence_rewards(r_w, response_w) + sequence_rewards(r_l, response_l)) / 2
                terms = [losses, (margin > 0) + 0.5 * (margin == 0), margin, *pair_terms(*scored), r_eos]
                sums += torch.stack([term.double().sum() for term in terms]) * bool(part)
        lr = cfg.lr * cosine(step, steps, cfg.warmup)
        where = f"step {step}, pairs {batch[:8]}... (of those that fit, from 0)"
        norm = optimizer_step(model.parameters(), optimizer, lr, cfg.max_grad_norm, where)
        loss, accuracy, margin, u0, u1_w, u1_l, r_eos = (total(sums) / len(batch)).tolist()  # all ranks
        tokens = sum(lengths[i] for i in batch)
        row = dict(step=step, loss=loss, accuracy=accuracy, margin=margin, u0=u0, u1_w=u1_w, u1_l=u1_l, r_eos=r_eos,
                   lr=lr, grad_norm=norm, tokens=tokens, tokens_per_s=tokens / (time.time() - started))
        last = step == steps - 1
        if held_out and (last or cfg.eval_every and (step + 1) % cfg.eval_every == 0):
            row |= evaluate(model, held_out, cfg, device)  # all ranks
        if step % cfg.log_every == 0 or last or "eval_loss" in row:
            log_metrics(cfg.out, row | dict(seconds=time.time() - started), shown=(
                "step", "loss", "accuracy", "margin", "u0", "u1_w", "u1_l", "r_eos", "grad_norm", "tokens_per_s",
                "eval_accuracy"))
        if (step + 1) % cfg.resume_every == 0 and not last:
            save_checkpoint(cfg.out, step + 1, model, optimizer)  # all ranks

    save_model(model, tokenizer, cfg.out, dtype, sequence=cfg.loss == "sequence")  # all ranks
    finish(cfg, keep_checkpoint=False)
    say(f"{cfg.out}: done")


if __name__ == "__main__":
    if sys.argv[1:2] == ["show"]:
        extra("report.show_rewards", "reward_model.py show").main(sys.argv[2:])
    else:
        main(load_config(Config, "reward_model"))
