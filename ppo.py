"""Stage 4. PPO with a reward at every token, or at the end.

    torchrun --nproc_per_node=8 ppo.py                                       # the paper's run: out/sft + out/rm -> out/ppo
    python ppo.py --policy=out/sft --reward_model=out/rm --data=data/toy/prompts.jsonl
    python ppo.py --level=sequence --reward_model=out/rm_sequence            # PPO-RLHF, the baseline

One step: roll out (sample a response per prompt), score (log pi of policy and reference, V, r_t), update (clipped PPO). Token
level gives GAE the rewards [R_1 - b KL_1, ..., R_T - b KL_T], sequence level [-b KL_1, ..., R - b KL_T]; all else is one code path.
r_t is read at a_t's own position (the model has seen a_t), V(s_t) and log pi(a_t | s_t) one earlier.

Where we depart: the paper writes [R_1..R_n] without KL; the defaults are AlpacaFarm's published script, which has it
(--kl_coef=0 is the paper's literal vector). Unlike that script, every mean and whitening is over real tokens of the whole batch,
all ranks together. Results do not depend on micro-batches or the number of ranks (but for float noise): rollouts are cut into
fixed groups, each row has its own draws, and optimizer batches are drawn over all rows.
"""
import json, os, resource, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import (RANK, WORLD, begin, check_input, check_model, deal, decode_response, encode_prompt,
                    epoch_order, fail, finish, fit_positions, generate, load_checkpoint, load_config, load_model, load_tokenizer,
                    log_metrics, logged, optimizer_step, pack, progress, read_jsonl, reward_level, row_uniforms, rows_at, save_checkpoint,
                    save_model, say, setup, token_heads, token_logprobs, token_texts, tokenizer_hash, total, trim_logs, unsharded)


@dataclass(frozen=True)
class Config:
    policy: str = "out/sft"                 # the start of the policy, and the reference
    reward_model: str = "out/rm"            # scores the policy's ids; its backbone, with a zero head, starts the value model
    data: str = "data/alpacafarm/prompts.jsonl"     # instruction, input
    out: str = "out/ppo"
    level: Literal["token", "sequence"] = "token"   # token: R_t at every token; sequence: R at the last (a token model's R is R(tau))
    steps: int = 80                         # rollout steps (AlpacaFarm: best at 20-80)
    rollout_batch: int = 512                # responses per step, all ranks together
    rollout_micro_batch: int = 64           # responses decoded at once: a fixed group, so part of the result
    score_micro_batch: int = 32             # rows per forward of reward and value; changes memory and speed only
    batch: int = 256                        # rows per optimizer step
    micro_batch: int = 8                    # rows per forward of the update; changes memory and speed only
    ppo_epochs: int = 2                     # 512 / 256 * 2 = 4 optimizer steps per rollout step
    query_len: int = 192                    # tokens; longer prompts are dropped and counted
    response_len: int = 300                 # tokens
    temperature: float = 1.0                # of pi itself: log pi is log_softmax(logits / temperature)
    # reward
    kl_coef: float = 0.0067                 # b; AlpacaFarm's for simulated preferences, 0.02 for human ones
    kl_target: float | None = None          # adapt b towards this KL per response (6 in AlpacaFarm's text); None: b is fixed
    clamp_kl: bool = False                  # AlpacaFarm's clamp of the per-token KL estimate at 0 (biased)
    reward_scale: Literal["sum", "mean", "fixed"] = "sum"   # token level: r_t, r_t / T (sums to R(tau)), r_t / fixed_length
    fixed_length: int | None = None         # for reward_scale=fixed
    missing_eos_penalty: float = 0.0        # subtracted at the last token of a response cut at response_len
    whiten_rewards: bool = True             # divide by their standard deviation, mean kept
    whiten_advantages: bool = True
    gamma: float = 1.0
    lam: float = 1.0
    # update
    lr: float = 1e-5
    warmup_steps: int = 5                   # lr min(1, (k + 1) / warmup_steps): step 0 trains
    lr_epochs: float = 10.0                 # then linear to 0 over this many epochs of prompts; `steps` stops earlier
    clip: float = 0.2
    value_clip: float | None = 0.2          # None: off
    vf_coef: float = 0.1
    max_grad_norm: float | None = 1.0       # of policy and value together; None: no clipping
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto: bfloat16 on GPU. Weights are float32
    activation_checkpointing: bool = False  # a third more computing for much less memory
    # what is kept
    save_every: int = 20                    # steps between Hugging Face folders out/step_N; the last is out itself
    resume_every: int = 10                  # steps between checkpoints; a killed run goes on from the newest
    sample_every: int = 10                  # steps between samples.jsonl's entries
    seed: int = 0                           # order of prompts, every draw
    overwrite: bool = False


