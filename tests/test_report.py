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

ARMS = {
    "ppo_rlhf": ("sequence", "rm_original", 24.0),
    "ppo_fine": ("sequence", "rm_edited", 44.0),
    "ppo_token": ("token", "rm_token", 58.0),
}
EVIL = "</span><script>alert(1)</script>\x1b[31m\u202e & \"quoted\" | {x}"


def write(path, rows, *, lines=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows),
        encoding="utf-8",
    )


def annotations(percent, n=200, seed=0):
    draw = random.Random(seed)
    return [
        dict(
            instruction=f"List {i} fruits.",
            input="",
            output_1=f"apple {i}",
            output_2=f"pear {draw.random()}",
            generator_1="reference",
            generator_2="ours",
            annotator="gold",
            preference=2 if draw.random() * 100 < percent else 1,
        )
        for i in range(n)
    ]


def run_json(folder, **config):
    write(
        folder / "run.json",
        dict(
            config=config,
            command=f"stage.py --out={folder}",
            commit="abc1234",
            dirty=False,
            finished="2026-01-01 00:00:00",
            device="cpu",
            world_size=1,
            torch="2.13.0",
            transformers="5.0",
        ),
        lines=False,
    )


def make_runs(folder, seed=0, steps=25):
    """One seed of the demo's layout: ppo_rlhf's score rises while its win rate falls"""
    draw = random.Random(seed)
    run_json(folder / "sft", model="data/toy/model", data="data/toy/sft.jsonl", lr=2e-3, epochs=1)
    write(
        folder / "sft/metrics.jsonl",
        [dict(step=s, loss=2 - s / 40, seconds=0.1) for s in range(25)],
    )
    write(folder / "sft/annotations.jsonl", annotations(21, seed=seed))
    for name, loss, data, accuracy in (
        ("rm_original", "sequence", "pref.jsonl", 61),
        ("rm_edited", "sequence", "out/diffs.jsonl", 71),
        ("rm_token", "eq4", "out/diffs.jsonl", 83.25),
    ):
        run_json(folder / name, model="out/sft", data=data, loss=loss, lr=1e-3)
        write(
            folder / name / "metrics.jsonl",
            [dict(step=s, loss=0.7 - s / 900, seconds=0.09) for s in range(0, 500, 50)],
        )
        bins = [
            dict(confidence=0.55 + 0.1 * i, accuracy=0.5 + 0.09 * i + draw.random() / 20, n=80)
            for i in range(5)
        ]
        found = [
            dict(
                data="pref_heldout.jsonl",
                kind="preferences",
                n=400,
                accuracy=accuracy + draw.gauss(0, 1),
                standard_error=2.1,
                longer_wins=48.0,
                margin=0.4,
                margin_error=0.02,
                calibration=dict(ece=0.05, bins=bins),
            ),
            dict(
                data="edits_heldout.jsonl",
                kind="edits",
                n=380,
                accuracy=accuracy + 14,
                standard_error=0.9,
                longer_wins=44.0,
                margin=0.9,
                margin_error=0.02,
                calibration=dict(ece=0.03, bins=bins),
                edited_wins=100.0,
                tokens=dict(
                    removed=dict(auroc=0.91, standard_error=0.01),
                    added=dict(auroc=0.88, standard_error=0.01),
                    unchanged=dict(mean=0.01, sd=0.12, tokens=900),
                    eos=dict(mean=-0.02, n=700),
                ),
            ),
        ]
        write(folder / name / "rewards.json", found, lines=False)
    write(folder / "bag_of_tokens.json", dict(accuracy=0.663), lines=False)
    for name, (level, rm, best) in ARMS.items():
        run = folder / name
        run_json(
            run,
            policy=str(folder / "sft"),
            reward_model=str(folder / rm),
            level=level,
            steps=steps,
            kl_coef=0.05,
        )

        def win(step):
            rise = step / (step + 5) * (steps + 5) / steps
            return (
                21 + (best - 21) * rise + draw.gauss(0, 1)
                if name != "ppo_rlhf"
                else 21 + 8 * (step == 5) - 0.2 * step
            )

        write(
            run / "metrics.jsonl",
            [
                dict(
                    step=s,
                    reward=(1 if level == "token" else 3) * (s / 25) + draw.gauss(0, 0.05),
                    kl=0.3 * s + draw.random(),
                    response_length=18 - s / 10 + draw.random(),
                    eos_share=1.0,
                    seconds=1.1,
                )
                for s in range(steps)
            ],
        )
        for step in range(5, steps, 5):
            write(run / f"step_{step}/annotations.jsonl", annotations(win(step), seed=seed + step))
        write(run / "annotations.jsonl", annotations(win(steps), seed=seed))
        samples = []
        for step in (0, 12, 24):
            for k, instruction in enumerate(("List three fruits.", "List four colours.", EVIL)):
                tokens = [
                    "red",
                    "\n",
                    "apple",
                    "\n",
                    "you fool",
                    "\n",
                    "pear",
                    EVIL if k == 2 else " ok",
                    "",
                ]
                r = [draw.gauss(0, 0.1) for _ in tokens]
                r[2], r[4] = 0.8, -1.4
                samples.append(
                    dict(
                        step=step,
                        instruction=instruction,
                        input="",
                        output="".join(tokens),
                        tokens=tokens,
                        token_rewards=r,
                        reward=sum(r) / len(r),
                    )
                )
        write(run / "samples.jsonl", samples)
    return folder


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    return [make_runs(home / f"seed_{seed}", seed) for seed in (3, 4, 5)]


