"""pytest tests/test_evaluate.py: the words of evaluate.py, their statistics by brute force, the
judge against a stand-in for Claude."""

import contextlib, functools, io, json, math, os, random, signal, statistics, subprocess, sys, time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import evaluate
from plumbing import record
from plumbing.command_line import load_config
from claude_standin import Standin
from common import decode_response, encode_prompt, encode_response, load_tokenizer, row_uniforms
from conftest import ROOT, rows_of, run
from evaluate import matched, paired, parse_verdict, preference, summary, win_rate
from evaluate import calibration
from extras.report.rewards import auroc, in_spans, token_auroc, token_figures

PUBLISHED = ROOT.parent / "shared/data/alpaca_eval"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def here(word, *flags, ok=True, **env):
    """evaluate.py <word> <flags> in this process, which saves the seconds that importing takes ->
    returncode, stdout, stderr"""
    out, err, code, hook = io.StringIO(), io.StringIO(), 0, sys.excepthook
    record.LOCKS.clear()  # as if the process before had ended
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, env),
    ):
        try:
            function, Config = evaluate.WORDS[word]
            function(load_config(Config, f"evaluate.{word}", list(map(str, flags))))
        except SystemExit as end:
            code = end.code
    sys.excepthook = hook
    assert not ok or code == 0, err.getvalue()
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


# ---------------------------------------------------------------- statistics


def test_win_rate_by_hand():
    """A small analogue of the published row: draws as 1.5 and as 0, an unparsed one, a pair
    between"""
    assert win_rate([1, 2, 2, 1.5, 0, None, 1.25]) == dict(
        win_rate=pytest.approx(100 * (0 + 1 + 1 + 0.5 + 0.5 + 0.25) / 6),
        standard_error=pytest.approx(
            100 * statistics.stdev([0, 1, 1, 0.5, 0.5, 0.25]) / math.sqrt(6)
        ),
        n_wins=2,
        n_wins_base=2,
        n_draws=2,
        n_total=6,
    )
    assert win_rate(iter([])) == dict(
        win_rate=None, standard_error=None, n_wins=0, n_wins_base=0, n_draws=0, n_total=0
    )
    assert win_rate([2])["standard_error"] is None
    with pytest.raises(ValueError):
        win_rate([3])


@pytest.mark.skipif(
    not PUBLISHED.exists(),
    reason="the published judgements (../shared/data/alpaca_eval) are not here",
)
def test_win_rate_published_to_every_digit():
    """python evaluate.py winrate published_annotations.jsonl"""
    row = json.loads((PUBLISHED / "published_result.json").read_text())[0]
    names = ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total")
    figures = json.loads(
        run(
            "evaluate.py", "winrate", PUBLISHED / "published_annotations.jsonl", "--json=true"
        ).stdout
    )
    assert {name: str(figures[name]) for name in names} == {name: row[name] for name in names}
    text = run("evaluate.py", "winrate", PUBLISHED / "published_annotations.jsonl").stdout.split()
    assert all(text[text.index(name) + 1] == row[name] for name in names)


def test_paired():
    draw = random.Random(0)
    b = [draw.choice([1, 2]) for _ in range(300)]
    a = [
        2 if draw.random() < 0.2 else p for p in b
    ]  # a wins a fifth of what b loses: correlated, so the pairing matters
    found = paired([*a, None, 2], [*b, 1, None], seed=1)
    d = [100 * (x - y) for x, y in zip(a, b)]
    assert found["n_total"] == 300 and found["difference"] == pytest.approx(
        win_rate(a)["win_rate"] - win_rate(b)["win_rate"]
    )
    assert found["standard_error"] == pytest.approx(statistics.stdev(d) / math.sqrt(300))
    assert found["standard_error"] < 0.6 * win_rate(a)["standard_error"] * math.sqrt(2), (
        "unpaired errors would be larger"
    )
    assert (
        abs((found["high"] - found["low"]) / (2 * 1.96) - found["standard_error"])
        < 0.15 * found["standard_error"]
    )
    assert found["p_value"] < 0.001 and paired(a, a)["p_value"] == 1.0
    assert paired([0, 2], [1.5, 1])["difference"] == 50  # 0 is a draw
    assert paired([2] * 9, [1] * 9, resamples=500)["p_value"] == 2 / 500, (
        "no number of resamples proves that p is 0"
    )
    swapped = paired(b, a, seed=1)
    assert (swapped["low"], swapped["high"]) == (
        pytest.approx(-found["high"]),
        pytest.approx(-found["low"]),
    )


