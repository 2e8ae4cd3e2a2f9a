"""Stage 4. PPO with a reward at every token, or at the end.

    torchrun --nproc_per_node=8 ppo.py              # the paper's run: out/sft + out/rm -> out/ppo
    python ppo.py config/demo.toml --data=data/toy/prompts.jsonl    # a toy model in out/sft, out/rm
    python ppo.py --level=sequence --reward_model=out/rm_sequence   # PPO-RLHF, the baseline
    WORLD_SIZE=8 python ppo.py --plan=true          # the memory of each phase; needs no GPU

One step: roll out (sample a response per prompt), score it (log pi of the policy and of the
reference, V, r_t), turn the scores into advantages, update (clipped PPO), log and save.

    level=token      GAE gets the rewards [R_1 - b KL_1, ..., R_T - b KL_T]
    level=sequence   GAE gets the rewards [-b KL_1, ..., R - b KL_T], where R is the reward model's
                     at the last token, or R(tau) of Eq. 1 if its level is token
All other code is the same. r_t is read at the position of a_t (the model has read a_t); V(s_t) and
log pi(a_t | s_t) are read one position earlier.

The paper writes [R_1..R_n] without KL (--kl_coef=0). Our defaults are AlpacaFarm's published
script, which has it. Unlike there, every mean and whitening is over the real tokens of the complete
batch, all ranks together. So micro-batches and ranks change results by float noise only.
"""
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from common import (encode_prompt, end_ids, epoch_order, generate, last_token, load_model,
                    load_tokenizer, my_micro_batches, optimizer_step, pack, reward_level,
                    row_uniforms, rows_at, setup, token_heads, token_logprobs, tokenizer_hash,
                    total_rewards, unsharded)
from plumbing import watch
from plumbing.command_line import extra, load_config
from plumbing.files import (ABOVE_0, ANY, AT_LEAST_0, COUNT, SHARE, check_input, check_numbers,
                            read_jsonl)
from plumbing.models import check_fits, check_model
from plumbing.ranks import RANK, WORLD, fail, say, total
from plumbing.record import (begin, finish, load_checkpoint, log_metrics, logged, progress,
                             record_of, save_checkpoint, save_model, save_step, trim_logs)

@dataclass(frozen=True)
class Config:
    policy: str = "out/sft"             # the start of the policy, and the reference
    reward_model: str = "out/rm"        # scores the responses; its backbone, with a zero head, is V
    data: str = "data/alpacafarm/prompts.jsonl"     # instruction, input
    out: str = "out/ppo"
    level: Literal["token", "sequence"] = "token"   # R_t at every token, or R at the last token
    steps: int = 80                     # rollout steps (AlpacaFarm: best at 20-80)
    rollout_batch: int = 512            # responses per step, all ranks together
    rollout_micro_batch: int = 64       # rows decoded together; changing it changes the samples
    score_micro_batch: int = 32         # rows per forward of the scores; changes memory, speed only
    batch: int = 256                    # rows per optimizer step
    micro_batch: int = 8                # rows per forward of the update; changes memory, speed only
    ppo_epochs: int = 2                 # 512 / 256 * 2 = 4 optimizer steps per rollout step
    query_len: int = 192                # tokens; longer prompts are dropped and counted
    response_len: int = 300             # tokens
    temperature: float = 1.0            # also used for log pi: what is sampled is what is trained
    # reward
    kl_coef: float = 0.0067             # b; AlpacaFarm's for simulated preferences, 0.02 for human
    kl_target: float | None = None      # adapt b to this KL per response (AlpacaFarm: 6); None: no
    clamp_kl: bool = False              # AlpacaFarm's clamp of the per-token KL at 0 (biased)
    reward_scale: Literal["sum", "mean", "fixed"] = "sum"   # r_t, r_t / T, r_t / fixed_length
    fixed_length: int | None = None     # of reward_scale=fixed, in tokens
    missing_eos_penalty: float = 0.0    # subtracted at a last token other than EOS, before scaling
    whiten_rewards: bool = True         # divide by their standard deviation, keep the mean
    whiten_advantages: bool = True
    gamma: float = 1.0                  # AlpacaFarm's; 0: each token counts in its own state alone
    lam: float = 1.0                    # no effect at gamma 0
    # update
    lr: float = 1e-5
    warmup_steps: int = 5               # linear warm-up; step 0 already uses lr / warmup_steps
    lr_epochs: float = 10.0             # then linear to 0 over these epochs; `steps` stops earlier
    clip: float = 0.2
    value_clip: float | None = 0.2      # None: no clipping
    vf_coef: float = 0.1
    max_grad_norm: float | None = 1.0   # of policy and value together; None: no clipping
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU; weights float32
    activation_checkpointing: bool = False      # a third more computing for much less memory
    # what is saved
    save_every: int = 20                # steps between models out/step_N; the last is out itself
    resume_every: int = 10              # steps between checkpoints; a killed run resumes from them
    sample_every: int = 10              # steps between entries of samples.jsonl
    wandb_project: str | None = None    # also send metrics.jsonl's rows there
    plan: bool = False                  # only print the memory per GPU and phase
    gpu_gb: float = 80.0                # memory of one GPU, for the plan
    seed: int = 0                       # order of the prompts, all random numbers
    overwrite: bool = False
    allow_changed_code: bool = False    # continue a run whose stage file or common.py changed

