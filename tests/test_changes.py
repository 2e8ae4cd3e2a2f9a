"""docs/changes/: each patch applies to a copy of its stage, the commands of its page run, and the
change does what the page says. pytest tests/test_changes.py

If a stage has changed so that a patch does not apply any more, edit a copy by hand, then
    diff -U1 --label a/my_ppo.py --label b/my_ppo.py ppo.py my_ppo.py > docs/changes/NAME.patch
(and look whether the page's text and figures still hold)."""
import importlib.util, json, re, shutil, subprocess

import pytest
import torch

import ppo
from conftest import PPO, RM, ROOT, python, rows_of
from data.toy.prepare import read_prompt
from test_house import copy_of_the_project
from test_stages import same_metrics

PAGES = ROOT / "docs/changes"
NAMES = ["length_penalty", "group_mean", "own_editor", "rule_reward"]

# Flags that make the pages' commands take seconds; the last flag wins.
FEW_STEPS = {"my_ppo.py": PPO, "my_edit.py": [], "diff.py": [],
             "reward_model.py": [*RM, "--steps=4"],
             "evaluate.py decode": ["--response_len=12", "--batch=8"], "evaluate.py judge": [],
             "evaluate.py winrate": [], "evaluate.py rewards": ["--resamples=2"],
             "evaluate.py ask": ["--response_len=12"]}


def commands_of(page):
    """The lines of a page's indented blocks, a line that ends in a backslash with the next one"""
    text = (PAGES / page).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"(?m)^    (?=cp |git |python )(.+)$", text)
    return [line.split("  #")[0].strip() for line in lines]


@pytest.fixture(scope="module")
def home(world, tmp_path_factory):
    """A copy of the project in which out/demo is the small world"""
    home = copy_of_the_project(tmp_path_factory.mktemp("changes") / "home")
    demo = home / "out/demo"
    demo.mkdir(parents=True)
    for name in ("data", "sft", "edits.jsonl", "diffs.jsonl"):
        (demo / name).symlink_to(world / name)
    (demo / "rm_token").symlink_to(world / "rm")
    shutil.copy(world / "edits.jsonl", demo / "edits_heldout.jsonl")
    return home


