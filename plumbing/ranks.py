"""The processes of a run: torchrun starts one per GPU; without torchrun there is one."""
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))         # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def fail(message):
    """Print one line on stderr and exit with code 2. All ranks hit the same error; rank 0 prints it."""
    if RANK > 0:
        # Rank 0 reports first, then torchrun ends this process. It lives on only if the error is its own.
        time.sleep(10)
    line = f"{Path(sys.argv[0]).name}: {message}"

    # The message may quote a file, so a control character in it must not reach the terminal.
    line = "".join(c if c.isprintable() else "?" for c in line)
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(2)


def say(*words):
    """print on rank 0, above the progress bar"""
    if RANK == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def barrier():
    """Wait for all ranks"""
    if dist.is_initialized():
        dist.barrier()


def total(x, op="sum"):
    """Sum (or max) of a tensor over the ranks. All ranks."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return x
