"""pytest tests/test_report.py: the tables and the page, from made-up run folders whose numbers are
known."""
import html.parser, json, math, random, re, shutil, statistics, sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import rows_of, run
from evaluate import win_rate
from extras import pages
from extras.report import answer, arms, painted, plots
from extras.report import page as report_page, tables as report, write as report_files

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


def rates_of(path):
    """100 where ours won, 0 where it lost"""
    return [100 * (row["preference"] - 1) for row in rows_of(path)]


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
        assert one[label] == [paper, f"{rate} ± {error}", "25", "200"]
    reference = "the reference: Davinci003, here the toy world's"
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

    # A difference has its sign. The interval is there, where there is one seed; no column repeats
    # another.
    token = rates_of(seeds[0] / "ppo_token/annotations.jsonl")
    rlhf = rates_of(seeds[0] / "ppo_rlhf/annotations.jsonl")
    mean = statistics.fmean(a - b for a, b in zip(token, rlhf))
    row = cells(tables, "Differences")[f"{arms.TOKEN} − {arms.RLHF}"]
    assert row[1].startswith(f"+{mean:.1f} ± ")
    assert re.fullmatch(r"\+[\d.]+ to \+[\d.]+", row[2])
    for title, header, rows, _ in tables:
        columns = [tuple(row[i] for row in rows) for i in range(1, len(header))]
        assert len({*columns}) == len(columns), title
    assert "AUROC spans" not in tables[-1][1], "there are no spans in these files"


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
    assert "95% (one seed)" not in tables[1][1]


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
    assert table["PPO-RLHF, to its own best"] == ["PPO", "4 h", "10", "11 s"]
    assert table[f"{arms.TOKEN}, to its own best"][2] == "25"
    assert table[f"{arms.TOKEN}, to the best of {arms.RLHF}"][2:4] == ["20", "22 s"]
    assert table[f"{arms.FINE}, to the best of {arms.RLHF}"][2:] == ["- (1 of 1 never)", "-"]


def test_what_is_missing_is_missing(tmp_path):
    """A folder with one unfinished run: there is a page, with dashes in the tables, and nothing is
    made up"""
    run_json(tmp_path / "ppo_token", policy="out/sft", reward_model="out/rm", level="token")
    write(tmp_path / "ppo_token/metrics.jsonl",
          '{"step": 0, "reward": 1.0, "kl": 0.0, "seconds": 1.0}\n{"step": 1, "rew')
    runs, tables = build([tmp_path])
    assert cells(tables, "Table 1")[arms.TOKEN][1:] == ["-", "-", "-"]
    assert cells(tables, "Table 2")[arms.RM_FINE] == ["85.2 ± 1.8", "-", "-"]
    row = cells(tables, "Table 3")[f"{arms.TOKEN}, to its own best"]
    assert row[1:] == ["2 h", "- (1 of 1 never)", "-"]
    text = report_page.page(runs, tables[:4], tables[4], answer.sentences(runs, 0))
    for missing in ("No answers were judged", "No reward model was measured", "is not known",
                    "needs painted.json"):
        assert missing in text, missing
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
    assert one[arms.TOKEN][1].startswith(f"{figures['win_rate']:.1f} ± ")
    assert one[arms.TOKEN][2] == "10"
    assert one[arms.FINE][2] == "25"
    three = cells([report.table_3(runs, target=65)], "Table 3")
    assert three[f"{arms.TOKEN}, to its own best"][2] == "10"
    assert three[f"{arms.TOKEN}, to 65%"][2] == "10"
    assert three[f"{arms.FINE}, to 65%"][2] == "- (1 of 1 never)"
    assert "that a step was chosen on" in report_page.curves(runs)


def test_a_reward_model_is_named_by_its_rows_not_by_its_files_name():
    for edits, name, label in ((True, "gaps.jsonl", arms.RM_FINE),
                               (True, ["gaps.jsonl", "more.jsonl"], arms.RM_FINE),
                               (False, ["different.jsonl"], arms.RM_RLHF)):
        config = dict(loss="sequence", data=name)
        rm = dict(kind="reward model", name="rm", config=config, record=dict(edits=edits))
        assert arms.label_of(rm, [rm]) == label
    for data in ("diffs.jsonl", ["out/diffs.jsonl", "out/rounds/more.jsonl"]):
        rm = dict(kind="reward model", config=dict(loss="sequence", data=data), record={})
        assert arms.label_of(rm, [rm]) == arms.RM_FINE