# ---------------------------------------------------------------- the mathematics: [B, T] tensors, mask True on real tokens

def masked_mean(x, mask):
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def shape_rewards(rewards, logprobs, ref_logprobs, mask, *, level, kl_coef, reward_scale="sum", fixed_length=None,
                  clamp_kl=False, missing_eos_penalty=0.0, ended=None):
    """The reward vector [B, T] that GAE sees: penalty, then scale, then minus kl_coef * (log pi - log pi_0) at every token.

    rewards: R [B] for level="sequence", put at the last real token; r_t [B, T] for "token". ended [B] bool: the response has its
    EOS; the others lose missing_eos_penalty at their last token. reward_scale is token level's: "sum", "mean" (by the row's T) or
    "fixed" (by fixed_length). ValueError: a scale at sequence level, fixed without fixed_length, a penalty without ended."""
    mask = mask.bool()
    lengths = mask.sum(1)
    last = torch.arange(mask.shape[1], device=mask.device) == lengths[:, None] - 1                 # [B, T]
    if level == "sequence":
        if reward_scale != "sum":
            raise ValueError(f"reward_scale={reward_scale} is for level=token; a sequence reward has one scale")
        rewards = last * rewards[:, None]
    rewards = rewards.masked_fill(~mask, 0)
    if missing_eos_penalty:
        if ended is None:
            raise ValueError("missing_eos_penalty needs `ended`, which rows have their EOS")
        rewards = rewards - missing_eos_penalty * (last & ~ended.bool()[:, None])
    if reward_scale == "mean":
        rewards = rewards / lengths.clamp(min=1)[:, None]
    elif reward_scale == "fixed":
        if not fixed_length:
            raise ValueError("reward_scale=fixed needs fixed_length")
        rewards = rewards / fixed_length
    kl = (logprobs - ref_logprobs).masked_fill(~mask, 0)
    return rewards - kl_coef * (kl.clamp(min=0) if clamp_kl else kl)


def gae(rewards, values, mask, *, gamma, lam):
    """Generalized advantage estimation -> advantages, returns = advantages + values [B, T].

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t); A_t = delta_t + gamma lam A_{t+1}. The value after the last real token is 0, also
    where a response was cut: the limit is part of the task."""
    mask = mask.bool()
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages, A, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        A = (delta + gamma * lam * A) * mask[:, t]  # padding lies behind the response: nothing flows in from it
        advantages[:, t], next_value = A, values[:, t]
    return advantages, advantages + values


def whiten(x, mask, *, shift_mean=True):
    """(x - mean) / std over the real tokens of all rows; shift_mean=False: x / std, nothing added (a constant per token would
    pay for length). Population std; below 1e-8 x is returned as it is."""
    mask = mask.bool()
    x = x.masked_fill(~mask, 0)
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    if std < 1e-8:
        return x
    return ((x - mean if shift_mean else x) / std).masked_fill(~mask, 0)


