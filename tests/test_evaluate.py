"""pytest tests/test_evaluate.py: the words of evaluate.py, their statistics by brute force, the
judge against a stand-in for Claude."""
import contextlib, functools, io, json, math, os, random, signal, statistics, subprocess, sys, time
from collections import defaultdict
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import evaluate
from claude_standin import Standin
from common import decode_response, encode_prompt, encode_response, load_tokenizer, row_uniforms
from conftest import ROOT, rows_of, run
from diff import align
from evaluate import calibration, matched, paired, parse_verdict, preference, summary, win_rate
from extras.report.rewards import auroc, in_spans, token_auroc, token_figures
from plumbing import record
from plumbing.command_line import load_config

PUBLISHED = ROOT.parent / "shared/data/alpaca_eval"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def here(word, *flags, ok=True, **env):
    """evaluate.py <word> <flags> in this process, which saves the seconds that importing takes ->
    returncode, stdout, stderr"""
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    hook = sys.excepthook
    record.LOCKS.clear()  # as if the process before had ended
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch.dict(os.environ, env))
        try:
            function, Config = evaluate.WORDS[word]
            function(load_config(Config, f"evaluate.{word}", list(map(str, flags))))
        except SystemExit as end:
            code = end.code
    sys.excepthook = hook
    assert not ok or code == 0, err.getvalue()
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def assert_refused(done, *words):
    """Exit code 2 and one line that holds these words"""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- statistics

def test_win_rate_by_hand():
    """Draws as 1.5 and as 0, a verdict that was not read, a preference between draw and win"""
    shares = [0, 1, 1, 0.5, 0.5, 0.25]
    error = 100 * statistics.stdev(shares) / math.sqrt(6)
    assert win_rate([1, 2, 2, 1.5, 0, None, 1.25]) == dict(
        win_rate=pytest.approx(100 * sum(shares) / 6), standard_error=pytest.approx(error),
        n_wins=2, n_wins_base=2, n_draws=2, n_total=6)
    assert win_rate(iter([])) == dict(win_rate=None, standard_error=None, n_wins=0, n_wins_base=0,
                                      n_draws=0, n_total=0)
    assert win_rate([2])["standard_error"] is None
    with pytest.raises(ValueError):
        win_rate([3])


@pytest.mark.skipif(not PUBLISHED.exists(),
                    reason="the published judgements (../shared/data/alpaca_eval) are not here")
def test_win_rate_published_to_every_digit():
    """python evaluate.py winrate published_annotations.jsonl"""
    row = json.loads((PUBLISHED / "published_result.json").read_text())[0]
    names = ("win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total")
    command = ["evaluate.py", "winrate", PUBLISHED / "published_annotations.jsonl"]
    figures = json.loads(run(*command, "--json=true").stdout)
    words = run(*command).stdout.split()
    for name in names:
        assert str(figures[name]) == row[name]
        shown = float(words[words.index(name) + 1])  # rounded
        assert shown == pytest.approx(float(row[name]), rel=1e-3)


def test_paired():
    # a wins a fifth of what b loses. They are correlated, so the pairing matters.
    draw = random.Random(0)
    b = [draw.choice([1, 2]) for _ in range(300)]
    a = [2 if draw.random() < 0.2 else p for p in b]
    found = paired([*a, None, 2], [*b, 1, None], seed=1)
    d = [100 * (x - y) for x, y in zip(a, b)]
    difference = win_rate(a)["win_rate"] - win_rate(b)["win_rate"]
    assert found["n_total"] == 300
    assert found["difference"] == pytest.approx(difference)

    error = found["standard_error"]
    assert error == pytest.approx(statistics.stdev(d) / math.sqrt(300))
    unpaired = win_rate(a)["standard_error"] * math.sqrt(2)
    assert error < 0.6 * unpaired, "unpaired errors would be larger"
    by_bootstrap = (found["high"] - found["low"]) / (2 * 1.96)
    assert abs(by_bootstrap - error) < 0.15 * error

    assert found["p_value"] < 0.001
    assert paired(a, a)["p_value"] == 1.0
    surest = paired([2] * 9, [1] * 9, resamples=500)
    assert surest["p_value"] == 2 / 500, "no number of resamples proves that p is 0"
    assert paired([0, 2], [1.5, 1])["difference"] == 50, "0 is a draw"
    swapped = paired(b, a, seed=1)
    assert swapped["low"] == pytest.approx(-found["high"])
    assert swapped["high"] == pytest.approx(-found["low"])


