"""A file's place says what it may touch, and a copy of a stage is the same run. pytest
tests/test_house.py"""

import ast
import json
import math
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import PPO, RM, ROOT, SFT, SMALL, python
from test_stages import same_metrics

import common
from plumbing import files, record
from plumbing.command_line import load_config


# ---------------------------------------------------------------- where a file may look


def imports_of(path):
    """The project's modules that a file imports, anywhere in it"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[0] for name in found}


STAGES = {"sft", "edit", "diff", "reward_model", "ppo", "evaluate"}


def test_imports_go_in_one_direction():
    for path in ROOT.glob("plumbing/*.py"):
        assert not imports_of(path) & {"common", "extras", *STAGES}, path
    assert not imports_of(ROOT / "common.py") & {"extras", *STAGES}
    for stage in STAGES:
        assert not imports_of(ROOT / f"{stage}.py") & {"extras", *STAGES}, stage


def copy_of_the_project(folder, *, extras=True):
    """The project's own files in another folder"""
    ignored = shutil.ignore_patterns(
        "out", ".git", "__pycache__", ".venv", "*.jsonl", "tests", *([] if extras else ["extras"])
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def test_everything_but_extras_runs_without_extras(tmp_path, world):
    """prepare, sft, edit, diff, reward_model, ppo, decode, judge, winrate, best, rewards"""
    home = copy_of_the_project(tmp_path / "home", extras=False)

    def stage(*words, code=0):
        done = subprocess.run(
            [python(), *map(str, words)], cwd=home, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == code, (words, done.stdout[-2000:], done.stderr[-2000:])
        return done.stdout + done.stderr

    stage("data/toy/prepare.py", "--out=d", *SMALL)
    stage("sft.py", "--model=d/model", "--data=d/sft.jsonl", "--out=sft", *SFT)
    assert (home / "sft/config.json").exists() and not (home / "sft/README.md").exists()
    edited = stage("edit.py", "--data=d/pref.jsonl", "--editor=rules", "--out=edits.jsonl")
    assert "48 rows:" in edited and "0 failed" in edited
    stage("diff.py", "--data=edits.jsonl", "--tokenizer=sft", "--out=diffs.jsonl")
    stage("reward_model.py", "--model=sft", "--data=diffs.jsonl", "--out=rm", *RM)
    stage(
        "ppo.py", "--policy=sft", "--reward_model=rm", "--data=d/prompts.jsonl", "--out=ppo", *PPO
    )
    stage(
        "evaluate.py",
        "decode",
        "--model=ppo",
        "--data=d/eval.jsonl",
        "--out=outputs.jsonl",
        "--response_len=12",
    )
    stage(
        "evaluate.py",
        "judge",
        "--judge=gold",
        "--outputs=outputs.jsonl",
        "--reference=d/eval.jsonl",
        "--out=ppo/val_annotations.jsonl",
    )
    assert "win_rate" in stage("evaluate.py", "winrate", "ppo/val_annotations.jsonl")
    assert "ppo ppo\n" in stage("evaluate.py", "best", "ppo")
    figures = stage(
        "evaluate.py", "rewards", "--reward_model=rm", "--data=d/pref_heldout.jsonl,edits.jsonl"
    )
    assert "accuracy" in figures and "extras/" in figures and "auroc" not in figures

    for words in (
        ["evaluate.py", "report", "."],
        ["evaluate.py", "ask", "--model=sft", "List four fruits."],
        ["diff.py", "show"],
        ["reward_model.py", "show"],
        ["edit.py", "stats"],
        ["edit.py", "--data=d/pref.jsonl", "--editor=human", "--out=h.jsonl"],
        ["ppo.py", "--plan=true"],
        ["edit.py", "--data=d/pref.jsonl", "--editor=local", "--model=sft", "--out=l.jsonl"],
    ):
        said = stage(*words, code=2)
        assert said.count("\n") == 1 and "needs the folder extras/" in said, said


# ---------------------------------------------------------------- a copy is the same run


def test_a_copy_under_another_name_is_the_same_run(tmp_path, world, ppo_flags):
    home = copy_of_the_project(tmp_path / "home")
    shutil.copy(home / "ppo.py", home / "my_ppo.py")
    (tmp_path / "my.toml").write_text("[ppo]\nsteps = 2\nkl_coef = 0.5\nlr = 2e-3\n")
    words = [*ppo_flags, f"{tmp_path}/my.toml", "--steps=1"]
    for name in ("ppo", "my_ppo"):
        done = subprocess.run(
            [python(), f"{name}.py", *words, f"--out={tmp_path}/{name}"],
            cwd=home,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("ppo", "my_ppo")
    )
    assert (
        one["config"] | {"out": ""} == two["config"] | {"out": ""}
        and one["config"]["kl_coef"] == 0.5
    )
    assert (
        one["inputs"] == two["inputs"]
        and one["code"] == two["code"]
        and set(one["code"]) == {"ppo", "common"}
    )
    same_metrics(tmp_path / "ppo", tmp_path / "my_ppo", 0)

    # A table of the copy's own name says which table it reads.
    (tmp_path / "wrong.toml").write_text("[my_ppo]\nsteps = 2\n")
    done = subprocess.run(
        [python(), "my_ppo.py", f"{tmp_path}/wrong.toml"], cwd=home, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and "my_ppo.py reads [ppo]" in done.stderr
        and done.stderr.count("\n") == 1
    )

    # The copy continues the original's run; once its code differs, it does not.
    again = [python(), "my_ppo.py", *words, f"--out={tmp_path}/ppo"]
    done = subprocess.run(again, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0 and "is finished" in done.stdout
    text = (home / "my_ppo.py").read_text()
    assert "-advantages * ratio" in text
    (home / "my_ppo.py").write_text(text.replace("-advantages * ratio", "advantages * ratio"))
    done = subprocess.run(again, cwd=home, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "my_ppo.py changed" in done.stderr
        and "--allow_changed_code=true" in done.stderr
    )
    done = subprocess.run(
        [*again, "--allow_changed_code"], cwd=home, capture_output=True, text=True
    )
    assert done.returncode == 0 and "is finished" in done.stdout


@dataclass(frozen=True)
class Run:
    out: str
    overwrite: bool = False
    allow_changed_code: bool = False


@pytest.fixture
def code(monkeypatch):
    """The hashes of a run's code, to be changed by a test"""
    now = {"ppo": "a", "common": "b"}
    monkeypatch.setattr(record, "code_hashes", lambda cfg, stage: dict(now))
    return now


def begin(out, **options):
    """record.begin in a process of its own, as far as locks are concerned"""
    while record.LOCKS:
        record.LOCKS.pop().close()
    fields = {
        name: options.pop(name) for name in ("overwrite", "allow_changed_code") if name in options
    }
    return record.begin(Run(str(out), **fields), "ppo", **options)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("changed", ["ppo", "common"])
def test_changed_code(tmp_path, code, capsys, changed, finished):
    """The stage's file: refused, finished or not. common.py: refused while unfinished, else a
    warning. Where the result
    was paid for: a warning."""
    out = tmp_path / "run"
    assert begin(out) is False
    (out / "metrics.jsonl").write_text("{}\n")
    if finished:
        record.finish(Run(str(out)))
    assert begin(out) is finished

    code[changed] = "c"
    name = "test_house.py" if changed == "ppo" else "common.py"
    if changed == "common" and finished:
        assert begin(out) is True
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and said.startswith(f"warning: {name} changed")
    else:
        with pytest.raises(SystemExit) as end:
            begin(out)
        said = capsys.readouterr().err
        assert (
            end.value.code == 2
            and f"{name} changed" in said
            and "--allow_changed_code=true" in said
        )

    assert begin(out, paid=True) is finished
    said = capsys.readouterr().out
    assert f"warning: {name} changed" in said and "overwrite" not in said
    code[changed] = "d"
    assert begin(out, allow_changed_code=True) is finished and (out / "metrics.jsonl").exists()
    assert begin(out, overwrite=True) is False and not (out / "metrics.jsonl").exists()


def test_an_old_record_passes(tmp_path, code):
    """A record from before code was hashed"""
    assert begin(tmp_path / "run") is False
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    old = record.record_of(tmp_path / "run")
    del old["code"]
    (tmp_path / "run/run.json").write_text(json.dumps(old))
    code["ppo"] = "c"
    assert begin(tmp_path / "run") is False


def test_what_a_hash_of_code_sees(tmp_path):
    """The syntax tree without docstrings: not comments, not layout"""
    path = tmp_path / "a.py"
    path.write_text('"""Doc."""\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    first = record.code_hash(path)
    path.write_text('def f(x):  # a comment\n\n    return (x +\n            1)\n')
    assert record.code_hash(path) == first
    path.write_text("def f(x):\n    return x - 1\n")
    assert record.code_hash(path) != first


# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Config:
    data: list[str] = field(default_factory=list)
    out: str = "out/x"
    lr: float = 1.0
    kl_coef: float = 0.1
    limit: int | None = None
    dry_run: bool = False
    overwrite: bool = False
    prompt: str = ""


def test_ways_to_write_a_flag():
    assert load_config(Config, "ppo", ["--lr", "3", "--kl-coef", "-2"]) == Config(
        lr=3.0, kl_coef=-2.0
    )
    assert load_config(Config, "ppo", ["--dry-run", "a.jsonl"]) == Config(
        data=["a.jsonl"], dry_run=True
    )
    assert load_config(Config, "ppo", ["--dry_run", "false", "--overwrite"]) == Config(
        overwrite=True
    )
    assert (
        load_config(Config, "ppo", ["--dry_run", "1"]).dry_run
        and not load_config(Config, "ppo", ["--dry-run=0"]).dry_run
    )
    assert load_config(Config, "ppo", ["--limit", "None", "--prompt=a=b"]) == Config(prompt="a=b")


def test_a_path_may_hold_a_comma_and_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a,b.jsonl").write_text("")
    assert load_config(Config, "ppo", ["a,b.jsonl"]).data == ["a,b.jsonl"]
    assert load_config(Config, "ppo", ["--data=a,b.jsonl"]).data == ["a,b.jsonl"]
    assert load_config(Config, "ppo", ["--data=a,b"]).data == ["a", "b"]
    assert load_config(Config, "ppo", ["a", "b"]).data == ["a", "b"], (
        "two positional arguments are two items"
    )
    assert load_config(Config, "ppo", ["--out=~/x", "--data=~/y,~/z", "--prompt=~/x"]) == Config(
        out=f"{tmp_path}/x", data=[f"{tmp_path}/y", f"{tmp_path}/z"], prompt="~/x"
    )
    Path("p.toml").write_text('[ppo]\ndata = ["a,b.jsonl", "~/c"]\nout = "~/x"\n')
    assert load_config(Config, "ppo", ["p.toml"]) == Config(
        data=["a,b.jsonl", f"{tmp_path}/c"], out=f"{tmp_path}/x"
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lr"], "--lr needs a value: write --lr=value"),
        (["--lr", "--overwrite"], "--lr needs a value"),
        (["-lr=3"], "unknown option '-lr=3'; an option is written --name=value"),
        (["--kl-ceof=1"], "unknown option 'kl-ceof'. Did you mean 'kl_coef'?"),
        (["--dry-run=maybe"], "dry_run must be bool"),
    ],
)
def test_wrong_flags(capsys, words, said):
    with pytest.raises(SystemExit) as end:
        load_config(Config, "ppo", words)
    assert end.value.code == 2 and said in capsys.readouterr().err


# ---------------------------------------- the last token, wherever a response begins


def test_the_last_token_wherever_the_response_begins():
    r = torch.tensor([[1.0, 2, 3, 4]] * 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert common.sequence_rewards(r, mask).tolist() == [2, 3, 4, 0]
    assert common.mean_rewards(r, mask).tolist() == [1.5, 2.5, 4, 0]
    import ppo

    shaped = ppo.shape_rewards(
        torch.tensor([5.0, 6, 7, 8]),
        torch.zeros(4, 4),
        torch.zeros(4, 4),
        mask,
        level="sequence",
        kl_coef=0.0,
    )
    assert shaped.tolist() == [[0, 5, 0, 0], [0, 0, 6, 0], [0, 0, 0, 7], [0, 0, 0, 0]]


# ---------------------------------------------------------------- every number has a range

def checked_fields(path):
    """The keywords of all check_numbers(...) calls in a file"""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_numbers":
            found |= {keyword.arg for keyword in node.keywords}
    return found


def configs_of(path):
    """Config class -> the names of its int and float fields"""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            numbers = set()
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign):
                    kinds = {node.id for node in ast.walk(statement.annotation)
                             if isinstance(node, ast.Name)}
                    if kinds & {"int", "float"}:
                        numbers.add(statement.target.id)
            found[node.name] = numbers
    return found


@pytest.mark.parametrize("name", [
    "sft.py", "edit.py", "diff.py", "reward_model.py", "ppo.py", "evaluate.py",
    "data/toy/prepare.py", "data/alpacafarm/prepare.py", "data/paradetox/prepare.py",
    "data/qa_feedback/prepare.py", "extras/report/show_diffs.py", "extras/report/show_rewards.py",
    "extras/editors/stats.py", "extras/study/baselines.py", "extras/study/bag_of_tokens.py"])
def test_every_number_has_a_range(name):
    """A field that check_numbers does not name would accept nan, inf and what cannot be meant"""
    checked = checked_fields(ROOT / name)
    for config, numbers in configs_of(ROOT / name).items():
        assert numbers <= checked, (name, config, numbers - checked)


@dataclass(frozen=True)
class Numbers:
    lr: float = 1.0
    steps: int | None = None
    max_grad_norm: float | None = 1.0


@pytest.mark.parametrize("fields, said", [
    (dict(lr=math.nan), "--lr must be at least 0 and finite, got nan"),
    (dict(lr=math.inf), "--lr must be at least 0 and finite, got inf"),
    (dict(lr=-1e-9), "--lr must be at least 0"), (dict(steps=0), "--steps must be at least 1"),
    (dict(max_grad_norm=0.0), "--max_grad_norm must be above 0 and finite, got 0.0"),
    (dict(max_grad_norm=-1.0), "--max_grad_norm must be above 0")])
def test_ranges(capsys, fields, said):
    ranges = dict(lr=files.AT_LEAST_0, steps=files.COUNT, max_grad_norm=files.ABOVE_0)
    files.check_numbers(Numbers(), **ranges)
    files.check_numbers(Numbers(lr=0.0, steps=1, max_grad_norm=None), **ranges)
    with pytest.raises(SystemExit) as end:
        files.check_numbers(Numbers(**fields), **ranges)
    assert end.value.code == 2 and said in capsys.readouterr().err