def test_auroc_by_brute_force():
    draw = random.Random(0)
    for _ in range(30):
        n = draw.randint(2, 40)
        scores, positive = (
            [draw.randint(0, 6) / 3 for _ in range(n)],
            [draw.random() < 0.4 for _ in range(n)],
        )
        times = [draw.randint(0, 3) for _ in range(n)]
        p, q = (
            [(s, t) for s, y, t in zip(scores, positive, times) if y == side]
            for side in (True, False)
        )
        pairs = sum(t * u for _, t in p for _, u in q)
        wins = sum(t * u * ((a > b) + 0.5 * (a == b)) for a, t in p for b, u in q)
        found = auroc(torch.tensor(scores), torch.tensor(positive), torch.tensor(times))
        assert found is None if not pairs else abs(found - wins / pairs) < 1e-12
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([True, True])) is None


def test_token_auroc_resamples_pairs_not_tokens():
    """Ten copies of a pair's tokens say no more than one: the error must not shrink"""
    draw = random.Random(1)
    tokens = [(draw.gauss(i % 3, 1), draw.random() < 0.5, i) for i in range(40) for _ in range(3)]
    one, ten = (
        token_auroc(tokens, resamples=200, seed=0),
        token_auroc(tokens * 10, resamples=200, seed=0),
    )
    assert one["auroc"] == pytest.approx(ten["auroc"]) and one["standard_error"] == pytest.approx(
        ten["standard_error"], rel=1e-6
    )


def test_calibration():
    margins = [math.log(0.7 / 0.3)] * 7 + [-math.log(0.7 / 0.3)] * 3  # 70% sure, 70% right
    assert calibration(margins)["ece"] == pytest.approx(0, abs=1e-9)
    sure = calibration([math.log(0.95 / 0.05)] * 5 + [-math.log(0.95 / 0.05)] * 5)
    assert sure["ece"] == pytest.approx(0.45) and sure["bins"] == [
        dict(confidence=pytest.approx(0.95), accuracy=0.5, n=10)
    ]
    assert calibration([0.0] * 4)["ece"] == 0 and calibration([1e4])["bins"][0]["confidence"] == 1


def test_token_figures_by_hand(world):
    """A reward that is -1 on what was removed, +1 on what was added, 0.25 elsewhere"""
    tokenizer = load_tokenizer(world / "sft")
    row = dict(
        instruction="x",
        original="apple\nbear\npear",
        edited="apple\nplum\npear",
        error_spans=[[6, 10, "wrong"], [11, 15, "other"]],
    )
    l, w = (encode_response(tokenizer, row[name]) for name in ("original", "edited"))
    from diff import align

    changed_l, changed_w = align(l, w)
    figures = token_figures(
        [(row, [], w, l)],
        [[1.0 if c else 0.25 for c in changed_w]],
        [[-1.0 if c else 0.25 for c in changed_l]],
        tokenizer,
        resamples=5,
        seed=0,
    )
    assert figures["removed"]["auroc"] == figures["added"]["auroc"] == 1 and figures["eos"] == dict(
        mean=0.25, n=2
    )
    assert figures["unchanged"]["mean"] == 0.25 and figures["unchanged"]["sd"] == 0
    assert figures["error_spans"]["wrong"] > figures["error_spans"]["other"] == pytest.approx(0.5)
    assert in_spans(["ab", "", "cd"], [[1, 2, "x"], [2, 3, "y"]]) == [{"x"}, set(), {"y"}]