def test_auroc_by_brute_force():
    draw = random.Random(0)
    for _ in range(30):
        n = draw.randint(2, 40)
        scores = [draw.randint(0, 6) / 3 for _ in range(n)]
        positive = [draw.random() < 0.4 for _ in range(n)]
        times = [draw.randint(0, 3) for _ in range(n)]

        # Every pair of a positive and a negative token, as often as both are drawn.
        pairs = 0
        wins = 0
        for i in range(n):
            for j in range(n):
                if positive[i] and not positive[j]:
                    weight = times[i] * times[j]
                    pairs += weight
                    if scores[i] > scores[j]:
                        wins += weight
                    elif scores[i] == scores[j]:
                        wins += weight / 2

        found = auroc(torch.tensor(scores), torch.tensor(positive), torch.tensor(times))
        if pairs == 0:
            assert found is None
        else:
            assert abs(found - wins / pairs) < 1e-12
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([True, True])) is None


def test_token_auroc_resamples_pairs_not_tokens():
    """Ten copies of a pair's tokens say no more than one: the error must not shrink"""
    draw = random.Random(1)
    tokens = []
    for i in range(40):
        for _ in range(3):
            tokens.append((draw.gauss(i % 3, 1), draw.random() < 0.5, i))
    one = token_auroc(tokens, resamples=200, seed=0)
    ten = token_auroc(tokens * 10, resamples=200, seed=0)
    assert one["auroc"] == pytest.approx(ten["auroc"])
    assert one["standard_error"] == pytest.approx(ten["standard_error"], rel=1e-6)


def test_calibration():
    margin = math.log(0.7 / 0.3)  # 70% sure
    assert calibration([margin] * 7 + [-margin] * 3)["ece"] == pytest.approx(0, abs=1e-9)
    margin = math.log(0.95 / 0.05)  # 95% sure, and right half of the time
    sure = calibration([margin] * 5 + [-margin] * 5)
    assert sure["ece"] == pytest.approx(0.45)
    assert sure["bins"] == [dict(confidence=pytest.approx(0.95), accuracy=0.5, n=10)]
    assert calibration([0.0] * 4)["ece"] == 0
    assert calibration([1e4])["bins"][0]["confidence"] == 1


def test_token_figures_by_hand(world):
    """A reward that is -1 on what was removed, +1 on what was added, 0.25 on other tokens"""
    tokenizer = load_tokenizer(world / "sft")
    row = dict(instruction="x", original="apple\nbear\npear", edited="apple\nplum\npear",
               error_spans=[[6, 10, "wrong"], [11, 15, "other"]])
    l = encode_response(tokenizer, row["original"])
    w = encode_response(tokenizer, row["edited"])
    changed_l, changed_w = align(l, w)
    r_l = [-1.0 if changed else 0.25 for changed in changed_l]
    r_w = [1.0 if changed else 0.25 for changed in changed_w]
    figures = token_figures([(row, [], w, l)], [r_w], [r_l], tokenizer, resamples=5, seed=0)
    assert figures["removed"]["auroc"] == 1
    assert figures["added"]["auroc"] == 1
    assert figures["eos"] == dict(mean=0.25, n=2)
    assert figures["unchanged"]["mean"] == 0.25
    assert figures["unchanged"]["sd"] == 0
    spans = figures["error_spans"]
    assert spans["wrong"] > spans["other"] == pytest.approx(0.5)
    assert in_spans(["ab", "", "cd"], [[1, 2, "x"], [2, 3, "y"]]) == [{"x"}, set(), {"y"}]


# ---------------------------------------------------------------- verdicts and their summary

A = "Output (a)"
B = "Output (b)"


def test_verdicts():
    for reply, verdict in ((A, 1), (" output (B).\n", 2), ("**Output (b)**", 2), ("Draw", 1.5)):
        assert parse_verdict(reply) == verdict
    junk = (None, "", "a", "Output (c)", "Output (a) or Output (b)", "I prefer Output (a)",
            "Output (a)\nOutput (b)")
    for reply in junk:
        assert parse_verdict(reply) is None, reply

    assert preference((A, B), (1, 2)) == 1
    assert preference((B, A), (1, 2)) == 2
    assert preference((A, A), (1, 2)) == 1.5
    assert preference((B,), (1,)) == 2
    assert preference((B,), (2,)) == 1
    assert preference((A, "?"), (1, 2)) is None
    assert preference((), ()) == 1.5, "equal answers: nobody was asked"


def test_summary_exposes_order_and_length():
    def row(verdicts, p, length_1, length_2):
        return dict(instruction="x", output_1="a" * length_1, output_2="b" * length_2,
                    verdicts=verdicts, preference=p)

    flip = row([A, A], 1.5, 5, 1)
    loss = row([A, B], 1, 5, 5)
    win = row([B, A], 2, 5, 9)
    unread = row([B, "?"], None, 5, 5)
    found = summary([flip, loss, win] * 3 + [unread])
    assert found["n_unparsed"] == 1
    assert found["n_total"] == 9
    assert found["order_flips"] == pytest.approx(100 * 3 / 9)
    assert found["first_position"] == pytest.approx(100 * (6 + 3 + 3) / 19)
    thirds = [(third["ours_longer_by"], third["win_rate"]) for third in found["by_length"]]
    assert thirds == [("-4 to -4", 50), ("0 to 0", 0), ("4 to 4", 100)]


