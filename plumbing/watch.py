"""What a ppo.py run shows beside its numbers (alarms, samples, wandb), and what it survives:
SIGTERM and a full disk."""
import hashlib
import json
import math
import resource
import shutil
import signal
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

from plumbing.paint import paint
from plumbing.ranks import RANK, fail, say, total
from plumbing.record import record_of, save_checkpoint


# ---------------------------------------------------------------- figures

def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the real tokens, [B, T] each. 1: V knows the
    returns; 0: it knows nothing, or there is nothing to know. Also over each fifth of the
    responses, because V learns the ends first."""
    lengths = mask.sum(1, keepdim=True).clamp(min=1)                                # [B, 1]
    fifth = torch.arange(mask.shape[1], device=mask.device) * 5 // lengths          # [B, T]
    figures = dict(explained_variance=explained(values, returns, mask))
    for k in range(5):
        part = mask & (fifth == k)
        figures[f"explained_variance_{k + 1}"] = explained(values, returns, part)
    return figures


def explained(values, returns, part):
    """explained_variance over the tokens of `part`"""
    variance = spread(returns[part])
    if not variance > 1e-12:  # also where no token is in the part: NaN
        return 0.0
    return (1 - spread((returns - values)[part]) / variance).item()


def spread(x):
    return (x - x.mean()).square().mean()


def peak_gb(device):
    """The peak memory of the fullest rank so far: GPU memory, or the process's memory without a
    GPU. All ranks."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return total(torch.tensor(peak / 1e9, device=device), "max").item()


# ---------------------------------------------------------------- alarms

def length_pressure(cfg, r, mask, ended):
    """From the first rollout, before anything is updated -> a sentence, or None. PPO sums r_t, so a
    mean that is not small against the spread rewards longer (or shorter) answers.

    r [B, T]; ended [B]: the response has its EOS"""
    mean = r[mask].mean().item()
    sd = r[mask].std(correction=0).item()
    if cfg.level != "token" or cfg.reward_scale == "mean" or abs(mean) <= sd / 2:
        return None
    at_eos = r.gather(1, mask.sum(1, keepdim=True) - 1)[ended, 0]
    eos = f"{at_eos.mean().item():+.3g} at EOS" if len(at_eos) else "no response has its EOS"
    return (f"each extra token pays {mean:+.3g} (mean r_t over all tokens; {eos}; their sd is "
            f"{sd:.3g}): length pressure, see anchor and reward_scale")


def alarms(cfg, history, dtype):
    """What is wrong with a run, in words -> list of sentences. history: the rows of metrics.jsonl
    up to this step"""
    row = history[-1]
    words = []
    if row["first_ratio_error"] > (1e-4 if dtype == torch.float32 else 1e-2):
        words.append(
            f"ratio != 1 at the first minibatch (off by {row['first_ratio_error']:.2g}): the "
            "update does not compute the log-probs that the rollout was scored with; do not "
            "trust this run")

    if row["kl"] > 10 * (cfg.kl_target or 6.0) or row["approx_kl"] > 0.1:  # AlpacaFarm aims at 6
        before = f" (three steps ago {history[-4]['kl']:.1f})" if len(history) > 3 else ""
        words.append(
            f"KL exploding: {row['kl']:.1f} nats per response from the reference{before}, "
            f"{row['approx_kl']:.2g} per token within this step's update; lower --lr, raise "
            "--kl_coef, see in samples.jsonl what is paid")

    if row["eos_share"] == 0:
        words.append(
            f"all {cfg.rollout_batch} responses truncated: none has its EOS within "
            f"--response_len={cfg.response_len}; raise it, or see missing_eos_penalty")

    length = row["response_length"]
    first_length = history[0]["response_length"]
    if len(history) % 10 == 0 and length > 1.5 * first_length:
        words.append(
            f"responses grow: {length:.3g} tokens, {first_length:.3g} at first; see in "
            "samples.jsonl whether length is what is paid: anchor, kl_coef, reward_scale")

    if row["return_sd"] < 1e-8:
        words.append("reward flat: every response of this batch has the same return, there is "
                     "nothing to learn from it")
    elif len(history) % 20 == 0:
        words += flat_reward(history)
    return words


def flat_reward(history):
    """An alarm if the last ten steps' reward is not above the first ten's by two standard errors"""
    first = [row["reward"] for row in history[:10]]
    last = [row["reward"] for row in history[-10:]]
    mean_1, mean_2 = statistics.fmean(first), statistics.fmean(last)
    error_1 = statistics.stdev(first) / math.sqrt(10)
    error_2 = statistics.stdev(last) / math.sqrt(10)
    if mean_2 - mean_1 >= 2 * math.hypot(error_1, error_2):
        return []
    return [f"reward flat: {mean_2:.4g} +- {error_2:.2g} over the last ten steps, {mean_1:.4g} +- "
            f"{error_1:.2g} over the first; raise --lr, lower --kl_coef, look at samples.jsonl"]


