"""--wandb_project: each row of metrics.jsonl is also sent to wandb"""
if __name__ == "__main__":
    raise SystemExit("wandb_mirror.py is a part of: python ppo.py --wandb_project=NAME")

import hashlib
from dataclasses import asdict
from pathlib import Path

from plumbing.ranks import RANK, fail
from plumbing.record import record_of


def check(cfg):
    """fail() unless wandb is installed and logged in, before the run writes or loads anything
    (rank 0). It may ask for the key in a terminal. WANDB_MODE=offline needs no login."""
    if RANK > 0:
        return
    try:
        import wandb
    except ImportError:
        fail(f"--wandb_project={cfg.wandb_project}: wandb is not installed; pip install wandb, or "
             "leave the flag out: metrics.jsonl has all numbers")
    try:
        wandb.login()
    except wandb.Error as error:
        cannot(cfg, error)


def mirror(cfg):
    """-> a function that sends a row of metrics.jsonl to wandb (rank 0)"""
    if RANK > 0:
        return lambda row: None
    import wandb

    # A resumed run of ours is the same run there; with --overwrite it is a new one.
    key = f"{Path(cfg.out).resolve()} {record_of(cfg.out).get('started', '')}"
    id = hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
        run = wandb.init(project=cfg.wandb_project, name=cfg.out, config=asdict(cfg), id=id,
                         resume="allow")
    except wandb.Error as error:
        cannot(cfg, error)
    return lambda row: run.log(row, step=row["step"])


def cannot(cfg, error):
    """One line with wandb's own reason, and what to do"""
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    fail(f"--wandb_project={cfg.wandb_project}: {why} Run: wandb login, set WANDB_MODE=offline, or "
         "leave the flag out")
