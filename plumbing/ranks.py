"""The processes of a run: torchrun starts one per GPU; without torchrun there is one."""
import os, sys, time

import torch.distributed as dist
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))

def fail(message):
    """One line on stderr, then exit code 2. All ranks hit the same error; only rank 0 prints it."""
    if RANK > 0:
        time.sleep(10)  # rank 0 reports first, then torchrun ends us, unless only we have the error
    line = f"{os.path.basename(sys.argv[0])}: {message}"
    safe = [c if c.isprintable() else "?" for c in line]  # it may quote a file's control characters
    print("".join(safe), file=sys.stderr, flush=True)
    raise SystemExit(2)

def say(*words):
    """Print on rank 0, above the progress bar. A closed pipe (`| head`) does not end the run."""
    if RANK == 0:
        try:
            tqdm.write(" ".join(map(str, words)))
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # from now on stdout goes nowhere

def barrier():  # all ranks
    if dist.is_initialized():
        dist.barrier()

def total(x, op="sum"):
    """Sum (or max) of a tensor over the ranks. All ranks."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return x
