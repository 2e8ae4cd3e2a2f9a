"""edit.py: nothing lost, nothing paid twice, nothing taken for an edit that is none.

python -m pytest tests/test_edit.py               # against tests/claude_standin.py; a minute
LARGE=1 python -m pytest tests/test_edit.py    # also 2,000 requests and 20 times kill -9
"""

import contextlib, json, os, random, re, signal, subprocess, sys, threading, time
import urllib.error, urllib.request
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import diff, edit
from plumbing import files
from plumbing import claude as claude_module, record
from claude_standin import Standin, mended
from extras.editors import stats as edit_stats

LARGE = bool(os.environ.get("LARGE"))
KEY = "sk-ant-secret-0123456789"
SHARED = ROOT.parent / "shared"
STUB = SHARED / "tools" / "claude_stub.py"


@pytest.fixture(autouse=True)
def setting(monkeypatch, tmp_path):
    """A key, a fresh folder, quick retries; and the locks of a run end with the run, as they do
    with its process"""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    for name in ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("anthropic._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("plumbing.claude.PAUSES", (0.01, 0.05))
    yield
    release_locks()


def release_locks():
    while record.LOCKS:
        record.LOCKS.pop().close()


def pairs(n, text="teh answer {i} is wrong."):
    return [
        {
            "instruction": f"Question {i}?",
            "input": "" if i % 3 else f"context {i}",
            "output_1": text.format(i=i),
            "output_2": f"Preferred {i}.",
            "preference": 2,
        }
        for i in range(n)
    ]


def write(rows, path="pref.jsonl"):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path="edits.jsonl"):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(monkeypatch, claude=None, **fields):
    """edit.py in this process -> its rows"""
    if claude:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", claude.url)
    release_locks()
    edit.main(edit.Config(**{"data": "pref.jsonl", "out": "edits.jsonl", **fields}))
    return read(fields.get("out", "edits.jsonl"))


def command(*words, **env):
    return [sys.executable, str(ROOT / "edit.py"), *words], {**os.environ, **env}


# ---------------------------------------------------------------- the prompt


def test_prompt_is_figure_2():
    row = {"instruction": "Say {original}.", "input": "a\nb", "original": "teh {input}"}
    request = edit.build_request(edit.Config(model="claude-haiku-4-5"), row)
    assert request["messages"] == [
        {
            "role": "user",
            "content": "Question: Say {original}.\nInput: a\nb\n\nResponse: teh {input}\n\nPlease "
            "make minimal changes to the above response in order to make it a "
            "more helpful response to the question. NOTE It is important to only make minimal "
            "changes to the response — try to keep most of the response unchanged.",
        },
        {
            "role": "assistant",
            "content": "Here is my attempt to make minimal changes to improve the response:",
        },
    ]
    request = edit.build_request(edit.Config(system="Be kind."), row | {"input": ""})
    (turn,) = request["messages"]
    assert turn["content"].startswith(
        "Question: Say {original}.\n\nResponse: teh {input}\n\nPlease"
    )  # no Input line
    assert turn["content"].endswith(edit.TAGS) and request["system"] == "Be kind."
    assert set(request) == {
        "model",
        "max_tokens",
        "messages",
        "system",
    }  # the API takes no temperature
    long = edit.build_request(edit.Config(), row | {"original": "word " * 4000})["max_tokens"]
    assert edit.build_request(edit.Config(), row)["max_tokens"] < long <= 21_333
    assert edit.build_request(edit.Config(max_tokens=99), row, longest=True)["max_tokens"] == 99
    assert edit.build_request(edit.Config(max_tokens=99), row)["max_tokens"] == 99
    edit.build_request(edit.Config(), row | {"original": "half \ud83d"})["messages"][0][
        "content"
    ].encode()


@pytest.mark.parametrize(
    "model, tags",
    [
        ("claude-2.1", False),
        ("claude-3-5-haiku-20241022", False),
        ("claude-opus-4-1-20250805", False),
        ("claude-sonnet-4-20250514", False),
        ("claude-haiku-4-5-20251001", False),
        ("claude-opus-4-5", False),
        ("claude-opus-4-6", True),
        ("claude-sonnet-5-5", True),
        ("other", True),
    ],
)
def test_prefill_only_where_the_model_takes_one(model, tags):
    assert edit.uses_tags(edit.Config(model=model)) == tags
    assert edit.uses_tags(edit.Config(model=model, prefill="")) and not edit.uses_tags(
        edit.Config(editor="local", model=model)
    )


def test_rows(monkeypatch, capsys):
    """The loser is edited, its `cut` goes with it, extra fields pass, and what asks the same is
    asked once"""
    rows = pairs(3)
    rows[0] |= {"preference": 1, "output_2": "bad one", "cut": ["output_2"], "generator": "g"}
    rows[1] |= {"cut": ["output_2"], "id": "mine"}
    write(rows + rows[2:] + rows[2:])
    with Standin() as claude:
        out = run(monkeypatch, claude)
        assert "2 of 5 rows are duplicates: asked once" in capsys.readouterr().out
        assert len(out) == 3 and set(claude.asked.values()) == {1}
        assert not any("Preferred" in prompt for prompt in claude.asked)
    assert list(out[0])[:9] == [
        "id",
        "instruction",
        "input",
        "original",
        "edited",
        "editor",
        "model",
        "stop_reason",
        "usage",
    ]
    assert (out[0]["original"], out[0]["edited"], out[0]["cut"], out[0]["generator"]) == (
        "bad one",
        "good one",
        ["original"],
        "g",
    )
    assert (
        "cut" not in out[1]
        and out[1]["source_id"] == "mine"
        and not {"output_1", "output_2", "preference"} & set(out[1])
    )
    assert out[0]["usage"]["output_tokens"] > 0 and out[0]["model"] == edit.Config.model
    write([{"instruction": "i", "input": None, "original": "  teh end \n"}], "plain.jsonl")
    with Standin() as claude:  # the original's own white space is kept
        assert (
            run(
                monkeypatch,
                claude,
                data="plain.jsonl",
                out="plain_edits.jsonl",
                model="claude-haiku-4-5",
            )[0]["edited"]
            == "  the end \n"
        )
    assert len({row["id"] for row in out} | {row["id"] for row in read("plain_edits.jsonl")}) == 4