# ---------------------------------------------------------------- equations: tensors are [B, T]

def masked_mean(x, mask):
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)

def shape_rewards(rewards, logprobs, ref_logprobs, mask, *, level, kl_coef, reward_scale="sum",
                  fixed_length=None, clamp_kl=False, missing_eos_penalty=0.0, ended=None):
    """The rewards [B, T] that GAE gets, Section 2.2: penalty, scale, - b (log pi - log pi_0).

    rewards: R [B] for level="sequence", put at the last real token; r_t [B, T] for "token".
    ended [B] bool: the response has its EOS; without, missing_eos_penalty is subtracted at the
    last token. reward_scale is for "token": "sum", "mean" (/ T) or "fixed" (/ fixed_length).
    ValueError: a scale at sequence level, fixed without fixed_length, a penalty without ended."""
    mask = mask.bool()
    last = last_token(mask)                                                     # [B, T]
    if level == "sequence":
        if reward_scale != "sum":
            raise ValueError(f"reward_scale={reward_scale} is for level=token; use sum")
        rewards = last * rewards[:, None]
    rewards = rewards.masked_fill(~mask, 0)

    if missing_eos_penalty:
        if ended is None:
            raise ValueError("missing_eos_penalty needs `ended`, which rows have their EOS")
        not_ended = last & ~ended.bool()[:, None]                               # [B, T]
        rewards = rewards - missing_eos_penalty * not_ended

    if reward_scale == "mean":
        lengths = mask.sum(1).clamp(min=1)                                      # [B]
        rewards = rewards / lengths[:, None]
    elif reward_scale == "fixed":
        if not fixed_length:
            raise ValueError("reward_scale=fixed needs fixed_length")
        rewards = rewards / fixed_length

    kl = (logprobs - ref_logprobs).masked_fill(~mask, 0)
    if clamp_kl:
        kl = kl.clamp(min=0)
    return rewards - kl_coef * kl

def gae(rewards, values, mask, *, gamma, lam):
    """Generalized advantage estimation, Section 2.2 -> advantages, returns = A + V, [B, T] each.
    delta_t = r_t + gamma V(s_{t+1}) - V(s_t) and A_t = delta_t + gamma lam A_{t+1}. The value after
    the last real token is 0, also if the response was cut: the length limit is part of the task.
    gamma 0: A_t = r_t - V(s_t). A part b(s_t) of r_t cancels in Eq. 4 where answers of one length
    are in a common state. At gamma 0 it changes no expected gradient; at gamma 1 it is summed."""
    mask = mask.bool()
    rewards = rewards.masked_fill(~mask, 0)
    values = values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(rewards)
    A, next_value = 0.0, 0.0
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        A = (delta + gamma * lam * A) * mask[:, t]  # 0 in the padding after a response
        advantages[:, t] = A
        next_value = values[:, t]
    return advantages, advantages + values

def whiten(x, mask, *, shift_mean=True):
    """(x - mean) / std over the real tokens of all rows; x is unchanged if std < 1e-8 (population).
    shift_mean=False: x / std, because a constant added to every token rewards longer answers."""
    mask = mask.bool()
    x = x.masked_fill(~mask, 0)
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    if std < 1e-8:
        return x
    if shift_mean:
        x = x - mean
    return (x / std).masked_fill(~mask, 0)