def test_matched(tmp_path):
    """Duplicates are matched in order; a question that one file lacks is refused"""
    a = write(tmp_path / "a.jsonl", [
        dict(instruction="x", input=None, output="1"),
        dict(instruction="y", input=None, output="2"),
        dict(instruction="x", input=None, output="3"),
    ])
    b = write(tmp_path / "b.jsonl", [
        dict(instruction="x", output="4"),
        dict(instruction="x", output="5"),
        dict(instruction="y", output="6"),
    ])
    pairs = matched(a, b, ("instruction", "input"), {"output": str})
    outputs = sorted((one["output"], two["output"]) for one, two in pairs)
    assert outputs == [("1", "4"), ("2", "6"), ("3", "5")]

    c = write(tmp_path / "c.jsonl", rows_of(b)[1:])
    out = tmp_path / "o.jsonl"
    for ours, theirs in ((a, c), (c, a)):
        done = here("judge", f"--outputs={ours}", f"--reference={theirs}", "--judge=gold",
                    f"--out={out}", ok=False)
        assert_refused(done, "c.jsonl lacks 1 of the rows of", "'x'")
        assert not out.exists()


def test_an_input_may_be_missing_or_null(tmp_path):
    for row in (dict(instruction="x", output="o"), dict(instruction="x", input=None, output="o")):
        a = write(tmp_path / "a.jsonl", [row])
        assert len(matched(a, a, ("instruction", "input"), {"output": str})) == 1


def test_words():
    """A wrong first word is one line and exit code 2; --help knows the words and each word's
    fields"""
    for words in ((), ("decod",)):
        done = run("evaluate.py", *words, ok=False)
        assert_refused(done, "decode, judge, winrate, best, rewards, report")
    assert "winrate" in run("evaluate.py", "--help").stdout
    assert "top_p" in here("decode", "--help").stdout
    assert_refused(here("winrate", ok=False), "one or two files of annotations")
    assert_refused(here("report", ok=False), "run folders")
    assert_refused(here("rewards", "--reward_model=out/nothing", ok=False), "config.json")
    assert_refused(here("judge", "--judg=gold", ok=False), "Did you mean 'judge'")


# ---------------------------------------------------------------- decode

@pytest.fixture(scope="module")
def decoded(world, tmp_path_factory):
    """30 prompts with a field of their own, some with an input, decoded by one process"""
    home = tmp_path_factory.mktemp("decode")
    rows = []
    for i, row in enumerate(rows_of(world / "data/prompts.jsonl")[:30]):
        given = "be brief" if i % 4 == 0 else ""
        rows.append(row | {"dataset": f"d{i}", "output": "theirs", "input": given})
    write(home / "eval.jsonl", rows)
    flags = [f"--model={world}/sft", f"--data={home}/eval.jsonl", "--response_len=16", "--batch=4"]
    here("decode", *flags, f"--out={home}/one.jsonl")
    return home, flags


@torch.no_grad()
def decode_slowly(model, prompt, uniforms, eos_id):
    """Sample at temperature 0.7 and top-p 0.9: no cache, no padding, top-p by sorting"""
    ids = []
    while len(ids) < len(uniforms) and eos_id not in ids:
        logits = model(torch.tensor([prompt + ids])).logits[0, -1]
        probs = torch.softmax(logits / 0.7, 0).tolist()

        # The likeliest tokens, up to the first that brings their mass to 0.9.
        kept = []
        mass = 0.0
        for token in sorted(range(len(probs)), key=lambda k: -probs[k]):
            if mass >= 0.9:
                break
            kept.append(token)
            mass += probs[token]

        # The first token, by id, at which the sum of the kept probabilities is above u.
        u = uniforms[len(ids)].item() * mass
        cdf = 0.0
        for token in sorted(kept):
            cdf += probs[token]
            if u < cdf:
                break
        ids.append(token)
    return ids