def policy_loss(logprobs, old_logprobs, advantages, mask, *, clip):
    """Clipped surrogate per token [B, T]: max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), ratio = pi / pi_old"""
    mask = mask.bool()
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).exp()
    advantages = advantages.masked_fill(~mask, 0)
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(values, old_values, returns, mask, *, clip):
    """1/2 squared error per token [B, T], the worse of V and V kept within clip of the rollout's V. clip None: no clipping"""
    mask = mask.bool()
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    errors = (values - returns) ** 2
    if clip is not None:
        errors = torch.max(errors, (torch.clamp(values, old_values - clip, old_values + clip) - returns) ** 2)
    return 0.5 * errors


# ---------------------------------------------------------------- one step

def roll_out(policy, tokenizer, prompts, cfg, step, device):
    """One response per prompt -> responses (lists of ids), the same on every rank; each rank decodes whole groups. All ranks."""
    n, groups = len(prompts), range(0, len(prompts), cfg.rollout_micro_batch)
    ids, lengths = torch.zeros(n, cfg.response_len, dtype=torch.long, device=device), torch.zeros(n, dtype=torch.long, device=device)
    with unsharded(policy):
        for start in groups[RANK::WORLD]:
            rows = range(start, min(start + cfg.rollout_micro_batch, n))
            prompt_ids, prompt_mask, _ = pack([prompts[row] for row in rows], [[]] * len(rows), device)
            response_ids, mask = generate(policy, prompt_ids, prompt_mask, max_new_tokens=cfg.response_len,
                                          eos_id=tokenizer.eos_token_id, temperature=cfg.temperature,
                                          uniforms=torch.stack([row_uniforms(cfg.response_len, cfg.seed, step, row) for row in rows]))
            ids[start:start + len(rows), :mask.shape[1]], lengths[start:start + len(rows)] = response_ids, mask.sum(1)
    ids, lengths = total(ids).tolist(), total(lengths).tolist()  # each row is 0 but on its own rank. All ranks
    return [row[:length] for row, length in zip(ids, lengths)]


def optimizer_batches(cfg, step, epoch):
    """The rows of the rollout batch in a new order, cut into optimizer batches: the same on every rank"""
    order = epoch_order(cfg.rollout_batch, cfg.seed, "step", step, "epoch", epoch)
    return [order[i:i + cfg.batch] for i in range(0, len(order), cfg.batch)]


@torch.no_grad()
def score(models, functions, parts, prompts, responses, device):
    """Each function(model, ids, mask, response_mask) [B, T] over this rank's parts (lists of rows) -> [rows, T] of all ranks. All ranks."""
    T = max(map(len, responses))
    outputs = [torch.zeros(len(responses), T, device=device) for _ in models]
    for part in parts:
        packed = pack([prompts[row] for row in part or [0]], [responses[row] for row in part or [0]], device)
        for model, function, output in zip(models, functions, outputs):
            x = function(model, *packed)
            if part:
                output[part, :x.shape[1]] = x
    return [total(output) for output in outputs]