def policy_loss(logprobs, old_logprobs, advantages, mask, *, clip):
    """Clipped loss, Section 2.2: max(-A ratio, -A clip(ratio, 1 +- clip)), ratio = pi / pi_old"""
    mask = mask.bool()
    ratio = (logprobs - old_logprobs).masked_fill(~mask, 0).exp()
    advantages = advantages.masked_fill(~mask, 0)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.max(unclipped, clipped)

def value_loss(values, old_values, returns, mask, *, clip):
    """1/2 max of the squared errors of V and of V clipped to old V +- clip; None: no clipping"""
    mask = mask.bool()
    values = values.masked_fill(~mask, 0)
    old_values = old_values.masked_fill(~mask, 0)
    returns = returns.masked_fill(~mask, 0)
    errors = (values - returns) ** 2
    if clip is not None:
        clipped = torch.clamp(values, old_values - clip, old_values + clip)
        errors = torch.max(errors, (clipped - returns) ** 2)
    return 0.5 * errors

def next_kl_coef(kl_coef, kl, target):
    """AlpacaFarm's adaptive KL: b <- b (1 + 0.1 clip(KL / target - 1, -0.2, 0.2)); None: b stays"""
    if target is None:
        return kl_coef
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + 0.1 * error)

def learning_rate(cfg, step, rows):
    """Linear warm-up, then linear to 0 over lr_epochs epochs of the prompts (AlpacaFarm's)"""
    steps = max(cfg.lr_epochs * rows / cfg.rollout_batch, cfg.warmup_steps + 1)
    warm_up = min(1, (step + 1) / max(1, cfg.warmup_steps))
    decay = min(1, max(0, (steps - step) / (steps - cfg.warmup_steps)))
    return cfg.lr * warm_up * decay

# ---------------------------------------------------------------- one step

def roll_out(policy, tokenizer, prompts, cfg, step, device):
    """One response per prompt -> lists of ids, the same on every rank. All ranks."""
    n = len(prompts)
    ids = torch.zeros(n, cfg.response_len, dtype=torch.long, device=device)
    lengths = torch.zeros(n, dtype=torch.long, device=device)

    # Each rank decodes some of the fixed groups.
    groups = range(0, n, cfg.rollout_micro_batch)
    with unsharded(policy):
        for start in groups[RANK::WORLD]:
            rows = range(n)[start:start + cfg.rollout_micro_batch]
            group = [prompts[row] for row in rows]
            prompt_ids, prompt_mask, _ = pack(group, [[]] * len(rows), device)  # [B, P] each
            draws = [row_uniforms(cfg.response_len, cfg.seed, step, row) for row in rows]
            uniforms = torch.stack(draws)                                       # [B, response_len]
            response_ids, response_mask = generate(                             # [B, T] each
                policy, prompt_ids, prompt_mask, max_new_tokens=cfg.response_len,
                eos_id=end_ids(tokenizer), temperature=cfg.temperature, uniforms=uniforms)
            T = response_mask.shape[1]
            ids[rows.start:rows.stop, :T] = response_ids
            lengths[rows.start:rows.stop] = response_mask.sum(1)

    # Every rank filled only its own rows, so the sum collects them. All ranks.
    ids = total(ids).tolist()
    lengths = total(lengths).tolist()
    return [row[:length] for row, length in zip(ids, lengths)]

def optimizer_batches(cfg, step, epoch):
    """The rows of the rollout batch in a new order, cut into batches: the same on every rank"""
    order = epoch_order(cfg.rollout_batch, cfg.seed, "step", step, "epoch", epoch)
    return [order[i:i + cfg.batch] for i in range(0, len(order), cfg.batch)]

@torch.no_grad()
def score(function, parts, prompts, responses, device):
    """function(*pack(..)) [B, T] over this rank's parts (lists of rows) -> [rows, T]. All ranks."""
    output = torch.zeros(len(responses), max(map(len, responses)), device=device)
    for part in parts:
        # A rank without rows runs row 0: FSDP's forward is collective.
        rows = part or [0]
        packed = pack([prompts[row] for row in rows], [responses[row] for row in rows], device)
        x = function(*packed)  # all ranks
        if part:
            output[part, :x.shape[1]] = x
    return total(output)

