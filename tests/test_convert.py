"""Rows as people have them, by shape, each with the row that must come out.

pytest tests/test_convert.py"""
import csv
import datetime
import gzip
import json
import sys

import pytest
from conftest import ROOT, rows_of, run

import evaluate
from data.convert.prepare import Config, main
from plumbing import record

SCRIPT = "data/convert/prepare.py"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


# Two turns, and what a row says of them.
TURNS = [system("Be kind."), user("Add 1 and 1."), assistant("2"), user("And 3?")]
OF_TURNS = {"instruction": "And 3?", "messages": TURNS,
            "input": "System: Be kind.\n\nUser: Add 1 and 1.\n\nAssistant: 2"}
PAIR = {"instruction": "Hi", "input": "", "output_1": "Hello!", "output_2": "What?"}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def convert(tmp_path, *rows, **fields):
    """The files that come of these rows: {"sft": rows, ...}"""
    path = write_lines(tmp_path / "given.jsonl", rows)
    return convert_file(tmp_path, path, **fields)


def convert_file(tmp_path, path, **fields):
    out = tmp_path / "out"
    main(Config(data=[str(path)], out=str(out), **fields))
    return {file.stem: lines_of(file) for file in out.glob("*.jsonl")}


def lines_of(path):
    """The rows of a JSONL file; only a newline ends a line"""
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


def refused(tmp_path, capsys, *data, **fields):
    """The one line that a malformed input gets; nothing may have been written"""
    with pytest.raises(SystemExit) as end:
        main(Config(data=[str(path) for path in data], out=f"{tmp_path}/out", **fields))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
    return said


# ---------------------------------------------------------------- shapes: pairs

