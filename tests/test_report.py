"""pytest tests/test_report.py: the tables and the page, from made-up run folders whose numbers are
known."""
import html.parser, json, random, re, statistics, sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import rows_of, run
from evaluate import win_rate
from extras import pages
from extras.report import arms, page as report_page, tables as report

# PPO run -> level, reward model, win rate at the end.
ARMS = {"ppo_rlhf": ("sequence", "rm_original", 24.0), "ppo_fine": ("sequence", "rm_edited", 44.0),
        "ppo_token": ("token", "rm_token", 58.0)}

# Reward model -> loss, data, accuracy on preferences.
REWARD_MODELS = {"rm_original": ("sequence", "pref.jsonl", 61),
                 "rm_edited": ("sequence", "out/diffs.jsonl", 71),
                 "rm_token": ("eq4", "out/diffs.jsonl", 83.25)}

EVIL = "</span><script>alert(1)</script>\x1b[31m\u202e & \"quoted\" | {x}"


# ---------------------------------------------------------------- made-up runs

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_rows(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path, value):
    write(path, json.dumps(value))


def run_json(folder, **config):
    record = dict(config=config, command=f"stage.py --out={folder}", commit="abc1234", dirty=False,
                  finished="2026-01-01 00:00:00", device="cpu", world_size=1, torch="2.13.0",
                  transformers="5.0")
    write_json(folder / "run.json", record)


def annotations(percent, n=200, seed=0):
    """Rows of annotations.jsonl, of which about so many percent are won"""
    draw = random.Random(seed)
    rows = []
    for i in range(n):
        rows.append(dict(instruction=f"List {i} fruits.", input="", output_1=f"apple {i}",
                         output_2=f"pear {draw.random()}", generator_1="reference",
                         generator_2="ours", annotator="gold",
                         preference=2 if draw.random() * 100 < percent else 1))
    return rows


def annotations_won(wins, n=200):
    """Rows of annotations.jsonl; the first `wins` are won"""
    rows = annotations(0, n)
    for row in rows[:wins]:
        row["preference"] = 2
    return rows


def rate_of(path):
    """The win rate of a file of annotations, with its error"""
    return win_rate(row["preference"] for row in rows_of(path))


def make_runs(folder, seed=0, steps=25):
    """One seed of the demo's layout: ppo_rlhf's score rises while its win rate falls"""
    draw = random.Random(seed)
    run_json(folder / "sft", model="data/toy/model", data="data/toy/sft.jsonl", lr=2e-3, epochs=1)
    metrics = [dict(step=step, loss=2 - step / 40, seconds=0.1) for step in range(25)]
    write_rows(folder / "sft/metrics.jsonl", metrics)
    write_rows(folder / "sft/annotations.jsonl", annotations(21, seed=seed))
    for name, (loss, data, accuracy) in REWARD_MODELS.items():
        make_reward_model(folder / name, loss, data, accuracy, draw)
    write_json(folder / "bag_of_tokens.json", dict(accuracy=0.663))
    for name in ARMS:
        make_ppo(folder, name, draw, seed, steps)
    return folder


def make_reward_model(folder, loss, data, accuracy, draw):
    run_json(folder, model="out/sft", data=data, loss=loss, lr=1e-3)
    metrics = [dict(step=s, loss=0.7 - s / 900, seconds=0.09) for s in range(0, 500, 50)]
    write_rows(folder / "metrics.jsonl", metrics)

    bins = []
    for i in range(5):
        right = 0.5 + 0.09 * i + draw.random() / 20
        bins.append(dict(confidence=0.55 + 0.1 * i, accuracy=right, n=80))
    of_prefs = dict(data="pref_heldout.jsonl", kind="preferences", n=400,
                    accuracy=accuracy + draw.gauss(0, 1), standard_error=2.1, longer_wins=48.0,
                    margin=0.4, margin_error=0.02, calibration=dict(ece=0.05, bins=bins))
    tokens = dict(removed=dict(auroc=0.91, standard_error=0.01),
                  added=dict(auroc=0.88, standard_error=0.01),
                  unchanged=dict(mean=0.01, sd=0.12, tokens=900), eos=dict(mean=-0.02, n=700))
    of_edits = dict(data="edits_heldout.jsonl", kind="edits", n=380, accuracy=accuracy + 14,
                    standard_error=0.9, longer_wins=44.0, margin=0.9, margin_error=0.02,
                    calibration=dict(ece=0.03, bins=bins), edited_wins=100.0, tokens=tokens)
    write_json(folder / "rewards.json", [of_prefs, of_edits])