def stop_if(bad, what, step, numbers, cfg):
    """Exits and names the rows with NaN or inf. bad [rows] bool, the same on every rank."""
    if bad.any():
        rows = [str(numbers[i]) for i in bad.nonzero()[:, 0]]
        if len(rows) > 8:
            rows = rows[:8] + ["..."]
        fail(f"step {step}: {what} not finite in row(s) {', '.join(rows)} of {cfg.data}; what was "
             f"saved before in {cfg.out} is kept. Lower --lr, or look at the rows")

def update(models, optimizer, rollout, cfg, step, lr, device):
    """ppo_epochs over the rollout batch -> means over all real tokens of the step. All ranks.
    rollout: prompts, responses (lists of ids), lengths, numbers (of the rows in the data file), and
    old_logprobs, old_values, advantages, returns [rows, T]."""
    # The sharded parameters are the optimizer's: after a forward, FSDP may show unsharded ones.
    parameters = optimizer.param_groups[0]["params"]
    value_clip = float("inf") if cfg.value_clip is None else cfg.value_clip
    sums = defaultdict(float)  # of each figure, over this rank's real tokens
    norms = []
    first_ratio_error = None
    for epoch in range(cfg.ppo_epochs):
        for batch in optimizer_batches(cfg, step, epoch):
            tokens = sum(len(rollout["responses"][row]) for row in batch)  # of all ranks
            ratio_error = torch.zeros((), device=device)
            bad = torch.zeros(len(rollout["responses"]), device=device)               # [rows]
            for part in my_micro_batches(batch, rollout["lengths"], cfg.micro_batch):
                # A rank without rows runs any row with weight 0: FSDP's forward is collective.
                rows = part or batch[:1]
                prompts = [rollout["prompts"][row] for row in rows]
                responses = [rollout["responses"][row] for row in rows]
                packed = pack(prompts, responses, device)
                mask = packed[2] & bool(part)                                         # [B, T]
                T = mask.shape[1]
                old_logprobs = rollout["old_logprobs"][rows, :T]
                old_values = rollout["old_values"][rows, :T]
                advantages = rollout["advantages"][rows, :T]
                returns = rollout["returns"][rows, :T]

                # Policy loss. All ranks.
                logprobs = token_logprobs(models["policy"], *packed, cfg.temperature)  # [B, T]
                losses = policy_loss(logprobs, old_logprobs, advantages, mask, clip=cfg.clip)
                (losses.sum() / tokens).backward()

                # Value loss. All ranks.
                values = token_heads(models["value"], *packed, before=True)           # [B, T]
                value_losses = value_loss(values, old_values, returns, mask, clip=cfg.value_clip)
                (cfg.vf_coef * value_losses.sum() / tokens).backward()

                # Figures.
                with torch.no_grad():
                    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0)
                    ratio = log_ratio.exp()
                    distance = (ratio - 1).abs()
                    ratio_error = torch.max(ratio_error, distance.max())
                    figures = dict(policy_loss=losses, value_loss=value_losses, ratio=ratio)
                    figures["value_clipped"] = (values - old_values).abs() > value_clip
                    figures["clip_fraction"] = distance > cfg.clip
                    figures["approx_kl"] = ratio - 1 - log_ratio  # k3, Schulman's, of (pi_old, pi)
                    for name, x in figures.items():
                        sums[name] += x.masked_fill(~mask, 0).double().sum()
                    finite = torch.isfinite((losses + value_losses).sum(1))           # [B]
                    bad[part] = (~finite).float()[:len(part)]

            stop_if(total(bad) > 0, "the loss is", step, rollout["numbers"], cfg)  # all ranks
            if first_ratio_error is None:  # pi is still pi_old, so the ratio must be 1
                first_ratio_error = total(ratio_error, "max").item()
            first_rows = [rollout["numbers"][row] for row in batch[:8]]
            where = f"step {step}, rows {first_rows}..."
            norms.append(optimizer_step(parameters, optimizer, lr, cfg.max_grad_norm, where))

    all_tokens = cfg.ppo_epochs * sum(map(len, rollout["responses"]))
    means = total(torch.stack(list(sums.values()))) / all_tokens  # all ranks
    stats = dict(zip(sums, means.tolist()))
    stats |= dict(first_ratio_error=first_ratio_error, grad_norm=sum(norms) / len(norms))
    return stats

