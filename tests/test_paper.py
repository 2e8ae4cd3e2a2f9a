"""paper.sh from beginning to end, with a tiny model, made-up data and a stand-in for Claude:

    OUT=/tmp/x NPROC=1 bash paper.sh tiny.toml

PAPER_TEST_NPROC=2 pytest tests/test_paper.py runs it under torchrun on two ranks."""
import json, os, random, subprocess

from claude_standin import Standin
from conftest import ROOT, rows_of, run
from evaluate import win_rate
from plumbing.files import write_jsonl
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
    """Corrects three words, and prefers the longer of two answers"""

    def message(self, request):
        prompt = request["messages"][0]["content"]
        if "## Output (a):\n" not in prompt:
            return super().message(request)

        # A judge's prompt. The stand-in only edits: let it "edit" the verdict, without its tags.
        outputs = prompt.split("## Output (a):\n")[1].split("\n\n## Which is best")[0]
        first, second = outputs.split("\n\n## Output (b):\n")
        verdict = "Output (a)" if len(first) >= len(second) else "Output (b)"
        with self.lock:
            self.asked[prompt] += 1
        content = f"\nResponse: {verdict}\n\nPlease make minimal"
        request = request | {"messages": [{"role": "user", "content": content}]}
        status, body = super().message(request)
        for block in body.get("content", [])[1:]:
            block["text"] = block["text"].removeprefix("<edited>").removesuffix("</edited>")
        return status, body

    def paid(self):
        """-> how many edits, how many verdicts"""
        edits = 0
        verdicts = 0
        for prompt, count in self.asked.items():
            if "Please make minimal changes" in prompt:
                edits += count
            if "## Output (a):\n" in prompt:
                verdicts += count
        return edits, verdicts


def make_farm(folder):
    """AlpacaFarm's files, with a few rows each"""
    draw = random.Random(0)

    def answer():
        lines = ["a bad apple", "teh pear", "plum", "the wrong fig"]
        return "\n".join(draw.choice(lines) for _ in range(3))

    def rows(name, count, **more):
        made = []
        for i in range(count):
            input = "be brief" if i % 3 == 0 else ""
            row = dict(instruction=f"Write {name} {i}.", input=input, output=answer())
            made.append(row | more)
        return made

    pairs = []
    for i in range(20):
        longer = f"{answer()}\nteh end {i}"
        pairs.append(dict(instruction=f"Write pair {i}.", input="", output_1=longer,
                          output_2=answer(), preference=2))
    files = {
        "alpaca_instructions/sft": rows("sft", 16),
        "alpaca_instructions/preference": [],
        "alpaca_instructions/unlabeled": rows("prompt", 16),
        "alpaca_instructions/val": rows("val", 8),
        "alpaca_noisy_multi_preference": pairs,
        "alpaca_farm_evaluation": rows("eval", 6, generator="text-davinci-003", dataset="koala"),
    }
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def verdicts_in(out):
    """-> how many files of annotations there are, how many verdicts they hold"""
    files = [*out.glob("*/*annotations.jsonl"), *out.glob("*/step_1/val_annotations.jsonl")]
    verdicts = 0
    for file in files:
        verdicts += sum(len(row["verdicts"]) for row in rows_of(file))
    return len(files), verdicts


def write_annotations(folder, wins):
    """Five verdicts: `wins` for the model, the last one unreadable, the others against it"""
    rows = []
    for i in range(5):
        preference = 2 if i < wins else 1
        if i == 4:
            preference = None
        rows.append(dict(instruction="", output_1="", output_2="", preference=preference))
    write_jsonl(folder / "val_annotations.jsonl", rows)