def test_verdicts():
    assert [
        parse_verdict(x) for x in ("Output (a)", " output (B).\n", "**Output (b)**", "Draw")
    ] == [1, 2, 2, 1.5]
    for junk in (
        None,
        "",
        "a",
        "Output (c)",
        "Output (a) or Output (b)",
        "I prefer Output (a)",
        "Output (a)\nOutput (b)",
    ):
        assert parse_verdict(junk) is None, junk
    a, b = "Output (a)", "Output (b)"
    assert [
        preference(*x)
        for x in (
            ((a, b), (1, 2)),
            ((b, a), (1, 2)),
            ((a, a), (1, 2)),
            ((b,), (1,)),
            ((b,), (2,)),
            ((a, "?"), (1, 2)),
            ((), ()),
        )
    ] == [1, 2, 1.5, 2, 1, None, 1.5]


def test_summary_exposes_order_and_length():
    def row(verdicts, p, one, two):
        return dict(
            instruction="x", output_1="a" * one, output_2="b" * two, verdicts=verdicts, preference=p
        )

    a, b = "Output (a)", "Output (b)"
    rows = [row([a, a], 1.5, 5, 1), row([a, b], 1, 5, 5), row([b, a], 2, 5, 9)] * 3 + [
        row([b, "?"], None, 5, 5)
    ]
    s = summary(rows)
    assert (s["n_unparsed"], s["n_total"], s["order_flips"]) == (1, 9, pytest.approx(100 * 3 / 9))
    assert s["first_position"] == pytest.approx(100 * (6 + 3 + 3) / 19)
    assert [(t["ours_longer_by"], t["win_rate"]) for t in s["by_length"]] == [
        ("-4 to -4", 50),
        ("0 to 0", 0),
        ("4 to 4", 100),
    ]


def test_matched(tmp_path):
    a = write(
        tmp_path / "a.jsonl",
        [
            dict(instruction=i, input=None, output=o)
            for i, o in (("x", "1"), ("y", "2"), ("x", "3"))
        ],
    )
    b = write(
        tmp_path / "b.jsonl",
        [dict(instruction=i, output=o) for i, o in (("x", "4"), ("x", "5"), ("y", "6"))],
    )
    pairs = matched(a, b, ("instruction", "input"), {"output": str})
    assert sorted((one["output"], two["output"]) for one, two in pairs) == [
        ("1", "4"),
        ("2", "6"),
        ("3", "5"),
    ]
    c = write(tmp_path / "c.jsonl", rows_of(b)[1:])
    for one, two in ((a, c), (c, a)):
        done = here(
            "judge",
            f"--outputs={one}",
            f"--reference={two}",
            "--judge=gold",
            f"--out={tmp_path}/o.jsonl",
            ok=False,
        )
        assert (
            done.returncode == 2
            and "c.jsonl lacks 1 of the rows of" in done.stderr
            and "'x'" in done.stderr
            and not (tmp_path / "o.jsonl").exists()
        )


def test_an_input_may_be_anything(tmp_path):
    a = write(tmp_path / "a.jsonl", [dict(instruction="x", input=["1", "2"], output="o")])
    assert len(matched(a, a, ("instruction", "input"), {"output": str})) == 1


def test_words():
    """A wrong first word is one line and exit code 2; --help knows the words and each word's
    fields"""
    for words in ((), ("decod",)):
        done = run("evaluate.py", *words, ok=False)
        assert (
            done.returncode == 2
            and len(done.stderr.strip().splitlines()) == 1
            and "decode, judge, winrate, best, rewards, report" in done.stderr
        )
    assert (
        "winrate" in run("evaluate.py", "--help").stdout
        and "top_p" in here("decode", "--help").stdout
    )
    for words, message in (
        (("winrate",), "one or two files of annotations"),
        (("report",), "run folders"),
        (("rewards", "--reward_model=out/nothing"), "config.json"),
    ):
        done = here(*words, ok=False)
        assert (
            done.returncode == 2
            and len(done.stderr.strip().splitlines()) == 1
            and message in done.stderr
        ), done.stderr
    done = here("judge", "--judg=gold", ok=False)
    assert done.returncode == 2 and "Did you mean 'judge'" in done.stderr


# ---------------------------------------------------------------- decode


@pytest.fixture(scope="module")
def decoded(world, tmp_path_factory):
    """30 prompts with a field of their own, some with an input, decoded by one process"""
    home = tmp_path_factory.mktemp("decode")
    rows = [
        row | {"dataset": f"d{i}", "output": "theirs", "input": "be brief" if i % 4 == 0 else ""}
        for i, row in enumerate(rows_of(world / "data/prompts.jsonl")[:30])
    ]
    write(home / "eval.jsonl", rows)
    flags = [f"--model={world}/sft", f"--data={home}/eval.jsonl", "--response_len=16", "--batch=4"]
    here("decode", *flags, f"--out={home}/one.jsonl")
    return home, flags