def make_ppo(folder, name, draw, seed, steps):
    level, rm, best = ARMS[name]
    run_json(folder / name, policy=str(folder / "sft"), reward_model=str(folder / rm), level=level,
             steps=steps, kl_coef=0.05)
    slope = 1 if level == "token" else 3
    metrics = []
    for step in range(steps):
        reward = slope * (step / 25) + draw.gauss(0, 0.05)
        metrics.append(dict(step=step, reward=reward, kl=0.3 * step + draw.random(),
                            response_length=18 - step / 10 + draw.random(), eos_share=1.0,
                            seconds=1.1))
    write_rows(folder / name / "metrics.jsonl", metrics)

    def win(step):
        if name == "ppo_rlhf":
            return 29 - 0.2 * step if step == 5 else 21 - 0.2 * step
        rise = step / (step + 5) * (steps + 5) / steps
        return 21 + (best - 21) * rise + draw.gauss(0, 1)

    for step in range(5, steps, 5):
        rows = annotations(win(step), seed=seed + step)
        write_rows(folder / name / f"step_{step}/annotations.jsonl", rows)
    write_rows(folder / name / "annotations.jsonl", annotations(win(steps), seed=seed))

    samples = []
    for step in (0, 12, 24):
        for instruction in ("List three fruits.", "List four colours.", EVIL):
            last = EVIL if instruction == EVIL else " ok"
            tokens = ["red", "\n", "apple", "\n", "you fool", "\n", "pear", last, ""]
            r = [draw.gauss(0, 0.1) for _ in tokens]
            r[2] = 0.8
            r[4] = -1.4
            samples.append(dict(step=step, instruction=instruction, input="",
                                output="".join(tokens), tokens=tokens, token_rewards=r,
                                reward=sum(r) / len(r)))
    write_rows(folder / name / "samples.jsonl", samples)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    return [make_runs(home / f"seed_{seed}", seed) for seed in (3, 4, 5)]


# ---------------------------------------------------------------- the tables

def build(folders):
    """-> the runs, and all tables of them"""
    runs = report.read_runs(folders)
    return runs, [report.table_1(runs), report.table_paired(runs, 0),
                  report.table_2(runs, folders), report.table_3(runs), report.table_rewards(runs)]


def cells(tables, title):
    """A table as dict: first cell of a row -> the others; "note" -> its note"""
    _, header, rows, note = next(table for table in tables if table[0].startswith(title))
    assert all(len(row) == len(header) for row in rows)
    found = {row[0]: row[1:] for row in rows}
    found["note"] = note
    return found


def test_tables_of_one_seed(seeds):
    """Each cell is the figure in the files"""
    _, tables = build(seeds[:1])
    one = cells(tables, "Table 1")
    for name, label, paper in (("ppo_token", arms.TOKEN, "51.6 ± 1.8"),
                               ("ppo_fine", arms.FINE, "51.2 ± 1.8"),
                               ("ppo_rlhf", arms.RLHF, "46.5 ± 1.8")):
        figures = rate_of(seeds[0] / name / "annotations.jsonl")
        rate = f"{figures['win_rate']:.1f}"
        error = f"{figures['standard_error']:.1f}"
        assert one[label] == [paper, f"{rate} ± {error}", rate, "25", "200"]
    reference = "the reference: Davinci003; ours: reference"
    assert list(one)[:5] == [arms.TOKEN, arms.FINE, reference, arms.RLHF, "SFT"]

    two = cells(tables, "Table 2")
    accuracy = {}
    for name in REWARD_MODELS:
        of_prefs, _ = json.loads((seeds[0] / name / "rewards.json").read_text())
        accuracy[name] = f"{of_prefs['accuracy']:.1f} ± 2.1"
    assert two[arms.RM_RLHF][:3] == ["58.2 ± 1.8", accuracy["rm_original"], "75.0 ± 0.9"]
    assert two[arms.RM_FINE][:2] == ["85.2 ± 1.8", accuracy["rm_edited"]]
    assert two["a bag of tokens, without the prompt"][1] == "66.3"
    assert two["always the edited one"][2] == "100.0"
    assert two["the longer answer wins"][1:3] == ["48.0", "44.0"]