def test_id_is_a_hash_of_what_is_asked():
    """Whatever changes the request changes the id, text that moves from one field to the next,
    too"""
    write(
        [
            {"instruction": "a", "input": "b", "original": "c"},
            {"instruction": "a", "input": "", "original": "c"},
            {"instruction": "a", "input": "x", "original": "c"},
            {"instruction": "ab", "input": "", "original": "c"},
            {"instruction": "a", "input": "", "original": "bc"},
            {"instruction": "a", "input": "b", "original": "c", "more": 1},
        ]
    )
    configs = [
        {},
        {"model": "m"},
        {"system": "s"},
        {"prompt": "p {original}"},
        {"prefill": "s"},
        {"tags": "<x></x>"},
        {"editor": "human"},
    ]
    ids = [list(edit.read_rows(edit.Config(data="pref.jsonl", **fields))) for fields in configs]
    assert len({key for keys in ids for key in keys}) == 5 * len(
        configs
    )  # the sixth row asks what the first does
    assert ids[0] == list(
        edit.read_rows(edit.Config(data="pref.jsonl", concurrency=1, max_tokens=9, seed=1))
    )
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in ids[0])  # a batch's custom_id


# ---------------------------------------------------------------- replies


@pytest.mark.parametrize(
    "text, stop, tag, edited, error, again",
    [
        ("<e>the cat</e>", "end_turn", "e", "the cat", None, False),
        (" \n<e>\nthe <b>cat</b></e> ", "end_turn", "e", "the <b>cat</b>", None, False),
        ("<e>a</e> b</e>", "end_turn", "e", "a</e> b", None, False),
        ("<e>the c", "max_tokens", "e", None, "cut by max_tokens", True),
        ("<e>the cat</e>", "max_tokens", "e", None, "cut by max_tokens", True),
        ("<e>the c", "end_turn", "e", None, "no <e> tags", True),
        ("Here is the edited answer:\n\n<e>the cat</e>", "end_turn", "e", None, "preamble", True),
        (
            "<e>the cat</e>\nI changed one word.",
            "end_turn",
            "e",
            None,
            "text behind the tags",
            True,
        ),
        ("<e>Here is the edited answer:\nthe cat</e>", "end_turn", "e", None, "preamble", True),
        ("<e>  \n</e>", "end_turn", "e", None, "empty reply", True),
        ("", "end_turn", "e", None, "empty reply", True),
        ("\n \n", "end_turn", None, None, "empty reply", True),
        ("", "refusal", "e", None, "refusal", False),
        ("I can't help with that.", "refusal", None, None, "refusal", False),
        ("I can’t help with that.", "end_turn", None, None, "refusal", False),
        ("Sure! Here's the improved version:\nthe cat", "end_turn", None, None, "preamble", True),
        ("\n\nthe cat\n", "end_turn", None, "the cat", None, False),
        ("the cat", "pause_turn", None, None, "cut by pause_turn", True),
        ("Here is the edited answer: the cat", "end_turn", None, None, "preamble", True),
        ("Of course!\n\nHere you go\nthe cat", "end_turn", None, None, "preamble", True),
        (
            "the cat\n\nI changed one word.",
            "end_turn",
            None,
            None,
            "comment behind the answer",
            True,
        ),
        (
            "the cat\n\n(The changes I made: one.)",
            "end_turn",
            None,
            None,
            "comment behind the answer",
            True,
        ),
        ("<e>the cat\n\nI made it.</e>", "end_turn", "e", "the cat\n\nI made it.", None, False),
        (
            "the cat\n\nThe changes of the year.",
            "end_turn",
            None,
            "the cat\n\nThe changes of the year.",
            None,
            False,
        ),
        (
            "The improved engine has two parts: a and b.",
            "end_turn",
            None,
            "The improved engine has two parts: a and b.",
            None,
            False,
        ),
    ],
)
def test_read_reply(text, stop, tag, edited, error, again):
    assert edit.read_reply(edit.Reply(text, stop, {}), "teh cat", tag) == (edited, error, again)


def test_an_answer_may_read_like_a_preamble_or_a_comment():
    for text in (
        "Here are two fruits:\napple",
        "I'm sorry, apples are no fruit.",
        "Dear apple,\n\nI made a cake.\n\nLet me know.",
    ):
        assert (
            edit.read_reply(
                edit.Reply(text, "end_turn", {}), text.replace("apple", "teh aple"), None
            )[0]
            == text
        )
    assert edit.read_reply(
        edit.Reply("<e>I cannot help with that.</e>", "end_turn", {}), "Steal it.", "e"
    )[0]


def test_read_message():
    def message(**usage):
        blocks = [
            SimpleNamespace(type="thinking", thinking="hm"),
            *(SimpleNamespace(type="text", text=text) for text in "ab"),
        ]
        return SimpleNamespace(
            content=blocks, stop_reason="end_turn", usage=SimpleNamespace(**usage)
        )

    assert claude_module.read_message(message(input_tokens=3, output_tokens=None)) == (
        "ab",
        "end_turn",
        {"input_tokens": 3, "output_tokens": 0},
        None,
        False,
    )
    assert claude_module.read_message(message()) == (None, None, None, "broken reply", True)


# ---------------------------------------------------------------- faults

FAULTS = {
    "429": "429 rate_limit_error Injected rate_limit_error.",
    "529": "529 overloaded_error",
    "500": "500",
    "drop": "APIConnectionError",
    "garbage": "JSONDecodeError",
    "html": "broken reply",
    "no_utf8": "UnicodeDecodeError",
    "null": "broken reply",
    "no_usage": "broken reply",
    "no_text": "broken reply",
    "truncate": "cut by max_tokens",
    "refusal": "refusal",
    "empty": "empty reply",
    "preamble": "preamble",
    "wrong_tag": "no <edited> tags",
    "400": "400 invalid_request_error",
}


def fault_of(prompt):
    return (re.search(r"fault=(\w+)", prompt) or [0, ""])[1]