def test_decode_form(decoded, world):
    """AlpacaEval's model_outputs, in the data's order; each row from its own draws, as generated
    alone"""
    home, flags = decoded
    given = rows_of(home / "eval.jsonl")
    rows = rows_of(home / "one.jsonl")
    assert len(rows) == len(given)
    for row, data in zip(rows, given):
        for field in ("instruction", "input", "dataset"):
            assert row[field] == data[field]
        assert row["generator"] == "sft"
    left = sorted(path.name for path in home.glob("one*"))
    assert left == ["one.jsonl", "one.jsonl.run.json", "one.jsonl.run.lock"]

    tokenizer = load_tokenizer(world / "sft")
    model = AutoModelForCausalLM.from_pretrained(world / "sft", dtype=torch.float64).eval()
    for i in (0, 1, 7, 29):
        prompt = encode_prompt(tokenizer, given[i])
        uniforms = row_uniforms(16, 0, i)
        ids = decode_slowly(model, prompt, uniforms, tokenizer.eos_token_id)
        ended = ids[-1] == tokenizer.eos_token_id
        assert rows[i]["output"] == decode_response(tokenizer, ids), i
        assert rows[i].get("cut") == (None if ended else ["output"]), i


def test_decode_on_four_ranks_is_the_same(decoded):
    """torchrun --nproc_per_node=4 evaluate.py decode"""
    home, flags = decoded
    run("evaluate.py", "decode", *flags, f"--out={home}/four.jsonl", ranks=4)
    assert (home / "four.jsonl").read_bytes() == (home / "one.jsonl").read_bytes()


def test_decode_resumes(decoded):
    """Groups that a killed run has finished are kept and not decoded again; a torn one is decoded
    again; a finished run is left alone"""
    home, flags = decoded
    out = home / "again.jsonl"
    parts = home / "again.jsonl.parts"
    once = rows_of(home / "one.jsonl")

    # Ctrl-C in the eighth group. What was to be written tells which rows are in which group.
    ends = [None] * 7 + [KeyboardInterrupt]
    with mock.patch.object(evaluate, "write_jsonl", side_effect=ends) as written:
        with pytest.raises(KeyboardInterrupt):
            here("decode", *flags, f"--out={out}")
    groups = [[row["row"] for row in call.args[1]] for call in written.call_args_list]
    assert sorted(i for group in groups for i in group) == list(range(30))
    assert all(len(group) <= 4 for group in groups)

    # Seven groups are finished, with answers of our own to tell them by; the eighth is torn.
    parts.mkdir()
    for number, group in enumerate(groups[:7]):
        kept = [{"row": i, "output": f"kept {i}"} for i in group]
        write(parts / f"{number}.jsonl", kept)
    (parts / "7.jsonl.tmp").write_text('{"row": 5, "output": "torn')
    here("decode", *flags, f"--out={out}")
    for i, row in enumerate(rows_of(out)):
        assert row["output"] == (once[i]["output"] if i in groups[7] else f"kept {i}")
    assert not parts.exists()

    # Parts without a record: nobody knows whose they are, so they are not used.
    stale = home / "fresh.jsonl.parts"
    stale.mkdir()
    write(stale / "0.jsonl", [{"row": i, "output": "stale"} for i in groups[0]])
    here("decode", *flags, f"--out={home}/fresh.jsonl")
    assert rows_of(home / "fresh.jsonl") == once

    # The finished run.
    assert "nothing to do" in here("decode", *flags, f"--out={out}").stdout
    done = here("decode", *flags, f"--out={out}", "--top_p=0.5", ok=False)
    assert_refused(done, "top_p: 0.9 then, 0.5 now")
    here("decode", *flags, f"--out={out}", "--overwrite=true")
    assert rows_of(out) == once


def test_decode_refuses_what_it_cannot_do(decoded):
    home, flags = decoded
    out = f"--out={home}/long.jsonl"
    done = here("decode", *flags, out, "--response_len=100000", ok=False)
    assert_refused(done, "positions for")
    for flag in ("--batch=0", "--response_len=0", "--temperature=-1", "--temperature=nan"):
        done = here("decode", *flags, out, flag, ok=False)
        assert_refused(done, flag.partition("=")[0], "must be at least")
    for flag in ("--top_p=0", "--top_p=1.5", "--top_p=nan"):
        done = here("decode", *flags, out, flag, ok=False)
        assert_refused(done, "--top_p must be above 0 and at most 1")
    assert not list(home.glob("long*"))


# ---------------------------------------------------------------- judge

@pytest.fixture(scope="module")
def contest(tmp_path_factory):
    """40 pairs. In pair 7 both answers are the same; in pair 3 they hold braces and half a
    surrogate pair."""
    home = tmp_path_factory.mktemp("judge")
    texts = [(f"a{i}" * (i % 5 + 1), f"b{i}" * (i % 3 + 1)) for i in range(40)]
    texts[7] = ("same", "same")
    texts[3] = ("{second} \ud800", "{instruction} \\1")
    for name, side in (("theirs", 0), ("ours", 1)):
        rows = []
        for i, pair in enumerate(texts):
            given = "with {first}" if i % 2 else ""
            rows.append(dict(instruction=f"Do {i}.", input=given, output=pair[side],
                             generator=name, dataset=f"{name} {i % 2}"))
        write(home / f"{name}.jsonl", rows)
    return home, [f"--reference={home}/theirs.jsonl", f"--outputs={home}/ours.jsonl"]


