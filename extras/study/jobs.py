"""Many short stages, without the three seconds that each start of torch takes: stages are forked
from one Python that has loaded torch and transformers."""
if __name__ == "__main__":
    raise SystemExit("jobs.py is a part of: python extras/study/toy.py")

import os, runpy, sys, time, traceback
from pathlib import Path

import torch.distributed.checkpoint  # loaded once, for all stages
import torch.distributed.fsdp  # noqa: F401
import transformers

from plumbing.ranks import fail, say

# transformers loads a class when it is first used: here once, before the first fork.
LOADED = [transformers.AutoModelForCausalLM, transformers.AutoModelForTokenClassification,
          transformers.LlamaForCausalLM, transformers.LlamaForTokenClassification,
          transformers.AutoTokenizer, transformers.LlamaTokenizer]


def fork(function, log):
    """Call function() in a child process whose output is appended to the file log -> its id"""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child

    # The child ends here, whatever happens.
    status = 1
    try:
        with open(log, "a") as opened:
            os.dup2(opened.fileno(), 1)
            os.dup2(opened.fileno(), 2)
        function()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def exit_status(wait_status):
    return os.waitstatus_to_exitcode(wait_status)


def stage(log, script, *words):
    """Run a stage, such as stage(log, "ppo.py", "--steps=1"), as a child. Exits if it fails"""
    words = [str(word) for word in words]

    def run():
        print(f"$ python {script} {' '.join(words)}", flush=True)
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")

    status = exit_status(os.waitpid(fork(run, log), 0)[1])
    if status:
        raise SystemExit(status)


def run_jobs(jobs, workers, folder):
    """Run jobs, {name: function}, each in a child, `workers` at a time. A job that fails does not
    stop the others; at the end the run exits with the logs to read, <folder>/<name>.log"""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    waiting = list(jobs.items())
    running = {}  # process id -> name
    failed = []
    start = time.time()
    while waiting or running:
        while waiting and len(running) < workers:
            name, function = waiting.pop(0)
            running[fork(function, folder / f"{name}.log")] = name
        child, status = os.wait()
        name = running.pop(child)
        if exit_status(status):
            failed.append(str(folder / f"{name}.log"))
        done = len(jobs) - len(waiting) - len(running)
        what = "failed" if exit_status(status) else "done"
        say(f"{done} of {len(jobs)} after {time.time() - start:.0f} s: {name} {what}")
    if failed:
        fail(f"{len(failed)} job(s) failed; read {', '.join(failed[:8])}; the same command "
             "repeats only what is not finished")
