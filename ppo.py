"""Stage 4. PPO with a reward at every token, or at the end.

    torchrun --nproc_per_node=8 ppo.py                              # the paper's run: out/sft + out/rm -> out/ppo
    python ppo.py --policy=out/sft --reward_model=out/rm --data=data/toy/prompts.jsonl
    python ppo.py --level=sequence --reward_model=out/rm_sequence   # PPO-RLHF, the baseline
    WORLD_SIZE=8 python ppo.py --plan=true                          # the memory of each phase; needs no GPU

One step: roll out (sample a response per prompt), score (log pi of policy and reference, V, r_t), update (clipped PPO).
Token level gives GAE the rewards [R_1 - b KL_1, ..., R_T - b KL_T], sequence level [-b KL_1, ..., R - b KL_T]; all else
is one code path. r_t is read at a_t's own position (the model has seen a_t), V(s_t) and log pi(a_t | s_t) one earlier.

Where we depart: the paper writes [R_1..R_n] without KL; the defaults are AlpacaFarm's published script, which has it
(--kl_coef=0 is the paper's literal vector). Unlike that script, every mean and whitening is over real tokens of the
whole batch, all ranks together. Results do not depend on micro-batches or the number of ranks (but for float noise):
rollouts are cut into fixed groups, each row has its own draws, and optimizer batches are drawn over all rows.
"""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import (decode_response, my_micro_batches, encode_prompt, epoch_order, generate, last_token, load_model,
                    load_tokenizer, optimizer_step, pack, reward_level, row_uniforms, rows_at,
                    setup, token_heads, token_logprobs, token_texts, tokenizer_hash, total_rewards,
                    unsharded)
from plumbing import watch
from plumbing.command_line import extra, load_config
from plumbing.files import check_fits, check_input, check_model, check_numbers, read_jsonl
from plumbing.ranks import RANK, WORLD, fail, say, total
from plumbing.record import (begin, finish, load_checkpoint, log_metrics, logged, progress,
                             record_of, save_checkpoint, save_model, save_step, trim_logs)


@dataclass(frozen=True)
class Config:
    policy: str = "out/sft"                 # the start of the policy, and the reference
    reward_model: str = "out/rm"            # scores the policy's ids; its backbone, with a zero head, starts V
    data: str = "data/alpacafarm/prompts.jsonl"     # instruction, input
    out: str = "out/ppo"
    level: Literal["token", "sequence"] = "token"   # R_t at every token, or R at the last (a token model's: Eq. 1)
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
    kl_target: float | None = None          # adapt b towards this KL per response (AlpacaFarm's text: 6); None: fixed
    clamp_kl: bool = False                  # AlpacaFarm's clamp of the per-token KL estimate at 0 (biased)
    reward_scale: Literal["sum", "mean", "fixed"] = "sum"   # level=token: r_t, r_t / T (sums to R(tau)), r_t / N
    fixed_length: int | None = None         # N of reward_scale=fixed
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
    wandb_project: str | None = None        # mirror metrics.jsonl there, if wandb is installed
    plan: bool = False                      # print the memory per GPU and phase, do nothing else
    gpu_gb: float = 80.0                    # of one GPU, for the plan
    seed: int = 0                           # order of prompts, every draw
    overwrite: bool = False
    allow_changed_code: bool = False        # continue a run whose stage file or common.py changed


# ---------------------------------------------------------------- the mathematics: [B, T] tensors, mask True on tokens

def masked_mean(x, mask):
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def shape_rewards(rewards, logprobs, ref_logprobs, mask, *, level, kl_coef, reward_scale="sum", fixed_length=None,
                  clamp_kl=False, missing_eos_penalty=0.0, ended=None):
    """The reward vector [B, T] that GAE sees: penalty, then scale, then minus kl_coef * (log pi - log pi_0) per token.

    rewards: R [B] for level="sequence", put at the last real token; r_t [B, T] for "token". ended [B] bool: the
    response has its EOS; the others lose missing_eos_penalty at their last token. reward_scale is token level's: "sum",
    "mean" (by the row's T) or "fixed" (by fixed_length). ValueError: a scale at sequence level, fixed without
    fixed_length, a penalty without ended."""
    mask = mask.bool()
    lengths = mask.sum(1)
    last = last_token(mask)                                                                        # [B, T]
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

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t); A_t = delta_t + gamma lam A_{t+1}. The value after the last real token is
    0, also where a response was cut: the limit is part of the task."""
    mask = mask.bool()
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages, A, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        A = (delta + gamma * lam * A) * mask[:, t]  # padding lies behind the response: nothing flows in from it
        advantages[:, t], next_value = A, values[:, t]
    return advantages, advantages + values


def whiten(x, mask, *, shift_mean=True):
    """(x - mean) / std over the real tokens of all rows; shift_mean=False: x / std, nothing added (a constant per token
    would pay for length). Population std; below 1e-8 x is returned as it is."""
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
    """1/2 squared error per token [B, T], the worse of V and V kept within clip of the rollout's; None: no clipping"""
    mask = mask.bool()
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    errors = (values - returns) ** 2
    if clip is not None:
        errors = torch.max(errors, (torch.clamp(values, old_values - clip, old_values + clip) - returns) ** 2)
    return 0.5 * errors