def test_decode_form(decoded, world):
    """AlpacaEval's model_outputs, in the data's order; each row from its own draws, as generated
    alone"""
    home, flags = decoded
    given, rows = rows_of(home / "eval.jsonl"), rows_of(home / "one.jsonl")
    assert [(r["instruction"], r["input"], r["dataset"]) for r in rows] == [
        (r["instruction"], r["input"], r["dataset"]) for r in given
    ]
    assert {r["generator"] for r in rows} == {"sft"} and sorted(
        p.name for p in home.glob("one*")
    ) == ["one.jsonl", "one.jsonl.run.json", "one.jsonl.run.lock"]
    tokenizer, model = (
        load_tokenizer(world / "sft"),
        AutoModelForCausalLM.from_pretrained(world / "sft", dtype=torch.float64).eval(),
    )
    some_ended = 0
    for i in (0, 1, 7, 29):  # a slow loop: no cache, no padding, top-p by sorting
        ids, prompt, uniforms = [], encode_prompt(tokenizer, given[i]), row_uniforms(16, 0, i)
        while len(ids) < 16 and tokenizer.eos_token_id not in ids:
            with torch.no_grad():
                probs = torch.softmax(model(torch.tensor([prompt + ids])).logits[0, -1] / 0.7, 0)
            order = sorted(range(len(probs)), key=lambda k: -probs[k])
            kept, mass = set(), 0.0
            for k in order:
                if mass >= 0.9:
                    break
                kept.add(k)
                mass += probs[k].item()
            cdf, u = 0.0, uniforms[len(ids)].item() * mass
            for k in sorted(kept):
                cdf += probs[k].item()
                if u < cdf:
                    break
            ids.append(k)
        ended = ids[-1] == tokenizer.eos_token_id
        some_ended += ended
        assert rows[i]["output"] == decode_response(tokenizer, ids) and rows[i].get("cut") == (
            None if ended else ["output"]
        ), i


def test_decode_on_four_ranks_is_the_same(decoded):
    """torchrun --nproc_per_node=4 evaluate.py decode"""
    home, flags = decoded
    run("evaluate.py", "decode", *flags, f"--out={home}/four.jsonl", ranks=4)
    assert (home / "four.jsonl").read_bytes() == (home / "one.jsonl").read_bytes()


def test_decode_goes_on(decoded):
    """Groups that a killed run has finished are taken in and not decoded again, a torn one is; a
    finished run is left alone"""
    home, flags = decoded
    out, parts, once = home / "again.jsonl", home / "again.jsonl.parts", rows_of(home / "one.jsonl")
    with mock.patch.object(
        evaluate, "write_jsonl", side_effect=[None] * 7 + [KeyboardInterrupt]
    ) as written:
        with pytest.raises(KeyboardInterrupt):
            here("decode", *flags, f"--out={out}")
    groups = [[row["row"] for row in call.args[1]] for call in written.call_args_list]
    assert sorted(i for group in groups for i in group) == list(range(30)) and all(
        len(group) <= 4 for group in groups
    )
    parts.mkdir()
    for number, group in enumerate(groups[:7]):
        write(parts / f"{number}.jsonl", [{"row": i, "output": f"kept {i}"} for i in group])
    (parts / "7.jsonl.tmp").write_text('{"row": 5, "output": "torn')
    here("decode", *flags, f"--out={out}")
    again = rows_of(out)
    assert [row["output"] for row in again] == [
        once[i]["output"] if i in groups[7] else f"kept {i}" for i in range(30)
    ]
    parts.mkdir()  # of a file that is gone, record and all: nobody knows whose
    write(parts / "0.jsonl", [{"row": i, "output": "stale"} for i in groups[0]])
    parts.rename(home / "fresh.jsonl.parts")
    here("decode", *flags, f"--out={home}/fresh.jsonl")
    assert rows_of(home / "fresh.jsonl") == once
    assert not parts.exists() and "nothing to do" in here("decode", *flags, f"--out={out}").stdout
    done = here("decode", *flags, f"--out={out}", "--top_p=0.5", ok=False)
    assert done.returncode == 2 and "top_p: 0.9 then, 0.5 now" in done.stderr
    here("decode", *flags, f"--out={out}", "--overwrite=true")
    assert rows_of(out) == once