def test_tables_of_three_seeds(seeds):
    """The mean of the seeds, and the standard error that follows from their spread"""
    runs, tables = build(seeds)
    rates = [rate_of(seed / "ppo_token/annotations.jsonl")["win_rate"] for seed in seeds]
    mean = statistics.fmean(rates)
    error = statistics.stdev(rates) / 3**0.5
    row = cells(tables, "Table 1")[arms.TOKEN]
    assert row[1] == f"{mean:.1f} ± {error:.1f}"
    assert row[2] == ", ".join(f"{rate:.1f}" for rate in rates)

    # Each PPO run began from its own seed's policy.
    for ppo in [one for one in runs if one["kind"] == "ppo"]:
        start = rate_of(Path(ppo["seed"]) / "sft/annotations.jsonl")
        assert arms.checkpoints(ppo, runs)[0] == (0, start)

    others = [rate_of(seed / "ppo_rlhf/annotations.jsonl")["win_rate"] for seed in seeds]
    row = cells(tables, "Differences")[f"{arms.TOKEN} − {arms.RLHF}"]
    assert row[0] == "+5.1"
    assert row[2] == ", ".join(f"{a - b:+.1f}" for a, b in zip(rates, others))


def test_steps_to_the_best(tmp_path):
    """Table 3: RLHF is best at step 10 (30%), token level first reaches that at 20, Fine-grained
    PPO never; seconds are summed"""
    make_runs(tmp_path)
    for name, rates in (("ppo_rlhf", (20, 30, 30, 10, 5)), ("ppo_token", (10, 20, 29, 31, 50)),
                        ("ppo_fine", (5, 5, 5, 5, 5))):
        for step, percent in zip((5, 10, 15, 20, 25), rates):
            folder = tmp_path / name
            if step < 25:
                folder = folder / f"step_{step}"
            write_rows(folder / "annotations.jsonl", annotations_won(2 * percent))
    table = cells(build([tmp_path])[1], "Table 3")
    assert table["PPO-RLHF, to its own best"] == ["PPO", "4", "10", "11 s", "0.003"]
    assert table[f"{arms.TOKEN}, to its own best"][2] == "25"
    assert table[f"{arms.TOKEN}, to the best of {arms.RLHF}"][2:4] == ["20", "22 s"]
    assert table[f"{arms.FINE}, to the best of {arms.RLHF}"][2:] == ["- (1 of 1 never)", "-", "-"]


def test_what_is_missing_is_missing(tmp_path):
    """A folder with one unfinished run: there is a page, with dashes in the tables, and nothing is
    made up"""
    run_json(tmp_path / "ppo_token", policy="out/sft", reward_model="out/rm", level="token")
    write(tmp_path / "ppo_token/metrics.jsonl",
          '{"step": 0, "reward": 1.0, "kl": 0.0, "seconds": 1.0}\n{"step": 1, "rew')
    runs, tables = build([tmp_path])
    assert cells(tables, "Table 1")[arms.TOKEN][1:] == ["-", "-", "-", "-"]
    assert cells(tables, "Table 2")[arms.RM_FINE] == ["85.2 ± 1.8", "-", "-", "-"]
    row = cells(tables, "Table 3")[f"{arms.TOKEN}, to its own best"]
    assert row[1:] == ["2", "- (1 of 1 never)", "-", "-"]
    text = report_page.page(runs, tables[:4], tables[4])
    assert "no samples.jsonl" in text
    assert "needs annotations of models kept" in text
    assert "nan" not in text.lower().split()