def learning_rate(cfg, step, rows):
    """AlpacaFarm's: linear warm-up, then linear to 0 over lr_epochs epochs of the prompts; once per rollout step"""
    steps = max(cfg.lr_epochs * rows / cfg.rollout_batch, cfg.warmup_steps + 1)
    decay = min(1, max(0, (steps - step) / (steps - cfg.warmup_steps)))
    return cfg.lr * min(1, (step + 1) / max(1, cfg.warmup_steps)) * decay


# ---------------------------------------------------------------- one step

def roll_out(policy, tokenizer, prompts, cfg, step, device):
    """One response per prompt -> lists of ids, the same on every rank; each rank decodes whole groups. All ranks."""
    n, groups = len(prompts), range(0, len(prompts), cfg.rollout_micro_batch)
    ids = torch.zeros(n, cfg.response_len, dtype=torch.long, device=device)
    lengths = torch.zeros(n, dtype=torch.long, device=device)
    with unsharded(policy):
        for start in groups[RANK::WORLD]:
            rows = range(start, min(start + cfg.rollout_micro_batch, n))
            prompt_ids, prompt_mask, _ = pack([prompts[row] for row in rows], [[]] * len(rows), device)
            uniforms = torch.stack([row_uniforms(cfg.response_len, cfg.seed, step, row) for row in rows])
            response_ids, mask = generate(policy, prompt_ids, prompt_mask, max_new_tokens=cfg.response_len,
                                          eos_id=tokenizer.eos_token_id, temperature=cfg.temperature, uniforms=uniforms)
            ids[start:start + len(rows), :mask.shape[1]], lengths[start:start + len(rows)] = response_ids, mask.sum(1)
    ids, lengths = total(ids).tolist(), total(lengths).tolist()  # each row is 0 but on its own rank. All ranks
    return [row[:length] for row, length in zip(ids, lengths)]


def optimizer_batches(cfg, step, epoch):
    """The rows of the rollout batch in a new order, cut into optimizer batches: the same on every rank"""
    order = epoch_order(cfg.rollout_batch, cfg.seed, "step", step, "epoch", epoch)
    return [order[i:i + cfg.batch] for i in range(0, len(order), cfg.batch)]


@torch.no_grad()
def score(function, parts, prompts, responses, device):
    """function(ids, mask, response_mask) [B, T] over this rank's parts (lists of rows) -> [rows, T]. All ranks."""
    output = torch.zeros(len(responses), max(map(len, responses)), device=device)
    for part in parts:
        packed = pack([prompts[row] for row in part or [0]], [responses[row] for row in part or [0]], device)
        x = function(*packed)  # all ranks, also those with nothing left
        if part:
            output[part, :x.shape[1]] = x
    return total(output)


def stop_if(bad, what, step, numbers, cfg):
    """bad [rows] bool, the same on every rank: a NaN or an infinity ends the run, with the rows it is in"""
    if bad.any():
        rows = [numbers[i] for i in bad.nonzero()[:, 0].tolist()]
        fail(f"step {step}: {what} not finite in row(s) {', '.join(map(str, rows[:8]))}{', ...' * (len(rows) > 8)} of "
             f"{cfg.data}; what was saved before in {cfg.out} is kept. Lower --lr, or look at the rows")


