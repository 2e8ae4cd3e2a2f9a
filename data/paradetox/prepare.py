"""People's minimal edits: ParaDetox (Logacheva et al., 2022), rude comments that people rewrote
with few changes.

    python data/paradetox/prepare.py                     # from its public address
    python data/paradetox/prepare.py --source=FILE       # a copy of paradetox.tsv on disk

    paradetox.tsv: columns toxic, neutral1, neutral2, neutral3
        -> edits_train.jsonl   one row per rewrite of a comment
        -> edits_test.jsonl    other comments, only the first rewrite of each

Texts are copied unchanged, quotation marks included. A line that has no comment with a rewrite (the
rest of a cell with a line break) is left out and counted. The texts are rude.
"""
import random, sys
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing.command_line import load_config
from plumbing.files import ANY, COUNT, check_numbers, write_jsonl
from plumbing.ranks import fail, say
from plumbing.record import begin, finish


@dataclass(frozen=True)
class Config:
    source: str = ("https://raw.githubusercontent.com/s-nlp/paradetox/main/"
                   "paradetox/paradetox.tsv")  # or a file
    instruction: str = "Write a comment for an online discussion."  # of all rows: the data has none
    test: int = 1000                # comments held out
    out: str = "data/paradetox"
    seed: int = 7                   # which comments are held out
    overwrite: bool = False


def fetch(source):
    """The text of a file, or of an address"""
    try:
        if "://" in source:
            say(f"fetching {source}")
            with urlopen(source, timeout=60) as answer:
                return answer.read().decode("utf-8")
        return Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no network, no such file, not an address, not UTF-8
        fail(f"--source={source}: {type(error).__name__}: {error}; "
             "copy the file here and write --source=FILE")


def source_files(source):
    """The input files that the record of the run names: none for an address"""
    return [] if "://" in source else [source]


def human_edit(id, instruction, original, edited, input=""):
    """A row of edits.jsonl whose editor is a person"""
    return dict(id=id, instruction=instruction, input=input, original=original, edited=edited,
                editor="human", model=None, stop_reason=None, usage=None)


def main(cfg):
    check_numbers(cfg, test=COUNT, seed=ANY)
    header, *lines = fetch(cfg.source).removesuffix("\n").split("\n")
    if header.rstrip("\r").split("\t")[:2] != ["toxic", "neutral1"]:
        fail(f"--source={cfg.source}: the first line must name the columns toxic, neutral1, ..., "
             f"got {header[:60]!r}")

    comments = {}  # comment -> its rewrites
    for line in lines:
        cells = [cell.strip() for cell in line.split("\t")]
        comment = cells[0]
        rewrites = [cell for cell in cells[1:] if cell]
        if comment and rewrites:
            comments[comment] = rewrites
    if not 0 < cfg.test < len(comments):
        fail(f"--source={cfg.source} has {len(comments)} comments: --test={cfg.test} must be at "
             "least 1 and leave one to train on")
    inputs = source_files(cfg.source)
    if begin(cfg, "prepare", paid=True, inputs=inputs, beside=("prepare.py", "__pycache__")):
        return say(f"{cfg.out} is finished; nothing to do")

    # The first comments of a shuffled order are held out.
    order = list(comments)
    random.Random(cfg.seed).shuffle(order)
    test = []
    train = []
    for number, comment in enumerate(order, 1):
        rows = [human_edit(f"paradetox-{number}-{k}", cfg.instruction, comment, rewrite)
                for k, rewrite in enumerate(comments[comment])]
        if number <= cfg.test:
            test.append(rows[0])
        else:
            train += rows

    files = {"edits_test.jsonl": test, "edits_train.jsonl": train}
    for name, rows in files.items():
        write_jsonl(Path(cfg.out, name), rows)
        say(f"{cfg.out}/{name}: {len(rows)} rows")
    say(f"{len(lines) - len(comments)} of {len(lines)} lines left out: "
        "no comment with a rewrite, or one seen before")
    finish(cfg, rows={name: len(rows) for name, rows in files.items()})
    say(f"next: python diff.py {cfg.out}/edits_train.jsonl")


if __name__ == "__main__":
    main(load_config(Config, "prepare"))
