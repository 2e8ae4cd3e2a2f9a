"""ppo.py over night: killed, stopped by SIGTERM, a NaN in the rewards, two machines, a rank that
fails. pytest tests/test_ppo_night.py"""
import os, signal, socket, subprocess, sys, time

import pytest, torch
from conftest import PPO, ROOT, python, rows_of, run
from test_stages import kill_when, lines, same_metrics, start, weights

STEPS = ["--steps=6", "--rollout_micro_batch=4", "--kl_target=0.1", "--sample_every=2"]

BROKEN = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import common
from common import *
steps, rows_at, token_heads = [], common.rows_at, common.token_heads
optimizer_step = common.optimizer_step
{patch}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NAN_AT_STEP_2 = """
def counted(*args):
    steps.append(1)
    return rows_at(*args)
def with_nan(*args, before=False):
    r = token_heads(*args, before=before)
    if len(steps) == 3 and not before:
        r[0, 0] = float("nan")
    return r
common.rows_at = counted
common.token_heads = with_nan
"""
TOLD_AFTER_SCORING_STEP_2 = """
from plumbing import watch
from extras import alarms
def told(*args, explained_variance=alarms.explained_variance):
    steps.append(1)
    if len(steps) == 3 and RANK == 3:
        watch.TOLD_TO_STOP.extend((15, 0))  # as SIGTERM does
    return explained_variance(*args)
alarms.explained_variance = told
"""
RANK_1_FAILS = """
def failing(*args):
    if RANK == 1:
        open({path!r}, "w").close()
        raise RuntimeError("the card of rank 1 fell off the bus")
    return optimizer_step(*args)
common.optimizer_step = failing
"""


@pytest.fixture(scope="module")
def words(world):
    inputs = [f"--policy={world}/sft", f"--reward_model={world}/rm"]
    return ["ppo.py", *inputs, f"--data={world}/data/prompts.jsonl", *PPO, *STEPS]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    """A run of six steps on one rank that nothing interrupts"""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(*words, f"--out={out}")
    return out


def broken(path, patch):
    path.write_text(BROKEN.format(root=str(ROOT), patch=patch))
    return path


def two_nodes(per_node, *words, python=sys.executable):
    """Start two torchrun agents, as on two machines -> the processes"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [python, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={per_node}",
              "--master_addr=127.0.0.1", f"--master_port={port}"]
    processes = []
    for node in range(2):
        command = [*launch, f"--node_rank={node}", *map(str, words)]
        processes.append(subprocess.Popen(
            command, cwd=ROOT, text=True, env=os.environ | {"PYTHON_EXEC": python},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return processes


def test_a_killed_and_stopped_run_ends_as_the_undisturbed_one(words, undisturbed, tmp_path):
    """kill -9 three times, a NaN at step 2, SIGTERM; then the same command ends with the same
    weights, to the last bit"""
    out = tmp_path / "out"

    def kill_at(rows):
        process = start(*words, f"--out={out}", "--resume_every=2")
        kill_when(process, lambda: lines(out / "metrics.jsonl") >= rows)
        assert not (out / "config.json").exists(), "a model has its final name, but is incomplete"

    kill_at(1)

    # A NaN: nothing of step 2 is kept.
    script = broken(tmp_path / "nan.py", NAN_AT_STEP_2)
    done = run(script, ROOT / words[0], *words[1:], f"--out={out}", "--resume_every=1", ok=False)
    assert done.returncode == 2, done.stderr
    assert "step 2: rewards are not finite in row(s) " in done.stderr
    assert [folder.name for folder in out.glob("checkpoint_*")] == ["checkpoint_2"]
    assert lines(out / "metrics.jsonl") == 2

    # SIGTERM: the checkpoint is of the last step that was logged.
    process = start(*words, f"--out={out}", "--resume_every=100", "--save_every=1")
    while lines(out / "metrics.jsonl") < 3 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    steps = lines(out / "metrics.jsonl")
    assert (out / f"checkpoint_{steps}").exists() and steps < 5
    kill_at(5)
    kill_at(6)

    run(*words, f"--out={out}")
    one = weights(undisturbed)
    two = weights(out)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    same_metrics(undisturbed, out, 0.0)
    assert rows_of(undisturbed / "samples.jsonl") == rows_of(out / "samples.jsonl")
    assert "is finished" in run(*words, f"--out={out}").stdout


def test_micro_batches_change_nothing(words, undisturbed, tmp_path):
    run(*words, f"--out={tmp_path}/out", "--micro_batch=3", "--score_micro_batch=16")
    same_metrics(undisturbed, tmp_path / "out", 5e-4)


def test_the_adaptive_kl_coefficient_follows_the_kl(undisturbed):
    rows = rows_of(undisturbed / "metrics.jsonl")
    for row, following in zip(rows, rows[1:]):
        error = max(-0.2, min(0.2, row["kl"] / 0.1 - 1))
        assert row["next_kl_coef"] == following["kl_coef"]
        assert row["next_kl_coef"] == pytest.approx(row["kl_coef"] * (1 + 0.1 * error), rel=1e-9)


def test_two_machines_and_then_one_rank_give_the_same_run(words, undisturbed, tmp_path):
    """HSDP: sharded inside a machine, replicated across. One rank gets SIGTERM between scoring and
    update; all ranks write a checkpoint, and one rank continues from it"""
    out = tmp_path / "out"
    script = broken(tmp_path / "told.py", TOLD_AFTER_SCORING_STEP_2)
    nodes = two_nodes(2, script, ROOT / words[0], *words[1:], f"--out={out}", python=python())
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1], said
    assert "SIGTERM: stopped after 2 steps" in said[0], said

    run(*words, f"--out={out}", "--steps=4")
    first_lines = (undisturbed / "metrics.jsonl").read_text().splitlines(True)[:4]
    (tmp_path / "first").mkdir()
    (tmp_path / "first/metrics.jsonl").write_text("".join(first_lines))
    same_metrics(tmp_path / "first", out, 1e-3)


def test_a_rank_that_fails_ends_the_job_with_its_own_error(words, tmp_path):
    """On both machines, within a minute"""
    failed = tmp_path / "failed"
    script = broken(tmp_path / "fail.py", RANK_1_FAILS.format(path=str(failed)))
    nodes = two_nodes(1, script, ROOT / words[0], *words[1:], f"--out={tmp_path}/out")
    while not failed.exists() and all(node.poll() is None for node in nodes):
        time.sleep(0.1)
    said = [node.communicate(timeout=60)[0] for node in nodes]
    assert failed.exists() and all(node.returncode for node in nodes), said
    assert "the card of rank 1 fell off the bus" in said[1], said