def test_decode_refuses_what_does_not_fit(decoded):
    home, flags = decoded
    done = here("decode", *flags, f"--out={home}/long.jsonl", "--response_len=100000", ok=False)
    assert done.returncode == 2 and "positions for" in done.stderr and not list(home.glob("long*"))


# ---------------------------------------------------------------- judge


@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    """40 pairs; in pair 7 both answers are the same, in pair 3 they hold braces and half a
    surrogate"""
    home = tmp_path_factory.mktemp("judge")
    texts = [(f"a{i}" * (i % 5 + 1), f"b{i}" * (i % 3 + 1)) for i in range(40)]
    texts[7], texts[3] = ("same", "same"), ("{second} \ud800", "{instruction} \\1")
    for name, side in (("theirs", 0), ("ours", 1)):
        write(
            home / f"{name}.jsonl",
            [
                dict(
                    instruction=f"Do {i}.",
                    input="with {first}" if i % 2 else "",
                    output=pair[side],
                    generator=name,
                    dataset=f"{name} {i % 2}",
                )
                for i, pair in enumerate(texts)
            ],
        )
    return home, [f"--reference={home}/theirs.jsonl", f"--outputs={home}/ours.jsonl"]


class Judge(Standin):
    """Says Output (a) or (b): always the first, or the longer one"""

    rule = "first"

    def message(self, request):
        prompt = request["messages"][0]["content"]
        first, second = (
            prompt.split("## Output (a):\n")[1]
            .split("\n\n## Which is best")[0]
            .split("\n\n## Output (b):\n")
        )
        verdict = (
            "Output (b)" if self.rule == "longer" and len(second) > len(first) else "Output (a)"
        )
        status, body = super().message(
            request
            | {
                "messages": [
                    {
                        "role": "user",
                        "content": f"{prompt}\nResponse: {verdict}\n\nPlease make minimal",
                    }
                ]
            }
        )
        for block in body.get("content", [])[1:]:
            block["text"] = block["text"].replace("<edited>", "").replace("</edited>", "")
        return status, body


def claude(server, **more):
    return dict(ANTHROPIC_BASE_URL=server.url, ANTHROPIC_API_KEY="a-key", **more)


def test_always_first_is_exposed(contest, tmp_path):
    """python evaluate.py judge, then winrate: flip rate 100%, win rate 50%"""
    home, flags = contest
    with Judge() as server:
        here(
            "judge",
            *flags,
            f"--out={tmp_path}/a.jsonl",
            "--prompt=length_neutral",
            **claude(server),
        )
        assert len(server.asked) == 78 and all(
            "Length is no merit" in prompt for prompt in server.asked
        )
        assert sum("## Input:\nwith {first}\n" in prompt for prompt in server.asked) == 38, (
            "odd pairs but the identical one, in both orders"
        )
        assert not any("## Input:\n\n" in prompt for prompt in server.asked), (
            "a row without input loses that block"
        )
        for text in (
            "(a):\n{second} ?\n",
            "(b):\n{second} ?\n",
            "(a):\n{instruction} \\1\n",
            "(b):\n{instruction} \\1\n",
        ):
            assert any(f"## Output {text}" in prompt for prompt in server.asked), (
                "an answer is put in as it is"
            )
        here("judge", *flags, f"--out={tmp_path}/b.jsonl", "--orders=1", **claude(server))
    figures = json.loads(here("winrate", f"{tmp_path}/a.jsonl", "--json=true").stdout)
    assert (
        figures["win_rate"],
        figures["n_draws"],
        figures["order_flips"],
        figures["first_position"],
    ) == (50, 40, 100, 100)
    rows = rows_of(tmp_path / "a.jsonl")
    assert rows[0].keys() >= {
        "instruction",
        "output_1",
        "output_2",
        "generator_1",
        "generator_2",
        "annotator",
        "preference",
        "verdicts",
    }
    assert [row["dataset"] for row in rows[:2]] == ["theirs 0", "theirs 1"], (
        "other fields of the reference's rows pass through"
    )
    assert (
        rows[7]["verdicts"] == []
        and rows[7]["preference"] == 1.5
        and rows[0]["verdicts"] == ["Output (a)"] * 2
    )
    once = rows_of(tmp_path / "b.jsonl")
    assert {row["preference"] for row in once} == {1, 1.5, 2} and all(
        row["preference"] == row["shown_first"][0] for row in once if row["verdicts"]
    )


