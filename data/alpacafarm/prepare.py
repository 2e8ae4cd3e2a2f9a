"""The paper's data: AlpacaFarm's splits (Dubois et al., 2023), as the files that the stages read.

    python data/alpacafarm/prepare.py                     # from the hub's tatsu-lab/alpaca_farm
    python data/alpacafarm/prepare.py --source=FOLDER     # a copy on disk, with the same file names
    python data/alpacafarm/prepare.py --preference=human --out=data/alpacafarm_human

    alpaca_instructions/sft.json        -> sft.jsonl      demonstrations
    alpaca_noisy_multi_preference.json  -> pref.jsonl     preference pairs
        (alpaca_human_preference.json with --preference=human)
    alpaca_instructions/unlabeled.json  -> prompts.jsonl  PPO's prompts, without the answers
    alpaca_instructions/val.json        -> val.jsonl      with references; chooses a checkpoint
    alpaca_farm_evaluation.json         -> eval.jsonl     805 instructions and the answers of
                                                          text-davinci-003

Rows keep only the fields that the stages read. No row is dropped: a malformed row ends the run,
repeated rows are counted.
"""
import json, sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing.command_line import load_config
from plumbing.files import check_row, fits, write_jsonl
from plumbing.ranks import fail, say
from plumbing.record import begin, finish


@dataclass(frozen=True)
class Config:
    source: str = "tatsu-lab/alpaca_farm"   # a dataset of the hub, or a folder with its files
    revision: str = "main"                  # of the hub's dataset: a branch or a commit
    preference: Literal["noisy_multi", "human"] = "noisy_multi"  # simulated annotators, or people
    out: str = "data/alpacafarm"
    overwrite: bool = False


PROMPT = {"instruction": str, "input": (str, type(None))}
ANSWERED = PROMPT | {"output": str}
PAIR = PROMPT | {"output_1": str, "output_2": str, "preference": None}
REFERENCE = ANSWERED | {"generator": str, "dataset": str}


def dataset_file(cfg, name):
    """The path of one file of the dataset, downloaded if necessary"""
    if Path(cfg.source).is_dir():
        path = Path(cfg.source, name)
        if not path.is_file():
            fail(f"--source={cfg.source} has no {name}; copy all files of the dataset there")
        return path

    from huggingface_hub import hf_hub_download, logging
    logging.set_verbosity_error()  # without this it prints a warning for every retry
    say(f"fetching {name} of {cfg.source}")
    try:
        path = hf_hub_download(cfg.source, name, repo_type="dataset", revision=cfg.revision)
    except (OSError, ValueError) as error:  # no network, no such dataset or file, or a bad name
        reason = str(error).strip().splitlines()[0][:60]
        fail(f"--source={cfg.source} is no folder here, and the hub did not give {name} "
             f"({type(error).__name__}: {reason}...); "
             "copy the dataset into a folder and write --source=FOLDER")
    return Path(path)


def load_rows(path, fields):
    """The rows of a JSON file (a list of objects), with only the fields asked for.

    fields: name -> type, or None for any value. An input of null becomes "". """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        fail(f"{path}: not JSON ({error})")
    if not isinstance(rows, list) or not rows:
        found = type(rows).__name__ if rows else "an empty one"
        fail(f"{path}: must be a list of rows, got {found}")

    loaded = []
    for number, row in enumerate(rows, 1):
        check_row(row, fields, f"{path}: row {number}")
        kept = {name: row[name] for name in fields}
        if kept["input"] is None:
            kept["input"] = ""
        loaded.append(kept)
    return loaded


def load_pairs(path):
    """Preference pairs. A Bradley-Terry label is 1 or 2: a draw or a list of votes is refused."""
    rows = load_rows(path, PAIR)
    strange = [at for at, row in enumerate(rows) if not fits(row["preference"], (1, 2))]
    if strange:
        first = json.dumps(rows[strange[0]]["preference"])[:60]
        fail(f"{path}: {len(strange)} of {len(rows)} rows have a preference that is neither 1 nor "
             f"2; the first is row {strange[0] + 1}: {first}. Make them 1 or 2, or take them out")
    return [row | {"preference": int(row["preference"])} for row in rows]


def main(cfg):
    """AlpacaFarm's splits, Section 3.1 -> sft, pref, prompts, val and eval.jsonl"""
    sft = dataset_file(cfg, "alpaca_instructions/sft.json")
    pairs = dataset_file(cfg, f"alpaca_{cfg.preference}_preference.json")
    unlabeled = dataset_file(cfg, "alpaca_instructions/unlabeled.json")
    val = dataset_file(cfg, "alpaca_instructions/val.json")
    evaluation = dataset_file(cfg, "alpaca_farm_evaluation.json")

    # All files are read before anything is written.
    files = {}
    files["sft.jsonl"] = load_rows(sft, ANSWERED)
    files["pref.jsonl"] = load_pairs(pairs)
    files["prompts.jsonl"] = load_rows(unlabeled, PROMPT)
    reference = {"generator": "alpaca", "dataset": "val"}
    files["val.jsonl"] = [row | reference for row in load_rows(val, ANSWERED)]
    files["eval.jsonl"] = load_rows(evaluation, REFERENCE)

    inputs = [sft, pairs, unlabeled, val, evaluation]
    if begin(cfg, "prepare", paid=True, inputs=inputs, beside=("prepare.py", "__pycache__")):
        return say(f"{cfg.out} is finished; nothing to do")
    for name, rows in files.items():
        write_jsonl(Path(cfg.out, name), rows)
        different = {json.dumps(row, sort_keys=True) for row in rows}
        message = f"{cfg.out}/{name}: {len(rows)} rows"
        if len(different) < len(rows):
            message += f", {len(rows) - len(different)} of them the same as an earlier one"
        say(message)
    finish(cfg, rows={name: len(rows) for name, rows in files.items()})
    say(f"next: python sft.py --data={cfg.out}/sft.jsonl")


if __name__ == "__main__":
    main(load_config(Config, "prepare"))