def update(models, parameters, optimizer, rollout, cfg, step, lr, device):
    """ppo_epochs over the rollout batch -> means over all real tokens of the step. rollout: prompts, responses, lengths, and
    old_logprobs, old_values, advantages, returns [rows, T]. All ranks."""
    sums, norms, first = torch.zeros(7, dtype=torch.float64, device=device), [], None
    for epoch in range(cfg.ppo_epochs):
        for batch in optimizer_batches(cfg, step, epoch):
            tokens, ratio_error = sum(len(rollout["responses"][row]) for row in batch), torch.zeros((), device=device)
            for part in deal(batch, rollout["lengths"], cfg.micro_batch):
                mine = part or batch[:1]  # nothing left for this rank: any row with weight 0 (the forwards are collective)
                packed = pack([rollout["prompts"][row] for row in mine], [rollout["responses"][row] for row in mine], device)
                mask = packed[2] & bool(part)
                old_logprobs, old_values, advantages, returns = (
                    rollout[name][mine, :mask.shape[1]] for name in ("old_logprobs", "old_values", "advantages", "returns"))

                logprobs = token_logprobs(models["policy"], *packed, cfg.temperature)              # all ranks
                losses = policy_loss(logprobs, old_logprobs, advantages, mask, clip=cfg.clip)      # [B, T]
                (losses.sum() / tokens).backward()
                values = token_heads(models["value"], *packed, before=True)                        # all ranks
                value_losses = value_loss(values, old_values, returns, mask, clip=cfg.value_clip)  # [B, T]
                (cfg.vf_coef * value_losses.sum() / tokens).backward()

                with torch.no_grad():
                    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0)
                    ratio, moved = log_ratio.exp(), (values - old_values).masked_fill(~mask, 0).abs()
                    ratio_error = torch.max(ratio_error, ((ratio - 1) * mask).abs().max())
                    k3 = ratio - 1 - log_ratio  # Schulman's low-variance estimate of KL(old, new)
                    clipped_value = moved > (cfg.value_clip if cfg.value_clip is not None else float("inf"))
                    sums += torch.stack([x.masked_fill(~mask, 0).double().sum() for x in (
                        losses, value_losses, (ratio - 1).abs() > cfg.clip, clipped_value, k3, ratio, mask)])
            if first is None:  # before anything was updated: pi is pi_old, so the ratio must be 1
                first = total(ratio_error.clone(), "max").item()
            norms.append(optimizer_step(parameters, optimizer, lr, cfg.max_grad_norm, f"step {step}, rows {batch[:8]}..."))
    policy, value, clipped, value_clipped, k3, ratio, count = total(sums).tolist()  # all ranks
    return dict(policy_loss=policy / count, value_loss=value / count, first_ratio_error=first, ratio=ratio / count,
                clip_fraction=clipped / count, value_clipped=value_clipped / count, approx_kl=k3 / count,
                grad_norm=sum(norms) / len(norms))


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the real tokens; 0: the values explain nothing"""
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return (1 - variance(returns - values) / variance(returns).clamp(min=1e-12)).item()


def learning_rate(cfg, step, rows):
    """AlpacaFarm's: linear warm-up, then linear to 0 over lr_epochs epochs of the prompts; once per rollout step"""
    steps = max(cfg.lr_epochs * rows / cfg.rollout_batch, cfg.warmup_steps + 1)
    return cfg.lr * min(1, (step + 1) / max(1, cfg.warmup_steps)) * min(1, max(0, (steps - step) / (steps - cfg.warmup_steps)))


# ---------------------------------------------------------------- the stage

