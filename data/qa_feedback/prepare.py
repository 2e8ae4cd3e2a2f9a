"""People's corrections of a model's answers, and the spans they marked as wrong: QA-Feedback
(Wu et al., 2023).

    python data/qa_feedback/prepare.py                   # from its public address
    python data/qa_feedback/prepare.py --source=FILE     # a copy of dev_feedback.json on disk

    dev_feedback.json
        -> edits_train.jsonl, edits_test.jsonl   original: the first prediction; edited: as a person
                                                 corrected it; error_spans: [start, end, kind] in
                                                 characters of original
        -> pref_train.jsonl, pref_test.jsonl     preferences among the four predictions, no ties

Half of the questions are held out. The passages that the answers are based on are the input, cut to
`words` words.
"""
import json, random, sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing.command_line import load_config
from plumbing.files import ANY, COUNT, check_numbers, write_jsonl
from plumbing.ranks import fail, say
from plumbing.record import begin, finish
from data.paradetox.prepare import fetch, human_edit, source_files


@dataclass(frozen=True)
class Config:
    source: str = ("https://raw.githubusercontent.com/allenai/FineGrainedRLHF/main/"
                   "tasks/qa_feedback/data/dev_feedback.json")  # or a file
    words: int = 180                # of the passages, from their beginning
    out: str = "data/qa_feedback"
    seed: int = 0                   # which half of the questions is held out
    overwrite: bool = False


def passages(row, words):
    """The passages' sentences as one text, without the titles; at most `words` words"""
    text = []
    for _title, *sentences in row["passages"]:
        for sentence in sentences:
            text.append(sentence.split("\n\n")[-1])  # the first sentence may repeat the title
    return " ".join(" ".join(text).split()[:words])


def convert(number, row, words):
    """A question -> its row of edits.jsonl, its rows of pref.jsonl"""
    question = row["question"]
    feedback = row["feedback"]
    input = passages(row, words)

    corrected = feedback["corrected-prediction"].strip()
    edit = human_edit(f"qa-{number}", question, row["prediction 1"], corrected, input)
    edit["error_spans"] = [[error["start"], error["end"], error["error type"]]
                           for error in feedback["errors"]]

    # One preference for each two of the four predictions: 1, 2, or 0 for a tie.
    pairs = []
    for (i, j), better in zip(combinations((1, 2, 3, 4), 2), row["preference"], strict=True):
        if better:
            pairs.append(dict(instruction=question, input=input, output_1=row[f"prediction {i}"],
                              output_2=row[f"prediction {j}"], preference=better))
    return edit, pairs


def main(cfg):
    check_numbers(cfg, words=COUNT, seed=ANY)
    try:
        questions = json.loads(fetch(cfg.source))
        converted = [convert(number, row, cfg.words) for number, row in enumerate(questions)]
    except (ValueError, KeyError, TypeError) as error:
        fail(f"--source={cfg.source} is no dev_feedback.json ({type(error).__name__}: {error})")
    inputs = source_files(cfg.source)
    if begin(cfg, "prepare", paid=True, inputs=inputs, beside=("prepare.py", "__pycache__")):
        return say(f"{cfg.out} is finished; nothing to do")

    # Half of the questions, in their original order, are for training.
    order = list(range(len(converted)))
    random.Random(cfg.seed).shuffle(order)
    middle = len(order) // 2
    halves = {"train": sorted(order[:middle]), "test": sorted(order[middle:])}
    files = {}
    for half, numbers in halves.items():
        files[f"edits_{half}.jsonl"] = [converted[number][0] for number in numbers]
        files[f"pref_{half}.jsonl"] = [row for number in numbers for row in converted[number][1]]

    for name, rows in files.items():
        write_jsonl(Path(cfg.out, name), rows)
        say(f"{cfg.out}/{name}: {len(rows)} rows")
    finish(cfg, rows={name: len(rows) for name, rows in files.items()})
    say(f"next: python diff.py {cfg.out}/edits_train.jsonl")


if __name__ == "__main__":
    main(load_config(Config, "prepare"))