def test_a_step_chosen_on_val(tmp_path):
    """Where there are val_annotations, the curve along training shows them. Table 1 is of the step
    whose outputs were judged."""
    make_runs(tmp_path)
    for folder, wins in (("sft", 20), ("ppo_token/step_5", 40), ("ppo_token/step_10", 70),
                         ("ppo_token", 60)):
        write_rows(tmp_path / folder / "val_annotations.jsonl", annotations_won(wins, n=100))
    judged = dict(config=dict(outputs="elsewhere/ppo_token/outputs.jsonl"))
    write_json(tmp_path / "ppo_token/annotations.jsonl.run.json", judged)
    decoded = dict(config=dict(model="elsewhere/ppo_token/step_10"))
    write_json(tmp_path / "ppo_token/outputs.jsonl.run.json", decoded)

    runs = report.read_runs([tmp_path])
    token = next(one for one in runs if one["name"] == "ppo_token")
    curve = [(step, figures["win_rate"]) for step, figures in arms.checkpoints(token, runs)]
    assert curve == [(0, 20), (5, 40), (10, 70), (25, 60)]

    one = cells([report.table_1(runs)], "Table 1")
    figures = rate_of(tmp_path / "ppo_token/annotations.jsonl")
    assert one[arms.TOKEN][2:4] == [f"{figures['win_rate']:.1f}", "10"]
    assert one[arms.FINE][3] == "25"
    three = cells([report.table_3(runs, target=65)], "Table 3")
    assert three[f"{arms.TOKEN}, to its own best"][2] == "10"
    assert three[f"{arms.TOKEN}, to 65%"][2] == "10"
    assert three[f"{arms.FINE}, to 65%"][2] == "- (1 of 1 never)"
    assert "that a step was chosen on" in report_page.curves(runs)


def test_a_reward_model_is_named_by_its_rows_not_by_its_files_name():
    for edits, name, label in ((True, "gaps.jsonl", arms.RM_FINE),
                               (False, "different.jsonl", arms.RM_RLHF)):
        config = dict(loss="sequence", data=name)
        rm = dict(kind="reward model", name="rm", config=config, record=dict(edits=edits))
        assert arms.label_of(rm, [rm]) == label


def test_a_cell_cannot_break_a_table():
    table = ("T", ["a", "b"], [["x | y\nz", "<i>\x1b"]], "note")
    assert arms.as_markdown(table).splitlines()[4] == "| x \\| y z | &lt;i&gt;\u241b |"
    assert "x | y z" in arms.as_text(table)
    assert "&lt;i&gt;" in arms.as_html(table)


# ---------------------------------------------------------------- reward hacking

def test_hacking_is_told(seeds):
    """The arm whose score rises while its win rate falls is named, and no other"""
    body = report_page.hacking(report.read_runs(seeds))
    titles = re.findall(r'class="title">(.*?)</text>', body)
    words = re.findall(r"<b>(.*?)</b>", body)
    told = dict(zip(titles, words))
    assert "reward hacking" in told.pop(arms.RLHF)
    assert list(told.values()) == ["the judge follows the score"] * 2


def test_verdicts_of_an_arm():
    """What is said of one seed, from its (score, win rate) at steps 0, 10, 20. Each win rate has a
    standard error of 2, so a difference of two has 2.83."""
    def said(*points):
        path = []
        for i, (score, rate) in enumerate(points):
            path.append((10 * i, score, dict(win_rate=rate, standard_error=2.0)))
        tone, _, words = report_page.verdict([path])
        return tone, words

    follows = ("", "the judge follows the score")
    fell_back = ("warn", "the judge followed to step 10, then fell back: over-optimised")
    hacked = ("bad", "the score rose, the judge did not follow: reward hacking")
    assert said((0, 20), (1, 40), (2, 60)) == follows
    assert said((0, 20), (1, 60), (2, 55)) == follows, "5 points are less than twice 2.83"
    assert said((0, 20), (1, 60), (2, 54)) == fell_back
    assert said((0, 20), (1, 60), (2, 22)) == hacked
    assert said((2, 20), (1, 60)) == ("", "the score did not rise")


