"""The paper's data, from a hand-made folder: pytest tests/test_alpacafarm.py"""
import json

import pytest
from conftest import rows_of, run
from data.alpacafarm.prepare import Config, load_pairs, main

SCRIPT = "data/alpacafarm/prepare.py"
PAIRS = "alpaca_noisy_multi_preference.json"

# Rows as they are in AlpacaFarm, with fields that no stage reads.
ROW = {"instruction": "Qué es «π»?\n", "input": "", "output": " 3.14…\n\n", "text": "unused"}
PAIR = {"instruction": "Add.", "input": "1 + 1", "output_1": "2", "output_2": "3", "preference": 1,
        "annotator_index": 13}


def save(folder, name, rows):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")


@pytest.fixture
def farm(tmp_path):
    """A folder with AlpacaFarm's files, a few rows each"""
    folder = tmp_path / "farm"
    rows_of_split = dict(sft=2, preference=3, unlabeled=4, val=5)
    for split, count in rows_of_split.items():
        rows = [ROW | {"instruction": split}] * count
        save(folder, f"alpaca_instructions/{split}.json", rows)
    save(folder, PAIRS, [PAIR, PAIR | {"preference": 2.0, "input": None}])
    save(folder, "alpaca_human_preference.json", [PAIR | {"instruction": "human"}])
    more = {"generator": "text-davinci-003", "dataset": "koala", "sample_mode": "x"}
    save(folder, "alpaca_farm_evaluation.json", [ROW | more])
    return folder


def refused(capfd, tmp_path, **fields):
    """What main() says when it ends with code 2; it must not have written anything"""
    with pytest.raises(SystemExit) as end:
        main(Config(out=f"{tmp_path}/out", **fields))
    said = capfd.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    return said


def test_which_split_goes_to_which_file(farm, tmp_path):
    done = run(SCRIPT, f"--source={farm}", f"--out={tmp_path}/out")
    files = {path.name: rows_of(path) for path in (tmp_path / "out").glob("*.jsonl")}
    answered = {name: ROW[name] for name in ("instruction", "input", "output")}
    pair = {name: value for name, value in PAIR.items() if name != "annotator_index"}
    val = answered | {"instruction": "val", "generator": "alpaca", "dataset": "val"}
    assert files == {
        "sft.jsonl": [answered | {"instruction": "sft"}] * 2,
        "prompts.jsonl": [{"instruction": "unlabeled", "input": ""}] * 4,
        "val.jsonl": [val] * 5,
        "pref.jsonl": [pair, pair | {"preference": 2, "input": ""}],
        "eval.jsonl": [answered | {"generator": "text-davinci-003", "dataset": "koala"}],
    }
    assert all(type(row["preference"]) is int for row in files["pref.jsonl"])
    assert "val.jsonl: 5 rows, 4 of them the same as an earlier one" in done.stdout
    assert "pref.jsonl: 2 rows\n" in done.stdout


def test_again_and_refused(farm, tmp_path):
    command = [SCRIPT, f"--source={farm}", f"--out={tmp_path}/out"]
    run(*command)
    before = rows_of(tmp_path / "out" / "pref.jsonl")
    assert "nothing to do" in run(*command).stdout
    done = run(*command, "--preference=human", ok=False)
    assert done.returncode == 2
    assert "preference: 'noisy_multi' then, 'human' now" in done.stderr
    assert rows_of(tmp_path / "out" / "pref.jsonl") == before


def test_preferences_of_people(farm, tmp_path):
    main(Config(source=str(farm), out=f"{tmp_path}/out", preference="human"))
    rows = rows_of(tmp_path / "out" / "pref.jsonl")
    assert [row["instruction"] for row in rows] == ["human"]


@pytest.mark.parametrize("preference", [0, 1.5, 3, True, None, "1", [1, 2]])
def test_strange_preferences_are_counted(farm, tmp_path, capfd, preference):
    strange = PAIR | {"preference": preference}
    save(farm, PAIRS, [PAIR, strange, PAIR, strange])
    said = refused(capfd, tmp_path, source=str(farm))
    assert "2 of 4 rows have a preference that is neither 1 nor 2; " in said
    assert f"the first is row 2: {json.dumps(preference)}." in said


@pytest.mark.parametrize("name, change, words", [
    ("alpaca_instructions/sft.json", lambda rows: rows[1].pop("output"),
     "sft.json: row 2: no field 'output'; the row has: "),
    ("alpaca_farm_evaluation.json", lambda rows: rows[0].pop("generator"),
     "alpaca_farm_evaluation.json: row 1: no field 'generator'"),
    (PAIRS, lambda rows: rows[1].update(output_2=7), "row 2: output_2 must be str, got 7"),
    ("alpaca_instructions/val.json", lambda rows: rows.append("x"),
     "val.json: row 6: must be a JSON object, got str"),
    ("alpaca_instructions/unlabeled.json", lambda rows: rows.clear(),
     "unlabeled.json: must be a list of rows, got an empty one"),
])
def test_malformed_rows(farm, tmp_path, capfd, name, change, words):
    rows = json.loads((farm / name).read_text())
    change(rows)
    save(farm, name, rows)
    assert words in refused(capfd, tmp_path, source=str(farm))


def test_a_file_that_is_missing_or_not_json(farm, tmp_path, capfd):
    val = farm / "alpaca_instructions" / "val.json"
    val.unlink()
    said = refused(capfd, tmp_path, source=str(farm))
    assert "has no alpaca_instructions/val.json" in said
    val.write_text("{")
    assert "val.json: not JSON" in refused(capfd, tmp_path, source=str(farm))


def test_neither_folder_nor_hub(tmp_path, capfd):
    # A source that cannot be a name of the hub.
    assert "is no folder here" in refused(capfd, tmp_path, source=f"{tmp_path}/no/such/folder")

    # A name of the hub, without a network.
    done = run(SCRIPT, f"--out={tmp_path}/out", ok=False, HF_HOME=tmp_path / "cache")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert ("is no folder here, and the hub did not give alpaca_instructions/sft.json"
            in done.stderr)
    assert "--source=FOLDER" in done.stderr
    assert not (tmp_path / "out").exists()


def test_from_the_hub(farm, tmp_path, monkeypatch):
    """With the download replaced: the hub is asked for the right dataset, revision and files"""
    asked = []

    def download(repo, name, *, repo_type, revision):
        asked.append((repo, repo_type, revision))
        return str(farm / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    main(Config(out=f"{tmp_path}/out"))
    assert asked == [("tatsu-lab/alpaca_farm", "dataset", "main")] * 5
    assert len(rows_of(tmp_path / "out" / "sft.jsonl")) == 2


def test_pairs_are_read_in_their_order(farm):
    assert [row["preference"] for row in load_pairs(farm / PAIRS)] == [1, 2]
