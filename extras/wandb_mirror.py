"""--wandb_project: each row of metrics.jsonl is also sent to wandb"""
if __name__ == "__main__":
    raise SystemExit("wandb_mirror.py is a part of: python ppo.py --wandb_project=NAME")

import hashlib
from dataclasses import asdict
from pathlib import Path

from plumbing.ranks import RANK, fail
from plumbing.record import record_of


def mirror(cfg):
    """A function that sends a row of metrics.jsonl to wandb (rank 0). A mirror that was asked for
    and cannot be had ends the run before it starts."""
    if RANK > 0:
        return lambda row: None
    try:
        import wandb
    except ImportError:
        fail(f"--wandb_project={cfg.wandb_project}: wandb is not installed; pip install wandb, or "
             "leave the flag out: metrics.jsonl has all numbers")

    # A resumed run of ours is the same run there; with --overwrite it is a new one.
    key = f"{Path(cfg.out).resolve()} {record_of(cfg.out).get('started', '')}"
    id = hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
        run = wandb.init(project=cfg.wandb_project, name=cfg.out, config=asdict(cfg), id=id,
                         resume="allow")
    except wandb.Error as error:
        why = str(error).strip().splitlines()[0]
        fail(f"--wandb_project={cfg.wandb_project}: {why}; run: wandb login, or leave the flag out")
    return lambda row: run.log(row, step=row["step"])