def test_each_fault_is_recognised_retried_once_and_recorded(monkeypatch):
    rows = pairs(len(FAULTS) + 1)
    for row, fault in zip(rows, FAULTS):
        row["instruction"] += f" fault={fault}"
    write(rows)
    with Standin(fault=lambda prompt, turn: fault_of(prompt)) as claude:
        out = run(monkeypatch, claude, retries=1, concurrency=4)
        asked = {fault_of(prompt): n for prompt, n in claude.asked.items()}
    for row, fault in zip(out, FAULTS):
        assert row["edited"] is None and row["error"].startswith(FAULTS[fault][:12]), row
        assert asked[fault] == {
            "429": 4,
            "529": 4,
            "500": 4,
            "drop": 4,
            "refusal": 1,
            "400": 1,
        }.get(fault, 2), fault
    assert "Here is the edited" in next(row["raw"] for row in out if row["error"] == "preamble")
    assert out[-1]["edited"] == mended(rows[-1]["output_1"]) and asked[""] == 1
    with (
        Standin() as claude
    ):  # the API is well again: what failed is asked, and only that; one line per id
        again = run(monkeypatch, claude)
        assert sum(claude.asked.values()) == len(FAULTS) and not any(
            "error" in row or row["edited"] is None for row in again
        )
        assert [row["id"] for row in again] == [row["id"] for row in out]
        assert (
            max(claude.limits) == edit.Config.max_tokens
        )  # the one that was cut gets all the room there is


def test_second_try_helps(monkeypatch):
    write(pairs(20))
    faults = ["empty", "preamble", "garbage", "html", "truncate", "wrong_tag"]
    with Standin(
        fault=lambda prompt, turn: faults[len(prompt) * 7 % 6] if turn == 1 else ""
    ) as claude:
        out = run(monkeypatch, claude)
        assert all(row["edited"] for row in out) and set(claude.asked.values()) == {2}


def test_every_fault_among_many(monkeypatch):
    """Each id once, as edit or as failure with its reason; none asked again that was done; the
    bound holds"""
    n, rng = 150, random.Random(0)
    write(pairs(n))
    kinds = [
        "429",
        "529",
        "500",
        "drop",
        "garbage",
        "html",
        "truncate",
        "refusal",
        "empty",
        "preamble",
        "wrong_tag",
    ]
    with Standin(
        fault=lambda prompt, turn: rng.choice(kinds) if rng.random() < 0.5 else "", delay=0.01
    ) as claude:
        out = run(monkeypatch, claude, concurrency=8)
        assert len(out) == len({row["id"] for row in out}) == n and claude.most <= 8
        assert max(claude.answered.values()) == 1
        for row in out:
            assert (
                row["edited"] == mended(row["original"]) or row["edited"] is None and row["error"]
            ), row
    assert 0 < sum(row["edited"] is None for row in out) < n / 2


def test_retry_after_is_bounded(monkeypatch):
    write(pairs(2))
    monkeypatch.setattr(claude_module, "MAX_WAIT", 0.05)
    sleep = time.sleep

    def nap(seconds):
        assert seconds < 5, f"the SDK would have slept {seconds} seconds"
        sleep(seconds)

    monkeypatch.setattr("time.sleep", nap)
    for value in (
        "100000",
        "Wed, 21 Oct 2099 07:28:00 GMT",
        "nan",
        {"retry-after-ms": "1e9"},
        {"retry-after-ms": "100000000"},
    ):
        with Standin(
            fault=lambda prompt, turn: "429" if turn < 3 else "", retry_after=value
        ) as claude:
            assert all(row["edited"] for row in run(monkeypatch, claude, overwrite=True))
            assert set(claude.asked.values()) == {3}


def test_hung_requests_time_out(monkeypatch):
    write(pairs(1))
    with Standin(delay=5) as claude:
        (row,) = run(monkeypatch, claude, timeout=0.2, retries=0)
        assert row["error"] == "APITimeoutError"


@pytest.mark.parametrize("fault, then", [("401", 8), ("404", 1)])
def test_hopeless_errors_stop_at_once(monkeypatch, capsys, fault, then):
    """401 at any time; 404 (a wrong model) only from the start: later it is one row's mishap"""
    write(pairs(20))
    with Standin(fault=lambda prompt, turn: fault) as claude:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, claude, concurrency=4)
        assert stop.value.code == 2 and sum(claude.asked.values()) <= 4
    error = capsys.readouterr().err
    assert [
        line for line in error.splitlines() if "the API says" in line and fault in line
    ] and KEY not in error
    count = iter(range(10**6))
    with (
        Standin(fault=lambda prompt, turn: fault if next(count) >= then else "") as claude,
        contextlib.suppress(SystemExit),
    ):
        run(monkeypatch, claude, concurrency=1)
    assert len(read()) == (8 if fault == "401" else 20)


def test_no_key(monkeypatch, capsys):
    write(pairs(2))
    for key, words in (
        ("", "no API key: set ANTHROPIC_API_KEY"),
        ("sk-ant-with\nnewline", "ANTHROPIC_API_KEY holds white space"),
    ):
        monkeypatch.setenv("ANTHROPIC_API_KEY", key)
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch)
        captured = capsys.readouterr()
        assert (
            stop.value.code == 2
            and words in captured.err
            and "newline" not in captured.err
            and captured.err.count("\n") == 1
        )
        assert os.listdir() == ["pref.jsonl"]


def test_nothing_secret_in_logs_or_files(monkeypatch, capfd):
    rows = pairs(12, "teh private {i} text is wrong.")
    write(rows)
    kinds = ["429", "drop", "garbage", "400", "empty", ""]
    with Standin(
        fault=lambda prompt, turn: kinds[int(re.search(r"Question (\d+)", prompt)[1]) % 6]
    ) as claude:
        out = run(monkeypatch, claude, retries=0)
        assert any(
            KEY in value for headers in claude.headers for value in headers.values()
        )  # it was sent
    captured = capfd.readouterr()
    everything = (
        captured.out
        + captured.err
        + "".join(path.read_text() for path in Path().iterdir() if path.name != "pref.jsonl")
    )
    assert not [
        word for word in (KEY, "uthorization", "Headers(", "user-agent") if word in everything
    ]
    assert "private" not in captured.out + captured.err
    for i, row in enumerate(out):
        assert not [j for j in range(12) if j != i and f"private {j} text" in json.dumps(row)]