def test_faults_lose_no_pair(contest, tmp_path):
    """429, 529, dropped, garbage, cut: asked again. A refusal, and what is never readable: null,
    counted, asked by the next run"""
    home, flags = contest

    def fault(prompt, turn):
        for number, kind in enumerate(("429", "529", "garbage", "drop", "truncate", "empty"), 10):
            if f"Do {number}." in prompt and turn == 1:
                return kind
        return (
            "refusal"
            if "Do 20." in prompt and turn < 3
            else "truncate"
            if "Do 21." in prompt and turn < 5
            else ""
        )

    with Judge(fault=fault) as server:
        server.rule = "longer"
        done = here("judge", *flags, f"--out={tmp_path}/a.jsonl", **claude(server))
        rows = rows_of(tmp_path / "a.jsonl")
        assert len(rows) == 40 and [
            row["instruction"] for row in rows if row["preference"] is None
        ] == ["Do 20.", "Do 21."]
        assert (
            "refusal" in rows[20]["error"]
            and "max_tokens" in rows[21]["error"]
            and "n_unparsed        2" in done.stdout
        )
        assert all(
            row["preference"] == (1 if len(row["output_1"]) > len(row["output_2"]) else 2)
            for row in rows
            if len(row["output_1"]) != len(row["output_2"]) and row["preference"]
        )
        asked = sum(server.asked.values())
        here("judge", *flags, f"--out={tmp_path}/a.jsonl", **claude(server))
        here("judge", *flags, f"--out={tmp_path}/a.jsonl", **claude(server))
        assert sum(server.asked.values()) - asked <= 10 and max(server.answered.values()) == 1, (
            "only what was missing is asked again"
        )
        assert all(
            row["preference"] is not None and "error" not in row
            for row in rows_of(tmp_path / "a.jsonl")
        )
        assert (
            "nothing to do"
            in here("judge", *flags, f"--out={tmp_path}/a.jsonl", **claude(server)).stdout
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.jsonl",
        "a.jsonl.run.json",
        "a.jsonl.run.lock",
    ]


@pytest.mark.parametrize("batch", [False, True])
def test_killed_and_run_again(contest, tmp_path, batch):
    """kill -9, then the same command: the same table"""
    home, flags = contest
    with Judge(delay=0.1, batch_seconds=1.0) as server:
        server.rule = "longer"
        words = [
            sys.executable,
            "evaluate.py",
            "judge",
            *flags,
            f"--out={tmp_path}/a.jsonl",
            "--concurrency=2",
            f"--batch_api={batch}",
        ]
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | claude(server),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        log, until = tmp_path / "a.jsonl.replies", time.time() + 60
        while time.time() < until and not (
            server.batches if batch else log.exists() and log.read_bytes().count(b"\n") >= 10
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "a.jsonl").exists()
        server.delay = 0
        if not batch:
            log.write_bytes(
                log.read_bytes() + b'{"case": [39'
            )  # as a kill in the middle of a write leaves it
        here(*words[2:], **claude(server))
        assert len(server.batches) == batch and sum(server.asked.values()) <= 78 + 2, (
            "at most what was in flight is asked twice"
        )
        here("judge", *flags, f"--out={tmp_path}/b.jsonl", **claude(server))
    assert rows_of(tmp_path / "a.jsonl") == rows_of(tmp_path / "b.jsonl")