def shell(home, command):
    """A page's command in the copy -> what it prints"""
    words = command.split()
    key = " ".join(words[1:3]) if words[1] == "evaluate.py" else words[1]
    if words[0] == "python":
        command = " ".join([python(), *words[1:], *FEW_STEPS[key]])
        command = command.replace("[", "'[").replace("]", "]'")
    done = subprocess.run(command, shell=True, cwd=home, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def patched(home, name):
    """The module that a patch makes of a copied stage, imported"""
    path = home / f"my_{'edit' if name == 'own_editor' else 'ppo'}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_copy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ran(home):
    """name -> the folder and the patched module after the commands of its page"""
    done = {}

    def run_page(name):
        if name not in done:
            said = [shell(home, command) for command in commands_of(f"{name}.md")]
            done[name] = home, patched(home, name), "".join(said)
        return done[name]
    return run_page


# ---------------------------------------------------------------- patches

def test_each_patch_has_a_page_and_each_page_a_patch():
    assert sorted(path.stem for path in PAGES.glob("*.patch")) == sorted(NAMES)
    for name in NAMES:
        commands = commands_of(f"{name}.md")
        assert re.fullmatch(r"cp (ppo|edit)\.py my_\1\.py", commands[0]), commands[0]
        assert commands[1] == f"git apply docs/changes/{name}.patch"
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        for heading in ("## What it changes", "## Run it", "## What to expect", "## What came out"):
            assert heading in text, (name, heading)
        assert name in (PAGES / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_each_patch_is_about_ten_lines(name):
    lines = (PAGES / f"{name}.patch").read_text().splitlines()
    added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
    assert len([line for line in added if line != "+"]) <= 12
    assert all(len(line) <= 101 for line in added)


@pytest.mark.parametrize("name", NAMES)
def test_patch_applies_it_too(tmp_path, name):
    """`patch my_ppo.py x.patch` does what `git apply x.patch` does, and nothing is fuzzy"""
    if not shutil.which("patch"):
        pytest.skip("patch is not installed")
    stage = "edit" if name == "own_editor" else "ppo"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(ROOT / f"{stage}.py", tmp_path / folder / f"my_{stage}.py")
    patch = PAGES / f"{name}.patch"
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path / "a", check=True)
    done = subprocess.run(["patch", f"my_{stage}.py", str(patch)], cwd=tmp_path / "b",
                          capture_output=True, text=True, check=True)
    assert "fuzz" not in done.stdout, done.stdout
    one, two = ((tmp_path / folder / f"my_{stage}.py").read_text() for folder in ("a", "b"))
    assert one == two != (ROOT / f"{stage}.py").read_text()


# ---------------------------------------------------------------- each change does what it says

def test_length_penalty(ran, world):
    home, module, _ = ran("length_penalty")
    run_json = json.loads((home / "out/changes/length_penalty/run.json").read_text())
    assert run_json["config"]["length_penalty"] > 0

    # By hand: responses of 3 and 1 tokens; each real token pays 0.5, padding nothing.
    rewards = torch.tensor([[1.0, 2, 3], [4, 9, 9]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    zero = torch.zeros(2, 3)
    options = dict(level="token", kl_coef=0.1)
    shaped = module.shape_rewards(rewards, zero, zero, mask, length_penalty=0.5, **options)
    assert shaped.tolist() == [[0.5, 1.5, 2.5], [3.5, 0, 0]]
    assert torch.equal(module.shape_rewards(rewards, zero, zero, mask, **options),
                       ppo.shape_rewards(rewards, zero, zero, mask, **options))

    # At gamma 1 the first token of the longer answer pays for all of its tokens. At gamma 0 each
    # token pays alone, so a whitened batch does not feel it.
    values = torch.zeros(2, 3)
    base, _ = ppo.gae(rewards * mask, values, mask, gamma=1, lam=1)
    paid, _ = ppo.gae(shaped, values, mask, gamma=1, lam=1)
    assert (base - paid).tolist() == [[1.5, 1.0, 0.5], [0.5, 0, 0]]
    base, _ = ppo.gae(rewards * mask, values, mask, gamma=0, lam=1)
    paid, _ = ppo.gae(shaped, values, mask, gamma=0, lam=1)
    torch.testing.assert_close(ppo.whiten(base, mask), ppo.whiten(paid, mask))


def test_without_a_penalty_the_copy_is_the_same_run(home, world, ppo_flags):
    """The patch changes nothing else: at --length_penalty=0 all metrics are those of ppo.py"""
    shutil.copy(home / "ppo.py", home / "my_ppo.py")
    shell(home, "git apply docs/changes/length_penalty.patch")
    for name, more in [("ppo", ""), ("my_ppo", "--length_penalty=0")]:
        shell(home, f"{python()} {name}.py {' '.join(ppo_flags)} {more} --out=out/same_{name}")
    same_metrics(home / "out/same_ppo", home / "out/same_my_ppo", 0)


def test_group_mean(ran):
    home, module, _ = ran("group_mean")
    rewards = torch.tensor([[1.0, 2, 0], [5, 0, 0], [0, 0, 1], [1, 1, 1]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]).bool()
    advantages = module.group_advantages(rewards, mask, 2)  # sums 3, 5 and 1, 3: means 4 and 2
    assert advantages.tolist() == [[-1, -1, 0], [1, 0, 0], [-1, -1, -1], [1, 1, 1]]

    # A prompt has `group` different responses, and V stays 0.
    out = home / "out/changes/group_mean"
    group = json.loads((out / "run.json").read_text())["config"]["group"]
    samples = rows_of(out / "samples.jsonl")[:3]
    assert group >= 3 and len({sample["instruction"] for sample in samples}) == 1
    assert len({sample["output"] for sample in samples}) > 1
    assert all(row["value_loss"] == 0 for row in rows_of(out / "metrics.jsonl"))


def test_own_editor(ran):
    home, module, said = ran("own_editor")
    edited = module.my_rule("pear\nWhat a dumb question!\nhammer\nEnjoy!\nEnjoy!")
    assert edited == "pear\nhammer\nEnjoy!"
    assert module.my_rule("pear") == "pear\nEnjoy!" and module.my_rule(edited) == edited
    rows = rows_of(home / "out/changes/edits.jsonl")
    assert len(rows) == 48
    for row in rows:
        assert row["edited"] == module.my_rule(row["original"]) and row["editor"] == "rules"
    assert "wrong item" in said and "rude aside" in said  # the probe's kinds


def test_rule_reward(ran):
    home, module, _ = ran("rule_reward")
    row = dict(instruction="List three fruits for a quiz.")
    rewards = [module.rule(row, answer) for answer in
               ("a\nb\nc\nEnjoy!", "a\nb\nEnjoy!", "a", "a\nb\nc\nd\ne\nf")]
    assert rewards == [0, -1, -3, -2]

    # The logged rewards are the rule's, and no reward model was opened.
    out = home / "out/changes/rule_reward"
    samples = rows_of(out / "samples.jsonl")
    assert samples
    for sample in samples:
        number, _, _ = read_prompt(sample)
        assert sample["reward"] == -abs(sample["output"].count("\n") - number)
    text = (home / "my_ppo.py").read_text()
    assert 'head="saved"' not in text and "reward_level(" not in text