# ---------------------------------------------------------------- nothing lost, nothing twice


def test_rerun_asks_nothing(monkeypatch, capsys):
    n = 20_000
    write(pairs(n))
    rows = edit.read_rows(edit.Config(data="pref.jsonl"))
    files.write_jsonl("edits.jsonl", [row | {"edited": "x"} for row in rows.values()])
    with Standin() as claude:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", claude.url)
        Path("edits.jsonl").rename("kept")
        run(monkeypatch, claude, limit=1)  # for the record of the run
        Path("kept").rename("edits.jsonl")
        claude.asked.clear()
        began = time.time()
        out = run(monkeypatch, claude)
        assert not claude.asked and len(out) == n and time.time() - began < 10
    assert f"{n} of {n} rows are done" in capsys.readouterr().out


def test_each_row_is_on_disk_before_the_next_is_asked(monkeypatch):
    write(pairs(9))
    seen = []
    with Standin(
        fault=lambda prompt, turn: seen.append(lines_of(Path("edits.jsonl"))) or ""
    ) as claude:
        run(monkeypatch, claude, concurrency=1)
    assert seen == list(range(9))


def test_torn_line_is_mended(monkeypatch):
    write(pairs(10))
    with Standin() as claude:
        whole = run(monkeypatch, claude)
        text = Path("edits.jsonl").read_bytes()
        for cut in (1, 30, len(text.splitlines()[-1]), len(text) - 20):
            Path("edits.jsonl").write_bytes(text[:-cut])
            claude.asked.clear()
            assert run(monkeypatch, claude) == whole
            lost = 10 - text[:-cut].count(b"\n")
            assert sum(claude.asked.values()) == lost, cut
        Path("edits.jsonl").write_bytes(
            text + text.splitlines(True)[3]
        )  # a line of an id that stands twice
        assert run(monkeypatch, claude) == whole


def test_another_config_is_refused(monkeypatch, capsys):
    write(pairs(3))
    with Standin() as claude:
        run(monkeypatch, claude)
        for fields in (
            {"prompt": edit.PROMPT + "!"},
            {"tags": "Between <new> and </new>."},
            {"model": "claude-opus-4-6"},
            {"system": "x"},
        ):
            with pytest.raises(SystemExit) as stop:
                run(monkeypatch, claude, **fields)
            assert stop.value.code == 2 and next(iter(fields)) in capsys.readouterr().err
        write(pairs(4))
        claude.asked.clear()
        run(
            monkeypatch, claude, concurrency=3, max_tokens=999, limit=2
        )  # these cannot change an edit; grown data goes on
        assert len(run(monkeypatch, claude)) == 4 and sum(claude.asked.values()) == 1
        assert len(run(monkeypatch, claude, limit=1)) == 4  # nothing that was paid for is dropped
        old = {row["id"] for row in read()}
        new = run(monkeypatch, claude, prompt=edit.PROMPT.replace("NOTE", "Note"), overwrite=True)
        assert len(new) == 4 and not old & {row["id"] for row in new}


def test_bad_input(monkeypatch, capsys):
    write([pairs(1)[0] | {"preference": 3}])
    for fields, words in (
        ({}, "pref.jsonl:1: preference must be 1 or 2, got 3"),
        ({"data": "none.jsonl"}, "does not exist; make it with"),
        ({"max_tokens": 30_000}, "at most 21333"),
        ({"concurrency": 0}, "at least 1"),
        ({"tags": "no tags"}, "<tag>"),
    ):
        with pytest.raises(SystemExit) as stop:
            write(pairs(1)) if fields else None
            run(monkeypatch, **fields)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert os.listdir() == ["pref.jsonl"]


@contextlib.contextmanager
def service(*words):
    """The stand-in, or the shared stub if words are given, as a process of its own -> its
    address"""
    script = (
        [str(STUB), "--port", "0", *words] if words else [str(ROOT / "tests" / "claude_standin.py")]
    )
    process = subprocess.Popen([sys.executable, *script], stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_and_restart(url, times, n, *flags, longest):
    """kill -9 so many times, each within `longest` seconds of the work's begin. A run that ends by
    itself is checked, and followed by one on other rows: none lost, none twice, none torn, in
    order"""
    rng, kills, done = random.Random(0), 0, 0
    while kills < times or not done:
        rows, out = pairs(n, f"teh answer {{i}} of {done} is wrong."), f"edits{done}.jsonl"
        write(rows)
        words, env = command(
            "pref.jsonl", f"--out={out}", "--concurrency=4", *flags, ANTHROPIC_BASE_URL=url
        )
        record, process = Path(f"{out}.run.json"), None
        while process is None or process.returncode:
            before = record.stat().st_mtime_ns if record.exists() else 0
            with open("stderr", "w") as stderr:
                process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=stderr)
            while process.poll() is None and not (
                record.exists() and record.stat().st_mtime_ns > before
            ):
                time.sleep(0.01)
            time.sleep(longest * rng.random())
            if kills < times and process.poll() is None:
                process.kill()
                kills += 1
            assert process.wait(300) in (0, -signal.SIGKILL), Path("stderr").read_text()[-2000:]
        assert [(row["instruction"], row["edited"]) for row in read(out)] == [
            (row["instruction"], mended(row["output_1"])) for row in rows
        ]
        done += 1


@pytest.mark.parametrize("flags", [(), ("--batch_api=true",)], ids=["requests", "batches"])
def test_kill_9(flags):
    with service() as url:
        kill_and_restart(url, 1, 150, *flags, longest=0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(monkeypatch, capsys, number):
    """What is in flight is finished and written, nothing new is asked, and it is said how much is
    left"""
    write(pairs(40))

    signals = [number]  # one: the second would end us

    def fault(prompt, turn):
        if len(claude.asked) == 10 and signals:
            os.kill(os.getpid(), signals.pop())
        return "empty" if "Question 3?" in prompt else ""

    with Standin(fault=fault, delay=0.05) as claude:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, claude, concurrency=3)
        asked = len(claude.asked)
        assert stop.value.code == 130 and 10 <= asked <= 15 and set(claude.asked.values()) == {1}
        assert len(read()) == asked and sum(row["edited"] is None for row in read()) == 1
        assert f"{40 - asked} of 40 rows are left, 1 may be asked again" in capsys.readouterr().out
        assert sum(row["edited"] is None for row in run(monkeypatch, claude)) == 1
        assert sum(claude.asked.values()) == 42  # the empty one at once and once more