def test_a_cell_cannot_break_a_table():
    table = ("T", ["a", "b"], [["x | y\nz", "<i>\x1b"]], "note")
    assert arms.as_markdown(table).splitlines()[4] == "| x \\| y z | &lt;i&gt;\u241b |"
    assert "x | y z" in arms.as_text(table)
    assert "&lt;i&gt;" in arms.as_html(table)


# ---------------------------------------------------------------- reward hacking

def test_hacking_is_told(seeds):
    """The arm whose score rises while its win rate falls is named, and no other"""
    body = report_page.hacking(report.read_runs(seeds))
    titles = re.findall(r"<h4>(.*?)</h4>", body)
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


# ---------------------------------------------------------------- the answer

def answer_of(*folders):
    return answer.sentences(report.read_runs(folders), 0)


def test_answer_of_one_seed(seeds):
    """Its numbers are those of the tables"""
    who_wins, right, fooled = answer_of(seeds[0])
    _, tables = build(seeds[:1])
    one = cells(tables, "Table 1")
    differences = cells(tables, "Differences")
    assert who_wins.startswith(f"{arms.TOKEN} wins {one[arms.TOKEN][1]}% against the reference: ")
    for label in (arms.FINE, arms.RLHF):
        mean = one[label][1].split(" ± ")[0]
        difference = differences[f"{arms.TOKEN} − {label}"][1].removeprefix("+")
        assert f"{difference} points above {label} ({mean})" in who_wins
    assert f"above SFT ({one['SFT'][1].split(' ± ')[0]})." in who_wins

    two = cells(tables, "Table 2")
    assert right.startswith(f"The token-level reward model is right on {two[arms.RM_TOKEN][1]}% of "
                            "the held-out pairs (that of Fine-grained PPO on ")
    assert f"that of PPO-RLHF on {two[arms.RM_RLHF][1].split(' ± ')[0]}%)" in right
    assert "with an AUROC of 0.91" in right
    assert fooled == (f"In {arms.TOKEN} and {arms.FINE} the judge follows the reward model's "
                      "score; in PPO-RLHF the reward model's score rose, the judge did not follow: "
                      "reward hacking.")


def test_answer_of_three_seeds(seeds):
    who_wins, right, _ = answer_of(*seeds)
    _, tables = build(seeds)
    rate = cells(tables, "Table 1")[arms.TOKEN][1]
    assert who_wins.startswith(f"{arms.TOKEN} wins {rate}% against the reference (the mean of 3 "
                               "seeds): ")
    assert f"right on {cells(tables, 'Table 2')[arms.RM_TOKEN][1]}% of" in right


def test_an_arm_beside_the_papers_changes_no_other(seeds, tmp_path):
    """An ablation next to ppo_token has its folder's name; the headline stays. Ours at gamma 0 is
    compared like the paper's arms"""
    folder = tmp_path / "seed_3"
    shutil.copytree(seeds[0], folder)
    for name, gamma in (("a_first", 1.0), ("ppo_gamma0", 0.0)):
        shutil.copytree(folder / "ppo_token", folder / name)
        record = json.loads((folder / name / "run.json").read_text())
        record["config"] |= dict(kl_coef=0.0, gamma=gamma)
        write_json(folder / name / "run.json", record)
    run_json(folder / "data", items="medium")

    runs, tables = build([folder])
    labels = {one["name"]: one["label"] for one in runs}
    assert labels["ppo_token"] == arms.TOKEN
    assert labels["a_first"] == f"{arms.TOKEN} (a_first)"
    assert labels["ppo_gamma0"] == arms.GAMMA_0
    before = cells(build(seeds[:1])[1], "Differences")
    after = cells(tables, "Differences")
    for name in (f"{arms.TOKEN} − {arms.RLHF}", f"{arms.TOKEN} − {arms.FINE}"):
        assert after[name] == before[name]

    # The answer: the ablation is not in it, gamma 0 is; the copy differs by nothing.
    who_wins, _, fooled = answer.sentences(runs, 0)
    told = who_wins + fooled
    assert "a_first" not in told
    assert f"not clearly different from {arms.TOKEN} at gamma 0 (ours) (" in who_wins
    assert "+0.0 ± 0.0" in who_wins

    # The data folder is no run.
    text = report_page.page(runs, tables[:4], tables[4], [])
    assert "9 runs in" in text


