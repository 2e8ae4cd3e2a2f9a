"""paper.sh, complete, with a tiny model, a data folder of ours and a stand-in for Claude:
OUT=/tmp/x NPROC=1 bash paper.sh tiny.toml

PAPER_TEST_NPROC=2 pytest tests/test_paper.py runs it with torchrun on two ranks."""

import json, os, random, subprocess

from claude_standin import Standin
from plumbing.files import write_jsonl
from conftest import ROOT, rows_of, run
from evaluate import win_rate
from warm_python import warm_python

NPROC = os.environ.get("PAPER_TEST_NPROC", "1")
TINY = """
[prepare]
source = "{home}/farm"
[sft]
model = "{home}/world/model"
epochs = 1
batch = 16
lr = 2e-3
[edit]
retries = 2
[reward_model]
lr = 1e-3
[ppo]
steps = 2
save_every = 1
rollout_batch = 8
rollout_micro_batch = 4
batch = 8
response_len = 8
ppo_epochs = 1
lr = 0.03
[evaluate.decode]
response_len = 8
batch = 4
[evaluate.judge]
prompt = "length_neutral"
[evaluate.rewards]
resamples = 5
"""


class Claude(Standin):
    """Mends three words, and prefers the longer of two answers"""

    def message(self, request):
        prompt = request["messages"][0]["content"]
        if "## Output (a):\n" in prompt:
            first, second = (
                prompt.split("## Output (a):\n")[1]
                .split("\n\n## Which is best")[0]
                .split("\n\n## Output (b):\n")
            )
            verdict = "Output (a)" if len(first) >= len(second) else "Output (b)"
            with self.lock:
                self.asked[prompt] += 1
            request = request | {
                "messages": [
                    {"role": "user", "content": f"\nResponse: {verdict}\n\nPlease make minimal"}
                ]
            }
        status, body = super().message(request)
        for block in body.get("content", [])[1:] if "## Output (a):\n" in prompt else []:
            block["text"] = block["text"].removeprefix("<edited>").removesuffix("</edited>")
        return status, body

    def paid(self):
        """-> how many edits, how many verdicts"""
        verdicts = sum(
            count for prompt, count in self.asked.items() if "## Output (a):\n" in prompt
        )
        return sum(
            count for prompt, count in self.asked.items() if "Please make minimal changes" in prompt
        ), verdicts


def farm(home):
    """AlpacaFarm's files in small"""
    draw = random.Random(0)

    def answer():
        return "\n".join(
            draw.choice(["a bad apple", "teh pear", "plum", "the wrong fig"]) for _ in range(3)
        )

    def rows(name, n, **more):
        return [
            dict(
                instruction=f"Write {name} {i}.",
                input="be brief" if i % 3 == 0 else "",
                output=answer(),
                **more,
            )
            for i in range(n)
        ]

    pairs = [
        dict(
            instruction=f"Write pair {i}.",
            input="",
            output_1=f"{answer()}\nteh end {i}",
            output_2=answer(),
            preference=2,
        )
        for i in range(20)
    ]
    files = {
        "alpaca_instructions/sft": rows("sft", 16),
        "alpaca_instructions/preference": [],
        "alpaca_instructions/unlabeled": rows("prompt", 16),
        "alpaca_instructions/val": rows("val", 8),
        "alpaca_noisy_multi_preference": pairs,
        "alpaca_farm_evaluation": rows("eval", 6, generator="text-davinci-003", dataset="koala"),
    }
    for name, content in files.items():
        (home / "farm" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "farm" / f"{name}.json").write_text(json.dumps(content))