@pytest.mark.parametrize("moment, made", [("create", 1), ("retrieve", 2)])
def test_ctrl_c_while_batches_are_made_or_worked_on(monkeypatch, capsys, moment, made):
    monkeypatch.setattr("plumbing.claude.ROWS", 2)
    write(pairs(4))
    signals = [signal.SIGINT]
    with Standin(
        trouble=lambda action: (
            os.kill(os.getpid(), signals.pop()) if action == moment and signals else ""
        )
    ) as claude:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, claude, batch_api=True)
        assert (
            stop.value.code == 130
            and "4 of 4 rows are left" in capsys.readouterr().out
            and len(claude.batches) == made
        )
        claude.trouble = lambda action: ""
        assert (
            all(row["edited"] for row in run(monkeypatch, claude, batch_api=True))
            and len(claude.batches) == 2
        )


def test_two_runs_at_once(monkeypatch, capsys):
    write(pairs(3))
    with Standin() as claude:
        before = run(monkeypatch, claude)
        with pytest.raises(SystemExit) as stop:  # the lock of the run before is still held
            edit.main(edit.Config(data="pref.jsonl", out="edits.jsonl"))
    assert (
        stop.value.code == 2
        and "another run is writing edits.jsonl" in capsys.readouterr().err
        and read() == before
    )


def test_disk_full(monkeypatch):
    """A line that does not fit is taken away whole: the next one, once there is room, begins a line
    of its own"""
    import resource
    from extras.editors import page as edit_page

    write(pairs(6))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = []

    def serve(cfg, rows, done, save, stop):  # a person, who frees space and saves again
        for key in rows:
            size = Path("edits.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, hard))  # half a line
            try:
                with pytest.raises(OSError, match="No space left"):
                    save(key, "lost")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert Path("edits.jsonl").stat().st_size == size and done.get(key) is None
            save(key, "mine")
            sizes.append(size)

    monkeypatch.setattr(edit_page, "serve", serve)
    assert [row["edited"] for row in run(monkeypatch, editor="human")] == ["mine"] * 6 and len(
        set(sizes)
    ) == 6


# ---------------------------------------------------------------- batches


def test_batches(monkeypatch):
    """Results in any order, errored and expired ones asked again, invalid ones not; several chunks;
    nothing left to do after"""
    from plumbing import claude as claude_batches

    monkeypatch.setattr(claude_batches, "ROWS", 7)
    write(pairs(30))
    kinds = {1: "errored", 2: "expired", 3: "400", 4: "preamble", 5: "refusal"}
    with Standin(
        fault=lambda prompt, turn: (
            kinds.get(int(re.search(r"Question (\d+)", prompt)[1]), "")
            if turn == 1 or "Question 3?" in prompt
            else ""
        ),
        batch_seconds=0.1,
    ) as claude:
        out = run(monkeypatch, claude, batch_api=True)
        assert claude.most == 0 and len(claude.batches) == 6  # 5 chunks, and the second try
        asked = {
            int(re.search(r"Question (\d+)", prompt)[1]): times
            for prompt, times in claude.asked.items()
        }
        made = len(claude.batches)
        run(monkeypatch, claude, batch_api=True, limit=1)
        assert len(claude.batches) == made
    assert not [
        batch for batch in json.loads(Path("edits.jsonl.batches.json").read_text()) if batch["keys"]
    ]
    assert asked == {i: 2 if i in (1, 2, 4) else 1 for i in range(30)}
    for i, row in enumerate(out):
        assert (
            row["edited"] == (None if i in (3, 5) else mended(row["original"]))
            and row["instruction"] == f"Question {i}?"
        )
    assert (
        out[3]["error"] == "errored invalid_request_error Injected invalid_request_error."
        and out[5]["error"] == "refusal"
    )


def test_chunks_keep_within_the_bounds_of_a_batch(monkeypatch):
    from plumbing import claude as claude_batches

    assert claude_batches.ROWS <= 100_000 and claude_batches.BYTES < 256e6  # the API's
    monkeypatch.setattr(claude_batches, "ROWS", 5)
    monkeypatch.setattr(claude_batches, "BYTES", 3000)
    rng = random.Random(0)
    requests = {f"{i:032}": {"messages": "é" * rng.choice((1, 50, 400))} for i in range(200)}
    chunks = list(claude_batches.chunks(requests))
    assert sum(chunks, []) == list(requests) and max(map(len, chunks)) == 5
    sizes = [
        len(json.dumps([{"custom_id": key, "params": requests[key]} for key in keys]))
        for keys in chunks
    ]
    assert 2500 < max(sizes) <= 3000


def test_a_batch_whose_making_was_not_heard_of(monkeypatch):
    """The answer to create is lost: the batch is found, not made twice. The same when we die
    between the two."""
    write(pairs(9))
    with Standin(lose_create=[1]) as claude:
        assert all(row["edited"] for row in run(monkeypatch, claude, batch_api=True))
        assert len(claude.batches) == 1
        run(monkeypatch, claude, batch_api=True, overwrite=True, limit=1)
        Path("edits.jsonl").write_text("")
        state = json.loads(Path("edits.jsonl.batches.json").read_text())
        keys = list(edit.read_rows(edit.Config(data="pref.jsonl", limit=1)))
        Path("edits.jsonl.batches.json").write_text(
            json.dumps([{"id": None, "keys": keys, "at": state[0]["at"]}])
        )
        assert (
            run(monkeypatch, claude, batch_api=True, limit=1)[0]["edited"]
            and len(claude.batches) == 2
        )


def test_batches_under_way_are_not_paid_twice(monkeypatch, capsys):
    """Killed while a batch is worked on: requests one by one are refused, a smaller --limit leaves
    the other results there"""
    from plumbing import claude as claude_batches

    write(pairs(8))
    with Standin() as claude:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(
                claude_batches, "read", lambda *_: (_ for _ in ()).throw(RuntimeError("killed"))
            )
            run(monkeypatch, claude, batch_api=True)
        assert [
            batch["id"] for batch in json.loads(Path("edits.jsonl.batches.json").read_text())
        ] == ["msgbatch_1"]
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, claude)
        assert (
            stop.value.code == 2
            and "continue with --batch_api=true" in capsys.readouterr().err
            and not claude.most
        )
        assert len(run(monkeypatch, claude, batch_api=True, limit=3)) == 3
        assert all(row["edited"] for row in run(monkeypatch, claude, batch_api=True))
        assert len(claude.batches) == 1 and set(claude.asked.values()) == {1}
        write(pairs(9))
        assert (
            len(run(monkeypatch, claude)) == 9
        )  # none is under way any more: the ninth is asked at once
        Path("edits.jsonl.batches.json").write_text(
            json.dumps([{"id": "msgbatch_1", "keys": [row["id"] for row in read()], "at": ""}])
        )
        assert (
            len(run(monkeypatch, claude, overwrite=True)) == 9 and sum(claude.asked.values()) == 18
        )  # given up: all anew