def test_a_difference_must_exceed_two_errors(seeds, tmp_path):
    """Two seeds that agree by chance prove nothing: the errors over pairs count, too"""
    for seed, ours in (("a", 52), ("b", 52)):
        shutil.copytree(seeds[0], tmp_path / seed)
        for name, percent in (("ppo_token", ours), ("ppo_fine", 50)):
            rows = annotations_won(2 * percent)
            if name == "ppo_fine":  # each question won by one is lost by the other
                for row in rows:
                    row["preference"] = 3 - row["preference"]
            write_rows(tmp_path / seed / name / "annotations.jsonl", rows)
    who_wins = answer_of(tmp_path / "a", tmp_path / "b")[0]
    said = r"not clearly different from Fine-grained PPO \(50.0; \+2.0 ± 0.0 over seeds, ± [\d.]+"
    assert re.search(said + r" over pairs\)", who_wins), who_wins
    assert arms.larger_error(None, [2.0]) == 2.0
    assert arms.larger_error(0.5, [3.0, 4.0]) == 2.5
    assert arms.larger_error(3.5, [3.0, 4.0]) == 3.5
    assert arms.larger_error(None, [None]) is None


def test_answer_where_arms_are_missing(seeds, tmp_path):
    """Whatever there is comes first; without SFT or reward models there is still an answer"""
    shutil.copytree(seeds[0] / "ppo_fine", tmp_path / "ppo_fine")
    rate = cells(build([tmp_path])[1], "Table 1")[arms.FINE][1]
    who_wins, right, fooled = answer_of(tmp_path)
    assert who_wins == f"{arms.FINE} wins {rate}% against the reference."
    assert right == "No reward model was measured on held-out pairs."
    assert "follows the reward model's score" in fooled

    shutil.copytree(seeds[0] / "rm_original", tmp_path / "rm_original")
    accuracy = cells(build([tmp_path])[1], "Table 2")[arms.RM_RLHF][1]
    assert answer_of(tmp_path)[1] == (f"The reward model of PPO-RLHF is right on {accuracy}% of "
                                      "the held-out pairs.")

    # Arms that the paper does not have, judged against other answers
    for name in ("mine", "yours"):
        rows = annotations(40)
        for row in rows:
            row["output_1"] += name
        write_rows(tmp_path / "other" / name / "annotations.jsonl", rows)
    who_wins = answer_of(tmp_path / "other")[0]
    assert who_wins.startswith("mine wins ") and "yours wins" in who_wins


# ---------------------------------------------------------------- one prompt, before and after

def paint_answers(folder, questions):
    """painted.json of SFT's and token level's answers to these questions"""
    rows = []
    for i in questions:
        answers = []
        for name, r in (("sft", -1.5), ("ppo_token", 0.5)):
            row = rows_of(folder / name / "annotations.jsonl")[i]
            answers.append(dict(file=f"elsewhere/{name}/outputs.jsonl", field="output",
                                text=row["output_2"], R=r, tokens=[f"{name} {i} ", EVIL, ""],
                                rewards=[r, 0.1, 0.0], changed=None))
        rows.append(dict(instruction=row["instruction"], input="", answers=answers))
    numbers = dict(made_by="reward_model.py show", reward_model="out/rm", level="token", rows=rows)
    write_json(folder / "painted.json", numbers)
    return numbers


def test_one_prompt_before_and_after(seeds, tmp_path):
    """The first question on which the verdicts differ. An answer that was not judged is no
    evidence; a reward model of sequences paints no tokens."""
    folder = tmp_path / "seed_3"
    shutil.copytree(seeds[0], folder)
    sft = rates_of(folder / "sft/annotations.jsonl")
    token = rates_of(folder / "ppo_token/annotations.jsonl")
    same = [i for i in range(200) if sft[i] == token[i]]
    won = [i for i in range(200) if sft[i] < token[i]]
    numbers = paint_answers(folder, [same[0], won[0], won[1]])
    runs = report.read_runs([folder])
    body = painted.before_and_after(runs)
    assert f"List {won[0]} fruits." in body
    assert f"sft {won[0]} " in body and f"ppo_token {won[0]} " in body
    assert "Before: SFT <em>R = -1.50; lost against the reference" in body
    assert f"After: {arms.TOKEN} <em>R = +0.50; won against the reference" in body
    assert re.findall(r'data-r="(.*?)"', body) == ["-1.5"]
    assert "<script>" not in body and "\x1b" not in body and "∎" in body

    paint_answers(folder, same[:2])
    body = painted.before_and_after(runs)
    assert f"List {same[0]} fruits." in body and "the same verdict on all" in body

    numbers["rows"][1]["answers"][1]["text"] = "another model's answer"
    write_json(folder / "painted.json", numbers)
    assert f"List {won[1]} fruits." in painted.before_and_after(runs)
    write_json(folder / "painted.json", numbers | dict(level="sequence"))
    assert "needs painted.json" in painted.before_and_after(runs)
    write(folder / "painted.json", "[1")
    done = run("evaluate.py", "report", folder, f"--out={tmp_path}/report.html", ok=False)
    assert done.returncode == 2 and "painted.json cannot be read" in done.stderr
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------- plots and files