class Judge(Standin):
    """Says Output (a) or (b): always the first, or the longer one"""
    rule = "first"

    def message(self, request):
        prompt = request["messages"][0]["content"]
        answers = prompt.split("## Output (a):\n")[1].split("\n\n## Which is best")[0]
        first, second = answers.split("\n\n## Output (b):\n")
        verdict = B if self.rule == "longer" and len(second) > len(first) else A

        # The stand-in replies with an edit of "Response: ...". It keeps a verdict as it is.
        content = f"{prompt}\nResponse: {verdict}\n\nPlease make minimal"
        messages = [{"role": "user", "content": content}]
        status, body = super().message(request | {"messages": messages})
        for block in body.get("content", [])[1:]:
            block["text"] = block["text"].replace("<edited>", "").replace("</edited>", "")
        return status, body


def claude(server):
    """The environment in which Claude is the stand-in"""
    return dict(ANTHROPIC_BASE_URL=server.url, ANTHROPIC_API_KEY="a-key")


def test_always_first_is_exposed(contest, tmp_path):
    """python evaluate.py judge, then winrate: flip rate 100%, win rate 50%"""
    home, flags = contest
    with Judge() as server:
        here("judge", *flags, f"--out={tmp_path}/a.jsonl", "--prompt=length_neutral",
             **claude(server))
        asked = list(server.asked)
        here("judge", *flags, f"--out={tmp_path}/b.jsonl", "--orders=1", **claude(server))

    # The prompts: odd pairs have an input, but pair 7, the identical one, is not asked.
    assert len(asked) == 78
    assert all("Length is no merit" in prompt for prompt in asked)
    assert sum("## Input:\nwith {first}\n" in prompt for prompt in asked) == 38
    assert not any("## Input:\n\n" in prompt for prompt in asked), "no input, no block"
    for answer in ("{second} ?", "{instruction} \\1"):
        for place in ("(a)", "(b)"):
            shown = f"## Output {place}:\n{answer}\n"
            assert any(shown in prompt for prompt in asked), "an answer is put in as it is"

    figures = json.loads(here("winrate", f"{tmp_path}/a.jsonl", "--json=true").stdout)
    assert figures["win_rate"] == 50
    assert figures["n_draws"] == 40
    assert figures["order_flips"] == 100
    assert figures["first_position"] == 100

    rows = rows_of(tmp_path / "a.jsonl")
    assert rows[0].keys() >= {"instruction", "output_1", "output_2", "generator_1", "generator_2",
                              "annotator", "preference", "verdicts"}
    assert rows[0]["dataset"] == "theirs 0", "other fields of the reference's rows are kept"
    assert rows[1]["dataset"] == "theirs 1"
    assert rows[0]["verdicts"] == [A, A]
    assert rows[7]["verdicts"] == []
    assert rows[7]["preference"] == 1.5

    # One order, a random one: the answer shown first wins.
    rows = rows_of(tmp_path / "b.jsonl")
    assert {row["preference"] for row in rows} == {1, 1.5, 2}
    for row in rows:
        if row["verdicts"]:
            assert row["preference"] == row["shown_first"][0]


def test_faults_lose_no_pair(contest, tmp_path):
    """429, 529, dropped, garbage, cut: asked again. A refusal, and what is never readable: null,
    counted, asked by the next run"""
    home, flags = contest
    faults = {"Do 10.": "429", "Do 11.": "529", "Do 12.": "garbage", "Do 13.": "drop",
              "Do 14.": "truncate", "Do 15.": "empty"}

    def fault(prompt, turn):
        if "Do 20." in prompt and turn < 3:
            return "refusal"
        if "Do 21." in prompt and turn < 5:
            return "truncate"
        for instruction, kind in faults.items():
            if instruction in prompt and turn == 1:
                return kind
        return ""

    command = ["judge", *flags, f"--out={tmp_path}/a.jsonl"]
    with Judge(fault=fault) as server:
        server.rule = "longer"
        done = here(*command, **claude(server))
        rows = rows_of(tmp_path / "a.jsonl")
        assert len(rows) == 40
        unread = [row["instruction"] for row in rows if row["preference"] is None]
        assert unread == ["Do 20.", "Do 21."]
        assert "refusal" in rows[20]["error"]
        assert "max_tokens" in rows[21]["error"]
        assert "n_unparsed        2" in done.stdout
        for row in rows:
            length_1 = len(row["output_1"])
            length_2 = len(row["output_2"])
            if row["preference"] and length_1 != length_2:
                assert row["preference"] == (1 if length_1 > length_2 else 2)

        # The next runs ask only for what is missing.
        asked = sum(server.asked.values())
        here(*command, **claude(server))
        here(*command, **claude(server))
        assert sum(server.asked.values()) - asked <= 10
        assert max(server.answered.values()) == 1
        for row in rows_of(tmp_path / "a.jsonl"):
            assert row["preference"] is not None
            assert "error" not in row
        assert "nothing to do" in here(*command, **claude(server)).stdout
    assert names_in(tmp_path) == ["a.jsonl", "a.jsonl.run.json", "a.jsonl.run.lock"]