def test_another_runs_batch_of_the_same_size(monkeypatch):
    """It was made last and ours was not heard of, so it is taken for ours, until its results
    tell"""
    from plumbing import claude as claude_batches

    write(pairs(4))
    find = claude_batches.find

    def after_another(client, *rest):
        if len(claude.batches) == 1:  # ours; the other run's comes a moment later
            requests = [
                {"custom_id": f"theirs{i}", "params": entry["params"]}
                for i, entry in enumerate(claude.batches["msgbatch_1"][1])
            ]
            client.messages.batches.create(requests=requests)
        return find(client, *rest)

    monkeypatch.setattr(claude_batches, "find", after_another)
    with Standin(lose_create=[1], batch_seconds=0.1) as claude:
        assert (
            all(row["edited"] for row in run(monkeypatch, claude, batch_api=True))
            and len(claude.batches) == 2
        )


def test_trouble_with_batches(monkeypatch, capsys):
    """While a batch is made and looked at everything may fail for a while; for good: one line, and
    the same command goes on"""
    from plumbing import claude as claude_batches

    monkeypatch.setattr(claude_batches, "PATIENCE", 14)  # the faults below
    write(pairs(5))
    faults = dict.fromkeys(
        ("create", "retrieve", "results"),
        ("500", "429", "drop", "garbage", "html", "no_utf8", "null"),
    )
    left = {
        action: list(kinds) if action != "create" else ["529", "html"]
        for action, kinds in faults.items()
    }
    with Standin(
        trouble=lambda action: left[action].pop() if left.get(action) else "", batch_seconds=0
    ) as claude:
        assert (
            all(row["edited"] for row in run(monkeypatch, claude, batch_api=True, retries=0))
            and len(claude.batches) == 1
        )
        assert not any(left.values())
        for action, fault, words in (
            ("create", "400", "400 invalid_request_error"),
            ("create", "401", "401 authentication_error"),
            ("retrieve", "401", "401 authentication_error"),
            ("list", "null", "looks for it"),
            ("results", "500", "500 api_error"),
        ):
            seen = []
            claude.trouble = lambda at: (
                seen.append(at)
                or (fault if at == action else "drop" if (action, at) == ("list", "create") else "")
            )
            with pytest.raises(SystemExit) as stop:
                run(monkeypatch, claude, batch_api=True, retries=0, overwrite=True)
            text = capsys.readouterr().err
            assert (
                stop.value.code == 2
                and words in text
                and "the same command" in text
                and KEY not in text
            ), (action, text)
            assert fault != "401" or seen.count(action) == 1  # it stops at once
        claude.trouble, made = lambda action: "", len(claude.batches)
        assert (
            all(row["edited"] for row in run(monkeypatch, claude, batch_api=True))
            and len(claude.batches) == made
        )


@pytest.mark.parametrize("arrived", [True, False])
def test_death_while_a_batch_is_sent(monkeypatch, arrived):
    """Before its id was heard: the batch is found if it was made, and sent if it was not"""
    from plumbing import claude as claude_batches

    send = claude_batches.send

    def die(*arguments):
        if arrived:
            send(*arguments)
        raise RuntimeError("killed")

    write(pairs(5))
    with Standin() as claude:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(claude_batches, "send", die)
            run(monkeypatch, claude, batch_api=True)
        assert (
            all(row["edited"] for row in run(monkeypatch, claude, batch_api=True))
            and len(claude.batches) == 1
        )


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize("editor", ["human", "local", "rules"])
def test_a_dry_run_of_who_asks_no_service_asks_none(monkeypatch, capsys, editor):
    write(pairs(3))
    with Standin() as claude:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", claude.url)
        edit.main(edit.Config(data="pref.jsonl", dry_run=True, editor=editor))
        assert (
            "does not call Claude" in capsys.readouterr().out
            and not claude.asked
            and not Path("edits.jsonl").exists()
        )


def test_a_mistake_leaves_no_record(monkeypatch, capsys):
    """What was refused before anything was asked does not stand in the way of the mended command"""
    write(pairs(3))
    for fields, words in (
        ({"editor": "rules"}, "instruction"),
        ({"tags": "none"}, "--tags must ask"),
    ):
        with pytest.raises(SystemExit) as end:
            edit.main(edit.Config(data="pref.jsonl", out="edits.jsonl", **fields))
        assert (
            end.value.code == 2
            and words in capsys.readouterr().err
            and not list(Path().glob("edits*"))
        )


def test_the_record_is_of_the_whole_file(monkeypatch):
    write(pairs(6))
    with Standin() as claude:
        run(monkeypatch, claude, limit=2)
        rows = run(monkeypatch, claude)
    about = record.record_of("edits.jsonl")
    assert about["config"]["limit"] is None and about["rows"] == 6
    assert about["output_tokens"] == sum(row["usage"]["output_tokens"] for row in rows)