def test_plots_can_be_compared(seeds):
    """All plots along training have the same steps on their x axis, every plot says what is on its
    y axis, and with one seed the noisy ones have each step and the mean of five"""
    runs = report.read_runs(seeds[:1])
    training = report_page.training_plots(runs)
    assert {plot.x_range for plot in training.values()} == {(0, 25)}
    others = [*report_page.hacking_plots(runs).values()]
    others += report_page.calibration_plots(runs).values()
    assert len(others) == 5
    for plot in [*training.values(), *others]:
        assert plot.ylabel and f">{plot.ylabel}</text>" in plot.html(), plot.title
    assert training["kl"].html().count("<polyline") == 2 * 3
    assert training["win_rate"].html().count("<polyline") == 3

    ys = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    found = plots.mean_of_5(ys)
    assert found == [8 / 3, 9 / 4, 14 / 5, 4.0, 19 / 4, 5.0]
    runs = report.read_runs(seeds)
    assert report_page.training_plots(runs)["kl"].html().count("<polyline") == 3


def test_names_at_line_ends_do_not_touch():
    draw = random.Random(1)
    for _ in range(200):
        ys = [draw.uniform(0, 100) for _ in range(draw.randrange(1, 6))]
        found = sorted(plots.apart(ys, 12))
        assert all(b - a >= 11.5 for a, b in zip(found, found[1:]))
        order = sorted(range(len(ys)), key=lambda i: ys[i])
        assert order == sorted(range(len(ys)), key=lambda i: plots.apart(ys, 12)[i])
    assert plots.apart([0, 50], 12) == [0, 50], "none is moved without need"


def test_figures_and_numbers_as_files(seeds, tmp_path):
    """report/*.svg: XML with its colours in it. report.json: every number as it is in the runs."""
    folder = tmp_path / "seed_3"
    shutil.copytree(seeds[0], folder)
    metrics = rows_of(folder / "ppo_token/metrics.jsonl")
    metrics[3]["kl"] = math.nan
    write_rows(folder / "ppo_token/metrics.jsonl", metrics)
    rewards = json.loads((folder / "rm_token/rewards.json").read_text())
    rewards[0]["margin"] = math.inf
    write_json(folder / "rm_token/rewards.json", rewards)
    run("evaluate.py", "report", folder, f"--out={tmp_path}/report.html")
    files = sorted((tmp_path / "report").glob("*.svg"))
    names = [path.stem for path in files]
    assert names == ["calibration_edits", "calibration_preferences", "hacking_fine_grained_ppo",
                     "hacking_fine_grained_token_level_ppo", "hacking_ppo_rlhf", "kl", "length",
                     "reward", "win_rate"]
    for path in files:
        text = path.read_text(encoding="utf-8")
        root = xml.etree.ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text and "class=" not in text and "nan" not in text
    text = (tmp_path / "report/win_rate.svg").read_text()
    assert "#2467ad" in text and arms.TOKEN in text

    numbers = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    runs = {Path(one["folder"]).name: one for one in numbers["runs"]}
    assert runs["ppo_token"]["win_rate"] == rate_of(folder / "ppo_token/annotations.jsonl")
    at_5 = rate_of(folder / "ppo_token/step_5/annotations.jsonl")
    assert runs["ppo_token"]["win_rates"]["5"] == at_5
    assert runs["rm_token"]["rewards"][1] == rewards[1]
    assert runs["rm_token"]["rewards"][0]["margin"] is None
    kl = numbers["training"]["kl"][arms.TOKEN]
    assert kl["steps"] == [row["step"] for row in metrics if row["step"] != 3]
    assert kl["mean"][4] == metrics[5]["kl"]
    between = [one for one in numbers["differences"] if one["minus"] == arms.RLHF]
    found = next(one for one in between if one["of"] == arms.TOKEN)["each_seed"]
    pairs = zip(rates_of(folder / "ppo_token/annotations.jsonl"),
                rates_of(folder / "ppo_rlhf/annotations.jsonl"))
    assert found[0]["difference"] == statistics.fmean(a - b for a, b in pairs)
    assert len(numbers["answer"]) == 3 and len(numbers["tables"]) == 5
    assert numbers["made_by"] == report_files.MADE_BY


