"""Of each run the model that won most often on the questions it is to be chosen on (val.jsonl, never eval.jsonl).

    python extras/best_step.py out/paper/ppo_*     # -> a line for each: "ppo_token out/paper/ppo_token/step_40"

Reads val_annotations.jsonl in the run's folder (its last model) and in step_N (those it kept); of equals the earliest
wins.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import fail
from evaluate import read_annotations, win_rate

for run in map(Path, sys.argv[1:]):
    kept = [folder for folder in run.glob("step_*") if folder.name[5:].isdigit()]
    models = sorted(kept, key=lambda folder: int(folder.name[5:])) + [run]
    files = {model: model / "val_annotations.jsonl" for model in models}
    rates = {model: win_rate(row["preference"] for row in read_annotations(file))
             for model, file in files.items() if file.exists()}
    rates = {model: figures for model, figures in rates.items() if figures["n_total"]}
    if not rates:
        fail(f"{run} holds no val_annotations.jsonl with a verdict in it; make one with: python evaluate.py judge")
    for model, figures in rates.items():
        print(f"{model}: {figures['win_rate']:.1f} ± {figures['standard_error'] or 0:.1f}", file=sys.stderr)
    print(run.name, max(rates, key=lambda model: rates[model]["win_rate"]))