def test_dry_run_and_no_key(contest, tmp_path):
    home, flags = contest
    done = here(
        "judge", *flags, f"--out={tmp_path}/a.jsonl", "--dry_run=true", ANTHROPIC_API_KEY=""
    )
    assert "78" in done.stdout and "Which is best" in done.stdout and not list(tmp_path.iterdir())
    done = here("judge", *flags, f"--out={tmp_path}/a.jsonl", ok=False, ANTHROPIC_API_KEY="")
    assert (
        done.returncode == 2
        and "ANTHROPIC_API_KEY" in done.stderr
        and not (tmp_path / "a.jsonl").exists()
    )
    done = here(
        "judge",
        *flags,
        f"--out={tmp_path}/a.jsonl",
        "--model=claude-next",
        ok=False,
        ANTHROPIC_API_KEY="",
    )
    assert "ANTHROPIC_API_KEY" in done.stderr, "nothing was asked yet: the model may change"
    done = here("judge", *flags, f"--out={tmp_path}/b.jsonl", "--judge=gold", "--dry_run=true")
    assert "does not call Claude" in done.stdout
    done = here(
        "judge", *flags, f"--out={tmp_path}/b.jsonl", "--judge=gold", ok=False
    )  # rows that are not of its world
    assert done.returncode == 2 and not list(tmp_path.glob("b*"))
    for word, flag in (
        ("judge", "--concurrency=0"),
        ("judge", "--micro_batch=0"),
        ("judge", "--max_tokens=0"),
    ):
        done = here(word, *flags, f"--out={tmp_path}/b.jsonl", flag, ok=False)
        assert done.returncode == 2 and "must be at least 1" in done.stderr
    (tmp_path / "c.jsonl.batches").write_text('[{"id": "b", "keys": ["0-1"]}]')
    done = here("judge", *flags, f"--out={tmp_path}/c.jsonl", ok=False, ANTHROPIC_API_KEY="x")
    assert done.returncode == 2 and "paid for: go on with --batch_api=true" in done.stderr


def test_gold_judge(world, tmp_path):
    """Fewer flaws win, as many is a draw"""
    from data.toy.prepare import gold

    theirs = rows_of(world / "data/eval.jsonl")
    ours = [
        row | {"output": other["output"]} for row, other in zip(theirs, theirs[1:] + theirs[:1])
    ]
    write(tmp_path / "ours.jsonl", ours[::-1])
    here(
        "judge",
        f"--outputs={tmp_path}/ours.jsonl",
        f"--reference={world}/data/eval.jsonl",
        "--judge=gold",
        f"--out={tmp_path}/a.jsonl",
    )
    rows, flaws = rows_of(tmp_path / "a.jsonl"), {}
    for row in rows:
        a, b = gold(row, row["output_1"]), gold(row, row["output_2"])
        assert row["preference"] == (1 if a < b else 2 if b < a else 1.5) and row["scores"] == [
            -a,
            -b,
        ]
        flaws[a < b, a == b] = True
    assert len(rows) == len(theirs) and (True, False) in flaws, "the rows must tell something"


@functools.cache
def plain(folder):
    model = AutoModelForTokenClassification.from_pretrained(
        folder, dtype=torch.float64, num_labels=1, token_classification_bias=False
    )
    return model.eval(), load_tokenizer(folder)


@torch.no_grad()
def plain_rewards(folder, row, answer):
    """Token rewards of an answer, and the score of the prompt alone, by plain transformers in
    float64"""
    model, tokenizer = plain(folder)
    prompt, response = encode_prompt(tokenizer, row), encode_response(tokenizer, answer)
    heads = model(torch.tensor([prompt + response])).logits[0, :, 0]
    return heads[len(prompt) :].tolist(), heads[len(prompt) - 1].item()


