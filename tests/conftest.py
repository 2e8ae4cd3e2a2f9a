"""Every test runs the user's own commands, on a CPU, without a network; the tiny world and its
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
    """A python that starts in a tenth of a second, the same for the whole session"""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(warm_python(stack.enter_context(tempfile.TemporaryDirectory())))


def run(*words, ranks=0, ok=True, **env):
    """python <words>, or torchrun with so many ranks -> the finished process; ok: it must
    succeed"""
    start = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks
        else []
    )
    done = subprocess.run(
        [python(), *start, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "PYTHON_EXEC": python()}
        | {k: str(v) for k, v in env.items()},
    )
    assert not ok or done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


SMALL = [
    "--hidden_size=32",
    "--heads=2",
    "--sft_rows=160",
    "--pref_rows=48",
    "--heldout_rows=24",
    "--eval_rows=8",
]
SFT = ["--batch=32", "--micro_batch=16", "--lr=2e-3", "--epochs=1"]
RM = ["--batch=16", "--micro_batch=8", "--lr=1e-3"]
PPO = [
    "--steps=2",
    "--rollout_batch=16",
    "--rollout_micro_batch=8",
    "--score_micro_batch=8",
    "--batch=8",
    "--micro_batch=4",
    "--response_len=12",
    "--query_len=64",
    "--lr=1e-3",
]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """data/, sft/, edits.jsonl, diffs.jsonl, rm/ (Eq. 4), rm_sequence/ of a world small enough for
    seconds"""
    home = tmp_path_factory.mktemp("world")
    run("data/toy/prepare.py", f"--out={home}/data", *SMALL)
    run(
        "sft.py",
        f"--model={home}/data/model",
        f"--data={home}/data/sft.jsonl",
        f"--out={home}/sft",
        *SFT,
    )
    run("edit.py", f"--data={home}/data/pref.jsonl", "--editor=rules", f"--out={home}/edits.jsonl")
    run(
        "diff.py",
        f"--data={home}/edits.jsonl",
        f"--tokenizer={home}/sft",
        f"--out={home}/diffs.jsonl",
    )
    run(
        "reward_model.py",
        f"--model={home}/sft",
        f"--data={home}/diffs.jsonl",
        f"--out={home}/rm",
        *RM,
    )
    run(
        "reward_model.py",
        f"--model={home}/sft",
        f"--data={home}/data/pref.jsonl",
        "--loss=sequence",
        f"--out={home}/rm_sequence",
        *RM,
    )
    return home


@pytest.fixture
def ppo_flags(world):
    return [
        f"--policy={world}/sft",
        f"--reward_model={world}/rm",
        f"--data={world}/data/prompts.jsonl",
        *PPO,
    ]