def test_numbers_are_aligned_at_the_right():
    table = ("T", ["model", "rate", "step"], [["a", "7.1", "PPO"], ["b", "10.2 ± 1.5", "RM"]], "n")
    assert arms.number_columns(table) == [False, True, False]
    lines = arms.as_text(table).splitlines()
    assert lines[4].index("7.1") + 3 == lines[5].index("1.5") + 3
    assert "|---|---:|---|" in arms.as_markdown(table)
    page = arms.as_html(table)
    assert "<td class=number>7.1<span class=error" in page
    assert page.count("class=error") == 2, "a cell without an error leaves its place"


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
    assert "51.6± 1.8" in shown and "51.6 ± 1.8" in done.stdout
    for label in (arms.TOKEN, arms.FINE, arms.RLHF, arms.RM_RLHF):
        assert label in shown, label
        assert label in done.stdout, label
    for label in (arms.SFT, "abc1234", "stage.py --out="):
        assert label in shown, label

    # It begins with its answer, then come the win rates, then the reward hacking.
    for sentence in done.stdout.splitlines()[:3]:
        assert sentence.replace(" ± ", "\xa0±\xa0") in shown, sentence
    places = [shown.index(words) for words in ("wins ", "Along training", "Which arm fooled its",
                                               "Table 1.")]
    assert places == sorted(places)
    assert "21 runs in" in shown

    # The same as Markdown. Each row of a table has as many cells as its header.
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

    # The same holds for the files next to the page.
    for name in ("notes.md", "notes.json", "notes/win_rate.svg"):
        notes = tmp_path / name
        write(notes, "notes of mine")
        done = run("evaluate.py", "report", seeds[0], f"--out={tmp_path}/notes.html", ok=False)
        assert done.returncode == 2 and f"{name} is no report of ours" in done.stderr
        assert notes.read_text() == "notes of mine"
        notes.unlink()

    # A second report replaces the first, and one of an older version. Figures of arms that are gone
    # go with it, but no others.
    figures = tmp_path / "ours"
    write(figures / "mine.svg", "<svg/>")
    write(tmp_path / "ours.md", "**Table 1. Win rate against the reference (%)**")
    for folder in (seeds[0], seeds[0] / "ppo_token"):
        run("evaluate.py", "report", folder, f"--out={tmp_path}/ours.html")
    assert (figures / "mine.svg").exists() and (figures / "kl.svg").exists()
    assert not list(figures.glob("hacking_ppo_rlhf*"))


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    write(tmp_path / "torn/rewards.json", '[{"n"')
    done = run("evaluate.py", "report", tmp_path / "torn", ok=False)
    assert done.returncode == 2 and "torn/rewards.json: not JSON" in done.stderr
    (tmp_path / "empty").mkdir()
    done = run("evaluate.py", "report", tmp_path / "empty", ok=False)
    assert done.returncode == 2 and "no run in" in done.stderr


def test_heat_is_what_ppo_is_paid():
    """Token level: each token's own r_t. The strength is the square root of |r_t|'s share of the
    scale, the sign gives the colour. An empty text is not drawn; a token without a reward is
    plain. Strong tokens have their number, on their own line."""
    body = pages.heat(["good\n", "bad", "", "none"], [1.0, -0.36, 3.0, None], 1.0, numbers=True)
    tones = re.findall(r"rgb\(var\((--\w+)\) / ([\d.]+)\)", body)
    assert tones == [("--good", "0.75"), ("--bad", "0.45"), ("--bad", "0.00")]
    assert re.findall(r'data-r="(.*?)"', body) == ["+1.0"]
    assert ">good↵</span>\n<" in body
    assert "data-r" not in pages.heat(["good"], [1.0], 1.0)


def test_ticks_cover():
    """The ticks of an axis reach from its lowest value to its highest; there are 2 to 7"""
    draw = random.Random(0)
    for _ in range(300):
        low = draw.uniform(-50, 50)
        high = low + draw.choice([0, 10 ** draw.uniform(-3, 4)])
        found = plots.ticks(low, high)
        assert found[0] <= low + 1e-6 * abs(low)
        assert found[-1] >= high - 1e-6 * abs(high)
        assert 2 <= len(found) <= 7


if __name__ == "__main__":  # python tests/test_report.py FOLDER: something to look at
    for seed in (3, 4, 5):
        make_runs(Path(sys.argv[1]) / f"seed_{seed}", seed)