@pytest.mark.parametrize("batch", [False, True])
def test_killed_and_run_again(contest, tmp_path, batch):
    """kill -9, then the same command: the same table"""
    home, flags = contest
    out = tmp_path / "a.jsonl"
    log = tmp_path / "a.jsonl.replies"
    command = ["judge", *flags, f"--out={out}", "--concurrency=2", f"--batch_api={batch}"]
    with Judge(delay=0.1, batch_seconds=1.0) as server:
        server.rule = "longer"

        def is_under_way():
            if batch:
                return bool(server.batches)
            return log.exists() and log.read_bytes().count(b"\n") >= 10

        process = subprocess.Popen([sys.executable, "evaluate.py", *command], cwd=ROOT,
                                   env=os.environ | claude(server), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        until = time.time() + 60
        while time.time() < until and not is_under_way():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()

        # A kill in the middle of a write leaves a torn line.
        if not batch:
            log.write_bytes(log.read_bytes() + b'{"case": [39')
        server.delay = 0
        here(*command, **claude(server))
        assert len(server.batches) == (1 if batch else 0)
        asked = sum(server.asked.values())
        assert asked <= 78 + 2, "at most what was in flight is asked twice"
        here("judge", *flags, f"--out={tmp_path}/b.jsonl", **claude(server))
    assert rows_of(out) == rows_of(tmp_path / "b.jsonl")


def test_dry_run_and_no_key(contest, tmp_path):
    home, flags = contest
    a = ["judge", *flags, f"--out={tmp_path}/a.jsonl"]
    done = here(*a, "--dry_run=true", ANTHROPIC_API_KEY="")
    assert "78" in done.stdout
    assert "Which is best" in done.stdout
    assert not list(tmp_path.iterdir())

    # Without a key nothing is asked, so the next command may name another model.
    for model in ("claude-sonnet-4-6", "claude-next"):
        done = here(*a, f"--model={model}", ok=False, ANTHROPIC_API_KEY="")
        assert done.returncode == 2
        assert "ANTHROPIC_API_KEY" in done.stderr
        assert not (tmp_path / "a.jsonl").exists()

    # The gold judge is free, but these rows are not of its world.
    b = ["judge", *flags, f"--out={tmp_path}/b.jsonl"]
    done = here(*b, "--judge=gold", "--dry_run=true")
    assert "does not call Claude" in done.stdout
    assert here(*b, "--judge=gold", ok=False).returncode == 2
    for flag in ("--concurrency=0", "--micro_batch=0", "--max_tokens=0"):
        assert_refused(here(*b, flag, ok=False), "must be at least 1")
    assert not list(tmp_path.glob("b*"))

    # A batch of an earlier run is paid for.
    (tmp_path / "c.jsonl.batches").write_text('[{"id": "b", "keys": ["0-1"]}]')
    done = here("judge", *flags, f"--out={tmp_path}/c.jsonl", ok=False, ANTHROPIC_API_KEY="x")
    assert_refused(done, "paid for) as a batch; continue with --batch_api=true")


def test_gold_judge(world, tmp_path):
    """Fewer flaws win, as many is a draw"""
    from data.toy.prepare import gold

    # Ours is the next question's answer, and the rows are in another order.
    theirs = rows_of(world / "data/eval.jsonl")
    others = theirs[1:] + theirs[:1]
    ours = [row | {"output": other["output"]} for row, other in zip(theirs, others)]
    write(tmp_path / "ours.jsonl", ours[::-1])
    here("judge", f"--outputs={tmp_path}/ours.jsonl", f"--reference={world}/data/eval.jsonl",
         "--judge=gold", f"--out={tmp_path}/a.jsonl")

    rows = rows_of(tmp_path / "a.jsonl")
    assert len(rows) == len(theirs)
    preferences = set()
    for row in rows:
        flaws_1 = gold(row, row["output_1"])
        flaws_2 = gold(row, row["output_2"])
        expected = 1.5
        if flaws_1 < flaws_2:
            expected = 1
        elif flaws_2 < flaws_1:
            expected = 2
        assert row["preference"] == expected
        assert row["scores"] == [-flaws_1, -flaws_2]
        preferences.add(expected)
    assert 1 in preferences, "the rows must tell something"


# ---------------------------------------------------------------- judge --judge=reward_model

@functools.cache
def plain(folder):
    model = AutoModelForTokenClassification.from_pretrained(
        folder, dtype=torch.float64, num_labels=1, token_classification_bias=False)
    return model.eval(), load_tokenizer(folder)


@torch.no_grad()
def plain_rewards(folder, row, answer):
    """r_t of an answer's tokens, and the head's output at the prompt's last token, by plain
    transformers in float64"""
    model, tokenizer = plain(folder)
    prompt = encode_prompt(tokenizer, row)
    response = encode_response(tokenizer, answer)
    heads = model(torch.tensor([prompt + response])).logits[0, :, 0].tolist()              # [S]
    return heads[len(prompt):], heads[len(prompt) - 1]


def plain_R(world, name, row, answer):
    """R of an answer: the mean of r_t (rm, token level), or the last r_t (rm_sequence)"""
    r, _ = plain_rewards(world / name, row, answer)
    return statistics.fmean(r) if name == "rm" else r[-1]


def test_reward_model_judge(world, tmp_path):
    theirs = rows_of(world / "data/eval.jsonl")
    write(tmp_path / "ours.jsonl", [row | {"output": row["output"] + "\nfig"} for row in theirs])
    command = ["judge", f"--outputs={tmp_path}/ours.jsonl", f"--reference={world}/data/eval.jsonl",
               "--judge=reward_model", "--micro_batch=3"]
    for name in ("rm", "rm_sequence"):
        here(*command, f"--reward_model={world}/{name}", f"--out={tmp_path}/{name}.jsonl")
        for row in rows_of(tmp_path / f"{name}.jsonl")[:3]:
            score_1, score_2 = row["scores"]
            assert score_1 == pytest.approx(plain_R(world, name, row, row["output_1"]), abs=1e-4)
            assert score_2 == pytest.approx(plain_R(world, name, row, row["output_2"]), abs=1e-4)
            assert row["preference"] == (2 if score_2 > score_1 else 1)

    # On two ranks, the same scores.
    run("evaluate.py", *command, f"--reward_model={world}/rm", f"--out={tmp_path}/two.jsonl",
        ranks=2)
    for one, two in zip(rows_of(tmp_path / "rm.jsonl"), rows_of(tmp_path / "two.jsonl")):
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-5)


