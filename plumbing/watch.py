"""How a training starts and stops: signals, what can be wrong with continuing; peak memory."""
import contextlib, os, resource, signal, time
from pathlib import Path

import torch

from plumbing.ranks import fail, say, total
from plumbing.record import save_checkpoint

TOLD_TO_STOP = []  # the signal's number and its time, after Ctrl-C or SIGTERM

def peak_gb(device):
    """Peak memory of the fullest rank so far, in GB: of the GPU, or of the process. All ranks."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return total(torch.tensor(peak / 1e9, device=device), "max").item()

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
