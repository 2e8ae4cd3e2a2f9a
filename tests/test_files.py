"""Files as people have them: right, or one line. pytest tests/test_files.py"""
import errno
import json

import pytest
from conftest import rows_of, run

from plumbing import files, record
from plumbing.command_line import load_config
from test_house import Config

FIELDS = {"instruction": str, "input": (str, type(None))}


def refused(capsys, call, *parts):
    with pytest.raises(SystemExit) as end:
        call()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    for part in parts:
        assert part in said, (part, said)


def test_a_json_array_is_read_and_input_may_be_missing(tmp_path, capsys):
    rows = [{"instruction": "a"}, {"instruction": "b", "input": None},
            {"instruction": "c", "input": "x"}]
    expected = [rows[0] | {"input": ""}, rows[1], rows[2]]
    path = tmp_path / "a.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        for bom in ("", "\ufeff"):
            path.write_text(bom + text, encoding="utf-8")
            assert files.read_jsonl(path, FIELDS) == expected
    path.write_text(json.dumps([rows[0], {"instruction": 5}]))
    refused(capsys, lambda: files.read_jsonl(path, FIELDS), f"{path}:2: instruction must be str")
    path.write_text("[1, 2]\n[3]\n")
    refused(capsys, lambda: files.read_jsonl(path, FIELDS), f"{path}:1: must be a JSON object")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_does_not_have(tmp_path, capsys, word):
    """pandas writes an empty cell as NaN: no stage takes it for a text"""
    for field in ("input", "mine"):
        text = f'{{"instruction": "a", "{field}": {word}}}\n'
        (tmp_path / "a.jsonl").write_text('{"instruction": "a"}\n' + text)
        refused(capsys, lambda: files.read_jsonl(tmp_path / "a.jsonl", FIELDS), "a.jsonl:2:", word)


def test_every_reader_of_questions_checks_input(world, tmp_path):
    """decode, judge, winrate, rewards, show: as sft, edit and ppo do"""
    row = dict(instruction="List four fruits.", input=5, output="apple", output_1="a", output_2="b",
               preference=1, generator="x")
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + "\n")
    bad, model = f"{tmp_path}/bad.jsonl", f"--model={world}/sft"
    for words in (["evaluate.py", "decode", model, f"--data={bad}", f"--out={tmp_path}/o.jsonl"],
                  ["evaluate.py", "judge", "--judge=gold", f"--outputs={bad}", f"--reference={bad}",
                   f"--out={tmp_path}/o.jsonl"],
                  ["evaluate.py", "winrate", bad],
                  ["evaluate.py", "rewards", f"--reward_model={world}/rm", f"--data={bad}"],
                  ["reward_model.py", "show", f"--model={world}/rm", bad],
                  ["sft.py", model, f"--data={bad}", f"--out={tmp_path}/o"]):
        done = run(*words, ok=False)
        assert done.returncode == 2
        assert "bad.jsonl:1: input must be str or null, got 5" in done.stderr
        assert done.stderr.count("\n") == 1 and not list(tmp_path.glob("o*"))


def test_a_preset_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "p.toml").write_text("[ppo]\r\nlr = 3\r\n", encoding="utf-8-sig")
    assert load_config(Config, "ppo", [f"{tmp_path}/p.toml"]) == Config(lr=3.0)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, code):
    """The run continues and says so; another error is no missing lock"""
    def flock(*_):
        raise OSError(code, "no locks")
    monkeypatch.setattr(record.fcntl, "flock", flock)
    assert record.begin(Config(out=f"{tmp_path}/run"), "ppo") is False
    assert "no locks on this file system" in capsys.readouterr().out
    code = errno.EIO
    with pytest.raises(OSError):
        record.begin(Config(out=f"{tmp_path}/run"), "ppo")


def test_torn_records_and_logs_are_one_line(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"config": {')
    refused(capsys, lambda: record.record_of(tmp_path), "run.json is torn")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": \n{"step": 2}\n')
    refused(capsys, lambda: record.logged(tmp_path / "metrics.jsonl"), "metrics.jsonl is damaged")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"ste')
    assert record.logged(tmp_path / "metrics.jsonl") == [{"step": 0}]


def test_alpaca_evals_arrays_go_through_decode_judge_and_winrate(world, tmp_path):
    rows = rows_of(world / "data/eval.jsonl")
    (tmp_path / "eval.json").write_text(json.dumps(rows, indent=1))
    run("evaluate.py", "decode", f"--model={world}/sft", f"--data={tmp_path}/eval.json",
        f"--out={tmp_path}/o.jsonl", "--response_len=9")
    run("evaluate.py", "judge", "--judge=gold", f"--outputs={tmp_path}/o.jsonl",
        f"--reference={tmp_path}/eval.json", f"--out={tmp_path}/a.jsonl")
    (tmp_path / "a.json").write_text(json.dumps(rows_of(tmp_path / "a.jsonl")))
    said = run("evaluate.py", "winrate", f"{tmp_path}/a.json").stdout
    assert f"n_total           {len(rows)}" in said
