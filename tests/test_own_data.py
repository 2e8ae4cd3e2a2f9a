"""docs/data.md: its rows and its commands work as pasted, in their order, on rows that nobody made
for the toy world, with a stand-in for Claude. pytest tests/test_own_data.py"""
import json, os, re, shutil, subprocess

import pytest

from conftest import PPO, RM, ROOT, python, rows_of
from plumbing.files import write_jsonl
from test_docs import commands_of
from test_house import copy_of_the_project
from test_paper import Claude

PAGE = ROOT / "docs/data.md"

# What a command begins with -> why it is not run here.
NOT_HERE = {"python data/": "test_convert.py, or a download", "MODEL=": "hours"}

# What is put after a command, so that it takes seconds. The last flag wins.
FEW = {"sft.py": ["--batch=8", "--micro_batch=4"], "reward_model.py config": [*RM, "--batch=4"],
       "ppo.py": PPO, "evaluate.py decode": ["--response_len=12", "--batch=8"],
       "evaluate.py ask": ["--response_len=12"]}


def rows_of_the_page():
    """The first row that the page shows of each file"""
    text = PAGE.read_text(encoding="utf-8")
    found = {}
    for name in ("sft", "pref", "prompts", "eval"):
        following = text.split(f"\n{name}.jsonl", 1)[1]
        found[name] = json.loads(re.search(r"(?m)^    (\{.*\})$", following).group(1))
    return found


@pytest.fixture(scope="module")
def said(world, tmp_path_factory):
    """The folder in which all of the page's commands ran, and what each one printed"""
    home = copy_of_the_project(tmp_path_factory.mktemp("own") / "home")
    rows = rows_of_the_page()
    for name, row in rows.items():
        others = []
        for i in range(24):
            other = row | {"instruction": f"{row['instruction']} ({i})"}
            if name == "pref":
                other["output_2"] = "It is a wrong one."  # a word that the stand-in corrects
            others.append(other)
        write_jsonl(home / f"{name}.jsonl", [row, *others])
    shutil.copy(home / "eval.jsonl", home / "data/alpacafarm/eval.jsonl")
    (home / "bin").mkdir()
    (home / "bin/python").symlink_to(python())
    (home / "out/ppo_rlhf").mkdir(parents=True)

    printed = {}
    with Claude() as claude:
        environment = os.environ | dict(
            ANTHROPIC_BASE_URL=claude.url, ANTHROPIC_API_KEY="a-key", HF_HUB_OFFLINE="1",
            PATH=f"{home}/bin:{os.environ['PATH']}")
        for command in commands_of(PAGE):
            if command.startswith(tuple(NOT_HERE)):
                continue
            # What the page takes from elsewhere
            if "held_out_edits.jsonl" in command:
                shutil.copy(home / "out/edits.jsonl", home / "held_out_edits.jsonl")
            if "ppo_rlhf" in command:
                shutil.copy(home / "out/ppo/annotations.jsonl", home / "out/ppo_rlhf")
            words = command.replace("=MODEL", f"={world}/data/model").split()
            few = [flags for begin, flags in FEW.items() if " ".join(words[1:]).startswith(begin)]
            command = " ".join([*words, *sum(few, [])])
            done = subprocess.run(command, shell=True, cwd=home, capture_output=True, text=True,
                                  timeout=600, env=environment)
            assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
            printed[" ".join(words)] = done.stdout
    return home, printed


def test_all_commands_ran(said):
    home, printed = said
    ran = {words.split(" ")[1] for words in printed}
    assert ran == {"sft.py", "edit.py", "diff.py", "reward_model.py", "ppo.py", "evaluate.py"}
    assert len(printed) >= 14
    for path in ("out/ppo/annotations.jsonl", "out/diffs.html", "out/rewards.html"):
        assert (home / path).exists(), path


def test_with_preference_1_the_second_answer_is_edited(said):
    home, _ = said
    row = rows_of_the_page()["pref"]
    assert row["preference"] == 1
    edits = {edit["instruction"]: edit for edit in rows_of(home / "out/edits.jsonl")}
    first = edits[row["instruction"]]
    assert first["original"] == row["output_2"] != row["output_1"]
    other = edits[f"{row['instruction']} (0)"]
    assert (other["original"], other["edited"]) == ("It is a wrong one.", "It is a right one.")


def test_small_toml_is_small(said):
    """The preset that the page names was read: two of its fields that FEW leaves alone"""
    home, _ = said
    assert json.loads((home / "out/ppo/run.json").read_text())["config"]["resume_every"] == 1
    assert json.loads((home / "out/rm/run.json").read_text())["config"]["anchor"] == 0.1