def update(models, optimizer, rollout, cfg, step, lr, device):
    """ppo_epochs over the rollout batch -> means over all real tokens of the step. All ranks.

    rollout: prompts, responses (lists of ids), lengths, numbers (the rows' in the data file), and old_logprobs,
    old_values, advantages, returns [rows, T]."""
    parameters = optimizer.param_groups[0]["params"]  # the shards: after a forward models.parameters() may be whole
    sums, norms, first = torch.zeros(6, dtype=torch.float64, device=device), [], None
    for epoch in range(cfg.ppo_epochs):
        for batch in optimizer_batches(cfg, step, epoch):
            tokens = sum(len(rollout["responses"][row]) for row in batch)
            ratio_error, bad = torch.zeros((), device=device), torch.zeros(len(rollout["responses"]), device=device)
            for part in my_micro_batches(batch, rollout["lengths"], cfg.micro_batch):
                mine = part or batch[:1]  # nothing left for this rank: any row, with weight 0
                packed = pack(*([rollout[name][row] for row in mine] for name in ("prompts", "responses")), device)
                mask = packed[2] & bool(part)
                old_logprobs, old_values, advantages, returns = (rollout[name][mine, :mask.shape[1]] for name in (
                    "old_logprobs", "old_values", "advantages", "returns"))

                logprobs = token_logprobs(models["policy"], *packed, cfg.temperature)             # all ranks
                losses = policy_loss(logprobs, old_logprobs, advantages, mask, clip=cfg.clip)     # [B, T]
                (losses.sum() / tokens).backward()
                values = token_heads(models["value"], *packed, before=True)                       # all ranks
                value_losses = value_loss(values, old_values, returns, mask, clip=cfg.value_clip) # [B, T]
                (cfg.vf_coef * value_losses.sum() / tokens).backward()

                with torch.no_grad():
                    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0)
                    ratio, moved = log_ratio.exp(), (values - old_values).abs()
                    ratio_error = torch.max(ratio_error, (ratio - 1).abs().max())
                    value_clipped = moved > (float("inf") if cfg.value_clip is None else cfg.value_clip)
                    seen = dict(policy_loss=losses, value_loss=value_losses, ratio=ratio, value_clipped=value_clipped,
                                clip_fraction=(ratio - 1).abs() > cfg.clip,
                                approx_kl=ratio - 1 - log_ratio)  # k3, Schulman's low-variance KL(old, new)
                    sums += torch.stack([x.masked_fill(~mask, 0).double().sum() for x in seen.values()])
                    bad[part] = (~torch.isfinite((losses + value_losses).sum(1))).float()[:len(part)]
            stop_if(total(bad) > 0, "the loss is", step, rollout["numbers"], cfg)  # all ranks
            if first is None:  # before anything was updated: pi is pi_old, so the ratio must be 1
                first = total(ratio_error, "max").item()
            rows = [rollout["numbers"][row] for row in batch[:8]]
            norms.append(optimizer_step(parameters, optimizer, lr, cfg.max_grad_norm, f"step {step}, rows {rows}..."))
    means = total(sums) / (cfg.ppo_epochs * sum(map(len, rollout["responses"])))  # all ranks
    return dict(zip(seen, means.tolist())) | dict(first_ratio_error=first, grad_norm=sum(norms) / len(norms))


def sample(tokenizer, step, row, ids, r, R):
    """A response with its token rewards, for samples.jsonl. r [T], R: its rewards"""
    return dict(step=step, instruction=row["instruction"], input=row.get("input") or "",
                output=decode_response(tokenizer, ids), tokens=token_texts(tokenizer, ids),
                token_rewards=r[:len(ids)].tolist(), reward=R.item())


# ---------------------------------------------------------------- the stage