# ---------------------------------------------------------------- samples and wandb

def save_samples(out, samples):
    """Add a few responses of a step to samples.jsonl and print the first, each token coloured by
    its r_t (rank 0). samples: dicts with instruction, tokens, token_rewards, reward, ..."""
    if RANK > 0:
        return
    with open(Path(out, "samples.jsonl"), "a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample) + "\n")

    first = samples[0]
    scale = max(map(abs, first["token_rewards"])) or 1.0
    say(f"R = {first['reward']:+.3f} for {json.dumps(first['instruction'])[:80]}:",
        paint(first["tokens"], first["token_rewards"], scale))


def mirror(cfg):
    """A function that sends a row of metrics.jsonl to wandb. It does nothing without
    --wandb_project, or where wandb is not installed."""
    if RANK > 0 or not cfg.wandb_project:
        return lambda row: None
    try:
        import wandb
    except ImportError:
        say(f"--wandb_project={cfg.wandb_project}: wandb is not installed (pip install wandb); "
            f"metrics go to {cfg.out}/metrics.jsonl alone")
        return lambda row: None

    # The same run of ours is the same run there; with --overwrite it is a new one.
    started = record_of(cfg.out).get("started", "")
    id = hashlib.sha256(f"{Path(cfg.out).resolve()} {started}".encode()).hexdigest()[:16]
    run = wandb.init(project=cfg.wandb_project, name=cfg.out, config=asdict(cfg), id=id,
                     resume="allow")
    return lambda row: run.log(row, step=row["step"])


# ---------------------------------------------------------------- SIGTERM and disk space

TOLD_TO_STOP = []


def listen_for_sigterm():
    signal.signal(signal.SIGTERM, lambda *_: TOLD_TO_STOP.append(True))


def stop_if_told(cfg, step, saved, models, optimizer, device):
    """After SIGTERM to any rank: write the checkpoint of `step` steps (unless it is `saved`
    already) and exit. All ranks."""
    told = total(torch.tensor(len(TOLD_TO_STOP), device=device), "max")
    if told == 0:
        return
    if step != saved:
        save_checkpoint(cfg.out, step, models, optimizer)
    without = " (without --overwrite)" if cfg.overwrite else ""
    say(f"SIGTERM: stopped after {step} steps; the same command continues from there{without}")
    raise SystemExit(128 + signal.SIGTERM)


def check_start(cfg, done, last_lr):
    """What can be wrong with continuing after `done` steps, or with the last step's learning rate"""
    if done > cfg.steps:
        fail(f"{cfg.out} has {done} steps already, --steps={cfg.steps} is less; choose another "
             "--out")
    if done and not Path(cfg.out, "metrics.jsonl").exists():
        fail(f"{cfg.out} has a checkpoint, but no metrics.jsonl to continue; start again with "
             "--overwrite=true")
    if cfg.lr and last_lr == 0:
        say(f"ALARM: the learning rate is 0 before step {cfg.steps}: prompts, rollout_batch and "
            f"--lr_epochs={cfg.lr_epochs} give fewer steps than --steps; raise --lr_epochs")


def check_disk(cfg, models, dtype):
    """fail() unless the disk has room for what the run will write: a checkpoint (float32 weights
    and Adam's two moments of policy and value) next to the one before, and a Hugging Face folder
    every save_every steps and at the end"""
    numel = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    checkpoint = 12 * sum(numel.values())
    folder = numel["policy"] * dtype.itemsize

    has_one = any(Path(cfg.out).glob("checkpoint_*"))
    checkpoints = 1 if has_one else 2
    folders = 1
    for step in range(cfg.save_every, cfg.steps, cfg.save_every):
        if not Path(cfg.out, f"step_{step}").exists():
            folders += 1

    need = checkpoints * checkpoint + folders * folder
    free = shutil.disk_usage(cfg.out).free
    if need > free:
        fail(f"--out={cfg.out} has {free / 1e9:.3g} GB free, this run needs {need / 1e9:.3g} GB: "
             f"{checkpoints} checkpoint(s) of {checkpoint / 1e9:.3g} GB (a new one is written "
             f"beside the old) and {folders} model folder(s) of {folder / 1e9:.3g} GB; raise "
             "--save_every, or choose an --out on a larger disk")