# ---------------------------------------------------------------- rewards

@pytest.fixture(scope="module")
def held_out(world, tmp_path_factory):
    """Files of preferences and of edits, and the rows of both that are compared"""
    home = tmp_path_factory.mktemp("held_out")
    prefs = rows_of(world / "data/pref.jsonl")[:12]
    write(home / "pref.jsonl", prefs)
    prefs = [row for row in prefs if row["output_1"] != row["output_2"]]

    edits = []
    for row in rows_of(world / "edits.jsonl"):
        if row["edited"] not in (None, row["original"]):
            edits.append(row)
    failed = edits[0] | {"edited": None}
    identical = edits[1] | {"edited": edits[1]["original"]}
    edits = edits[:10]
    write(home / "edits.jsonl", [*edits, failed, identical])
    return home, prefs, edits


def figures_of(done):
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["rm", "rm_sequence"])
def test_rewards(world, tmp_path, held_out, name):
    """python evaluate.py rewards: the figures against plain transformers, for both levels of reward
    models"""
    home, prefs, edits = held_out
    command = ["rewards", f"--reward_model={world}/{name}", home / "pref.jsonl",
               home / "edits.jsonl", "--resamples=5", "--micro_batch=5", "--json=true"]
    of_prefs, of_edits = figures_of(here(*command, f"--out={tmp_path}/figures.json"))
    assert json.loads((tmp_path / "figures.json").read_text()) == [of_prefs, of_edits]

    # Preferences: accuracy and margin.
    margins = []
    for row in prefs:
        margin = (plain_R(world, name, row, row["output_1"])
                  - plain_R(world, name, row, row["output_2"]))
        margins.append(margin if row["preference"] == 1 else -margin)
    right = [100.0 if margin > 0 else 0.0 for margin in margins]
    error = statistics.stdev(right) / math.sqrt(len(right))
    assert of_prefs["n"] == len(prefs)
    assert of_prefs["accuracy"] == pytest.approx(statistics.fmean(right))
    assert of_prefs["standard_error"] == pytest.approx(error)
    assert of_prefs["margin"] == pytest.approx(statistics.fmean(margins), abs=1e-5)

    # Edits: what was dropped, and r_t at EOS; at sequence level, what EOS adds to the score.
    assert of_edits["n"] == 10
    assert of_edits["dropped"] == {"failed edit": 1, "identical": 1}
    assert of_edits["edited_wins"] == 100
    at_eos = []
    for row in edits:
        for text in (row["original"], row["edited"]):
            r, _ = plain_rewards(world / name, row, text)
            at_eos.append(r[-1] if name == "rm" else r[-1] - r[-2])
    mean = pytest.approx(statistics.fmean(at_eos), abs=1e-5)
    assert of_edits["tokens"]["eos"] == dict(mean=mean, n=20)