def test_dry_run(monkeypatch, capsys):
    write(pairs(300))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "")
    edit.main(edit.Config(data="pref.jsonl", dry_run=True, system="\x1b[31mred"))
    text = capsys.readouterr().out
    requests = [
        edit.build_request(edit.Config(), row)
        for row in edit.read_rows(edit.Config(data="pref.jsonl")).values()
    ]
    tokens = (
        sum(len(request["messages"][0]["content"]) + len("\x1b[31mred") for request in requests) / 4
    )
    assert (
        f"{len(requests)} to {edit.Config.model}" in text
        and f"{round(tokens):,} (estimated" in text
        and "\x1b" not in text
    )
    assert "Question: Question 0?\nInput: context 0\n\nResponse: teh answer 0 is wrong." in text
    output = sum(len(row["output_1"]) for row in pairs(300)) // 4
    assert f"dollars        {(3 * round(tokens) + 15 * output) / 1e6:,.2f} ($3 and $15" in text
    write(
        [{"instruction": f"{i:0168}", "input": "", "original": f"{i:0515}"} for i in range(10_000)]
    )  # the figures of docs/data.md
    for batch, price in ((False, "27.00"), (True, "13.50")):
        edit.main(edit.Config(data="pref.jsonl", dry_run=True, batch_api=batch))
        text = capsys.readouterr().out
        assert all(
            words in text
            for words in (
                "10,000 to claude-sonnet-4-6",
                "2,562,500 (est",
                "1,287,500 (est",
                f"      {price} (",
            )
        )
    write(pairs(300))
    edit.main(edit.Config(data="pref.jsonl", dry_run=True, model="claude-next"))
    assert (
        "dollars        unknown: claude-next is not in the price table" in capsys.readouterr().out
    )
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    with Standin() as claude:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", claude.url)
        lengths = [len(request["messages"][0]["content"]) for request in requests[:101]]
        edit.main(edit.Config(data="pref.jsonl", dry_run=True, limit=9))
        assert f"{sum(n // 3 for n in lengths[:9]):,} (the API's count)" in capsys.readouterr().out
        edit.main(
            edit.Config(data="pref.jsonl", dry_run=True, limit=101)
        )  # every second one is counted
        scaled = sum(n // 3 for n in lengths[::2]) * sum(lengths) / sum(lengths[::2])
        assert (
            f"{round(scaled):,} (the API's count of 51 requests, scaled by length)"
            in capsys.readouterr().out
        )
        claude.fault = lambda prompt, turn: "garbage"
        edit.main(edit.Config(data="pref.jsonl", dry_run=True, limit=9))
        assert (
            "4 characters each; the API would not count" in capsys.readouterr().out
            and not claude.asked
        )
    assert os.listdir() == ["pref.jsonl"]
    assert (
        claude_module.dollars(
            "claude-haiku-4-5-20251001", {"input_tokens": 10**6, "output_tokens": 10**6}, batch=True
        )
        == 3
    )


# ---------------------------------------------------------------- the gate and the statistics


def test_stats(capsys):
    rows = [
        ("a b c d e f g h", "a b c d e f g"),
        ("a b c d e f g h", "a x c d e f g h"),
        ("a b c d", "a b c d"),
        ("a b", ""),
        ("a b", None),
        ("a b c d", "w x y z"),
        ("a b c d", "a b new c d"),
    ]
    write(
        [
            {
                "instruction": f"i{k}",
                "input": "",
                "original": a,
                "edited": b,
                **({"error": "refusal"} if b is None else {}),
            }
            for k, (a, b) in enumerate(rows)
        ],
        "edits.jsonl",
    )
    edit_stats.main(["edits.jsonl", "--max_changed=0.7", "--n=1"])
    text = capsys.readouterr().out
    assert (
        "7 rows: 3 edits pass the gate" in text
        and "1 identical" in text
        and "1 empty" in text
        and "1 changed share" in text
    )
    assert (
        "1 failed: refusal" in " ".join(text.split())
        and "operations: 1 insert, 2 delete, 2 replace" in text
    )
    assert "[-a b c d-]{+w x y z+}" in text and text.count("changed)") == 1


def test_summary_of_a_run(monkeypatch, capsys):
    """Two lines: counts and reasons; tokens, dollars"""
    write(pairs(3))
    with Standin(fault=lambda prompt, turn: "refusal" if "Question 1?" in prompt else "") as claude:
        out, text = run(monkeypatch, claude, model="claude-opus-4-6"), capsys.readouterr().out
        spent = {
            name: sum(row["usage"][name] for row in out)
            for name in ("input_tokens", "output_tokens")
        }
        assert (
            f"{spent['input_tokens']} tokens in and {spent['output_tokens']} out this time, $0.0"
            in text
        )
        assert (
            "3 rows: 2 edited, 0 unchanged, 1 failed\nfailed: 1 refusal\n" in text
            and "teh" not in text
        )
        record = json.loads(Path("edits.jsonl.run.json").read_text())
        assert record["finished"] and spent | {"rows": 3, "failed": 1} == {
            name: record[name] for name in ("rows", "failed", *spent)
        }


def test_operations_against_a_plain_reading():
    rng = random.Random(1)
    for _ in range(200):
        a, b = ([rng.choice("abc") for _ in range(rng.randrange(9))] for _ in range(2))
        masks = diff.align(a, b)
        counts, i, j, kept = Counter(), 0, 0, []
        for side in masks:
            kept.append([k for k, changed in enumerate(side) if not changed] + [len(side)])
        for x, y in zip(*kept):
            counts[
                "replace"
                if x > i and y > j
                else "delete"
                if x > i
                else "insert"
                if y > j
                else "none"
            ] += 1
            i, j = x + 1, y + 1
        del counts["none"]
        assert edit_stats.operations(*masks) == counts


@pytest.mark.parametrize(
    "name, rows", [("qa_feedback/edits.jsonl", 500), ("paradetox/edits_test.jsonl", 1000)]
)
def test_stats_of_peoples_edits(capsys, name, rows):
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"no {name} beside this project")
    edit_stats.main([str(path), "--n=10", "--max_changed=0.5"])
    text = capsys.readouterr().out
    kept = int(re.search(r"(\d+) edits pass", text)[1])
    assert (
        text.startswith(f"{rows} rows: {kept} edits pass")
        and 0 < kept < rows
        and text.count("changed)") == 10
        and "\x1b" not in text
    )