# ---------------------------------------------------------------- the stage

def check(cfg):
    """What can be wrong before a model is loaded -> tokenizer, level of the reward model"""
    check_model(cfg.policy, "policy", "python sft.py")
    check_model(cfg.reward_model, "reward_model", "python reward_model.py")
    check_input(cfg.data, "data", "python data/toy/prepare.py or python data/alpacafarm/prepare.py")
    check_numbers(cfg, steps=COUNT, rollout_batch=COUNT, rollout_micro_batch=COUNT, batch=COUNT,
                  score_micro_batch=COUNT, micro_batch=COUNT, ppo_epochs=COUNT, query_len=COUNT,
                  response_len=COUNT, fixed_length=COUNT, save_every=COUNT, resume_every=COUNT,
                  sample_every=COUNT)
    check_numbers(cfg, temperature=ABOVE_0, kl_coef=AT_LEAST_0, kl_target=ABOVE_0, gamma=SHARE,
                  missing_eos_penalty=AT_LEAST_0, lam=SHARE, lr=AT_LEAST_0, clip=ABOVE_0,
                  warmup_steps=AT_LEAST_0, lr_epochs=ABOVE_0, value_clip=ABOVE_0, seed=ANY,
                  vf_coef=AT_LEAST_0, max_grad_norm=ABOVE_0, gpu_gb=ABOVE_0)
    if cfg.wandb_project:
        extra("wandb_mirror", "--wandb_project").check(cfg)
    groups = -(-cfg.rollout_batch // cfg.rollout_micro_batch)
    if groups < WORLD:
        fail(f"--rollout_micro_batch={cfg.rollout_micro_batch} leaves some of the {WORLD} ranks "
             f"without rollouts of --rollout_batch={cfg.rollout_batch}; make it smaller")
    if cfg.level == "sequence" and cfg.reward_scale != "sum":
        fail(f"--reward_scale={cfg.reward_scale} is for --level=token")
    if (cfg.reward_scale == "fixed") != bool(cfg.fixed_length):
        fail("--reward_scale=fixed and --fixed_length=N go together")
    if cfg.kl_target and not cfg.kl_coef:
        fail(f"--kl_target={cfg.kl_target:g} multiplies --kl_coef, and 0 stays 0; set a --kl_coef")
    reward_model_level = reward_level(cfg.reward_model)
    if cfg.level == "token" and reward_model_level == "sequence":
        fail(f"--reward_model={cfg.reward_model} gives one reward per response; use "
             "--level=sequence, or train one with --loss=eq4")
    tokenizer = load_tokenizer(cfg.policy)
    scorer = load_tokenizer(cfg.reward_model)
    if scorer.prompt_format != tokenizer.prompt_format:
        fail(f"--reward_model={cfg.reward_model} was trained on prompts of {scorer.prompt_format}, "
             f"--policy={cfg.policy} on prompts of {tokenizer.prompt_format}; train one anew")
    if tokenizer_hash(tokenizer) != tokenizer_hash(scorer):
        fail(f"--reward_model={cfg.reward_model} has another tokenizer than --policy={cfg.policy}; "
             "it scores the policy's own ids")
    longest = cfg.query_len + cfg.response_len
    check_fits(cfg.policy, "policy", longest, vocabulary=len(tokenizer))
    check_fits(cfg.reward_model, "reward_model", longest, head="saved", vocabulary=len(tokenizer))
    return tokenizer, reward_model_level

def resume(cfg, models, optimizer, tokenizer, dtype, last_lr):
    """Load the newest checkpoint, if there is one -> steps done, their rows of metrics.jsonl"""
    done = load_checkpoint(cfg.out, models, optimizer)
    watch.check_start(cfg, done, last_lr)
    trim_logs(cfg.out, done)
    if 0 < done < cfg.steps and done % cfg.save_every == 0:
        # When --steps was raised, the former last model becomes out/step_N.
        if not Path(cfg.out, f"step_{done}").exists():
            save_step(models["policy"], tokenizer, cfg.out, done, dtype)
    history = [row for row in logged(Path(cfg.out, "metrics.jsonl")) if row["step"] < done]
    return done, history

def main(cfg):
    if cfg.plan:
        return extra("memory.plan", "--plan").show_plan(cfg)

    # Check the run, and read the prompts that are short enough.
    tokenizer, reward_model_level = check(cfg)
    rows = read_jsonl(cfg.data, {"instruction": str, "input": (str, type(None))})
    all_prompts = [encode_prompt(tokenizer, row) for row in rows]
    kept = [i for i, ids in enumerate(all_prompts) if ids and len(ids) <= cfg.query_len]
    if not kept:
        fail(f"{cfg.data}: no prompt fits in --query_len={cfg.query_len} tokens")
    unimportant = ("steps", "score_micro_batch", "micro_batch", "save_every", "resume_every",
                   "sample_every", "wandb_project", "plan", "gpu_gb")
    inputs = [cfg.policy, cfg.reward_model, cfg.data]
    finished = begin(cfg, "ppo", unimportant=unimportant, inputs=inputs, prompts=len(kept))
    if finished and record_of(cfg.out)["config"]["steps"] >= cfg.steps:
        return say(f"{cfg.out} is finished; nothing to do")
    alarms = extra("alarms")  # None where extras/ was deleted
    samples = extra("samples")
    mirror = None
    if cfg.wandb_project:
        mirror = extra("wandb_mirror").mirror(cfg)

    # Two models learn, two are frozen.
    device, mesh, dtype = setup(cfg.dtype)
    learns = dict(checkpointing=cfg.activation_checkpointing)
    policy = load_model(cfg.policy, device, mesh, dtype, **learns)
    value = load_model(cfg.reward_model, device, mesh, dtype, head="zero", **learns)
    models = torch.nn.ModuleDict(dict(policy=policy, value=value))
    reference = load_model(cfg.policy, device, mesh, dtype, frozen=True)
    reward_model = load_model(cfg.reward_model, device, mesh, dtype, head="saved", frozen=True)
    optimizer = torch.optim.AdamW(models.parameters(), cfg.lr, eps=1e-5, weight_decay=0, fused=True)

    # Start, or resume after the last checkpoint.
    if alarms:
        alarms.check_disk(cfg, models, dtype)
    last_lr = learning_rate(cfg, cfg.steps - 1, len(kept))
    done, history = resume(cfg, models, optimizer, tokenizer, dtype, last_lr)
    saved = done  # the steps that the newest checkpoint has done
    kl_coef = history[-1]["next_kl_coef"] if done else cfg.kl_coef
    watch.listen_for_signals()
    so_far = f", {done} of them done" if done else ""
    special = all_prompts.count(None)
    dropped = f" ({special} hold a special token's text)" if special else ""
    say(f"{len(kept)} of {len(rows)} prompts fit in {cfg.query_len} tokens{dropped}, {cfg.steps} "
        f"steps of {cfg.rollout_batch} responses on {WORLD} rank(s){so_far}")

    for step in progress(range(done, cfg.steps), "ppo", cfg.steps):
        watch.stop_if_told(cfg, step, saved, models, optimizer, device)  # all ranks

        # ---- 1. roll out
        t0 = time.time()
        start = step * cfg.rollout_batch
        places = rows_at(start, start + cfg.rollout_batch, len(kept), cfg.seed)
        batch = [kept[place] for place in places]
        numbers = [i + 1 for i in batch]  # in the data file, from 1
        prompts = [all_prompts[i] for i in batch]
        responses = roll_out(policy, tokenizer, prompts, cfg, step, device)
        lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, responses)]

        # ---- 2. score
        t1 = time.time()
        # In the micro-batches of the update's first epoch, so that its first ratio is exactly 1.
        parts = []
        for optimizer_batch in optimizer_batches(cfg, step, 0):
            parts += my_micro_batches(optimizer_batch, lengths, cfg.micro_batch)
        log_pi = partial(token_logprobs, temperature=cfg.temperature)
        old_logprobs = score(partial(log_pi, policy), parts, prompts, responses, device)
        ref_logprobs = score(partial(log_pi, reference), parts, prompts, responses, device)

        # V(s_t) is read one position before r_t. All four results are [rows, T].
        parts = my_micro_batches(range(len(responses)), lengths, cfg.score_micro_batch)
        V = partial(token_heads, value, before=True)
        r = score(partial(token_heads, reward_model), parts, prompts, responses, device)
        old_values = score(V, parts, prompts, responses, device)
        scores = dict(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
        scores |= dict(rewards=r, values=old_values)
        for name, x in scores.items():
            stop_if(~torch.isfinite(x.sum(1)), f"{name} are", step, numbers, cfg)

        # ---- 3. rewards and advantages
        response_lengths = torch.tensor([[len(ids)] for ids in responses], device=device)
        mask = torch.arange(r.shape[1], device=device) < response_lengths       # [rows, T]
        ends = [ids[-1] in end_ids(tokenizer) for ids in responses]
        ended = torch.tensor(ends, device=device)                               # [rows]
        R = total_rewards(r, mask, reward_model_level)                          # [rows], Eq. 1
        rewards = shape_rewards(
            r if cfg.level == "token" else R, old_logprobs, ref_logprobs, mask, level=cfg.level,
            kl_coef=kl_coef, reward_scale=cfg.reward_scale, fixed_length=cfg.fixed_length,
            clamp_kl=cfg.clamp_kl, missing_eos_penalty=cfg.missing_eos_penalty, ended=ended)
        return_sd = rewards.sum(1).std(correction=0).item()  # compare kl_coef with this
        if cfg.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, old_values, mask, gamma=cfg.gamma, lam=cfg.lam)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, mask)
        explained = {}
        if alarms:
            explained = alarms.explained_variance(old_values, returns, mask)
            alarms.check_length_pressure(cfg, step, r, mask, ended)

        # ---- 4. update
        t2 = time.time()
        watch.stop_if_told(cfg, step, saved, models, optimizer, device)  # all ranks
        lr = learning_rate(cfg, step, len(kept))
        rollout = dict(prompts=prompts, responses=responses, lengths=lengths, numbers=numbers)
        rollout |= dict(old_logprobs=old_logprobs, old_values=old_values)
        rollout |= dict(advantages=advantages, returns=returns)
        stats = update(models, optimizer, rollout, cfg, step, lr, device)

        # ---- 5. log and save
        t3 = time.time()
        tokens = int(mask.sum())
        kl = (old_logprobs - ref_logprobs).sum(1).mean().item()
        entropy = -masked_mean(old_logprobs, mask).item()
        row = dict(step=step, reward=R.mean().item(), token_reward=masked_mean(r, mask).item())
        row |= dict(return_sd=return_sd, kl=kl, response_length=tokens / len(responses))
        row |= dict(eos_share=ended.float().mean().item(), entropy=entropy)
        row |= explained | stats
        row |= dict(lr=lr, kl_coef=kl_coef, next_kl_coef=next_kl_coef(kl_coef, kl, cfg.kl_target))
        row |= dict(rollout_s=t1 - t0, score_s=t2 - t1, update_s=t3 - t2)
        row |= dict(tokens_per_s=tokens / (t3 - t0), peak_gb=watch.peak_gb(device), seconds=t3 - t0)
        history.append(row)
        kl_coef = row["next_kl_coef"]
        log_metrics(cfg.out, row, ("step", "reward", "kl", "response_length", "eos_share",
                                   "grad_norm", "seconds"))
        if mirror:
            mirror(row)
        if alarms:
            for words in alarms.alarms(cfg, history, dtype):
                say(f"ALARM at step {step}:", words)

        is_last = step + 1 == cfg.steps
        if samples and (step % cfg.sample_every == 0 or is_last):
            batch_rows = [rows[i] for i in batch]
            samples.save_samples(cfg.out, tokenizer, step, batch_rows, responses, r, R)
        if (step + 1) % cfg.save_every == 0 and not is_last:
            save_step(policy, tokenizer, cfg.out, step + 1, dtype)  # all ranks
        if (step + 1) % cfg.resume_every == 0 or is_last:
            saved = step + 1
            save_checkpoint(cfg.out, saved, models, optimizer)  # all ranks

    save_model(policy, tokenizer, cfg.out, dtype)  # all ranks
    finish(cfg, config=vars(cfg))
    row, questions = history[-1], Path(cfg.data).with_name("eval.jsonl")
    say(f"{cfg.out}: done, reward {history[0]['reward']:.4g} -> {row['reward']:.4g}, KL "
        f"{row['kl']:.3g}; next: python evaluate.py decode --model={cfg.out} --data={questions} "
        f"--out={cfg.out}/outputs.jsonl")

if __name__ == "__main__":
    main(load_config(Config, "ppo"))