PAIRS = {
    "texts": (
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", "source": "me"},
        PAIR | {"preference": 1, "source": "me"}),
    "question and system (Intel/orca_dpo_pairs)": (
        {"system": "Be kind.", "question": "Hi", "chosen": "Hello!", "rejected": "What?"},
        PAIR | {"preference": 1, "input": "System: Be kind.",
                "messages": [system("Be kind."), user("Hi")]}),
    "an empty system": (
        {"system_prompt": "", "question": "Hi", "chosen": "Hello!", "rejected": "What?"},
        PAIR | {"preference": 1}),
    "TRL, explicit prompt": (
        {"prompt": [user("Hi")], "chosen": [assistant("Hello!")], "rejected": [assistant("What?")]},
        PAIR | {"preference": 1}),
    "TRL, several turns": (
        {"prompt": TURNS, "chosen": [assistant("5")], "rejected": [assistant("6")]},
        OF_TURNS | {"output_1": "5", "output_2": "6", "preference": 1}),
    "TRL, implicit prompt": (
        {"chosen": [*TURNS, assistant("5")], "rejected": [*TURNS, assistant("6")]},
        OF_TURNS | {"output_1": "5", "output_2": "6", "preference": 1}),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"prompt": "Hi", "prompt_id": "e1", "chosen": [user("Hi"), assistant("Hello!")],
         "rejected": [user("Hi"), assistant("What?")],
         "messages": [user("Hi"), assistant("Hello!")], "score_chosen": 8.5, "score_rejected": 5},
        PAIR | {"preference": 1, "prompt": "Hi", "prompt_id": "e1", "score_chosen": 8.5,
                "score_rejected": 5}),
    "Anthropic/hh-rlhf": (
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sing\n\nAssistant: La\n\nla",
         "rejected": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sing\n\nAssistant: No"},
        {"instruction": "Sing", "input": "User: Hi\n\nAssistant: Yes?", "output_1": "La\n\nla",
         "output_2": "No", "preference": 1,
         "messages": [user("Hi"), assistant("Yes?"), user("Sing")]}),
    "AlpacaFarm": (
        {"instruction": "Add.", "input": "1 + 1", "output_1": "2", "output_2": "3",
         "preference": 2, "annotator_index": 13},
        {"instruction": "Add.", "input": "1 + 1", "output_1": "2", "output_2": "3",
         "preference": 2, "annotator_index": 13}),
    "AlpacaFarm, cut": (
        PAIR | {"preference": 1, "cut": ["output_2"]},
        PAIR | {"preference": 1, "cut": ["output_2"]}),
    "AlpacaEval, how sure": (
        {"instruction": "Hi", "output_1": "Hello!", "output_2": "What?", "preference": 1.53},
        PAIR | {"preference": 2}),
    "scores": (
        {"prompt": "Hi", "response_a": "Hello!", "response_b": "What?", "score_a": 2, "score_b": 7},
        PAIR | {"preference": 2}),
    "SHP": (
        {"history": "Hi", "human_ref_A": "Hello!", "human_ref_B": "What?", "score_A": 9,
         "score_B": 7, "labels": 1},
        PAIR | {"preference": 1, "labels": 1}),
    "ranks": (
        {"prompt": "Hi", "answer_1": "Hello!", "answer_2": "What?", "rank_1": 2, "rank_2": 1},
        PAIR | {"preference": 2}),
    "a winner": (
        {"prompt": "Hi", "response_a": "Hello!", "response_b": "What?", "winner": "model_b"},
        PAIR | {"preference": 2}),
    "a winner, by name": (
        {"prompt": "Hi", "response_a": "Hello!", "response_b": "What?", "winner": "Response_A"},
        PAIR | {"preference": 1}),
    "PKU-SafeRLHF": (
        {"prompt": "Hi", "response_0": "Hello!", "response_1": "What?", "better_response_id": 0},
        PAIR | {"preference": 1}),
    "chatbot arena": (
        {"conversation_a": [*TURNS, assistant("5")], "conversation_b": [*TURNS, assistant("6")],
         "winner": "model_b", "model_a": "x"},
        OF_TURNS | {"output_1": "5", "output_2": "6", "preference": 2, "model_a": "x"}),
    "HelpSteer3": (
        {"context": [user("Hi")], "response1": "Hello!", "response2": "What?",
         "overall_preference": -2},
        PAIR | {"preference": 1}),
    "openbmb/UltraFeedback": (
        {"source": "x", "instruction": "Hi", "models": ["m", "n", "o"], "completions": [
            {"model": "m", "response": "Good day!", "overall_score": 7.0, "annotations": {"a": 1}},
            {"model": "n", "response": "What?", "overall_score": 3.0},
            {"model": "o", "response": "Hello!", "overall_score": 8.0}]},
        PAIR | {"preference": 1, "source": "x", "models": ["m", "n", "o"]}),
    "Nectar": (
        {"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": [
            {"answer": "What?", "rank": 3.0}, {"answer": "Hello!", "rank": 1.0},
            {"answer": "Yes", "rank": 2.0}]},
        PAIR | {"preference": 1}),
    "distilabel": (
        {"instruction": "Hi", "generations": ["Hello!", "What?"], "ratings": [4, 2.5]},
        PAIR | {"preference": 1}),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(tmp_path, name):
    given, expected = PAIRS[name]
    assert convert(tmp_path, given) == {"pref": [expected]}


# ---------------------------------------------------------------- shapes: demonstrations, prompts