def made(tables, title):
    """A table's rows as dict: first cell -> the others"""
    _, header, rows, note = next(table for table in tables if table[0].startswith(title))
    assert all(len(row) == len(header) for row in rows)
    return {row[0]: row[1:] for row in rows} | {"note": note}


def build(folders):
    runs = report.read_runs(folders)
    return runs, [
        report.table_1(runs),
        report.table_paired(runs, 0),
        report.table_2(runs, folders),
        report.table_3(runs),
        report.table_rewards(runs),
    ]


def test_tables_of_one_seed(seeds):
    """Each cell is the figure in the files"""
    runs, tables = build(seeds[:1])
    one = made(tables, "Table 1")
    for name, label, paper in (
        ("ppo_token", arms.TOKEN, "51.6 ± 1.8"),
        ("ppo_fine", arms.FINE, "51.2 ± 1.8"),
        ("ppo_rlhf", arms.RLHF, "46.5 ± 1.8"),
    ):
        figures = win_rate(
            row["preference"] for row in rows_of(seeds[0] / name / "annotations.jsonl")
        )
        assert one[label] == [
            paper,
            f"{figures['win_rate']:.1f} ± {figures['standard_error']:.1f}",
            f"{figures['win_rate']:.1f}",
            "25",
            "200",
        ]
    assert list(one)[:5] == [
        arms.TOKEN,
        arms.FINE,
        "the reference: Davinci003; ours: reference",
        arms.RLHF,
        "SFT",
    ]
    two = made(tables, "Table 2")
    accuracy = {
        name: json.loads((seeds[0] / name / "rewards.json").read_text())[0]["accuracy"]
        for name in ("rm_original", "rm_edited", "rm_token")
    }
    assert two[arms.RM_RLHF][:3] == [
        "58.2 ± 1.8",
        f"{accuracy['rm_original']:.1f} ± 2.1",
        "75.0 ± 0.9",
    ]
    assert two[arms.RM_FINE][:2] == ["85.2 ± 1.8", f"{accuracy['rm_edited']:.1f} ± 2.1"]
    assert (
        two["a bag of tokens, without the prompt"][1] == "66.3"
        and two["always the edited one"][2] == "100.0"
    )
    assert two["the longer answer wins"][1:3] == ["48.0", "44.0"]


