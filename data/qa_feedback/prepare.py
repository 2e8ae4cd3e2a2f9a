"""People's corrections of a model's answers, and the spans they marked as wrong: QA-Feedback (Wu et al., 2023).

    python data/qa_feedback/prepare.py                   # from its public address
    python data/qa_feedback/prepare.py --source=FILE     # a copy of dev_feedback.json on disk

    dev_feedback.json  -> edits_train.jsonl, edits_test.jsonl   original: the first prediction, edited: as corrected by
                                                                a person; error_spans: [start, end, kind] in
                                                                characters of original
                       -> pref_train.jsonl, pref_test.jsonl     preferences among the four predictions, without ties

Half of the questions are held out. The passages that the answers rest on are the input, cut to `words`.
"""
import json, random, sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing.command_line import load_config
from plumbing.files import write_jsonl
from plumbing.ranks import fail, say
from plumbing.record import begin, finish
from data.paradetox.prepare import edit, fetch


@dataclass(frozen=True)
class Config:
    source: str = ("https://raw.githubusercontent.com/allenai/FineGrainedRLHF/main/"
                   "tasks/qa_feedback/data/dev_feedback.json")  # or a file
    words: int = 180                # of the passages, from their beginning
    out: str = "data/qa_feedback"
    seed: int = 0                   # which half of the questions is held out
    overwrite: bool = False


def passages(row, words):
    """The passages' sentences as one text; a title that stands before a passage's first sentence is not one"""
    sentences = [sentence.split("\n\n")[-1] for _title, *sentences in row["passages"] for sentence in sentences]
    return " ".join(" ".join(sentences).split()[:words])


def convert(number, row, words):
    """A question -> its row of edits.jsonl, its rows of pref.jsonl"""
    question, feedback, input = row["question"], row["feedback"], passages(row, words)
    edits = edit(f"qa-{number}", question, row["prediction 1"], feedback["corrected-prediction"].strip(), input)
    spans = [[error["start"], error["end"], error["error type"]] for error in feedback["errors"]]
    pairs = zip(combinations((1, 2, 3, 4), 2), row["preference"], strict=True)
    return edits | dict(error_spans=spans), [
        dict(instruction=question, input=input, output_1=row[f"prediction {i}"], output_2=row[f"prediction {j}"],
             preference=better) for (i, j), better in pairs if better]


def main(cfg):
    try:
        converted = [convert(number, row, cfg.words) for number, row in enumerate(json.loads(fetch(cfg.source)))]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"--source={cfg.source} is no dev_feedback.json ({type(error).__name__}: {error})")
    if begin(cfg, "prepare", paid=True, inputs=[] if "://" in cfg.source else [cfg.source], beside=("prepare.py", "__pycache__")):
        return say(f"{cfg.out} is finished; nothing to do")
    order = list(range(len(converted)))
    random.Random(cfg.seed).shuffle(order)
    halves, counts = {"train": sorted(order[:len(order) // 2]), "test": sorted(order[len(order) // 2:])}, {}
    for half, numbers in halves.items():
        for name, rows in ((f"edits_{half}.jsonl", [converted[n][0] for n in numbers]),
                           (f"pref_{half}.jsonl", [row for n in numbers for row in converted[n][1]])):
            write_jsonl(Path(cfg.out, name), rows)
            counts[name] = len(rows)
            say(f"{cfg.out}/{name}: {len(rows)} rows")
    finish(cfg, rows=counts)


if __name__ == "__main__":
    main(load_config(Config, "prepare"))