# ---------------------------------------------------------------- the page

class Page(html.parser.HTMLParser):
    """The text of a page, its tags, and every attribute that could fetch something"""

    def __init__(self, text):
        super().__init__()
        self.words = []
        self.tags = set()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action") or name.startswith("on"):
                self.links.append(value)

    def handle_data(self, data):
        self.words.append(data)


def test_page(seeds, tmp_path):
    """python evaluate.py report: one self-contained page. An answer that holds <script> is shown as
    text; control characters are harmless."""
    done = run("evaluate.py", "report", *seeds, f"--out={tmp_path}/report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed"})
    assert page.links == []
    assert "http" not in text.replace("http-equiv", "")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "NaN" not in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 4 + 3 + 2

    shown = "".join(page.words)
    assert "</span><script>alert(1)</script>" in shown
    for label in (arms.TOKEN, arms.FINE, arms.RLHF, arms.RM_RLHF, "51.6 ± 1.8"):
        assert label in shown, label
        assert label in done.stdout, label
    for label in (arms.SFT, "abc1234", "stage.py --out="):
        assert label in shown, label

    # The tables alone, as Markdown. Each row of a table has as many cells as its header.
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "**Table 3. Training efficiency**" in markdown
    assert "| PPO-RLHF | 46.5 ± 1.8 |" in markdown
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            bars = {line.count("|") for line in block.splitlines()}
            assert len(bars) == 1, block


def test_only_our_own_file_is_replaced(seeds, tmp_path):
    mine = tmp_path / "mine.html"
    mine.write_text("a page of mine")
    done = run("evaluate.py", "report", seeds[0], f"--out={mine}", ok=False)
    assert done.returncode == 2 and "is no report of ours" in done.stderr
    assert mine.read_text() == "a page of mine"

    # The same holds for the Markdown file next to the page.
    notes = tmp_path / "notes.md"
    notes.write_text("notes of mine")
    done = run("evaluate.py", "report", seeds[0], f"--out={tmp_path}/notes.html", ok=False)
    assert done.returncode == 2 and "notes.md is no report of ours" in done.stderr
    assert notes.read_text() == "notes of mine"

    for _ in range(2):  # the second replaces the first
        run("evaluate.py", "report", seeds[0], f"--out={tmp_path}/ours.html")


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    write(tmp_path / "torn/rewards.json", '[{"n"')
    done = run("evaluate.py", "report", tmp_path / "torn", ok=False)
    assert done.returncode == 2 and "torn/rewards.json: not JSON" in done.stderr
    (tmp_path / "empty").mkdir()
    done = run("evaluate.py", "report", tmp_path / "empty", ok=False)
    assert done.returncode == 2 and "no run in" in done.stderr


def test_heat_is_what_ppo_is_paid():
    """Token level: each token's own r_t. The strength grows with |r_t|, the sign gives the colour.
    An empty text is not drawn; a token without a reward is plain."""
    body = pages.heat(["good", "bad", "", "none"], [1.0, -0.4, 3.0, None], 1.0)
    tones = re.findall(r"rgb\(var\((--\w+)\) / ([\d.]+)\)", body)
    assert tones == [("--good", "0.75"), ("--bad", "0.30"), ("--bad", "0.00")]


def test_ticks_cover():
    """The ticks of an axis reach from its lowest value to its highest; there are 2 to 7"""
    draw = random.Random(0)
    for _ in range(300):
        low = draw.uniform(-50, 50)
        high = low + draw.choice([0, 10 ** draw.uniform(-3, 4)])
        found = report_page.ticks(low, high)
        assert found[0] <= low + 1e-6 * abs(low)
        assert found[-1] >= high - 1e-6 * abs(high)
        assert 2 <= len(found) <= 7


if __name__ == "__main__":  # python tests/test_report.py FOLDER: something to look at
    for seed in (3, 4, 5):
        make_runs(Path(sys.argv[1]) / f"seed_{seed}", seed)