def test_tables_of_three_seeds(seeds):
    """The mean of the seeds, and the error that their spread tells"""
    runs, tables = build(seeds)
    rates = [
        win_rate(row["preference"] for row in rows_of(seed / "ppo_token/annotations.jsonl"))[
            "win_rate"
        ]
        for seed in seeds
    ]
    row = made(tables, "Table 1")[arms.TOKEN]
    assert row[
        1
    ] == f"{statistics.fmean(rates):.1f} ± {statistics.stdev(rates) / 3**0.5:.1f}" and row[
        2
    ] == ", ".join(f"{x:.1f}" for x in rates)
    for each in (
        one for one in runs if one["kind"] == "ppo"
    ):  # each began from its own seed's policy
        start = win_rate(
            r["preference"] for r in rows_of(Path(each["seed"]) / "sft/annotations.jsonl")
        )
        assert arms.checkpoints(each, runs)[0] == (0, start)
    others = [
        win_rate(r["preference"] for r in rows_of(seed / "ppo_rlhf/annotations.jsonl"))["win_rate"]
        for seed in seeds
    ]
    row = made(tables, "Differences")[f"{arms.TOKEN} − {arms.RLHF}"]
    assert row[0] == "+5.1" and row[2] == ", ".join(f"{a - b:+.1f}" for a, b in zip(rates, others))


def test_steps_to_the_best(tmp_path):
    """Table 3: RLHF is best at step 10 (30%), token level first reaches that at 20, Fine-grained
    PPO never; seconds are summed"""
    make_runs(tmp_path)
    for name, rates in (
        ("ppo_rlhf", (20, 30, 30, 10, 5)),
        ("ppo_token", (10, 20, 29, 31, 50)),
        ("ppo_fine", (5, 5, 5, 5, 5)),
    ):
        for step, percent in zip((5, 10, 15, 20, 25), rates):
            folder = tmp_path / name / (f"step_{step}" if step < 25 else "")
            write(
                folder / "annotations.jsonl",
                [
                    row | {"preference": 2 if i < 2 * percent else 1}
                    for i, row in enumerate(annotations(0))
                ],
            )
    table = made(build([tmp_path])[1], "Table 3")
    assert table["PPO-RLHF, to its own best"] == ["PPO", "4", "10", "11 s", "0.003"]
    assert table[f"{arms.TOKEN}, to its own best"][2] == "25"
    assert table[f"{arms.TOKEN}, to the best of {arms.RLHF}"][2:4] == ["20", "22 s"]
    assert table[f"{arms.FINE}, to the best of {arms.RLHF}"][2:] == ["- (1 of 1 never)", "-", "-"]


def test_what_is_missing_is_missing(tmp_path):
    """A folder with one unfinished run: a page all the same, dashes in the tables, nothing made
    up"""
    run_json(tmp_path / "ppo_token", policy="out/sft", reward_model="out/rm", level="token")
    (tmp_path / "ppo_token/metrics.jsonl").write_text(
        '{"step": 0, "reward": 1.0, "kl": 0.0, "seconds": 1.0}\n{"step": 1, "rew'
    )
    runs, tables = build([tmp_path])
    assert made(tables, "Table 1")[arms.TOKEN][1:] == ["-", "-", "-", "-"] and made(
        tables, "Table 2"
    )[arms.RM_FINE] == ["85.2 ± 1.8", "-", "-", "-"]
    assert made(tables, "Table 3")[f"{arms.TOKEN}, to its own best"][1:] == [
        "2",
        "- (1 of 1 never)",
        "-",
        "-",
    ]
    text = report_page.page(runs, tables[:4], tables[4])
    assert (
        "no samples.jsonl" in text
        and "needs annotations of models kept" in text
        and "nan" not in text.lower().split()
    )


def test_hacking_is_told(seeds):
    """The arm whose score rises while its win rate falls is named, and no other"""
    body = report_page.hacking(report.read_runs(seeds))
    told = dict(
        zip(re.findall(r'class="title">(.*?)</text>', body), re.findall(r"<b>(.*?)</b>", body))
    )
    assert (
        "reward hacking" in told.pop(arms.RLHF)
        and set(told.values()) == {"the judge follows the score"}
        and len(told) == 2
    )