def test_the_paper(tmp_path):
    """Without a yes nothing is spent. With it everything runs. A second time nothing is asked for.
    The best step on val is judged on eval."""
    make_farm(tmp_path / "farm")
    run("data/toy/prepare.py", f"--out={tmp_path}/world", "--hidden_size=32", "--heads=2",
        "--sft_rows=8", "--pref_rows=4", "--heldout_rows=4", "--eval_rows=4")
    (tmp_path / "tiny.toml").write_text(TINY.format(home=tmp_path))
    out = tmp_path / "out"
    with Claude() as claude, warm_python(tmp_path) as python:
        environment = os.environ | dict(
            OUT=str(out), PYTHON=python, PYTHON_EXEC=python, NPROC=NPROC, HELDOUT="4", VAL="3",
            ANTHROPIC_BASE_URL=claude.url, ANTHROPIC_API_KEY="a-key", HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS="1", KL_TOKEN="0.05")

        def paper(*words, answers=""):
            return subprocess.run(["bash", "paper.sh", f"{tmp_path}/tiny.toml", *words], cwd=ROOT,
                                  capture_output=True, text=True, timeout=900, env=environment,
                                  input=answers)

        # No answer, or a no: the price is named, nothing is asked and nothing is trained.
        for answers in ("", "n\n"):
            done = paper("--seed=7", answers=answers)
            assert done.returncode == 2
            assert "16 to claude" in done.stdout and "dollars" in done.stdout
            assert "nothing asked" in done.stderr
            assert claude.paid() == (0, 0)
            assert not (out / "sft").exists() and not (out / "edits.jsonl").exists()

        # Yes to the edits and to the verdicts on val, no to those on eval.
        done = paper("--seed=7", answers="y\ny\nn\n")
        said = done.stdout[-3000:] + done.stderr[-3000:]
        assert done.returncode == 2 and not (out / "report.html").exists(), said
        edits, verdicts = claude.paid()
        assert edits == 20
        assert 7 * 3 < verdicts <= 7 * 3 * 2, "seven models, three questions, in both orders"
        assert "There are 7 of these" in done.stdout and "There are 4 of these" in done.stdout

        # Yes to everything: the run continues to its end.
        done = paper("--seed=7", "--yes")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for what in ("Table 1", "Table 2", "Table 3", "text-davinci-003", "claude-sonnet"):
            assert what in done.stdout, what
        assert "step 0 |" not in done.stdout, "nothing is trained twice"
        spent = claude.paid()
        files, verdicts = verdicts_in(out)
        assert files == 11
        assert spent == (20, verdicts), "nothing is paid twice"

        # A finished run asks for nothing; another seed is refused.
        assert paper("--seed=7").returncode == 0 and claude.paid() == spent
        done = paper("--seed=8", "--yes")
        assert done.returncode == (2 if NPROC == "1" else 1)
        assert "seed: 7 then, 8 now" in done.stdout
        assert claude.paid() == spent

        # The best step: the highest win rate, and of equal ones the earliest, by number.
        write_annotations(tmp_path / "run/step_20", wins=1)
        write_annotations(tmp_path / "run/step_100", wins=3)
        write_annotations(tmp_path / "run", wins=3)
        best = subprocess.run([python, "evaluate.py", "best", tmp_path / "run"], cwd=ROOT,
                              capture_output=True, text=True)
        assert best.stdout == f"run {tmp_path}/run/step_100\n"

    check_configs(out)
    check_split(out)
    for name in ("ppo_rlhf", "ppo_fine", "ppo_token"):
        check_best_step(out / name)
    assert "step_1" in (out / "report.html").read_text()


def check_configs(out):
    """Each arm has the settings of the paper"""
    configs = {}
    for path in out.glob("*/run.json"):
        configs[path.parent.name] = json.loads(path.read_text())["config"]

    arms = {"ppo_rlhf": ("sequence", 0.0067, "rm_original"),
            "ppo_fine": ("sequence", 0.0067, "rm_edited"),
            "ppo_token": ("token", 0.05, "rm_token")}
    for name, (level, kl_coef, reward_model) in arms.items():
        assert configs[name]["level"] == level
        assert configs[name]["kl_coef"] == kl_coef
        assert configs[name]["reward_model"].split("/")[-1] == reward_model

    reward_models = {"rm_original": ("sequence", "pref.jsonl"),
                     "rm_edited": ("sequence", "diffs.jsonl"),
                     "rm_token": ("eq4", "diffs.jsonl")}
    for name, (loss, data) in reward_models.items():
        assert configs[name]["loss"] == loss
        assert [file.split("/")[-1] for file in configs[name]["data"]] == [data]


def check_split(out):
    """The held-out pairs are others than those that are learnt from"""
    learnt = {row["instruction"] for row in rows_of(out / "pref.jsonl")}
    held_out = {row["instruction"] for row in rows_of(out / "pref_heldout.jsonl")}
    assert len(learnt) == 16 and len(held_out) == 4
    assert not learnt & held_out


def check_best_step(folder):
    """The step with the higher win rate on val is the one that is judged on eval"""
    def rate(model):
        rows = rows_of(model / "val_annotations.jsonl")
        return win_rate(row["preference"] for row in rows)["win_rate"]

    best = folder
    if rate(folder / "step_1") >= rate(folder):
        best = folder / "step_1"
    record = json.loads((folder / "outputs.jsonl.run.json").read_text())
    assert record["config"]["model"].rstrip("/") == str(best)
    assert len(rows_of(folder / "annotations.jsonl")) == 6