def check(cfg):
    """What can be wrong with a run before any model is loaded -> tokenizer, the reward model's level"""
    check_model(cfg.policy, "policy", "python sft.py")
    check_model(cfg.reward_model, "reward_model", "python reward_model.py")
    check_input(cfg.data, "data", "python data/toy/prepare.py or python data/alpacafarm/prepare.py")
    check_numbers(cfg, "steps", "rollout_batch", "rollout_micro_batch", "score_micro_batch", "batch", "micro_batch",
                 "ppo_epochs", "response_len", "fixed_length", "save_every", "resume_every", "sample_every")
    if -(-cfg.rollout_batch // cfg.rollout_micro_batch) < WORLD:
        fail(f"--rollout_batch={cfg.rollout_batch} in groups of --rollout_micro_batch={cfg.rollout_micro_batch} leaves "
             f"some of the {WORLD} ranks without rollouts; make the groups smaller")
    if cfg.level == "sequence" and cfg.reward_scale != "sum":
        fail(f"--reward_scale={cfg.reward_scale} is for --level=token")
    if (cfg.reward_scale == "fixed") != bool(cfg.fixed_length):
        fail("--reward_scale=fixed and --fixed_length=N go together")
    if cfg.kl_target is not None and cfg.kl_target <= 0:
        fail(f"--kl_target must be above 0, got {cfg.kl_target} (None: kl_coef stays)")
    if cfg.temperature <= 0:
        fail(f"--temperature must be above 0, got {cfg.temperature}: pi is sampled from")
    kind = reward_level(cfg.reward_model)
    if cfg.level == "token" and kind == "sequence":
        fail(f"--reward_model={cfg.reward_model} gives one reward per response; use --level=sequence, or train one "
             "with --loss=eq4")
    tokenizer = load_tokenizer(cfg.policy)
    if tokenizer_hash(tokenizer) != tokenizer_hash(load_tokenizer(cfg.reward_model)):
        fail(f"--reward_model={cfg.reward_model} has another tokenizer than --policy={cfg.policy}; it scores the "
             "policy's own ids")
    check_fits(cfg.policy, "policy", cfg.query_len + cfg.response_len, speaks=True)
    check_fits(cfg.reward_model, "reward_model", cfg.query_len + cfg.response_len)
    return tokenizer, kind


def main(cfg):
    if cfg.plan:
        return extra("memory.plan", "--plan").show_plan(cfg)

    # ---------------------------------------------------------------- inputs
    tokenizer, kind = check(cfg)
    rows = read_jsonl(cfg.data, {"instruction": str, "input": (str, type(None))})
    prompts = [(number, row, ids) for number, row in enumerate(rows, 1)
               if len(ids := encode_prompt(tokenizer, row)) <= cfg.query_len]
    if not prompts:
        fail(f"{cfg.data}: every prompt is longer than --query_len={cfg.query_len} tokens")
    unimportant = ("steps", "score_micro_batch", "micro_batch", "save_every", "resume_every", "sample_every", "wandb_project",
            "plan", "gpu_gb")
    finished = begin(cfg, "ppo", unimportant=unimportant, inputs=[cfg.policy, cfg.reward_model, cfg.data], prompts=len(prompts))
    if finished and record_of(cfg.out)["config"]["steps"] >= cfg.steps:  # else: more steps than last time
        return say(f"{cfg.out} is finished; nothing to do")
    mirror = watch.mirror(cfg)

    # ---------------------------------------------------------------- models: two that learn, two that are frozen
    device, mesh, dtype = setup(cfg.dtype)
    ac = cfg.activation_checkpointing
    models = torch.nn.ModuleDict(dict(
        policy=load_model(cfg.policy, device, mesh, dtype, checkpointing=ac),
        value=load_model(cfg.reward_model, device, mesh, dtype, head="zero", checkpointing=ac)))
    policy, value = models["policy"], models["value"]
    reference = load_model(cfg.policy, device, mesh, dtype, frozen=True)
    reward_model = load_model(cfg.reward_model, device, mesh, dtype, head="saved", frozen=True)
    optimizer = torch.optim.AdamW(models.parameters(), lr=cfg.lr, betas=(0.9, 0.999), eps=1e-5, weight_decay=0.0)
    watch.check_disk(cfg, models, dtype)
    done = saved = load_checkpoint(cfg.out, models, optimizer)
    watch.check_start(cfg, done, learning_rate(cfg, cfg.steps - 1, len(prompts)))
    if 0 < done < cfg.steps and done % cfg.save_every == 0 and not Path(cfg.out, f"step_{done}").exists():
        save_step(policy, tokenizer, cfg.out, done, dtype)  # it was the last step, out itself; now there are more
    trim_logs(cfg.out, done)
    history = [row for row in logged(Path(cfg.out, "metrics.jsonl")) if row["step"] < done]
    kl_coef = history[-1]["next_kl_coef"] if done else cfg.kl_coef
    watch.listen_for_sigterm()
    say(f"{len(prompts)} prompts ({len(rows) - len(prompts)} longer than {cfg.query_len} tokens dropped), {cfg.steps} "
        f"steps of {cfg.rollout_batch} responses on {WORLD} rank(s){f', {done} of them done' if done else ''}")

    for step in progress(range(done, cfg.steps), "ppo", cfg.steps):
        watch.stop_if_told(cfg, step, saved, models, optimizer, device)  # all ranks
        # ------------------------------------------------------------ roll out
        clock = [time.time()]
        batch = rows_at(step * cfg.rollout_batch, (step + 1) * cfg.rollout_batch, len(prompts), cfg.seed)
        numbers, batch_rows, batch_prompts = zip(*(prompts[i] for i in batch))
        responses = roll_out(policy, tokenizer, batch_prompts, cfg, step, device)
        lengths = [len(p) + len(ids) for p, ids in zip(batch_prompts, responses)]
        clock.append(time.time())

        # ------------------------------------------------------------ score
        texts = (batch_prompts, responses, device)
        parts = [part for b in optimizer_batches(cfg, step, 0) for part in my_micro_batches(b, lengths, cfg.micro_batch)]
        old_logprobs, ref_logprobs = (  # [rows, T], in the first epoch's own micro-batches: the first ratio is 1
            score(lambda *packed: token_logprobs(model, *packed, cfg.temperature), parts, *texts)
            for model in (policy, reference))
        parts = my_micro_batches(range(len(responses)), lengths, cfg.score_micro_batch)
        r = score(lambda *packed: token_heads(reward_model, *packed), parts, *texts)  # [rows, T], r_t at a_t
        old_values = score(lambda *packed: token_heads(value, *packed, before=True), parts, *texts)  # [rows, T], V(s_t)
        for name, x in dict(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, rewards=r, values=old_values).items():
            stop_if(~torch.isfinite(x.sum(1)), f"{name} are", step, numbers, cfg)

        mask = torch.arange(r.shape[1], device=device) < torch.tensor([[len(ids)] for ids in responses], device=device)
        ended = torch.tensor([ids[-1] == tokenizer.eos_token_id for ids in responses], device=device)
        R = total_rewards(r, mask, kind)                                                               # [rows], Eq. 1
        rewards = shape_rewards(r if cfg.level == "token" else R, old_logprobs, ref_logprobs, mask, level=cfg.level,
                                kl_coef=kl_coef, reward_scale=cfg.reward_scale, fixed_length=cfg.fixed_length,
                                clamp_kl=cfg.clamp_kl, missing_eos_penalty=cfg.missing_eos_penalty, ended=ended)
        return_sd = rewards.sum(1).std(correction=0).item()  # what kl_coef is to be held against
        if cfg.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, old_values, mask, gamma=cfg.gamma, lam=cfg.lam)
        explained = watch.explained_variance(old_values, returns, mask)
        if cfg.whiten_advantages:
            advantages = whiten(advantages, mask)
        if step == 0 and (words := watch.length_pressure(cfg, r, mask, ended)):
            say("ALARM:", words)
        clock.append(time.time())
        watch.stop_if_told(cfg, step, saved, models, optimizer, device)  # all ranks; the weights are the last step's

        # ------------------------------------------------------------ update
        lr = learning_rate(cfg, step, len(prompts))
        rollout = dict(prompts=batch_prompts, responses=responses, lengths=lengths, numbers=numbers,
                       old_logprobs=old_logprobs, old_values=old_values, advantages=advantages, returns=returns)
        stats = update(models, optimizer, rollout, cfg, step, lr, device)
        clock.append(time.time())

        # ------------------------------------------------------------ log, keep
        tokens, kl = int(mask.sum()), (old_logprobs - ref_logprobs).sum(1).mean().item()
        next_kl_coef = kl_coef * (1 + 0.1 * min(0.2, max(-0.2, kl / cfg.kl_target - 1))) if cfg.kl_target else kl_coef
        rollout_s, score_s, update_s = (end - start for start, end in zip(clock, clock[1:]))
        history.append(dict(
            step=step, reward=R.mean().item(), token_reward=masked_mean(r, mask).item(), return_sd=return_sd, kl=kl,
            response_length=tokens / len(responses), eos_share=ended.float().mean().item(),
            entropy=-masked_mean(old_logprobs, mask).item(), **explained, **stats, lr=lr, kl_coef=kl_coef,
            next_kl_coef=next_kl_coef, rollout_s=rollout_s, score_s=score_s, update_s=update_s,
            tokens_per_s=tokens / (clock[-1] - clock[0]), peak_gb=watch.peak_gb(device), seconds=clock[-1] - clock[0]))
        log_metrics(cfg.out, history[-1], shown=("step", "reward", "kl", "response_length", "eos_share",
                                                 "first_ratio_error", "clip_fraction", "grad_norm", "seconds"))
        mirror(history[-1])
        for words in watch.alarms(cfg, history, dtype):
            say(f"ALARM at step {step}:", words)
        kl_coef = next_kl_coef
        if step % cfg.sample_every == 0 or step == cfg.steps - 1:
            watch.save_samples(cfg.out, [
                sample(tokenizer, step, *one) for one in zip(batch_rows[:3], responses, r, R)])
        if (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps:
            save_step(policy, tokenizer, cfg.out, step + 1, dtype)  # all ranks
        if (step + 1) % cfg.resume_every == 0 or step + 1 == cfg.steps:
            save_checkpoint(cfg.out, saved := step + 1, models, optimizer)  # all ranks

    save_model(policy, tokenizer, cfg.out, dtype)  # all ranks
    finish(cfg, config=vars(cfg))
    say(f"{cfg.out}: done")


if __name__ == "__main__":
    main(load_config(Config, "ppo"))