def test_verdicts_of_an_arm():
    """What is said of one seed's path by its numbers: score, win rate, each with a standard error
    of 2"""

    def said(*points):
        tone, figures, words = report_page.verdict(
            [[(10 * i, x, dict(win_rate=y, standard_error=2.0)) for i, (x, y) in enumerate(points)]]
        )
        return tone, words

    assert said((0, 20), (1, 40), (2, 60)) == ("", "the judge follows the score")
    assert said((0, 20), (1, 60), (2, 55)) == ("", "the judge follows the score"), (
        "5 points are less than twice 2.83"
    )
    assert said((0, 20), (1, 60), (2, 54)) == (
        "warn",
        "the judge followed to step 10, then fell back: over-optimised",
    )
    assert said((0, 20), (1, 60), (2, 22)) == (
        "bad",
        "the score rose, the judge did not follow: reward hacking",
    )
    assert said((2, 20), (1, 60)) == ("", "the score did not rise")


def test_a_step_chosen_on_val(tmp_path):
    """Where there are val_annotations, they are what lies along training; Table 1 is of the step
    whose outputs were judged"""
    make_runs(tmp_path)
    for folder, percent in (
        ("sft", 20),
        ("ppo_token/step_5", 40),
        ("ppo_token/step_10", 70),
        ("ppo_token", 60),
    ):
        write(
            tmp_path / folder / "val_annotations.jsonl",
            [
                row | {"preference": 2 if i < percent else 1}
                for i, row in enumerate(annotations(0, 100))
            ],
        )
    write(
        tmp_path / "ppo_token/annotations.jsonl.run.json",
        dict(config=dict(outputs="elsewhere/ppo_token/outputs.jsonl")),
        lines=False,
    )
    write(
        tmp_path / "ppo_token/outputs.jsonl.run.json",
        dict(config=dict(model="elsewhere/ppo_token/step_10")),
        lines=False,
    )
    runs = report.read_runs([tmp_path])
    token = next(run for run in runs if run["name"] == "ppo_token")
    assert [(step, f["win_rate"]) for step, f in arms.checkpoints(token, runs)] == [
        (0, 20),
        (5, 40),
        (10, 70),
        (25, 60),
    ]
    one, three = (
        made([report.table_1(runs)], "Table 1"),
        made([report.table_3(runs, target=65)], "Table 3"),
    )
    figures = win_rate(
        row["preference"] for row in rows_of(tmp_path / "ppo_token/annotations.jsonl")
    )
    assert (
        one[arms.TOKEN][2:4] == [f"{figures['win_rate']:.1f}", "10"] and one[arms.FINE][3] == "25"
    )
    assert three[f"{arms.TOKEN}, to its own best"][2] == three[f"{arms.TOKEN}, to 65%"][2] == "10"
    assert three[f"{arms.FINE}, to 65%"][2] == "- (1 of 1 never)"
    assert "that a step was chosen on" in report_page.curves(runs)