OTHERS = {
    "messages": (
        "sft", {"messages": [*TURNS, assistant("5")], "source": "x"},
        OF_TURNS | {"output": "5", "source": "x"}),
    "one turn": (
        "sft", {"prompt": "Hi", "prompt_id": 7, "messages": [user("Hi"), assistant("Hello!")]},
        {"instruction": "Hi", "input": "", "output": "Hello!", "prompt": "Hi", "prompt_id": 7}),
    "an empty system turn": (
        "sft", {"messages": [system(""), user("Hi"), assistant("Hello!")]},
        {"instruction": "Hi", "input": "", "output": "Hello!"}),
    "turns after the last answer": (
        "sft", {"messages": [user("Hi"), assistant("Hello!"), user("Thanks")]},
        {"instruction": "Hi", "input": "", "output": "Hello!"}),
    "parts of text": (
        "sft", {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, assistant("Hello!")]},
        {"instruction": "Hi", "input": "", "output": "Hello!"}),
    "ShareGPT": (
        "sft", {"conversations": [{"from": "system", "value": "Be kind."},
                                  {"from": "human", "value": "Add 1 and 1."},
                                  {"from": "gpt", "value": "2"},
                                  {"from": "human", "value": "And 3?"},
                                  {"from": "gpt", "value": "5"}]},
        OF_TURNS | {"output": "5"}),
    "prompt, completion": (
        "sft", {"prompt": "The sky is", "completion": " blue."},
        {"instruction": "The sky is", "input": "", "output": " blue."}),
    "prompt, completion: messages": (
        "sft", {"prompt": TURNS, "completion": [assistant("5")]}, OF_TURNS | {"output": "5"}),
    "a good one of TRL's unpaired": (
        "sft", {"prompt": "The sky is", "completion": " blue.", "label": True},
        {"instruction": "The sky is", "input": "", "output": " blue.", "label": True}),
    "dolly": (
        "sft", {"instruction": "When?", "context": "In 1815.", "response": "1815",
                "category": "qa"},
        {"instruction": "When?", "input": "In 1815.", "output": "1815", "category": "qa"}),
    "context and system": (
        "sft", {"system": "Be kind.", "question": "When?", "context": "In 1815.", "answer": "1815"},
        {"instruction": "When?\n\nIn 1815.", "input": "System: Be kind.", "output": "1815",
         "messages": [system("Be kind."), user("When?\n\nIn 1815.")]}),
    "Alpaca": (
        "sft", {"instruction": "Qué?", "input": None, "output": " 3.14…\n\n", "text": "unused"},
        {"instruction": "Qué?", "input": "", "output": " 3.14…\n\n", "text": "unused"}),
    "ours, with turns": (
        "sft", OF_TURNS | {"output": "5", "cut": ["output"]},
        OF_TURNS | {"output": "5", "cut": ["output"]}),
    "a prompt": ("prompts", {"prompt": "Hi"}, {"instruction": "Hi", "input": ""}),
    "a prompt of turns": ("prompts", {"prompt": TURNS, "id": 3}, OF_TURNS | {"id": 3}),
    "messages without an answer": (
        "prompts", {"messages": [system("Be kind."), user("Hi")]},
        {"instruction": "Hi", "input": "System: Be kind.",
         "messages": [system("Be kind."), user("Hi")]}),
    "ours, a prompt with turns": ("prompts", OF_TURNS, OF_TURNS),
    "what edit.py would take for an answer is left out": (
        "prompts", {"prompt": "Hi", "original": "x", "edited": "y", "preference": 1,
                    "cut": "yes", "mine": 1},
        {"instruction": "Hi", "input": "", "mine": 1}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_demonstrations_and_prompts(tmp_path, name):
    kind, given, expected = OTHERS[name]
    assert convert(tmp_path, given) == {kind: [expected]}


def test_what_comes_out_goes_in_again(tmp_path):
    rows = [given for given, _ in PAIRS.values()] + [given for _, given, _ in OTHERS.values()]
    first = convert(tmp_path, *rows)
    assert set(first) == {"sft", "pref", "prompts"}
    for kind, expected in first.items():
        (tmp_path / kind).mkdir()
        assert convert(tmp_path / kind, *expected) == {kind: expected}


# ---------------------------------------------------------------- several answers with scores


def test_all_pairs_of_a_list(tmp_path, capsys):
    answers = [{"text": "a", "score": 1}, {"text": "b", "score": 3}, {"text": "c", "score": 3},
               {"text": "d", "score": None}]
    files = convert(tmp_path, {"prompt": "Hi", "responses": answers}, pairs="all")
    pairs = [(row["output_1"], row["output_2"], row["preference"]) for row in files["pref"]]
    assert pairs == [("b", "a", 1), ("c", "a", 1)]
    said = capsys.readouterr().out
    assert "1 (an answer without a score)" in said and "1 (a tie)" in said


def test_one_answer_a_row(tmp_path, capsys):
    """nvidia/HelpSteer: rows of one prompt are compared by the field that --score names"""
    rows = [{"prompt": "Hi", "response": "What?", "helpfulness": 0, "verbosity": 1, "x": 1},
            {"prompt": "Bye", "response": "Ciao", "helpfulness": 4, "verbosity": 1},
            {"prompt": "Hi", "response": "Hello!", "helpfulness": 3, "verbosity": 1, "x": 2}]
    files = convert(tmp_path, *rows, score="helpfulness")
    assert files == {"pref": [PAIR | {"preference": 1, "verbosity": 1}]}
    assert "dropped: 1 (fewer than two answers with a score)" in capsys.readouterr().out


def test_scores_that_were_not_used_are_told(tmp_path, capsys):
    rows = [{"prompt": "Hi", "response": text, "score": len(text)} for text in ("a", "bb")]
    assert len(convert(tmp_path, *rows)["sft"]) == 2
    said = capsys.readouterr().out
    assert "1 prompts have several answers that differ in score; --score=score makes" in said


def test_which_score_is_meant(tmp_path, capsys):
    answers = [{"text": "Hello!", "pm_score": 9, "score": 1}, {"text": "What?", "pm_score": 2,
                                                              "score": 2}]
    row = {"question": "Hi", "answers": answers}
    assert convert(tmp_path, row, score="pm_score")["pref"] == [PAIR | {"preference": 1}]
    path = write_lines(tmp_path / "bad.jsonl", [row])
    said = refused(tmp_path / "none", capsys, path, score="stars")
    assert f"{path}:1: answers: an answer has no stars; it has: text, pm_score, score" in said


# ---------------------------------------------------------------- dropped, and malformed

DROPPED = {
    "a tie": [
        PAIR | {"preference": 1.5}, PAIR | {"preference": 0},
        {"prompt": "Hi", "response_a": "a", "response_b": "b", "winner": "tie (bothbad)"},
        {"prompt": "Hi", "response_a": "a", "response_b": "b", "score_a": 3, "score_b": 3.0},
        {"prompt": "Hi", "response1": "a", "response2": "b", "overall_preference": 0},
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": 5, "score_rejected": 5},
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "chosen-rating": 5, "rejected-rating": 5},
        {"prompt": "Hi", "answers": ["a", "b"], "scores": [2, 2]}],
    "equal answers": [
        {"prompt": "Hi", "chosen": "a", "rejected": "a"},
        {"prompt": "Hi", "answers": ["a", "a"], "scores": [1, 2]}],
    "no preference": [PAIR | {"preference": None}],
    "an answer without a score": [
        {"prompt": "Hi", "response_a": "a", "response_b": "b", "score_a": 3, "score_b": None}],
    "fewer than two answers with a score": [
        {"prompt": "Hi", "completions": []}, {"prompt": "Hi", "completions": [
            {"response": "a", "score": 2}]}],
    "conversations that differ before their last turn": [
        {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Ho"), assistant("b")]},
        {"chosen": [user("Hi"), assistant("a"), user("x"), assistant("y")],
         "rejected": [user("Hi"), assistant("b")]},
        {"prompt": "Hi", "chosen": "a", "rejected": [system("")]}],
    "a conversation that does not end with an answer": [
        {"chosen": [user("Hi"), assistant("a"), user("x")],
         "rejected": [user("Hi"), assistant("a"), user("y")]}],
    "no user turn before the answer": [
        {"messages": [assistant("a")]}, {"messages": [user("Hi"), assistant("a"), assistant("b")]}],
    'a turn of "tool"': [
        {"messages": [user("Hi"), {"role": "tool", "content": "7"}, assistant("a")]}],
    "a turn that is not text": [
        {"messages": [user("Hi"), {"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, assistant("a")]}],
    "an answer with the label false": [{"prompt": "Hi", "completion": "x", "label": False}],
}


@pytest.mark.parametrize("reason", DROPPED)
def test_dropped_rows_are_counted(tmp_path, capsys, reason):
    rows = DROPPED[reason]
    files = convert(tmp_path, *rows, {"prompt": "kept"})
    assert files == {"prompts": [{"instruction": "kept", "input": ""}]}
    said = capsys.readouterr().out
    assert f"{len(rows)} ({reason})" in said
    of_run = json.loads((tmp_path / "out/run.json").read_text())
    assert of_run["dropped"][reason] == len(rows)


def test_nothing_is_left(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", DROPPED["a tie"][:3])
    assert "no row is left; dropped: 3 (a tie)" in refused(tmp_path, capsys, path)


@pytest.mark.parametrize("row, words", [
    ({"chosen": "a", "rejected": "b"}, "no prompt; the row has: chosen, rejected; it may be"),
    ({"text": "a"}, "no prompt; the row has: text"),
    ({"prompt": 5}, "prompt must be a text or a list of messages, got 5"),
    ({"prompt": "Hi", "chosen": "a", "rejected": None}, "rejected must be a text or a list"),
    ({"messages": ["Hi", "Ho"]}, 'messages: a message must have role and content, got "Hi"'),
    ({"prompt": "Hi", "completion": "a", "input": 3}, "input must be a text or null, got 3"),
    ({"system": [1], "prompt": "Hi"}, "system must be a text or null, got [1]"),
    ({"prompt": "Hi", "response_a": "a", "response_b": "b"},
     "nothing says which of response_a and response_b is better"),
    ({"prompt": "Hi", "response_a": "a", "response_b": "b", "winner": 1},
     "winner must be a, b or tie, got 1"),
    (PAIR | {"preference": 3}, "preference must be 1, 2 or tie, got 3"),
    (PAIR | {"preference": True}, "preference must be 1, 2 or tie, got true"),
    (PAIR | {"output_3": "x", "preference": 1}, "more than two answers (output_3)"),
    ({"prompt": "Hi", "response_a": "a", "response_b": "b", "score_a": "x", "score_b": 1},
     'score_a must be a number, got "x"'),
    ({"prompt": "Hi", "answers": ["a", "b"], "scores": [1]}, "answers has 2 answers; scores must"),
    ({"prompt": "Hi", "answers": [{"text": "a"}]}, "answers: an answer has no score; it has: text"),
    ([1], "must be a JSON object, got list"),
])
def test_malformed_rows_name_their_line(tmp_path, capsys, row, words):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "fine"}, row])
    assert f"{path}:2: {words}" in refused(tmp_path, capsys, path)


def test_other_mistakes(tmp_path, capsys):
    assert "name the files" in refused(tmp_path, capsys)
    assert "No such file" in refused(tmp_path, capsys, tmp_path / "none.jsonl")
    assert "Is a directory" in refused(tmp_path, capsys, tmp_path)
    for content, words in [(b"", "no rows in it"), (b'{"prompt": "a"}\n{\n', ":2: not JSON"),
                           (b'[{"prompt": "a"},\n {"prompt"]\n', ":2: not JSON"),
                           (b'{"prompt": NaN}\n', ":1: not JSON (NaN is not JSON"),
                           (b'{"prompt": "\xe9"}\n', "byte 12 is not UTF-8"),
                           (b"\x1f\x8b\x08damaged", "a damaged gzip file")]:
        path = tmp_path / "bad.jsonl"
        path.write_bytes(content)
        assert f"{path}" in (said := refused(tmp_path, capsys, path)) and words in said
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    said = refused(tmp_path, capsys, path, score="helpfulness")
    assert f"{path}:1: no field 'helpfulness' (--score)" in said


def test_an_input_is_not_overwritten(tmp_path, capsys):
    path = write_lines(tmp_path / "pref.jsonl", [PAIR | {"preference": 1}])
    with pytest.raises(SystemExit):
        main(Config(data=[str(path)], out=str(tmp_path), overwrite=True))
    assert "pref.jsonl would be overwritten" in capsys.readouterr().err
    assert rows_of(path) == [PAIR | {"preference": 1}]


# ---------------------------------------------------------------- files

# Texts that a careless reader breaks: line separators of Unicode, line ends, quotes, tabs.
ODD = 'a "quoted", text\nof two lines\u2028and\u2029\x85more\r\n\tend\x0b; \u00e9\U0001f600'
ODD_ROW = {"instruction": ODD, "input": "", "output": ODD[::-1]}


def test_arrays_byte_order_marks_and_gzip(tmp_path):
    rows = [{"prompt": ODD, "completion": ODD[::-1]}, {"prompt": "b", "completion": "c"}]
    expected = {"sft": [ODD_ROW, {"instruction": "b", "input": "", "output": "c"}]}
    texts = {"lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
             "windows": "\r\n".join(map(json.dumps, rows)) + "\r\n\r\n",
             "array": json.dumps(rows, ensure_ascii=False),
             "indented": "\n " + json.dumps(rows, indent=1)}
    for name, text in texts.items():
        for encoding in ("utf-8", "utf-8-sig"):
            for packed in (False, True):
                folder = tmp_path / f"{name}-{encoding}-{packed}"
                folder.mkdir()
                content = text.encode(encoding)
                # Gzip is seen in the content: the name does not say it.
                (folder / "a.json").write_bytes(gzip.compress(content) if packed else content)
                assert convert_file(folder, folder / "a.json") == expected


@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_tables(tmp_path, suffix, delimiter):
    path = tmp_path / f"a{suffix}"
    opened = gzip.open if suffix.endswith(".gz") else open
    with opened(path, "wt", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerow(["", "prompt", "response_a", "response_b", "winner", "score"])
        table.writerow([0, ODD, "[1, 2]", "b" * 200_000, "a", "1.0"])
        table.writerow([1, json.dumps(TURNS), "5", "6", "b", ""])
        table.writerow([2, "Hi", "5", "6", "tie", ""])
        table.writerow([3, "Hi", "5", "6", "", ""])
    first = {"instruction": ODD, "input": "", "output_1": "[1, 2]", "output_2": "b" * 200_000,
             "preference": 1, "score": "1.0"}
    second = OF_TURNS | {"output_1": "5", "output_2": "6", "preference": 2, "score": ""}
    assert convert_file(tmp_path, path) == {"pref": [second, first]}


@pytest.mark.parametrize("text, words", [
    ('prompt,completion\n"a\nb",c\n"d",e,f\n', ":4: 3 cells, but 2 columns"),
    ('prompt,completion\n"a\nb",c\n"d,e\n', ":4: unexpected end of data"),
    ("prompt,prompt\na,b\n", ":1: two columns have the same name"),
    ("a,messages\n1,\"[{'role': 'user'}]\"\n", ":2: a cell looks like messages but is not JSON"),
    ("prompt,completion\n", "no rows in it"),
])
def test_malformed_tables(tmp_path, capsys, text, words):
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert f"{path}" in (said := refused(tmp_path, capsys, path)) and words in said


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow
    rows = [{"prompt": "Hi", "chosen": [user("Hi"), assistant("Hello!")], "score": 2.5,
             "rejected": [user("Hi"), assistant("What?")], "day": datetime.date(2024, 1, 2)},
            {"prompt": "x", "chosen": [*TURNS, assistant("5")], "score": float("nan"),
             "rejected": [*TURNS, assistant("6")], "day": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first = PAIR | {"preference": 1, "prompt": "Hi", "score": 2.5, "day": "2024-01-02"}
    second = OF_TURNS | {"output_1": "5", "output_2": "6", "preference": 1, "prompt": "x",
                         "score": None, "day": None}
    assert convert_file(tmp_path, tmp_path / "a.parquet") == {"pref": [second, first]}


def test_parquet_without_pyarrow_or_damaged(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    try:
        import pyarrow  # noqa: F401
        assert "a damaged parquet file" in refused(tmp_path, capsys, path)
    except ImportError:
        pass
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert f"{path} is parquet: pip install pyarrow" in refused(tmp_path, capsys, path)


# ---------------------------------------------------------------- what it says; again; next stages


def test_it_says_what_it_took_for_what(tmp_path, capsys):
    given = {"system": "Be kind.", "question": "Hi" * 99, "chosen": "\x1b\x9b\u202e",
             "rejected": "b", "preference": "x", "mine": 1}
    convert(tmp_path, given, given, {"prompt": "p"}, {"prompt": "p", "chosen": "a",
                                                      "rejected": "a"})
    said = capsys.readouterr().out
    assert ("2 rows -> pref.jsonl: chosen -> output_1, rejected -> output_2, question -> "
            "instruction, system -> input, messages, earlier turns -> input, messages\n"
            "  as they are: mine\n  left out: preference\n  before: {") in said
    assert "1 rows -> prompts.jsonl: prompt -> instruction\n" in said
    assert 'after:  {"instruction": "p", "input": ""}' in said
    assert "dropped: 1 (equal answers)" in said and not set("\x1b\x9b\u202e") & set(said)
    assert f"{tmp_path}/out/pref.jsonl: 2 rows; next: python edit.py --data={tmp_path}/out/" in said
    assert max(map(len, said.split("\n"))) < 700


def test_again_other_files_and_overwrite(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    command = [SCRIPT, path, f"--out={tmp_path}/out"]
    run(*command)
    assert "nothing to do" in run(*command).stdout
    write_lines(path, [{"prompt": "a"}])
    done = run(*command, ok=False)
    assert done.returncode == 2 and f"the content of {path}" in done.stderr
    assert rows_of(tmp_path / "out/sft.jsonl") == [{"instruction": "a", "input": "", "output": "b"}]

    # The rows of the earlier run do not stay beside the new ones.
    run(*command, "--overwrite")
    assert [file.name for file in (tmp_path / "out").glob("*.jsonl")] == ["prompts.jsonl"]


def test_the_stages_read_the_rows(world, tmp_path):
    """What comes out of chosen and rejected conversations goes through edit, sft and decode"""
    rows = []
    for row in rows_of(world / "data/pref.jsonl")[:8]:
        chosen = [user(row["instruction"]), assistant(row["output_1"])]
        rejected = [user(row["instruction"]), assistant(row["output_2"])]
        rows.append({"chosen": chosen, "rejected": rejected})
    given = write_lines(tmp_path / "pairs.jsonl", [row for row in rows
                                                   if row["chosen"] != row["rejected"]])
    chats = write_lines(tmp_path / "chats.jsonl",
                        [{"messages": [system("Be kind."), *row["chosen"]]} for row in rows])
    out = tmp_path / "out"
    run(SCRIPT, given, chats, f"--out={out}")
    run("edit.py", "--editor=rules", f"--data={out}/pref.jsonl", f"--out={tmp_path}/edits.jsonl")
    run("diff.py", f"--data={tmp_path}/edits.jsonl", f"--tokenizer={world}/sft",
        f"--out={tmp_path}/diffs.jsonl", "--max_changed=1")
    run("sft.py", f"--model={world}/data/model", f"--data={out}/sft.jsonl", f"--out={tmp_path}/sft",
        "--batch=4", "--epochs=1")
    run("evaluate.py", "decode", f"--model={world}/sft", f"--data={out}/sft.jsonl",
        f"--out={tmp_path}/outputs.jsonl", "--response_len=5")
    outputs = rows_of(tmp_path / "outputs.jsonl")
    assert [row["messages"] for row in outputs] == [
        [system("Be kind."), row["chosen"][0]] for row in rows]


# ---------------------------------------------------------------- other people's readers


def decode(world, path):
    return run("evaluate.py", "decode", f"--model={world}/sft", f"--data={world}/data/eval.jsonl",
               f"--out={path}", "--response_len=9", "--batch=4")


def test_decode_writes_an_array(world, tmp_path, monkeypatch):
    """Of the same rows as the lines; what a killed run has decoded is not decoded again"""
    decode(world, tmp_path / "o.jsonl")
    rows = rows_of(tmp_path / "o.jsonl")
    assert len(rows) == 8

    # Killed in the second of two groups.
    def killed(*args, groups=[]):
        groups.append(answer(*args))
        if len(groups) > 1:
            raise KeyboardInterrupt
        return groups[0]

    answer = evaluate.answer
    monkeypatch.setattr(evaluate, "answer", killed)
    path = tmp_path / "o.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate.decode(evaluate.DecodeConfig(
            model=f"{world}/sft", data=f"{world}/data/eval.jsonl", out=str(path), response_len=9,
            batch=4))
    while record.LOCKS:
        record.LOCKS.pop().close()  # as the end of a process does
    assert not path.exists()
    part = tmp_path / "o.json.parts/0.jsonl"
    done = {row["row"] for row in rows_of(part)}
    write_lines(part, [row | {"output": "kept"} for row in rows_of(part)])

    decode(world, path)
    expected = [row | {"output": "kept"} if number in done else row
                for number, row in enumerate(rows)]
    assert json.loads(path.read_text()) == expected and len(done) == 4
    assert not part.exists() and "nothing to do" in decode(world, path).stdout


def test_judge_and_winrate_read_lines_and_arrays(world, tmp_path):
    decode(world, tmp_path / "o.jsonl")
    decode(world, tmp_path / "o.json")
    reference = rows_of(world / "data/eval.jsonl")
    (tmp_path / "eval.json").write_text(json.dumps(reference))
    found = []
    for outputs, data in (("o.jsonl", f"{world}/data/eval.jsonl"), ("o.json", "eval.json")):
        data = tmp_path / data
        run("evaluate.py", "judge", "--judge=gold", f"--outputs={tmp_path}/{outputs}",
            f"--reference={data}", f"--out={tmp_path}/{outputs}.annotations.jsonl")
        rows = rows_of(tmp_path / f"{outputs}.annotations.jsonl")
        (tmp_path / "annotations.json").write_text(json.dumps(rows))
        found.append([run("evaluate.py", "winrate", path, "--json").stdout for path in
                      (tmp_path / f"{outputs}.annotations.jsonl", tmp_path / "annotations.json")])
    assert found[0][0] == found[0][1] == found[1][0] == found[1][1]
    assert '"n_total": 8' in found[0][0]


def test_alpaca_eval_opens_our_outputs(world, tmp_path):
    utils = pytest.importorskip("alpaca_eval.utils", reason="alpaca_eval is not installed")
    metrics = pytest.importorskip("alpaca_eval.metrics", reason="alpaca_eval is not installed")
    decode(world, tmp_path / "o.json")
    table = utils.load_or_convert_to_dataframe(tmp_path / "o.json")
    assert {"instruction", "output", "generator"} <= set(table.columns)
    rows = json.loads((tmp_path / "o.json").read_text())
    for name in ("instruction", "output", "generator"):
        assert table[name].tolist() == [row[name] for row in rows]

    # Its aggregator on our judgements.
    run("evaluate.py", "judge", "--judge=gold", f"--outputs={tmp_path}/o.json",
        f"--reference={world}/data/eval.jsonl", f"--out={tmp_path}/a.jsonl")
    theirs = metrics.get_winrate(rows_of(tmp_path / "a.jsonl"))
    ours = json.loads(run("evaluate.py", "winrate", f"{tmp_path}/a.jsonl", "--json").stdout)
    assert theirs["win_rate"] == pytest.approx(ours["win_rate"])
    assert theirs["standard_error"] == pytest.approx(ours["standard_error"])


def test_datasets_opens_what_we_write(world, tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [given for given, _ in PAIRS.values()] + [given for _, given, _ in OTHERS.values()]
    convert(tmp_path, *rows)
    decode(world, tmp_path / "o.json")
    for path in (*(tmp_path / "out").glob("*.jsonl"), tmp_path / "o.json"):
        read = datasets.load_dataset("json", data_files=str(path), split="train",
                                     cache_dir=str(tmp_path / "cache"))
        text = path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else rows_of(path)
        assert len(read) == len(rows)
        for theirs, ours in zip(read, rows):
            for name, value in ours.items():
                if isinstance(value, str) or name == "messages":
                    assert theirs[name] == value

    # The one row with several turns comes after more than datasets looks at to infer the fields.
    many = [{"prompt": "x" * 1000, "completion": "y"}] * 20_000
    (tmp_path / "many").mkdir()
    convert(tmp_path / "many", *many, {"prompt": TURNS, "completion": "5"})
    read = datasets.load_dataset("json", data_files=f"{tmp_path}/many/out/sft.jsonl", split="train",
                                 cache_dir=str(tmp_path / "cache"))
    assert len(read) == 20_001 and read[-1]["messages"] is None
    assert read[0] == OF_TURNS | {"output": "5"}


# ---------------------------------------------------------------- an example in docs


def test_the_example_of_docs_data(tmp_path):
    """The row that docs/data.md shows comes out as it says"""
    text = (ROOT / "docs/data.md").read_text()
    lines = text[text.index('    {"chosen"'):].split("\n")
    given, expected = map(json.loads, lines[:2])
    assert convert(tmp_path, given) == {"pref": [expected]}
