"""Every test runs the user's own commands, on a CPU, without a network. The small toy world and its
models are made once."""
import atexit, contextlib, functools, json, os, subprocess, sys, tempfile
from pathlib import Path

import pytest

from warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")


@functools.cache
def python():
    """A python that starts in a tenth of a second, the same for all tests"""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    return stack.enter_context(warm_python(folder))


def run(*words, ranks=0, ok=True, **env):
    """python <words>, with ranks under torchrun -> the finished process. ok: it must succeed"""
    command = [python()]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(word) for word in words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHON_EXEC": python()}
    environment |= {name: str(value) for name, value in env.items()}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=environment)
    if ok:
        assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# Settings with which each stage takes seconds.
SMALL = ["--hidden_size=32", "--heads=2", "--sft_rows=160", "--pref_rows=48", "--heldout_rows=24",
         "--eval_rows=8"]
SFT = ["--batch=32", "--micro_batch=16", "--lr=2e-3", "--epochs=1"]
RM = ["--batch=16", "--micro_batch=8", "--lr=1e-3"]
PPO = ["--steps=2", "--rollout_batch=16", "--rollout_micro_batch=8", "--score_micro_batch=8",
       "--batch=8", "--micro_batch=4", "--response_len=12", "--query_len=64", "--lr=1e-3"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with data/, sft/, edits.jsonl, diffs.jsonl, rm/ (Eq. 4) and rm_sequence/"""
    home = tmp_path_factory.mktemp("world")
    data = home / "data"
    sft = home / "sft"
    run("data/toy/prepare.py", f"--out={data}", *SMALL)
    run("sft.py", f"--model={data}/model", f"--data={data}/sft.jsonl", f"--out={sft}", *SFT)
    run("edit.py", "--editor=rules", f"--data={data}/pref.jsonl", f"--out={home}/edits.jsonl")
    run("diff.py", f"--data={home}/edits.jsonl", f"--tokenizer={sft}", f"--out={home}/diffs.jsonl")
    run("reward_model.py", f"--model={sft}", f"--data={home}/diffs.jsonl", f"--out={home}/rm", *RM)
    run("reward_model.py", f"--model={sft}", f"--data={data}/pref.jsonl", "--loss=sequence",
        f"--out={home}/rm_sequence", *RM)
    return home


@pytest.fixture
def ppo_flags(world):
    return [f"--policy={world}/sft", f"--reward_model={world}/rm",
            f"--data={world}/data/prompts.jsonl", *PPO]