class Page(html.parser.HTMLParser):
    """The text of a page, its tags, and every attribute that could fetch something"""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.links, self.titles = [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [
            value
            for name, value in attributes
            if name in ("src", "href", "srcset", "data", "action") or name.startswith("on")
        ]

    def handle_data(self, data):
        self.words.append(data)


def test_page(seeds, tmp_path):
    """python evaluate.py report: one self-contained page; an answer that holds <script> is shown as
    text; control characters are harmless"""
    done = run("evaluate.py", "report", *seeds, f"--out={tmp_path}/report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (
        not page.tags & {"script", "link", "img", "iframe", "object", "embed"}
        and not page.links
        and "http" not in re.sub("http-equiv", "", text)
    )
    shown = "".join(page.words)
    assert (
        "</span><script>alert(1)</script>" in shown and "\x1b" not in text and "\u202e" not in text
    )
    assert (
        "prefers-color-scheme: dark" in text
        and text.count("<svg") == 4 + 3 + 2
        and "NaN" not in text
    )
    for label in (
        arms.TOKEN,
        arms.FINE,
        arms.RLHF,
        arms.SFT,
        arms.RM_RLHF,
        "51.6 ± 1.8",
        "abc1234",
        "stage.py --out=",
    ):
        assert label in shown and (
            label in done.stdout or label in ("abc1234", "stage.py --out=", arms.SFT)
        ), label
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (
        "**Table 3. Training efficiency**" in markdown and "| PPO-RLHF | 46.5 ± 1.8 |" in markdown
    )
    assert all(
        line.count("|") == markdown_table[0].count("|")
        for markdown_table in [
            block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")
        ]
        for line in markdown_table
    )


def test_only_our_own_file_is_replaced(seeds, tmp_path):
    (tmp_path / "mine.html").write_text("a page of mine")
    done = run("evaluate.py", "report", seeds[0], f"--out={tmp_path}/mine.html", ok=False)
    assert (
        done.returncode == 2
        and "is no report of ours" in done.stderr
        and (tmp_path / "mine.html").read_text() == "a page of mine"
    )
    (tmp_path / "notes.md").write_text("notes of mine")
    done = run("evaluate.py", "report", seeds[0], f"--out={tmp_path}/notes.html", ok=False)
    assert (
        done.returncode == 2
        and "notes.md is no report of ours" in done.stderr
        and (tmp_path / "notes.md").read_text() == "notes of mine"
    )
    for _ in range(2):  # its own it replaces
        run("evaluate.py", "report", seeds[0], f"--out={tmp_path}/ours.html")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/rewards.json").write_text('[{"n"')
    done = run("evaluate.py", "report", tmp_path / "torn", ok=False)
    assert done.returncode == 2 and "torn/rewards.json: not JSON" in done.stderr
    (tmp_path / "empty").mkdir()
    done = run("evaluate.py", "report", tmp_path / "empty", ok=False)
    assert done.returncode == 2 and "no run in" in done.stderr


def test_a_reward_model_is_named_by_its_rows_not_by_its_files_name():
    for edits, name in ((True, "gaps.jsonl"), (False, "different.jsonl")):
        rm = dict(
            kind="reward model",
            name="rm",
            config=dict(loss="sequence", data=name),
            record=dict(edits=edits),
        )
        assert arms.label_of(rm, [rm]) == (arms.RM_FINE if edits else arms.RM_RLHF)


def test_heat_is_what_ppo_is_paid():
    """Token level: each token's own; the strength grows with |r|, the sign gives the colour"""
    body = pages.heat(["good", "bad", "", "none"], [1.0, -0.4, 3.0, None], 1.0)
    tones = re.findall(r"rgb\(var\((--\w+)\) / ([\d.]+)\)", body)
    assert tones == [("--good", "0.75"), ("--bad", "0.30"), ("--bad", "0.00")], (
        "an empty text is not drawn, a token without reward is plain"
    )


def test_a_cell_cannot_break_a_table():
    table = ("T", ["a", "b"], [["x | y\nz", "<i>\x1b"]], "note")
    assert arms.as_markdown(table).splitlines()[4] == "| x \\| y z | &lt;i&gt;\u241b |"
    assert "x | y z" in arms.as_text(table) and "&lt;i&gt;" in arms.as_html(table)


def test_ticks_cover():
    draw = random.Random(0)
    for _ in range(300):
        low = draw.uniform(-50, 50)
        high = low + draw.choice([0, 10 ** draw.uniform(-3, 4)])
        found = report_page.ticks(low, high)
        assert (
            found[0] <= low + 1e-6 * abs(low)
            and found[-1] >= high - 1e-6 * abs(high)
            and 2 <= len(found) <= 7
        )


if __name__ == "__main__":  # python tests/test_report.py FOLDER: something to look at
    for seed in (3, 4, 5):
        make_runs(Path(sys.argv[1]) / f"seed_{seed}", seed)