# ---------------------------------------------------------------- other editors


def test_local_model(monkeypatch):
    """A tiny random chat model: its replies pass the same checks, and do not depend on the batch"""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate([*alphabet, "<|end|>", "<|turn|>"])}, [])
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
    )
    fast.save_pretrained("chat")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=700,
        )
    ).save_pretrained("chat")
    write(pairs(5) + [pairs(1, "long " * 200)[0]])
    fields = dict(editor="local", model="chat", prefill="Here:", max_tokens=80)
    out = run(monkeypatch, **fields, concurrency=4)
    assert "positions" in out[5]["error"] and all(
        row["edited"] or row["error"] in ("cut by max_tokens", "empty reply") for row in out[:5]
    )
    assert out[0]["model"] == "chat" and out[0]["usage"]["input_tokens"] > 300
    from extras.editors.local import ask_local

    requests = {row["id"]: edit.build_request(edit.Config(**fields), row) for row in out[:5]}
    model = LlamaForCausalLM.from_pretrained("chat")
    for key, reply in ask_local(
        requests, threading.Event(), path="chat", batch=4, seed=0, temperature=0
    ):
        ids = fast.apply_chat_template(
            requests[key]["messages"],
            continue_final_message=True,
            return_dict=False,
            return_tensors="pt",
        )
        alone = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            eos_token_id=256,
            max_new_tokens=reply.usage["output_tokens"],
        )
        assert fast.decode(alone[0, ids.shape[1] :], skip_special_tokens=True) == reply.text != ""
    drawn = [
        dict(
            ask_local(
                requests, threading.Event(), path="chat", batch=batch, seed=0, temperature=0.7
            )
        )
        for batch in (1, 5)
    ]
    assert len({drawn[0][key].text for key in requests}) > 1  # draws of its own
    for key in requests:  # the same whatever the batch, up to the longest its batch allows
        short, long = sorted((answers[key].text for answers in drawn), key=len)
        assert long.startswith(short[:-3])


def test_rules(monkeypatch):
    """Each row's draws are its own: a part of the data gets the same edits as the whole"""
    from data.toy import prepare as world
    categories = world.WORLDS["short"].categories
    category = next(iter(categories))
    items = sum(categories.values(), [])
    rows = [
        {
            "instruction": f"List three {category}.",
            "input": "",
            "original": "\n".join([items[i], items[-i - 1], items[i + 1]]),
        }
        for i in range(9)
    ]
    write(rows)
    out = run(monkeypatch, editor="rules")
    assert (
        any(row["edited"] != row["original"] for row in out)
        and out[0]["editor"] == "rules"
        and out[0]["model"] is None
    )
    write(rows[4:])
    assert run(monkeypatch, editor="rules", out="part.jsonl") == out[4:]


# ---------------------------------------- the same against a fuller stub, where there is one

needs_stub = pytest.mark.skipif(
    not STUB.exists(),
    reason="no fuller stub beside this project; tests/claude_standin.py has been asked",
)


def stats_of(url):
    with urllib.request.urlopen(url + "/stats") as reply:
        return json.load(reply)


@needs_stub
def test_stub_every_fault(monkeypatch):
    n = 2000 if LARGE else 200
    write(pairs(n))
    kinds = [
        "429 0.2",
        "529",
        "500",
        "drop",
        "stall 1.5",
        "garbage",
        "garbage html",
        "truncate",
        "refusal",
        "refusal short",
        "empty",
        "whitespace",
        "padded",
        "preamble",
        "wrong_tag",
        "thinking",
    ]
    Path("faults.json").write_text(
        json.dumps([{"match": "*", "fault": fault, "every": 20} for fault in kinds])
    )
    with service("--faults", "faults.json", "--log", "calls.jsonl") as url:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
        out = run(monkeypatch, concurrency=16, timeout=1.0)
        seen = stats_of(url)
    assert len(out) == len({row["id"] for row in out}) == n
    assert seen["max_concurrency"] <= 16 + seen["outcomes"].get(
        "stall", 0
    )  # a stalled one that timed out is still in there
    assert seen["repeated_answers"] == 0 and set(kind.split()[0] for kind in kinds) <= set(
        seen["outcomes"]
    )
    for row in out:
        assert row["edited"] == mended(row["original"]) or row["edited"] is None and row["error"], (
            row
        )
    done = {row["original"] for row in out if row["edited"]}
    assert len(done) > 0.75 * n  # a tenth is refused, which is not asked again


@needs_stub
@pytest.mark.parametrize("model", ["claude-haiku-4-5", "claude-sonnet-5-5"])
@pytest.mark.parametrize("batch_api", [False, True])
def test_stub_prefill_tags_and_batches(monkeypatch, model, batch_api):
    write(pairs(40))
    Path("faults.json").write_text(
        json.dumps(
            [
                {"match": "*", "fault": "errored", "every": 9},
                {"match": "*", "fault": "expired", "every": 7},
            ]
        )
    )
    with service("--faults", "faults.json", "--batch-seconds", "0.3") as url:
        monkeypatch.setenv("ANTHROPIC_BASE_URL", url)
        out = run(monkeypatch, model=model, batch_api=batch_api)
        seen = stats_of(url)
    assert sum(row["edited"] is None for row in out) < 4 and seen["repeated_answers"] == 0
    assert (
        all(row["edited"] in (mended(row["original"]), None) for row in out)
        and "rejected 400" not in seen["outcomes"]
    )


@needs_stub
@pytest.mark.skipif(not LARGE, reason="LARGE=1 runs it: minutes; test_kill_9 is its small form")
@pytest.mark.parametrize("flags", [(), ("--batch_api=true",)], ids=["requests", "batches"])
def test_stub_kill_9(flags):
    times = 20
    Path("faults.json").write_text(
        json.dumps([{"match": "*", "fault": "stall 0.05"}] if not flags else [])
    )
    with service("--faults", "faults.json", "--batch-seconds", "2") as url:
        kill_and_restart(url, times, 2000, *flags, longest=4)
        seen = stats_of(url)
    assert seen["repeated_answers"] <= 4 * times * (
        not flags
    )  # at most what was in flight; of batches nothing