def test_rewards_on_two_ranks_and_of_float_preferences(world, tmp_path, held_out):
    home, prefs, _ = held_out
    options = [f"--reward_model={world}/rm_sequence", "--resamples=5", "--json=true"]
    data = [home / "pref.jsonl", home / "edits.jsonl"]
    one = figures_of(here("rewards", *options, *data))
    two = figures_of(run("evaluate.py", "rewards", *options, *data, "--micro_batch=5", ranks=2))
    margin = one[0]["margin"]
    assert two[0]["margin"] == pytest.approx(margin, abs=1e-5)
    removed_1 = one[1]["tokens"]["removed"]["auroc"]
    removed_2 = two[1]["tokens"]["removed"]["auroc"]
    assert removed_2 == pytest.approx(removed_1, abs=1e-3)

    # 1.0 and 2.0 are preferences, too; cut may be null.
    floats = [row | {"preference": float(row["preference"]), "cut": None} for row in prefs]
    (again,) = figures_of(here("rewards", *options, write(tmp_path / "float.jsonl", floats)))
    assert again["margin"] == pytest.approx(margin, abs=1e-5)


@pytest.mark.parametrize("name", ["rm", "rm_sequence"])
def test_probe(world, tmp_path, name):
    """After the same prefix, is r of the better token above r of the worse one? Against plain
    transformers; rows where a token crosses the end of the prefix are counted and left out"""
    rows = rows_of(world / "data/probe.jsonl")
    file = write(tmp_path / "probe.jsonl", rows)
    (figures,) = figures_of(here("rewards", f"--reward_model={world}/{name}", file, "--json=true"))
    assert figures["kind"] == "probe" and figures["n"] == len(rows) == 48
    right = defaultdict(list)
    for row in rows:
        r_better = r_after(world / name, row, row["better"], row["worse"])
        r_worse = r_after(world / name, row, row["worse"], row["better"])
        right[row["kind"]].append(100.0 * (r_better > r_worse))
    found = {share["worse"]: share["right"] for share in figures["shares"]}
    assert found == {kind: pytest.approx(statistics.fmean(v)) for kind, v in right.items()}
    assert all(share["n"] == 8 for share in figures["shares"])

    # "apple" is one token: inside of it nothing was decided, and the two differ before its end.
    question = dict(instruction="List three fruits.", input="", kind="spelling")
    inside = question | dict(prefix="ap", better="ple", worse="rle")
    whole = question | dict(prefix="apple", better="\nEnjoy!", worse="")
    file = write(tmp_path / "inside.jsonl", [inside, whole])
    (figures,) = figures_of(here("rewards", f"--reward_model={world}/{name}", file, "--json=true"))
    assert figures["dropped"] == {"a token crosses the end of the prefix": 1}
    assert figures["n"] == 1

    # One line for a row that compares nothing.
    same = write(tmp_path / "same.jsonl", [whole, whole | dict(worse="\nEnjoy!")])
    done = here("rewards", f"--reward_model={world}/{name}", same, ok=False)
    assert_refused(done, "same.jsonl:2: better and worse are the same")


def r_after(folder, row, continuation, other):
    """r of the first token of prefix + continuation that prefix + other does not share; of a
    sequence model, what that token adds to the score"""
    _, tokenizer = plain(folder)
    text = row["prefix"] + continuation
    ids = encode_response(tokenizer, text)
    other_ids = encode_response(tokenizer, row["prefix"] + other)
    at = 0
    while ids[at] == other_ids[at]:
        at += 1
    r, r_before = plain_rewards(folder, row, text)
    if "sequence" not in folder.name:
        return r[at]
    return r[at] - [r_before, *r][at]


def test_rewards_never_replace_a_model(world, held_out):
    """--out=<the reward model> is refused, even with --overwrite"""
    home, _, _ = held_out
    done = here("rewards", f"--reward_model={world}/rm_sequence", home / "pref.jsonl",
                f"--out={world}/rm", "--overwrite=true", ok=False)
    assert_refused(done, "must end in .json")
    assert (world / "rm/config.json").exists()