def test_paper_whole(tmp_path):
    """Without an answer nothing is spent; with it all runs; again, and it asks for nothing; the
    best step on val is judged on eval"""
    farm(tmp_path)
    run(
        "data/toy/prepare.py",
        f"--out={tmp_path}/world",
        "--hidden_size=32",
        "--heads=2",
        "--sft_rows=8",
        "--pref_rows=4",
        "--heldout_rows=4",
        "--eval_rows=4",
    )
    (tmp_path / "tiny.toml").write_text(TINY.format(home=tmp_path))
    out = tmp_path / "out"
    with Claude() as claude, warm_python(tmp_path) as python:
        env = os.environ | dict(
            OUT=str(out),
            PYTHON=python,
            PYTHON_EXEC=python,
            NPROC=NPROC,
            HELDOUT="4",
            VAL="3",
            ANTHROPIC_BASE_URL=claude.url,
            ANTHROPIC_API_KEY="a-key",
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS="1",
            KL_TOKEN="0.05",
        )

        def paper(*words, answers=""):
            return subprocess.run(
                ["bash", "paper.sh", f"{tmp_path}/tiny.toml", *words],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=900,
                env=env,
                input=answers,
            )

        for answers in ("", "n\n"):
            done = paper("--seed=7", answers=answers)
            assert (
                done.returncode == 2
                and "16 to claude" in done.stdout
                and "dollars" in done.stdout
                and claude.paid() == (0, 0)
            )
            assert (
                "nothing asked" in done.stderr
                and not (out / "sft").exists()
                and not (out / "edits.jsonl").exists()
            )
        done = paper("--seed=7", answers="y\ny\nn\n")
        assert done.returncode == 2 and not (out / "report.html").exists(), (
            done.stdout[-3000:] + done.stderr[-3000:]
        )
        edits, verdicts = claude.paid()
        assert edits == 20 and 7 * 3 < verdicts <= 7 * 3 * 2, (
            "seven models on three questions, in both orders"
        )
        assert "There are 7 of these" in done.stdout and "There are 4 of these" in done.stdout
        done = paper("--seed=7", "--yes")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for what in (
            "Table 1",
            "Table 2",
            "Table 3",
            "text-davinci-003",
            "claude-sonnet",
            "step 0 |",
        ):
            assert (what in done.stdout) == (what != "step 0 |"), what
        spent, files = (
            claude.paid(),
            [*out.glob("*/*annotations.jsonl"), *out.glob("*/step_1/val_annotations.jsonl")],
        )
        assert len(files) == 11 and spent == (
            20,
            sum(len(row["verdicts"]) for file in files for row in rows_of(file)),
        ), "paid twice"
        assert paper("--seed=7").returncode == 0 and claude.paid() == spent, (
            "and a finished run asks for nothing"
        )
        done = paper("--seed=8", "--yes")
        assert (
            done.returncode == (2 if NPROC == "1" else 1)
            and "seed: 7 then, 8 now" in done.stdout
            and claude.paid() == spent
        )

        for folder, wins in (
            (tmp_path / "run/step_20", 1),
            (tmp_path / "run/step_100", 3),
            (tmp_path / "run", 3),
        ):
            write_jsonl(
                folder / "val_annotations.jsonl",
                [
                    dict(
                        instruction="",
                        output_1="",
                        output_2="",
                        preference=2 if i < wins else None if i == 4 else 1,
                    )
                    for i in range(5)
                ],
            )
        best = subprocess.run(
            [python, "evaluate.py", "best", tmp_path / "run"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout
        assert best == f"run {tmp_path}/run/step_100\n", (
            "the highest win rate; of equals the earliest, by number"
        )

    config = {
        path.parent.name: json.loads(path.read_text())["config"] for path in out.glob("*/run.json")
    }
    assert [
        (
            config[name]["level"],
            config[name]["kl_coef"],
            config[name]["reward_model"].split("/")[-1],
        )
        for name in ("ppo_rlhf", "ppo_fine", "ppo_token")
    ] == [
        ("sequence", 0.0067, "rm_original"),
        ("sequence", 0.0067, "rm_edited"),
        ("token", 0.05, "rm_token"),
    ]
    assert [
        (config[name]["loss"], config[name]["data"].split("/")[-1])
        for name in ("rm_original", "rm_edited", "rm_token")
    ] == [("sequence", "pref.jsonl"), ("sequence", "diffs.jsonl"), ("eq4", "diffs.jsonl")]
    learnt, held_out = (
        {row["instruction"] for row in rows_of(out / name)}
        for name in ("pref.jsonl", "pref_heldout.jsonl")
    )
    assert len(learnt) == 16 and len(held_out) == 4 and not learnt & held_out
    for name in ("ppo_rlhf", "ppo_fine", "ppo_token"):
        rates = [
            win_rate(row["preference"] for row in rows_of(folder / "val_annotations.jsonl"))[
                "win_rate"
            ]
            for folder in (out / name / "step_1", out / name)
        ]
        best = out / name / "step_1" if rates[0] >= rates[1] else out / name
        assert json.loads((out / name / "outputs.jsonl.run.json").read_text())["config"][
            "model"
        ].rstrip("/") == str(best)
        assert len(rows_of(out / name / "annotations.jsonl")) == 6
    assert "step_1" in (out / "report.html").read_text()
