"""How a run ends: its last line, signals, closed pipes, terminals that show little.
pytest tests/test_last_lines.py"""
import json, os, pty, signal, subprocess, sys, time

import pytest

from claude_standin import Standin
from conftest import PPO, RM, ROOT, SFT, python, rows_of, run
from extras import alarms
from plumbing import command_line, paint

ENV = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHON_EXEC": python()}


def sft(world, out, *flags):
    return ["sft.py", f"--model={world}/data/model", f"--data={world}/data/sft.jsonl",
            f"--out={out}", *SFT, *flags]


def reward_model(world, out, *flags):
    return ["reward_model.py", f"--model={world}/sft", f"--data={world}/diffs.jsonl",
            f"--out={out}", *RM, *flags]


def ppo(world, out, *flags):
    return ["ppo.py", f"--policy={world}/sft", f"--reward_model={world}/rm",
            f"--data={world}/data/prompts.jsonl", f"--out={out}", *PPO, *flags]


# Each training with more steps than it will take.
LONG = {sft: "--epochs=2000", reward_model: "--steps=2000", ppo: "--steps=2000"}


def start(words, ranks=0):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [python(), *(torchrun if ranks else []), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, text=True, env=ENV, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for_step(out, step):
    metrics = out / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and len(metrics.read_text().splitlines()) > step:
            return
        time.sleep(0.1)
    raise AssertionError(f"{metrics} has no step {step}")


# ---------------------------------------------------------------- the last line

def test_each_stage_ends_with_figures_and_the_next_command(world, tmp_path):
    def last_line(*words):
        done = run(*words)
        assert "Warning" not in done.stderr
        return done.stdout.splitlines()[-1]

    out = tmp_path / "sft"
    line = last_line(*sft(world, out))
    assert "loss" in line and f"--tokenizer={out}" in line
    out = tmp_path / "rm"
    line = last_line(*reward_model(world, out))
    assert "accuracy" in line and f"ppo.py --policy={world}/sft --reward_model={out}" in line
    out = tmp_path / "ppo"
    line = last_line(*ppo(world, out))
    assert "reward" in line and f"evaluate.py decode --model={out} " in line

    edits = tmp_path / "edits.jsonl"
    line = last_line("edit.py", f"{world}/data/pref.jsonl", "--editor=rules", f"--out={edits}")
    assert f"python diff.py {edits}" in line
    diffs = tmp_path / "diffs.jsonl"
    line = last_line("diff.py", edits, f"--tokenizer={world}/sft", f"--out={diffs}")
    assert "pairs of 48 rows" in line and f"reward_model.py --data={diffs}" in line

    # The commands that decode and judge name can be run as they are.
    questions = f"{world}/data/eval.jsonl"
    line = last_line("evaluate.py", "decode", f"--model={world}/sft", f"--data={questions}",
                     "--response_len=9", f"--out={tmp_path}/val_outputs.jsonl")
    words = line.partition("next: python ")[2].split()
    assert f"--out={tmp_path}/val_annotations.jsonl" in words
    line = last_line(*words, "--judge=gold")
    words = line.partition("next: python ")[2].split()
    assert "win_rate" in run(*words).stdout


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize("stage, number, ranks", [
    (sft, signal.SIGINT, 0), (sft, signal.SIGTERM, 0), (reward_model, signal.SIGINT, 0),
    (reward_model, signal.SIGTERM, 2), (ppo, signal.SIGINT, 0), (ppo, signal.SIGINT, 2)])
def test_a_signal_writes_a_checkpoint_from_which_the_run_continues(world, tmp_path, stage, number,
                                                                   ranks):
    out = tmp_path / "out"
    words = stage(world, out, LONG[stage], "--resume_every=10000")
    process = start(words, ranks)
    wait_for_step(out, 2)
    process.send_signal(number)
    shown, errors = process.communicate(timeout=120)
    steps = len(rows_of(out / "metrics.jsonl"))
    assert f"{number.name}: stopped after {steps} steps" in shown, shown + errors
    assert f"continues with step {steps}" in shown
    assert (out / f"checkpoint_{steps}").is_dir()
    if not ranks:
        assert process.returncode == 128 + number
        assert "Traceback" not in errors

    # The same command continues there; no step is logged twice.
    process = start(words, ranks)
    wait_for_step(out, steps)
    process.send_signal(number)
    errors = process.communicate(timeout=120)[1]
    assert "Warning" not in errors
    logged = [row["step"] for row in rows_of(out / "metrics.jsonl")]
    assert logged == list(range(len(logged))) and len(logged) > steps


def test_a_second_signal_ends_at_once(world, tmp_path):
    out = tmp_path / "out"
    flags = ["--batch=20000", "--epochs=200"]  # a step of minutes
    process = start(sft(world, out, *flags))
    assert "rows fit" in process.stdout.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert "again: stop at once" in errors


# ---------------------------------------------------------------- where it is printed

def test_a_closed_pipe_does_not_end_a_training(world, tmp_path):
    out = tmp_path / "out"
    command = " ".join([python(), *ppo(world, out, "--steps=3")])
    shell = f"set -o pipefail; {command} | head -1"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(rows_of(out / "metrics.jsonl")) == 3
    assert json.loads((out / "run.json").read_text())["finished"]


@pytest.mark.parametrize("words", [
    ["evaluate.py", "winrate", "{0}/a.jsonl"], ["ppo.py", "--help"],
    ["diff.py", "show", "{1}/edits.jsonl", "--tokenizer={1}/sft"]])
def test_a_closed_pipe_ends_quietly_what_only_prints(world, tmp_path, words):
    row = dict(instruction="q", output_1="a", output_2="b", preference=2)
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    command = " ".join([python(), *words]).format(tmp_path, world)
    shell = f"set -o pipefail; {command} | true"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


def test_a_closed_pipe_does_not_end_what_is_paid_for(tmp_path):
    """Both outputs end at once, while Claude is asked: every row is still asked once, and kept"""
    rows = [dict(id=str(k), instruction="q", input="", original=f"teh cat {k}") for k in range(6)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Standin() as claude:
        words = ["edit.py", tmp_path / "in.jsonl", f"--out={tmp_path}/edits.jsonl"]
        command = " ".join(map(str, [sys.executable, *words, "--concurrency=1"]))
        shell = f"set -o pipefail; {command} 2>&1 | true"
        env = ENV | dict(ANTHROPIC_BASE_URL=claude.url, ANTHROPIC_API_KEY="a-key")
        done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=env)
    assert done.returncode == 0
    assert [row["edited"] for row in rows_of(tmp_path / "edits.jsonl")] == [
        f"the cat {k}" for k in range(6)]


@pytest.mark.parametrize("env", [dict(PYTHONIOENCODING="ascii"), dict(LC_ALL="C", PYTHONUTF8="0"),
                                 dict(PYTHONIOENCODING="latin-1")])
def test_a_terminal_that_is_not_utf_8_ends_no_run(world, tmp_path, env):
    row = dict(instruction="Où est 東京?", input="", original="東京", edited="京都 é")
    (tmp_path / "edits.jsonl").write_text(json.dumps(row) + "\n")
    show = ["diff.py", "show", tmp_path / "edits.jsonl", f"--tokenizer={world}/sft"]
    for words in (show, ppo(world, tmp_path / "ppo", "--steps=1")):
        command = [sys.executable, *map(str, words)]  # a python that reads the environment
        done = subprocess.run(command, cwd=ROOT, env=ENV | env, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert b"R = " in done.stdout


def test_a_closed_stdout_ends_no_run(world, tmp_path):
    command = " ".join([sys.executable, *sft(world, tmp_path / "out")])
    done = subprocess.run(["bash", "-c", f"{command} >&-"], cwd=ROOT, env=ENV)
    assert done.returncode == 0
    assert (tmp_path / "out" / "config.json").exists()


def test_no_color_and_newlines_in_a_painted_token(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    painted = paint.paint(["a\n"], [1.0], 1.0)
    before, after = painted.split("\n")
    assert before.startswith("\033[30") and before.endswith("\033[0m")
    assert after.startswith("\033[30") and after.endswith("\033[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in paint.paint(["a"], [1.0], 1.0)


def test_no_color_in_a_terminal(world):
    def in_a_terminal(**env):
        leader, follower = pty.openpty()
        words = ["diff.py", "show", f"{world}/edits.jsonl", f"--tokenizer={world}/sft", "--n=1"]
        subprocess.run([python(), *words], cwd=ROOT, env=ENV | env, stdout=follower, check=True)
        os.close(follower)
        return os.read(leader, 100_000)

    assert b"\033[" in in_a_terminal(NO_COLOR="")
    assert b"\033[" not in in_a_terminal(NO_COLOR="1")


# ---------------------------------------------------------------- messages that say what they mean

@pytest.mark.parametrize("words, says", [
    (["reward_model.py", "shwo", "x"], "Did you mean the word 'show'?"),
    (["edit.py", "stat", "x"], "Did you mean the word 'stats'?"),
    (["diff.py", "--tokenizer=x", "show"], "It comes first"),
    (["ppo.py", "--out="], "--out is empty"), (["evaluate.py", "decode", "--data="], "is empty"),
    (["sft.py", "a.jsonl", "b.jsonl"], "takes one value, got 2: a.jsonl b.jsonl"),
    (["sft.py", "-epochs=2"], "unknown option '-epochs=2'")])
def test_a_mistake_is_one_line_with_the_right_word(words, says):
    done = run(*words, ok=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("part", sorted(ROOT.glob("extras/**/*.py")), ids=lambda path: path.name)
def test_a_part_that_is_run_says_what_to_run(part):
    """A part of a stage is no program. It says so before its imports fail"""
    if "sys.path.insert" in part.read_text() or part.name == "walk.py":
        pytest.skip("a program")
    done = subprocess.run([sys.executable, part], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert f"{part.name} is a part of: python " in done.stderr


@pytest.mark.parametrize("number, says", [(13, "choose another path"), (28, "free some space")])
def test_a_read_only_folder_is_not_a_full_disk(capsys, number, says):
    error = OSError(number, os.strerror(number), "out")
    command_line.one_line(type(error), error, None)
    assert says in capsys.readouterr().err


def test_the_alarm_names_the_kl_that_is_large():
    class Cfg:
        kl_target = None
        rollout_batch = 4
        response_len = 9

    row = dict(first_ratio_error=0.0, kl=0.0, approx_kl=0.9, eos_share=1.0, response_length=5.0,
               return_sd=1.0)
    words = alarms.alarms(Cfg, [row], None)
    assert len(words) == 1
    assert "0.9 nats per token" in words[0]


def test_winrate_rounds_and_json_does_not(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [dict(instruction=str(k), output_1="a", output_2="b", preference=p)
            for k, p in enumerate((1, 2, 2))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "66.67\n" in run("evaluate.py", "winrate", path).stdout
    exact = json.loads(run("evaluate.py", "winrate", path, "--json=true").stdout)
    assert exact["win_rate"] == pytest.approx(200 / 3, abs=1e-12)
