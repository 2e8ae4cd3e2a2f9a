"""`python evaluate.py report`: what came out, the paper's tables and ours, a page, and all of it as
files for a paper.

    report.html           the page
    report.md             the answer and the tables
    report.json           every number, not rounded
    report/win_rate.svg   the plots of the page, each with its title, legend and colours
"""
if __name__ == "__main__":
    raise SystemExit("write.py is a part of: python evaluate.py report")

import json, math, re
from pathlib import Path

from extras.pages import is_ours
from extras.report.answer import sentences
from extras.report.arms import arms, as_markdown, as_text
from extras.report.page import (calibration_plots, hacking_plots, page, score_paths, training_lines,
                                training_plots)
from extras.report.plots import MARK
from extras.report.tables import (ceilings, differences, rate, read_runs, seconds_until, table_1,
                                  table_2, table_3, table_paired, table_probe, table_rewards)
from plumbing.files import check_input, replacing, whole_characters
from plumbing.ranks import fail, say

IN_SHORT = "**In three sentences**"  # how report.md begins; older ones began with Table 1
MADE_BY = "evaluate.py report"


def write_report(cfg):
    """Print what came out and the tables; write the page and, next to it, its files"""
    if not cfg.data:
        fail("report needs run folders, or folders that hold them: python evaluate.py report out")
    for path in cfg.data:
        check_input(path, "data", "bash demo.sh")
    out = Path(cfg.out)
    if out.suffix != ".html":
        fail(f"--out={out} must end in .html")
    runs = read_runs(cfg.data)
    if not runs:
        fail(f"no run in {', '.join(cfg.data)} (no run.json, annotations.jsonl, rewards.json); "
             "bash demo.sh makes one")

    # The answer, then the tables
    answer = sentences(runs, cfg.seed)
    tables = [table_1(runs), table_paired(runs, cfg.seed)]
    tables += [table_2(runs, cfg.data), table_3(runs, cfg.target)]
    probe = table_probe(runs)
    if probe[2]:
        tables.append(probe)
    closer = table_rewards(runs)

    # The files: path -> (text, how a file of ours begins)
    short = "\n".join([IN_SHORT, "", *(f"1. {sentence}" for sentence in answer)])
    markdown = "\n\n".join([short, *map(as_markdown, [*tables, closer])]) + "\n"
    numbers = numbers_of(runs, answer, [*tables, closer], cfg.seed)
    files = {out: (page(runs, tables, closer, answer), [MARK])}
    files[out.with_suffix(".md")] = markdown, [IN_SHORT, "**Table 1. "]
    files[out.with_suffix(".json")] = (json.dumps(finite(numbers), indent=1) + "\n",
                                       [f'"made_by": "{MADE_BY}"'])
    first = ", ".join(map(str, files))
    figures = out.with_suffix("")
    for name, plot in figures_of(runs).items():
        files[figures / f"{name}.svg"] = plot.file(), [MARK]

    # Never replace a file that we did not write.
    for path, (_, marks) in files.items():
        if not cfg.overwrite and not is_ours(path, *marks):
            fail(f"{path} is no report of ours; choose another --out, or replace it with "
                 "--overwrite=true")

    show_table = as_markdown if cfg.markdown else as_text
    say("\n".join(answer) + "\n\n\n" + "\n\n\n".join(map(show_table, tables)))
    for path in figures.glob("*.svg"):  # of an earlier report
        if path not in files and is_ours(path, MARK):
            path.unlink()
    for path, (text, _) in files.items():
        with replacing(path) as file:
            file.write(whole_characters(text))
    say(f"\n{first} and the figures in {figures}")


def figures_of(runs):
    """{name: Plot} of all plots of the page"""
    plots = dict(training_plots(runs))
    for label, plot in hacking_plots(runs).items():
        plots[f"hacking_{file_name(label)}"] = plot
    for kind, plot in calibration_plots(runs).items():
        plots[f"calibration_{kind}"] = plot
    return plots


def file_name(label):
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


# ---------------------------------------------------------------- report.json

def numbers_of(runs, answer, tables, seed):
    """What report.json holds: every number of the report, before it is rounded"""
    numbers = dict(made_by=MADE_BY, answer=answer)
    numbers["runs"] = [numbers_of_run(run) for run in runs]
    numbers["ceilings"] = ceilings(runs)
    numbers["differences"] = paired_numbers(runs, seed)

    # The plots, as they are drawn
    numbers["training"] = {}
    for name, lines in training_lines(runs).items():
        columns = "steps", "mean", "low", "high"
        numbers["training"][name] = {label: dict(zip(columns, line))
                                     for label, line in lines.items()}
    numbers["score_and_win_rate"] = {}
    for label, paths in score_paths(runs).items():
        points = [[dict(step=step, score=score, **figures) for step, score, figures in path]
                  for path in paths]
        numbers["score_and_win_rate"][label] = points

    numbers["tables"] = []
    for title, header, rows, note in tables:
        numbers["tables"].append(dict(title=title, header=header, rows=rows, note=note))
    return numbers


def numbers_of_run(run):
    """The figures of one run"""
    figures = dict(folder=str(run["path"]), label=run["label"], kind=run["kind"], seed=run["seed"])
    figures["steps"] = run["steps"]
    figures["judged_at"] = run["judged_at"]
    figures["seconds"] = seconds_until(run, run["steps"])
    figures["win_rate"] = rate(run["annotations"])
    figures["win_rates"] = run["win_rates"]
    figures["rewards"] = run["rewards"]
    return figures


def paired_numbers(runs, seed):
    """The differences between all PPO arms, on the same questions"""
    groups = list(arms(runs, "ppo").items())
    found = []
    for i, (a, mine) in enumerate(groups):
        for b, others in groups[i + 1:]:
            each_seed = differences(mine, others, seed)
            if each_seed:
                found.append(dict(of=a, minus=b, each_seed=each_seed))
    return found


def finite(x):
    """The same without nan and inf, which JSON does not have: null in their place"""
    if isinstance(x, dict):
        return {str(key): finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x
