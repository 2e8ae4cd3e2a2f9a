"""What ppo.py shows next to its rewards and losses, and how a training handles signals."""
import contextlib, json, os, resource, signal, time
from pathlib import Path

import torch

from plumbing.paint import paint
from plumbing.ranks import RANK, fail, say, total
from plumbing.record import save_checkpoint

TOLD_TO_STOP = []  # the signal's number and its time, after Ctrl-C or SIGTERM

def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns), [B, T] each: 1 if V predicts the returns, 0 if not.
    -> dict: of all real tokens, and of each fifth of the responses (V learns the ends first)"""
    lengths = mask.sum(1, keepdim=True).clamp(min=1)                                # [B, 1]
    fifth = torch.arange(mask.shape[1], device=mask.device) * 5 // lengths          # [B, T]
    parts = {"explained_variance": mask}
    for k in range(5):
        parts[f"explained_variance_{k + 1}"] = mask & (fifth == k)
    figures = {}
    for name, part in parts.items():
        target, error = returns[part], (returns - values)[part]
        variance = (target - target.mean()).square().mean()
        unexplained = (error - error.mean()).square().mean()
        known = variance > 1e-12  # False for NaN, where the part has no token
        figures[name] = (1 - unexplained / variance).item() if known else 0.0
    return figures

def peak_gb(device):
    """Peak memory of the fullest rank so far, in GB: of the GPU, or of the process. All ranks."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return total(torch.tensor(peak / 1e9, device=device), "max").item()

def save_samples(out, samples):
    """Add ppo.samples() to samples.jsonl, and print the first one coloured by its r_t (rank 0)"""
    if RANK == 0:
        with open(Path(out, "samples.jsonl"), "a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample) + "\n")
        first = samples[0]
        scale = max(map(abs, first["token_rewards"])) or 1.0
        say(f"R = {first['reward']:+.3f} for {json.dumps(first['instruction'])[:80]}:",
            paint(first["tokens"], first["token_rewards"], scale))

def listen_for_signals():
    """From now on Ctrl-C and SIGTERM are obeyed by stop_if_told(); a second one ends at once"""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)

def note_signal(number, _):
    now = time.monotonic()
    if not TOLD_TO_STOP:
        TOLD_TO_STOP.extend((number, now))
        with contextlib.suppress(OSError):  # stderr may be a closed pipe
            os.write(2, b"\nstopping: a checkpoint is written first (again: stop at once)\n")
    elif now - TOLD_TO_STOP[1] > 0.5:  # a scheduler sends one stop to torchrun and to its processes
        os._exit(128 + number)

def stop_if_told(cfg, step, saved, models, optimizer, device):
    """After a signal to any rank: save a checkpoint of `step` steps and exit. All ranks."""
    number = int(total(torch.tensor((TOLD_TO_STOP or [0])[0], device=device), "max"))
    if number:
        if step != saved:
            save_checkpoint(cfg.out, step, models, optimizer)
        without = " without --overwrite" if cfg.overwrite else ""
        say(f"{signal.Signals(number).name}: stopped after {step} steps; the same command{without} "
            f"continues with step {step}")
        raise SystemExit(128 + number)

def check_start(cfg, done, last_lr):
    """What can be wrong with continuing after `done` steps, or with the last learning rate"""
    if done > cfg.steps:
        fail(f"{cfg.out} has {done} steps already, --steps={cfg.steps} is less; choose a new --out")
    if done and not Path(cfg.out, "metrics.jsonl").exists():
        fail(f"{cfg.out} has a checkpoint, but no metrics.jsonl to continue; use --overwrite=true")
    if cfg.lr and last_lr == 0:
        say(f"ALARM: the learning rate is 0 before step {cfg.steps}; raise --lr_epochs")