def test_reward_model_judge(world, tmp_path):
    theirs = rows_of(world / "data/eval.jsonl")
    write(tmp_path / "ours.jsonl", [row | {"output": row["output"] + "\nfig"} for row in theirs])
    flags = [
        f"--outputs={tmp_path}/ours.jsonl",
        f"--reference={world}/data/eval.jsonl",
        "--judge=reward_model",
        "--micro_batch=3",
    ]
    for name in ("rm", "rm_sequence"):
        here("judge", *flags, f"--reward_model={world}/{name}", f"--out={tmp_path}/{name}.jsonl")
        for row in rows_of(tmp_path / f"{name}.jsonl")[:3]:
            for text, found in zip((row["output_1"], row["output_2"]), row["scores"]):
                r, _ = plain_rewards(world / name, row, text)
                assert found == pytest.approx(
                    statistics.fmean(r) if name == "rm" else r[-1], abs=1e-4
                )
            assert row["preference"] == (2 if row["scores"][1] > row["scores"][0] else 1)
    run(
        "evaluate.py",
        "judge",
        *flags,
        f"--reward_model={world}/rm",
        f"--out={tmp_path}/two.jsonl",
        ranks=2,
    )
    for one, two in zip(rows_of(tmp_path / "rm.jsonl"), rows_of(tmp_path / "two.jsonl")):
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-5)


# ---------------------------------------------------------------- rewards


def test_rewards(world, tmp_path):
    """python evaluate.py rewards: accuracy and token figures against plain transformers, for both
    kinds of reward model, on 2 ranks too"""
    edits = [
        row
        for row in rows_of(world / "edits.jsonl")
        if row["edited"] is not None and row["edited"] != row["original"]
    ]
    write(
        tmp_path / "edits.jsonl",
        [*edits[:10], edits[0] | {"edited": None}, edits[1] | {"edited": edits[1]["original"]}],
    )
    prefs = rows_of(world / "data/pref.jsonl")[:12]
    write(tmp_path / "pref.jsonl", prefs)
    prefs = [row for row in prefs if row["output_1"] != row["output_2"]]
    for name in ("rm", "rm_sequence"):
        flags = [
            f"--reward_model={world}/{name}",
            tmp_path / "pref.jsonl",
            tmp_path / "edits.jsonl",
            "--resamples=5",
            "--micro_batch=5",
        ]
        first, second = json.loads(
            here("rewards", *flags, "--json=true", f"--out={tmp_path}/{name}.json").stdout
        )
        assert json.loads((tmp_path / f"{name}.json").read_text()) == [first, second]

        def R(row, text):
            r, _ = plain_rewards(world / name, row, text)
            return statistics.fmean(r) if name == "rm" else r[-1]

        margins = [
            (R(row, row["output_1"]) - R(row, row["output_2"])) * (3 - 2 * row["preference"])
            for row in prefs
        ]
        assert first["n"] == len(prefs) and first["accuracy"] == pytest.approx(
            statistics.fmean(100.0 * (m > 0) for m in margins)
        )
        assert first["margin"] == pytest.approx(statistics.fmean(margins), abs=1e-5) and first[
            "standard_error"
        ] == pytest.approx(
            statistics.stdev(100.0 * (m > 0) for m in margins) / math.sqrt(len(margins))
        )
        assert (
            second["n"] == 10
            and second["dropped"] == {"failed edit": 1, "identical": 1}
            and second["edited_wins"] == 100
        )
        at_eos = []
        for row in edits[:10]:
            for text in (row["original"], row["edited"]):
                r, before = plain_rewards(world / name, row, text)
                at_eos.append(r[-1] - r[-2] if name == "rm_sequence" else r[-1])
        assert second["tokens"]["eos"] == dict(
            mean=pytest.approx(statistics.fmean(at_eos), abs=1e-5), n=20
        )
    done = here("rewards", *flags, f"--out={world}/rm", "--overwrite=true", ok=False)
    assert (
        done.returncode == 2
        and "must end in .json" in done.stderr
        and (world / "rm/config.json").exists()
    )
    write(
        tmp_path / "float.jsonl",
        [row | {"preference": float(row["preference"]), "cut": None} for row in prefs],
    )
    (again,) = json.loads(
        here(
            "rewards",
            f"--reward_model={world}/rm_sequence",
            tmp_path / "float.jsonl",
            "--resamples=5",
            "--json=true",
        ).stdout
    )
    assert again["margin"] == pytest.approx(first["margin"], abs=1e-5)
    two = json.loads(run("evaluate.py", "rewards", *flags, "--json=true", ranks=2).stdout)
    assert two[0]["margin"] == pytest.approx(first["margin"], abs=1e-5) and two[1]["tokens"][
        "removed"
    ]["auroc"] == pytest.approx(second["tokens"]["removed"]["auroc"], abs=1e-3)
