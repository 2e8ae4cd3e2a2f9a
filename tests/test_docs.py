"""The pages in docs/ and README.md say what the code does. pytest tests/test_docs.py"""
import ast, functools, json, re, shlex, subprocess

import pytest

import ppo
from conftest import PPO, RM, ROOT, python, rows_of, run
from test_house import STAGES, copy_of_the_project

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("extras/**/*.py"),
           *ROOT.glob("data/*/*.py")]
HOLE = "\0"  # where a message fills something in


def links_of(text):
    """The targets of a page's links and pictures, but not those inside of code"""
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors_of(text):
    """The headings of a page as GitHub's anchors"""
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_go_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in links_of(text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    """`docs/x.md`, `data/x/prepare.py`, `extras/x`, ... in code"""
    text = page.read_text(encoding="utf-8")
    folders = "docs|tests|extras|plumbing|config"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*\w)`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


# ---------------------------------------------------------------- messages


def strings_of(path):
    """All string literals of a file, HOLE where an f-string fills something in"""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [getattr(part, "value", "") if isinstance(part, ast.Constant) else HOLE
                     for part in node.values]
            found.append("".join(parts))
    return found


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    """Each "..." of a message may be anything; all other words must follow each other in one string
    of the code"""
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    ours = text.split("\n## Our messages\n")[1].split("\n## ")[0]
    messages = re.findall(r"(?m)^\| `([^`]+)` \|", ours)
    messages += [found for found in re.findall(r"`([^`\n]+ step \.\.\.:?)`", ours)]
    assert len(messages) > 30
    strings = {text for path in SOURCES for text in strings_of(path)}
    for message in messages:
        pattern = ".*".join(re.escape(part) for part in message.split("..."))
        assert any(re.search(pattern, text, re.DOTALL) for text in strings), message


# ---------------------------------------------------------------- rows


def test_the_rows_of_data_md_are_read(tmp_path):
    """Each example row in docs/data.md has the fields that its stage asks for"""
    from plumbing.files import read_jsonl
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    fields = {
        "sft.jsonl": {"instruction": str, "input": str, "output": str},
        "pref.jsonl": {"instruction": str, "input": str, "output_1": str, "output_2": str,
                       "preference": (1, 2)},
        "prompts.jsonl": {"instruction": str, "input": str},
        "eval.jsonl": {"instruction": str, "input": str, "output": str, "generator": str},
    }
    for name, kinds in fields.items():
        row = re.search(rf"(?m)^{re.escape(name)}[^\n]*\n(?:[^\n]+\n)*\n    (\{{.*\}})$", text)
        path = tmp_path / name
        path.write_text(row.group(1) + "\n", encoding="utf-8")
        assert list(read_jsonl(path, kinds)[0]) == list(kinds), name


def test_the_worse_answer_of_data_md_is_edited(tmp_path):
    """The sentence about `preference` is true: the editor gets the other answer"""
    import edit
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert "**`preference` is 1: `output_1` is better. It is 2:\n`output_2` is better.**" in text
    row = json.loads(re.search(r'(?m)^    (\{.*"preference".*\})$', text).group(1))
    path = tmp_path / "pref.jsonl"
    for preference, worse in ((1, row["output_2"]), (2, row["output_1"])):
        path.write_text(json.dumps(row | {"preference": preference}) + "\n", encoding="utf-8")
        (asked,) = edit.read_rows(edit.Config(data=str(path))).values()
        assert asked["original"] == worse


# ---------------------------------------------------------------- metrics


@pytest.fixture(scope="module")
def logged_by(world, tmp_path_factory):
    """stage -> the names of the numbers that it logs"""
    home = tmp_path_factory.mktemp("logged")
    run("reward_model.py", f"--model={world}/sft", f"--data={world}/diffs.jsonl", *RM, "--steps=2",
        f"--eval_data={world}/diffs.jsonl", f"--out={home}/rm")
    run("ppo.py", f"--policy={world}/sft", f"--reward_model={world}/rm",
        f"--data={world}/data/prompts.jsonl", *PPO, f"--out={home}/ppo")
    folders = {"ppo.py": home / "ppo", "reward_model.py": home / "rm", "sft.py": world / "sft"}
    return {stage: {name for row in rows_of(folder / "metrics.jsonl") for name in row}
            for stage, folder in folders.items()}


@pytest.mark.parametrize("stage", ["ppo.py", "reward_model.py", "sft.py"])
def test_metrics_md_has_a_row_for_each_number(stage, logged_by):
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {stage}\n")[1].split("\n## ")[0]
    cells = re.findall(r"(?m)^\| (`[^|]*) \|", section.replace("\\|", ""))
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    fifths = {f"explained_variance_{k}" for k in range(1, 6)}
    assert named == logged_by[stage] - {"step"} - fifths


def test_metrics_md_has_the_thresholds_of_the_alarms():
    """Its numbers are those at which the code's own alarms begin"""
    import torch
    from extras import alarms
    cfg = ppo.Config()
    fine = dict(first_ratio_error=0.0, kl=0.0, approx_kl=0.0, eos_share=1.0, response_length=20.0,
                return_sd=1.0, reward=0.0)
    cases = {"first_ratio_error": (0.9e-4, 1.1e-4), "kl": (59.0, 61.0), "approx_kl": (0.09, 0.11),
             "eos_share": (0.01, 0.0), "return_sd": (1.1e-8, 0.9e-8)}
    for name, (quiet, loud) in cases.items():
        assert not alarms.alarms(cfg, [fine | {name: quiet}], torch.float32), name
        assert len(alarms.alarms(cfg, [fine | {name: loud}], torch.float32)) == 1, name
    for length, count in ((29.0, 0), (31.0, 1)):
        history = [fine] * 9 + [fine | {"response_length": length}]
        assert len(alarms.alarms(cfg, history, torch.float32)) == count


# ---------------------------------------------------------------- README


def test_the_lines_of_the_six_files_are_right_to_10_percent():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"(?m)^\| \[(\w+\.py)\]\(\w+\.py\) \|[^|]*\| (\d+) \|", text))
    assert set(said) == {f"{stage}.py" for stage in STAGES}
    said["common.py"] = re.search(r"`common\.py` \((\d+) lines", text).group(1)
    for name, lines in said.items():
        there = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(lines) - there) <= there / 10, f"{name}: README says {lines}, it has {there}"


