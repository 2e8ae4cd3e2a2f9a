"""The paper's data, from a hand-made folder: pytest tests/test_alpacafarm.py"""

import json

import pytest
from conftest import rows_of, run
from data.alpacafarm.prepare import Config, load_pairs, main


@pytest.fixture
def source(tmp_path):
    """AlpacaFarm's files in small, with the further fields that its rows have"""

    def save(name, rows):
        (tmp_path / "farm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "farm" / name).write_text(json.dumps(rows), encoding="utf-8")

    row = {"instruction": "Qué es «π»?\n", "input": "", "output": " 3.14…\n\n", "text": "unused"}
    pair = {
        "instruction": "Add.",
        "input": "1 + 1",
        "output_1": "2",
        "output_2": "3",
        "preference": 1,
        "annotator_index": 13,
    }
    for number, split in enumerate(("sft", "preference", "unlabeled", "val")):
        save(f"alpaca_instructions/{split}.json", [row | {"instruction": split}] * (number + 2))
    save("alpaca_noisy_multi_preference.json", [pair, pair | {"preference": 2.0, "input": None}])
    save("alpaca_human_preference.json", [pair | {"instruction": "human"}])
    save(
        "alpaca_farm_evaluation.json",
        [row | {"generator": "text-davinci-003", "dataset": "koala", "sample_mode": "x"}],
    )
    return tmp_path / "farm", save, row, pair


def refused(capfd, tmp_path, **fields):
    """What main() says when it ends with code 2, having written nothing"""
    with pytest.raises(SystemExit) as end:
        main(Config(out=f"{tmp_path}/out", **fields))
    said = capfd.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and not (tmp_path / "out").exists()
    return said


def test_which_split_feeds_what(source, tmp_path):
    folder, _, row, pair = source
    done = run("data/alpacafarm/prepare.py", f"--source={folder}", f"--out={tmp_path}/out")
    files = {path.name: rows_of(path) for path in (tmp_path / "out").glob("*.jsonl")}
    answered = {name: row[name] for name in ("instruction", "input", "output")}
    assert files == {
        "sft.jsonl": [answered | {"instruction": "sft"}] * 2,
        "prompts.jsonl": [{"instruction": "unlabeled", "input": ""}] * 4,
        "val.jsonl": [answered | {"instruction": "val", "generator": "alpaca", "dataset": "val"}]
        * 5,
        "pref.jsonl": [
            {k: v for k, v in pair.items() if k != "annotator_index"} | more
            for more in ({}, {"preference": 2, "input": ""})
        ],
        "eval.jsonl": [answered | {"generator": "text-davinci-003", "dataset": "koala"}],
    }
    assert all(type(pair["preference"]) is int for pair in files["pref.jsonl"])
    assert (
        "val.jsonl: 5 rows, 4 of them the same as an earlier one" in done.stdout
        and "pref.jsonl: 2 rows\n" in done.stdout
    )
    assert (
        "nothing to do"
        in run("data/alpacafarm/prepare.py", f"--source={folder}", f"--out={tmp_path}/out").stdout
    )
    done = run(
        "data/alpacafarm/prepare.py",
        f"--source={folder}",
        f"--out={tmp_path}/out",
        "--preference=human",
        ok=False,
    )
    assert done.returncode == 2 and "preference: 'noisy_multi' then, 'human' now" in done.stderr
    assert rows_of(tmp_path / "out" / "pref.jsonl") == files["pref.jsonl"]


def test_people_s_preferences(source, tmp_path):
    main(Config(source=str(source[0]), out=f"{tmp_path}/out", preference="human"))
    assert [row["instruction"] for row in rows_of(tmp_path / "out" / "pref.jsonl")] == ["human"]


@pytest.mark.parametrize("preference", [0, 1.5, 3, True, None, "1", [1, 2]])
def test_strange_preferences_are_counted(source, tmp_path, capfd, preference):
    folder, save, _, pair = source
    save(
        "alpaca_noisy_multi_preference.json",
        [pair, pair | {"preference": preference}, pair, pair | {"preference": preference}],
    )
    said = refused(capfd, tmp_path, source=str(folder))
    assert (
        f"2 of 4 rows have a preference that is neither 1 nor 2; the first is row 2: "
        f"{json.dumps(preference)}."
        in said
    )


@pytest.mark.parametrize(
    "name, change, words",
    [
        (
            "alpaca_instructions/sft.json",
            lambda rows: rows[1].pop("output"),
            "sft.json: row 2: no field 'output'; the row has: ",
        ),
        (
            "alpaca_farm_evaluation.json",
            lambda rows: rows[0].pop("generator"),
            "alpaca_farm_evaluation.json: row 1: no field 'generator'",
        ),
        (
            "alpaca_noisy_multi_preference.json",
            lambda rows: rows[1].update(output_2=7),
            "row 2: output_2 must be str, got 7",
        ),
        (
            "alpaca_instructions/val.json",
            lambda rows: rows.append("x"),
            "val.json: row 6: must be a JSON object, got str",
        ),
        (
            "alpaca_instructions/unlabeled.json",
            lambda rows: rows.clear(),
            "unlabeled.json: must be a list of rows, got an empty one",
        ),
    ],
)
def test_malformed_rows(source, tmp_path, capfd, name, change, words):
    folder, save, *_ = source
    rows = json.loads((folder / name).read_text())
    change(rows)
    save(name, rows)
    assert words in refused(capfd, tmp_path, source=str(folder))


def test_neither_folder_nor_hub(source, tmp_path, capfd, monkeypatch):
    folder, *_ = source
    (folder / "alpaca_instructions" / "val.json").unlink()
    assert "has no alpaca_instructions/val.json" in refused(capfd, tmp_path, source=str(folder))
    (folder / "alpaca_instructions" / "val.json").write_text("{")
    assert "val.json: not JSON" in refused(capfd, tmp_path, source=str(folder))
    assert "is no folder here" in refused(
        capfd, tmp_path, source=f"{tmp_path}/no/such/folder"
    )  # not a name of the hub
    done = run(
        "data/alpacafarm/prepare.py", f"--out={tmp_path}/out", ok=False, HF_HOME=tmp_path / "cache"
    )  # offline
    assert (
        done.returncode == 2
        and "is no folder here, and the hub did not give alpaca_instructions/sft.json"
        in done.stderr
    )
    assert (
        done.stderr.count("\n") == 1
        and "--source=FOLDER" in done.stderr
        and not (tmp_path / "out").exists()
    )


def test_from_the_hub(source, tmp_path, monkeypatch):
    """The hub's part with its download replaced: dataset, revision and file names as they are
    there"""
    folder, asked = source[0], []

    def download(repo, name, *, repo_type, revision):
        asked.append((repo, name, repo_type, revision))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    main(Config(out=f"{tmp_path}/out"))
    assert {row[0::2] + row[3:] for row in asked} == {
        ("tatsu-lab/alpaca_farm", "dataset", "main")
    } and len(asked) == 5
    assert len(rows_of(tmp_path / "out" / "sft.jsonl")) == 2


def test_pairs_are_read_as_they_stand(source):
    assert [
        row["preference"] for row in load_pairs(source[0] / "alpaca_noisy_multi_preference.json")
    ] == [1, 2]
