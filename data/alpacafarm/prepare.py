"""The paper's data: AlpacaFarm's splits (Dubois et al., 2023), as the files that the stages read.

    python data/alpacafarm/prepare.py                               # from the hub's dataset tatsu-lab/alpaca_farm
    python data/alpacafarm/prepare.py --source=FOLDER               # a copy of it on disk, with the same file names
    python data/alpacafarm/prepare.py --preference=human --out=data/alpacafarm_human

    alpaca_instructions/sft.json               -> sft.jsonl      demonstrations
    alpaca_noisy_multi_preference.json         -> pref.jsonl     preference pairs (or alpaca_human_preference.json)
    alpaca_instructions/unlabeled.json         -> prompts.jsonl  PPO's prompts; their answers are left out
    alpaca_instructions/val.json               -> val.jsonl      to choose a checkpoint on, with references
    alpaca_farm_evaluation.json                -> eval.jsonl     the 805 instructions with text-davinci-003's answers

Rows keep the fields that the stages read. None is dropped: a malformed row ends the run, repeated rows are counted.
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
    source: str = "tatsu-lab/alpaca_farm"   # a dataset of the hub, or a folder that holds its files
    revision: str = "main"                  # of the hub's dataset: a branch or a commit
    preference: Literal["noisy_multi", "human"] = "noisy_multi"  # the simulated annotators, noise included, or people
    out: str = "data/alpacafarm"
    overwrite: bool = False


PROMPT = {"instruction": str, "input": (str, type(None))}
ANSWERED = PROMPT | {"output": str}
PAIR = PROMPT | {"output_1": str, "output_2": str, "preference": None}
REFERENCE = ANSWERED | {"generator": str, "dataset": str}


def fetch(cfg, name):
    """The path of one file of the dataset, downloaded if need be"""
    if Path(cfg.source).is_dir():
        path = Path(cfg.source, name)
        return path if path.is_file() else fail(f"--source={cfg.source} has no {name}; copy the whole dataset there")
    from huggingface_hub import hf_hub_download, logging
    logging.set_verbosity_error()  # it retries aloud
    say(f"fetching {name} of {cfg.source}")
    try:
        return Path(hf_hub_download(cfg.source, name, repo_type="dataset", revision=cfg.revision))
    except (OSError, ValueError) as error:  # no network, no such dataset or file, not a dataset's name
        fail(f"--source={cfg.source} is no folder here, and the hub did not give {name} ({type(error).__name__}: "
             f"{str(error).strip().splitlines()[0][:60]}...); copy the dataset into a folder and write --source=FOLDER")


def load_rows(path, fields):
    """The rows of a JSON file (a list of objects), cut down to `fields` (name -> kind); an input of null becomes "" """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"{path}: not JSON ({error})")
    if not isinstance(rows, list) or not rows:
        fail(f"{path}: must be a list of rows, got {type(rows).__name__ if rows else 'an empty one'}")
    for number, row in enumerate(rows, 1):
        check_row(row, fields, f"{path}: row {number}")
    return [{name: "" if row[name] is None and kind else row[name] for name, kind in fields.items()} for row in rows]


def load_pairs(path):
    """Preference pairs. A preference is 1 or 2: anything else (a draw, a list of votes) is no Bradley-Terry label."""
    rows = load_rows(path, PAIR)
    strange = [number for number, row in enumerate(rows, 1) if not fits(row["preference"], (1, 2))]
    if strange:
        first = json.dumps(rows[strange[0] - 1]["preference"])[:60]
        fail(f"{path}: {len(strange)} of {len(rows)} rows have a preference that is neither 1 nor 2; the first is row "
             f"{strange[0]}: {first}. Make them 1 or 2, or take them out")
    return [row | {"preference": int(row["preference"])} for row in rows]


def main(cfg):
    sft, pairs, unlabeled, val, evaluation = paths = [fetch(cfg, name) for name in (
        "alpaca_instructions/sft.json", f"alpaca_{cfg.preference}_preference.json",
        "alpaca_instructions/unlabeled.json", "alpaca_instructions/val.json", "alpaca_farm_evaluation.json")]
    files = {  # all read before anything is written
        "sft.jsonl": load_rows(sft, ANSWERED),
        "pref.jsonl": load_pairs(pairs),
        "prompts.jsonl": load_rows(unlabeled, PROMPT),
        "val.jsonl": [row | {"generator": "alpaca", "dataset": "val"} for row in load_rows(val, ANSWERED)],
        "eval.jsonl": load_rows(evaluation, REFERENCE),
    }
    if begin(cfg, "prepare", paid=True, inputs=paths, beside=("prepare.py", "__pycache__")):
        return say(f"{cfg.out} is finished; nothing to do")
    for name, rows in files.items():
        write_jsonl(Path(cfg.out, name), rows)
        repeated = len(rows) - len({json.dumps(row, sort_keys=True) for row in rows})
        say(f"{cfg.out}/{name}: {len(rows)} rows" + f", {repeated} of them the same as an earlier one" * (repeated > 0))
    finish(cfg, rows={name: len(rows) for name, rows in files.items()})


if __name__ == "__main__":
    main(load_config(Config, "prepare"))