def test_the_readme_is_a_first_screen():
    """Short, the paper's link at the beginning, and the set-up that .ci/run takes"""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split("\n")
    assert len(lines) <= 220
    assert "![" in lines[2] and "arxiv.org/abs/2406.02756" in "\n".join(lines[:14])
    assert "    pip install -r requirements.txt && pytest" in lines
    torch = re.search(r"(?m)^torch==\S+", (ROOT / "requirements.txt").read_text()).group()
    assert f"    pip install {torch} --index-url https://download.pytorch.org/whl/cpu" in lines


# ---------------------------------------------------------------- commands


def commands_of(page):
    """The commands in a page's indented blocks, a line that ends in a backslash with the next one,
    without comments"""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    words = r"git|python|pip|bash|torchrun|cp|[A-Z_]+=\S+"
    found = []
    for line in re.findall(rf"(?m)^    ((?:{words}) .+)$", text):
        found.append(" ".join(line.split("  #")[0].split(" # ")[0].split()))
    return found


# The pages with commands. test_changes.py runs docs/changes/, test_lesson.py docs/lesson.md.
WITH_COMMANDS = ["README.md", "docs/by_hand.md", "docs/data.md", "docs/families.md",
                 "docs/machines.md", "docs/memory.md"]

# What a command begins with -> why no test here runs it. Its flags are checked nevertheless.
NOT_RUN = {
    "git clone": "needs the network",
    "python -m venv": "CI makes one (.ci/run)",
    "pip install": "CI does it (.ci/run)",
    "bash demo.sh": "test_demo.py, with small sizes",
    "ANTHROPIC_API_KEY=... bash paper.sh": "test_paper.py, with a stand-in for Claude",
    "MODEL=FOLDER bash extras/study/study.sh": "hours; test_study.py runs its parts",
    "FAMILIES=all pytest": "a test",
    "torchrun": "eight GPUs, or two machines; test_stages.py runs the stages on two ranks",
    "python data/alpacafarm/prepare.py": "a download; test_alpacafarm.py",
    "python data/paradetox/prepare.py": "a download; test_reward_model.py",
    "python data/qa_feedback/prepare.py": "a download; test_reward_model.py",
    "python data/convert/prepare.py": "test_convert.py",
    "python sft.py config/small.toml": "test_own_data.py",
    "python edit.py config/small.toml": "test_own_data.py, with a stand-in for Claude",
    "python edit.py data/alpacafarm": "needs a key; test_paper.py, with a stand-in",
    "python diff.py": "test_own_data.py",
    "python reward_model.py": "test_own_data.py",
    "python ppo.py": "test_own_data.py",
    "python edit.py stats": "test_own_data.py",
    "python evaluate.py": "test_own_data.py; of docs/by_hand.md, test_paper.py",
    "WORLD_SIZE=8 python ppo.py --plan": "test_plan.py",
}