def check(cfg):
    """What can be wrong with a run before any model is loaded"""
    check_model(cfg.policy, "policy", "python sft.py")
    check_model(cfg.reward_model, "reward_model", "python reward_model.py")
    check_input(cfg.data, "data", "python data/toy/prepare.py or python data/alpacafarm/prepare.py")
    for name in ("steps", "rollout_batch", "rollout_micro_batch", "score_micro_batch", "batch", "micro_batch", "ppo_epochs", "response_len"):
        if getattr(cfg, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(cfg, name)}")
    if -(-cfg.rollout_batch // cfg.rollout_micro_batch) < WORLD:
        fail(f"--rollout_batch={cfg.rollout_batch} in groups of --rollout_micro_batch={cfg.rollout_micro_batch} leaves some of the "
             f"{WORLD} ranks without rollouts; make the groups smaller")
    if cfg.level == "sequence" and cfg.reward_scale != "sum":
        fail(f"--reward_scale={cfg.reward_scale} is for --level=token")
    if (cfg.reward_scale == "fixed") != bool(cfg.fixed_length):
        fail("--reward_scale=fixed and --fixed_length=N go together")
    if cfg.temperature <= 0:
        fail(f"--temperature must be above 0, got {cfg.temperature}: pi is sampled from")
    kind = reward_level(cfg.reward_model)
    if cfg.level == "token" and kind == "sequence":
        fail(f"--reward_model={cfg.reward_model} gives one reward per response; use --level=sequence, or train one with --loss=eq4")
    tokenizer = load_tokenizer(cfg.policy)
    if tokenizer_hash(tokenizer) != tokenizer_hash(load_tokenizer(cfg.reward_model)):
        fail(f"--reward_model={cfg.reward_model} has another tokenizer than --policy={cfg.policy}; it scores the policy's own ids")
    for flag in ("policy", "reward_model"):
        fit_positions(getattr(cfg, flag), flag, cfg.query_len + cfg.response_len)
    return tokenizer, kind


def main(cfg):
    # ---------------------------------------------------------------- inputs
    tokenizer, kind = check(cfg)
    rows = read_jsonl(cfg.data, {"instruction": str, "input": (str, type(None))})
    prompts = [(row, ids) for row in rows if len(ids := encode_prompt(tokenizer, row)) <= cfg.query_len]
    if not prompts:
        fail(f"{cfg.data}: every prompt is longer than --query_len={cfg.query_len} tokens")
    free = ("steps", "score_micro_batch", "micro_batch", "save_every", "resume_every", "sample_every")
    finished = begin(cfg, free=free, inputs=[cfg.policy, cfg.reward_model, cfg.data], prompts=len(prompts))
    history = {row["step"]: row for row in logged(Path(cfg.out, "metrics.jsonl"))}
    if finished and len(history) >= cfg.steps:  # else: more steps than last time
        return say(f"{cfg.out} is finished; nothing to do")

    # ---------------------------------------------------------------- models: two that learn, two that are frozen
    device, mesh, dtype = setup(cfg.dtype)
    ac = cfg.activation_checkpointing
    models = torch.nn.ModuleDict(dict(policy=load_model(cfg.policy, device, mesh, dtype, checkpointing=ac),
                                      value=load_model(cfg.reward_model, device, mesh, dtype, head="zero", checkpointing=ac)))
    policy, value = models["policy"], models["value"]
    reference = load_model(cfg.policy, device, mesh, dtype, frozen=True)
    reward_model = load_model(cfg.reward_model, device, mesh, dtype, head="saved", frozen=True)
    parameters = list(models.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0)
    done = load_checkpoint(cfg.out, models, optimizer)
    kl_coef = history[done - 1]["next_kl_coef"] if done else cfg.kl_coef
    trim_logs(cfg.out, done)
    say(f"{len(prompts)} prompts ({len(rows) - len(prompts)} longer than {cfg.query_len} tokens dropped), {cfg.steps} steps of "
        f"{cfg.rollout_batch} responses on {WORLD} rank(s)" + (f", going on after step {done}" if done else ""))

    for step in progress(range(done, cfg.steps), "ppo", cfg.steps):
        # ------------------------------------------------------------ roll out
        clock = [time.time()]
        batch = rows_at(step * cfg.rollout_batch, (step + 1) * cfg.rollout_batch, len(prompts), cfg.seed)
        batch_prompts = [prompts[i][1] for i in batch]
        responses = roll_out(policy, tokenizer, batch_prompts, cfg, step, device)
        clock.append(time.time())

        # ------------------------------------------------------------ score
        lengths = [len(p) + len(r) for p, r in zip(batch_prompts, responses)]
        def logprobs_of(model, *packed):
            return token_logprobs(model, *packed, cfg.temperature)
        def values_of(model, *packed):
            return token_heads(model, *packed, before=True)
        parts = [part for b in optimizer_batches(cfg, step, 0) for part in deal(b, lengths, cfg.micro_batch)]  # the first update's
        old_logprobs, ref_logprobs = score([policy, reference], [logprobs_of] * 2, parts, batch_prompts, responses, device)
        parts = deal(range(len(responses)), lengths, cfg.score_micro_batch)
        r, old_values = score([reward_model, value], [token_heads, values_of], parts, batch_prompts, responses, device)

        mask = torch.arange(r.shape[1], device=device) < torch.tensor([len(ids) for ids in responses], device=device)[:, None]
        ended = torch.tensor([ids[-1] == tokenizer.eos_token_id for ids in responses], device=device)
        R = r.sum(1) / mask.sum(1) if kind == "token" else r.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]   # [rows], Eq. 1
        rewards = shape_rewards(r if cfg.level == "token" else R, old_logprobs, ref_logprobs, mask, level=cfg.level, kl_coef=kl_coef,
                                reward_scale=cfg.reward_scale, fixed_length=cfg.fixed_length, clamp_kl=cfg.clamp_kl,
                                missing_eos_penalty=cfg.missing_eos_penalty, ended=ended)
        score_sd = rewards.sum(1).std().item() if len(rewards) > 1 else 0.0  # of the return: what kl_coef is to be held against
        if cfg.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, old_values, mask, gamma=cfg.gamma, lam=cfg.lam)
        value_explains = explained_variance(old_values, returns, mask)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, mask)
        clock.append(time.time())

        # ------------------------------------------------------------ update
        lr = learning_rate(cfg, step, len(prompts))
        rollout = dict(prompts=batch_prompts, responses=responses, lengths=lengths, old_logprobs=old_logprobs,
                       old_values=old_values, advantages=advantages, returns=returns)
        stats = update(models, parameters, optimizer, rollout, cfg, step, lr, device)
        clock.append(time.time())

        # ------------------------------------------------------------ log, keep
        tokens, kl = int(mask.sum()), (old_logprobs - ref_logprobs).sum(1).mean().item()
        rollout_s, score_s, update_s = (end - start for start, end in zip(clock, clock[1:]))
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        next_kl_coef = kl_coef * (1 + 0.1 * min(0.2, max(-0.2, kl / cfg.kl_target - 1))) if cfg.kl_target else kl_coef
        log_metrics(cfg.out, dict(
            step=step, reward=R.mean().item(), token_reward=masked_mean(r, mask).item(), return_sd=score_sd, kl=kl,
            response_length=tokens / len(responses), eos_share=ended.float().mean().item(),
            entropy=-masked_mean(old_logprobs, mask).item(), explained_variance=value_explains, **stats, lr=lr, kl_coef=kl_coef,
            next_kl_coef=next_kl_coef, rollout_s=rollout_s, score_s=score_s, update_s=update_s,
            tokens_per_s=tokens / (clock[-1] - clock[0]), peak_gb=peak / 1e9, seconds=clock[-1] - clock[0]),
            shown=("step", "reward", "kl", "response_length", "eos_share", "first_ratio_error", "clip_fraction", "grad_norm", "seconds"))
        kl_coef = next_kl_coef
        if step % cfg.sample_every == 0 or step == cfg.steps - 1:
            log_samples(cfg, tokenizer, step, [prompts[i][0] for i in batch[:3]], responses, r, R)
        if (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps:
            save_model(policy, tokenizer, Path(cfg.out, "saving_step.tmp"), dtype)  # all ranks
            if RANK == 0:
                os.replace(Path(cfg.out, "saving_step.tmp"), Path(cfg.out, f"step_{step + 1}"))
        if (step + 1) % cfg.resume_every == 0 or step + 1 == cfg.steps:
            save_checkpoint(cfg.out, step + 1, models, optimizer)  # all ranks

    save_model(policy, tokenizer, cfg.out, dtype)  # all ranks
    finish(cfg)
    say(f"{cfg.out}: done")


def log_samples(cfg, tokenizer, step, rows, responses, r, R):
    """Three responses of the step with their token rewards -> samples.jsonl (rank 0)"""
    if RANK == 0:
        with open(Path(cfg.out, "samples.jsonl"), "a", encoding="utf-8") as file:
            for i, (row, ids) in enumerate(zip(rows, responses)):
                file.write(json.dumps(dict(step=step, instruction=row["instruction"], input=row.get("input") or "",
                                           output=decode_response(tokenizer, ids), tokens=token_texts(tokenizer, ids),
                                           token_rewards=r[i, :len(ids)].tolist(), reward=R[i].item())) + "\n")


if __name__ == "__main__":
    main(load_config(Config))
