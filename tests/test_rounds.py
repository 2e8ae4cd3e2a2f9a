"""More than one round: the policy's own answers are edited, and a reward model learns from several
files of diffs. rounds.sh from beginning to end, with small sizes."""
import json, os, shutil, subprocess

import pytest

import common
from conftest import PPO, RM, ROOT, python, rows_of, run
from reward_model import read_pairs


@pytest.fixture(scope="module")
def answers(world, tmp_path_factory):
    """outputs.jsonl of the SFT model for the first prompts"""
    home = tmp_path_factory.mktemp("answers")
    prompts = (world / "data/prompts.jsonl").read_text().splitlines(keepends=True)[:24]
    (home / "prompts.jsonl").write_text("".join(prompts))
    run("evaluate.py", "decode", f"--model={world}/sft", f"--data={home}/prompts.jsonl",
        "--response_len=12", f"--out={home}/outputs.jsonl")
    return home / "outputs.jsonl"


def test_a_policys_answers_are_edited(answers, tmp_path):
    outputs = rows_of(answers)
    run("edit.py", "--editor=rules", answers, f"--out={tmp_path}/edits.jsonl")
    edits = {}
    for row in rows_of(tmp_path / "edits.jsonl"):
        edits[row["instruction"], row["original"]] = row
    assert set(edits) == {(row["instruction"], row["output"]) for row in outputs}
    for row in outputs:
        edit = edits[row["instruction"], row["output"]]
        assert "output" not in edit and "generator" not in edit
        assert edit.get("cut") == (["original"] if row.get("cut") else None)
    assert sum(row["edited"] != row["original"] for row in edits.values()) > 10


def test_a_reward_model_learns_from_several_files(world, answers, tmp_path):
    run("edit.py", "--editor=rules", answers, f"--out={tmp_path}/edits.jsonl")
    run("diff.py", f"--data={tmp_path}/edits.jsonl", f"--tokenizer={world}/sft",
        f"--out={tmp_path}/diffs.jsonl")
    files = [world / "diffs.jsonl", tmp_path / "diffs.jsonl"]
    tokenizer = common.load_tokenizer(world / "sft")
    count = sum(len(read_pairs(file, "data", tokenizer, 512)[0]) for file in files)

    flags = [f"--model={world}/sft", f"--out={tmp_path}/rm", *RM]
    run("reward_model.py", *files, *flags)
    record = json.loads((tmp_path / "rm/run.json").read_text())
    assert record["pairs"] == count
    assert [str(file) for file in files] == record["config"]["data"]
    assert {str(file) for file in files} < set(record["inputs"])

    # The result is that of one file with both: the pairs are drawn from all of them.
    both = tmp_path / "both.jsonl"
    both.write_text("".join(file.read_text() for file in files))
    shutil.copyfile(f"{files[0]}.run.json", f"{both}.run.json")
    run("reward_model.py", both, f"--model={world}/sft", f"--out={tmp_path}/rm_both", *RM)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("rm", "rm_both")]
    assert weights[0] == weights[1]

    # Each file's tokenizer is compared, and the line names the file.
    record = json.loads(open(f"{files[1]}.run.json").read())
    with open(f"{files[1]}.run.json", "w") as file:
        json.dump(record | {"tokenizer_hash": "another"}, file)
    done = run("reward_model.py", *files, f"--model={world}/sft", f"--out={tmp_path}/no", *RM,
               ok=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{files[1]} was made with another tokenizer" in done.stderr


def rounds(world, home, *words, **env):
    environment = os.environ | {"PYTHON": python(), "RUN": str(world), "OUT": f"{home}/rounds"}
    environment |= {"POLICY": f"{world}/sft", "N": "16", "JUDGE": "gold"} | env
    return subprocess.run(["bash", "rounds.sh", f"{home}/small.toml", *words], cwd=ROOT, text=True,
                          env=environment, capture_output=True, stdin=subprocess.DEVNULL)


def table(name, flags):
    fields = [flag.removeprefix("--").split("=") for flag in flags]
    return f"[{name}]\n" + "".join(f"{field} = {value}\n" for field, value in fields)


def test_two_rounds_and_a_second_time_nothing(world, tmp_path):
    small = table("reward_model", RM) + table("ppo", PPO)
    small += "[evaluate.decode]\nresponse_len = 12\n[evaluate.rewards]\nresamples = 2\n"
    (tmp_path / "small.toml").write_text(small)
    first = rounds(world, tmp_path, ROUNDS="2")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    out = tmp_path / "rounds"

    # Round 2 edits the answers of round 1's policy, and learns from three files.
    assert record(out / "round_2/answers.jsonl.run.json")["config"]["model"].endswith("round_1/ppo")
    data = record(out / "round_2/rm/run.json")["config"]["data"]
    assert data == [f"{world}/diffs.jsonl", f"{out}/round_1/diffs.jsonl",
                    f"{out}/round_2/diffs.jsonl"]
    assert record(out / "round_2/ppo/run.json")["config"]["policy"] == f"{world}/sft"
    assert (out / "round_2/ppo/annotations.jsonl").exists()
    kinds = [figures["kind"] for figures in record(out / "round_2/rm/rewards.json")]
    assert kinds == ["preferences", "probe"]

    weights = (out / "round_2/ppo/model.safetensors").stat().st_mtime_ns
    second = rounds(world, tmp_path, ROUNDS="2")
    assert second.returncode == 0 and "step 0 |" not in second.stdout
    assert (out / "round_2/ppo/model.safetensors").stat().st_mtime_ns == weights


def record(path):
    return json.loads(path.read_text())


def test_claude_is_not_asked_before_the_price_was_agreed_to(world, tmp_path):
    (tmp_path / "small.toml").write_text("[evaluate.decode]\nresponse_len = 12\n")
    done = rounds(world, tmp_path, EDITOR="claude", ANTHROPIC_BASE_URL="http://127.0.0.1:9",
                  ANTHROPIC_API_KEY="none")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "$" in done.stdout and "nothing asked" in done.stderr
    assert not (tmp_path / "rounds/round_1/edits.jsonl").exists()