def on_the_demo():
    """README's commands on what the demo left"""
    return [line for line in commands_of(ROOT / "README.md")
            if line.startswith("python") and "out/demo" in line]


def test_each_command_is_run_or_is_on_the_list():
    listed = set()
    for name in WITH_COMMANDS:
        for command in commands_of(ROOT / name):
            known = [begin for begin in NOT_RUN if command.startswith(begin)]
            listed.update(known)
            assert known or command in on_the_demo(), f"{name}: {command}"
    assert listed == set(NOT_RUN), set(NOT_RUN) - listed
    for page in (ROOT / "docs").glob("*.md"):
        if page.name != "lesson.md" and f"docs/{page.name}" not in WITH_COMMANDS:
            assert not commands_of(page), page


@functools.cache
def manual(*words):
    return run(*words, "--help").stdout


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_each_flag_is_in_the_stages_manual(name):
    for command in commands_of(ROOT / name):
        words = shlex.split(command)
        scripts = [word for word in words if word.endswith(".py")]
        if not scripts:
            continue
        script = scripts[0]
        following = words[words.index(script) + 1:]
        word = [following[0]] if following and re.fullmatch("[a-z]+", following[0]) else []
        known = manual(script, *word)
        for flag in re.findall(r"--(\w+)", " ".join(following)):
            assert re.search(rf"(?m)^ *{flag}: ", known), f"{name}: {command}: --{flag}"


@pytest.fixture(scope="module")
def demo(world, tmp_path_factory):
    """A copy of the project in which out/demo is the small world"""
    home = copy_of_the_project(tmp_path_factory.mktemp("demo") / "home")
    left = home / "out/demo"
    left.mkdir(parents=True)
    for name in ("data", "sft", "edits.jsonl"):
        (left / name).symlink_to(world / name)
    (left / "rm_token").symlink_to(world / "rm")
    (left / "ppo_gamma0").symlink_to(world / "sft")
    (left / "edits_heldout.jsonl").symlink_to(world / "edits.jsonl")
    run("evaluate.py", "decode", f"--model={world}/sft", f"--data={world}/data/eval.jsonl",
        f"--out={left}/outputs.jsonl", "--response_len=12", "--batch=8")
    for arm in ("ppo_token", "ppo_fine"):
        run("evaluate.py", "judge", "--judge=gold", f"--outputs={left}/outputs.jsonl",
            f"--reference={world}/data/eval.jsonl", f"--out={left}/{arm}/annotations.jsonl")
    return home


def test_the_commands_of_now_look_work_as_pasted(demo):
    commands = on_the_demo()
    assert len(commands) >= 5
    rows = rows_of(demo / "out/demo/edits.jsonl")
    edited = next(i for i, row in enumerate(rows, 1) if row["edited"] != row["original"])
    for command in commands:
        command = re.sub(r"--row=\d+", f"--row={edited}", command)  # the small world has 48 rows
        done = subprocess.run([python(), *shlex.split(command)[1:]], cwd=demo, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == 0, (command, done.stderr[-2000:])
        assert done.stdout.strip(), command
