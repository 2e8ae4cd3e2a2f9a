"""People's minimal edits: ParaDetox (Logacheva et al., 2022), rude comments that people rewrote, changing little.

    python data/paradetox/prepare.py                     # from its public address
    python data/paradetox/prepare.py --source=FILE       # a copy of paradetox.tsv on disk

    paradetox.tsv (toxic, neutral1, neutral2, neutral3)  -> edits_train.jsonl   a row for every rewrite of a comment
                                                         -> edits_test.jsonl    other comments, the first rewrite each

Columns stay as they are, quotation marks included. A line that holds no comment with a rewrite (a cell that was broken
over two lines) is left out and counted. The texts are rude.
"""
import random, sys
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing.command_line import load_config
from plumbing.files import write_jsonl
from plumbing.ranks import fail, say
from plumbing.record import begin, finish


@dataclass(frozen=True)
class Config:
    source: str = "https://raw.githubusercontent.com/s-nlp/paradetox/main/paradetox/paradetox.tsv"  # or a file
    instruction: str = "Write a comment for an online discussion."  # every row's: the data has none
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
        fail(f"--source={source}: {type(error).__name__}: {error}; copy the file here and write --source=FILE")


def edit(id, instruction, original, edited, input=""):
    """A row of edits.jsonl whose editor is a person"""
    return dict(id=id, instruction=instruction, input=input, original=original, edited=edited, editor="human",
                model=None, stop_reason=None, usage=None)


def main(cfg):
    header, *lines = fetch(cfg.source).removesuffix("\n").split("\n")
    if header.rstrip("\r").split("\t")[:2] != ["toxic", "neutral1"]:
        fail(f"--source={cfg.source}: the first line must name the columns toxic, neutral1, ..., got {header[:60]!r}")
    comments = {}  # comment -> its rewrites
    for line in lines:
        toxic, *rewrites = (cell.strip() for cell in line.split("\t"))
        if toxic and any(rewrites):
            comments[toxic] = [rewrite for rewrite in rewrites if rewrite]
    if not 0 < cfg.test < len(comments):
        fail(f"--source={cfg.source} has {len(comments)} comments: --test={cfg.test} must be 1 to one less")
    if begin(cfg, "prepare", paid=True, inputs=[] if "://" in cfg.source else [cfg.source], beside=("prepare.py", "__pycache__")):
        return say(f"{cfg.out} is finished; nothing to do")
    order = list(comments)
    random.Random(cfg.seed).shuffle(order)
    rows = [[edit(f"paradetox-{number}-{k}", cfg.instruction, comment, rewrite)
             for k, rewrite in enumerate(comments[comment])] for number, comment in enumerate(order, 1)]
    files = {"edits_test.jsonl": [row[0] for row in rows[:cfg.test]], "edits_train.jsonl": sum(rows[cfg.test:], [])}
    for name, content in files.items():
        write_jsonl(Path(cfg.out, name), content)
        say(f"{cfg.out}/{name}: {len(content)} rows")
    say(f"{len(lines) - len(comments)} of {len(lines)} lines left out: no comment with a rewrite, or one seen before")
    finish(cfg, rows={name: len(content) for name, content in files.items()})


if __name__ == "__main__":
    main(load_config(Config, "prepare"))
