"""The evidence in the toy world: when token rewards pay, and why. One resumable command a part.

    python extras/study/toy.py grid        # each arm's settings; on seeds 100 to 105 alone
    python extras/study/toy.py lengths     # how many steps a run needs; on the same seeds
    python extras/study/toy.py sft paper   # settings of SFT on the edited answers, and of PPO on
                                           # the paper's Eq. 4; on the same
    python extras/study/toy.py horizons    # short, medium and long answers: seeds 300 to 304
    python extras/study/toy.py data edits losses why rounds    # the other questions
    python extras/study/toy_tables.py      # EXPERIMENTS.md and docs/horizons.svg, from the results

A part trains its cells (a world, a seed, a reward, settings of PPO), judges the models that each
cell kept on the 300 questions of eval.jsonl with the gold judge, and adds one row per cell to
extras/study/toy.jsonl. A cell that has its row is not run again. To run all of it again, start with
another --results. The weights of a judged cell are deleted.

kl_coef is a share of the standard deviation of the arm's return at step 0, which a run of one step
measures: the rewards of different models have different units.
"""
import json, shutil, sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.toy.prepare import gold, items_of, read_prompt, split_lines
from evaluate import mean_and_error, win_rate
from extras.study.jobs import run_jobs, stage
from plumbing.command_line import load_config
from plumbing.files import COUNT, check_numbers, write_jsonl
from plumbing.ranks import fail, say
from plumbing.record import logged


@dataclass(frozen=True)
class Config:
    data: list[str] = ()                     # the parts to run
    out: str = "out/study_toy"               # the run folders
    results: str = "extras/study/toy.jsonl"  # one row per finished cell
    workers: int = 2                         # cells at a time, one core each
    keep_weights: bool = False


TUNING_SEEDS = range(100, 106)    # settings are chosen on these, and nothing is reported on them
REPORTED_SEEDS = range(300, 305)  # run once, with settings fixed before
PRESET = "config/demo.toml"
STEPS = 50


class World(NamedTuple):
    items: str             # short, medium or long
    prepare: tuple = ()    # other flags of data/toy/prepare.py
    edit: tuple = ()       # other flags of edit.py


WORLDS = {
    "short": World("short"),
    "medium": World("medium"),
    "long": World("long"),
    "medium_line": World("medium", ("--flaws_per=line",)),
    "noise0": World("medium", ("--label_noise=0",)),
    "noise40": World("medium", ("--label_noise=0.4",)),
    "fixes50": World("medium", (), ("--fixes=0.5",)),
    "fixes75": World("medium", (), ("--fixes=0.75",)),
    "fixes100": World("medium", (), ("--fixes=1",)),
}
RESPONSE_LEN = {"short": 48, "medium": 64, "long": 128}  # tokens


class Cell(NamedTuple):
    world: str                # a name of WORLDS
    seed: int
    name: str
    reward_model: str         # a name of REWARD_MODELS
    level: str                # of PPO: token or sequence
    kl_share: float           # kl_coef as a share of the sd of the arm's return at step 0
    flags: tuple = ()         # other flags of ppo.py
    steps: int = STEPS
    judge_every: int = 25     # steps between the models that are judged
    variant: str = ""         # ppo.py with a changed equation: a name of variants.py


# Reward models: flags of reward_model.py, which file of pairs, and a name of variants.py.
REWARD_MODELS = {
    "rm_original": (("--loss=sequence",), "data/pref.jsonl", ""),
    "rm_edited": (("--loss=sequence",), "diffs.jsonl", ""),
    "rm_token": (("--loss=eq4", "--anchor=0.3"), "diffs.jsonl", ""),
    "rm_plain": (("--loss=eq4",), "diffs.jsonl", ""),
    "rm_paper": (("--loss=eq4",), "diffs_no_gaps.jsonl", ""),
    "rm_no_gaps": (("--loss=eq4", "--anchor=0.3"), "diffs_no_gaps.jsonl", ""),
    "rm_eq3": (("--loss=eq3",), "diffs.jsonl", ""),
    "rm_eq3_anchor": (("--loss=eq3", "--anchor=0.3"), "diffs.jsonl", ""),
    "rm_sum": (("--loss=eq4", "--anchor=0.3"), "diffs.jsonl", "sum"),
    "rm_keep": (("--loss=eq4",), "diffs.jsonl", "keep"),
    "rm_half": (("--loss=eq4", "--anchor=0.3"), "diffs_half.jsonl", ""),
    "rm_rounds": (("--loss=eq4", "--anchor=0.3"), "diffs_half.jsonl,diffs_round.jsonl", ""),
}


# ---------------------------------------------------------------- a world and its reward models

def base_folder(cfg, world, seed):
    return Path(cfg.out, world, f"seed{seed}")


def make_base(cfg, world, seed):
    """The data, the SFT model, the edits and the diffs of a world"""
    base = base_folder(cfg, world, seed)
    base.mkdir(parents=True, exist_ok=True)
    run = partial(stage, base / "base.log")
    first = [PRESET, f"--seed={seed}"]
    items, prepare, edit = WORLDS[world]
    run("data/toy/prepare.py", *first, f"--items={items}", *prepare, f"--out={base}/data")
    run("sft.py", *first, f"--model={base}/data/model", f"--data={base}/data/sft.jsonl",
        f"--out={base}/sft")
    for name, edits in (("pref", "edits"), ("pref_heldout", "edits_heldout")):
        run("edit.py", *first, "--editor=rules", *edit, f"--data={base}/data/{name}.jsonl",
            f"--out={base}/{edits}.jsonl")

    # Also without gaps, and of the first half of the pairs.
    edits = logged(base / "edits.jsonl")
    write_jsonl(base / "edits_half.jsonl", edits[:len(edits) // 2])
    for name, source, gaps in (("diffs", "edits", "true"), ("diffs_no_gaps", "edits", "false"),
                               ("diffs_half", "edits_half", "true")):
        run("diff.py", *first, f"--data={base}/{source}.jsonl", f"--tokenizer={base}/sft",
            f"--gaps={gaps}", f"--out={base}/{name}.jsonl")


def make_reward_model(cfg, world, seed, name):
    """Train a reward model, and measure it on held-out pairs of both kinds and on the probe"""
    base = base_folder(cfg, world, seed)
    flags, pairs, variant = REWARD_MODELS[name]
    log = base / f"{name}.log"
    first = [PRESET, f"--seed={seed}"]
    heldout = [f"{base}/data/pref_heldout.jsonl", f"{base}/edits_heldout.jsonl"]
    heldout.append(f"{base}/data/probe.jsonl")
    data = ",".join(f"{base}/{file}" for file in pairs.split(","))
    train_stage(log, "reward_model.py", variant, *first, f"--model={base}/sft", *flags,
                f"--data={data}", f"--out={base}/{name}")
    stage(log, "evaluate.py", "rewards", *first, f"--reward_model={base}/{name}",
          f"--data={','.join(heldout)}", f"--out={base}/{name}/rewards.json")


def train_stage(log, script, variant, *flags):
    """A stage, or the same stage with one equation changed"""
    if variant:
        stage(log, "extras/study/variants.py", variant, script, *flags)
    else:
        stage(log, script, *flags)


# ---------------------------------------------------------------- a cell

def scale_flags(cell):
    """Those of a cell's settings on which the unit of its return depends"""
    return [flag for flag in cell.flags if flag.startswith("--reward_scale")]


def sd_folder(cfg, cell):
    words = [cell.reward_model, cell.level, cell.variant]
    words += [flag.split("=")[1] for flag in scale_flags(cell)]
    return base_folder(cfg, cell.world, cell.seed) / "_".join(["return_sd", *filter(None, words)])


def measure_return_sd(cfg, cell):
    """A run of one step, whose metrics have return_sd"""
    out = sd_folder(cfg, cell)
    train(cfg, cell, out, scale_flags(cell), kl_coef=0.0, steps=1, save_every=1)
    drop_weights(out)


def train(cfg, cell, out, flags, *, kl_coef, steps, save_every):
    """ppo.py with the settings of a cell; the learning rate reaches 0 at its last step"""
    base = base_folder(cfg, cell.world, cell.seed)
    prompts = sum(1 for _ in open(base / "data/prompts.jsonl"))
    epochs = steps * 64 / prompts  # 64: the demo's rollout batch
    response_len = RESPONSE_LEN[WORLDS[cell.world].items]
    train_stage(f"{out}.log", "ppo.py", cell.variant, PRESET, f"--seed={cell.seed}",
                f"--policy={base}/sft", f"--reward_model={base}/{cell.reward_model}",
                f"--data={base}/data/prompts.jsonl", f"--level={cell.level}",
                f"--kl_coef={kl_coef:.6g}", f"--steps={steps}", f"--lr_epochs={epochs:.6g}",
                f"--save_every={save_every}", f"--resume_every={save_every}",
                f"--response_len={response_len}", *flags, f"--out={out}")


def drop_weights(out):
    for path in [*out.glob("step_*"), *out.glob("checkpoint_*")]:
        shutil.rmtree(path)
    for path in out.glob("*.safetensors"):
        path.unlink()


def judged(cfg, cell, model):
    """The answers of a model to eval.jsonl and the gold judge's verdicts -> annotations"""
    base = base_folder(cfg, cell.world, cell.seed)
    log = f"{base}/{cell.name}.log"
    questions = base / "data/eval.jsonl"
    first = [PRESET, f"--seed={cell.seed}"]
    outputs = model / "outputs.jsonl"
    annotations = model / "annotations.jsonl"
    stage(log, "evaluate.py", "decode", *first, f"--model={model}", f"--data={questions}",
          f"--response_len={RESPONSE_LEN[WORLDS[cell.world].items]}",
          f"--generator={cell.name}", f"--out={outputs}")
    stage(log, "evaluate.py", "judge", *first, "--judge=gold", f"--outputs={outputs}",
          f"--reference={questions}", f"--out={annotations}")
    return logged(annotations)


def figures_of(annotations):
    """Win rate, flaws, and items too many and too few an answer"""
    figures = win_rate(row["preference"] for row in annotations)
    figures = {name: figures[name] for name in ("win_rate", "standard_error")}
    over = []
    under = []
    for row in annotations:
        number, _, world = read_prompt(row)
        items = [line for line in split_lines(row["output_2"]) if line in items_of(world)]
        over.append(max(0, len(items) - number))
        under.append(max(0, number - len(items)))
    figures["flaws"] = mean_and_error([-row["scores"][1] for row in annotations])[0]
    figures["over"] = mean_and_error(over)[0]
    figures["under"] = mean_and_error(under)[0]
    return {name: round(value, 4) for name, value in figures.items()}


def ceiling(annotations):
    """The win rate of answers without flaws"""
    return win_rate(2 if gold(row, row["output_1"]) else 1.5 for row in annotations)["win_rate"]


LAST_STEP = ("reward", "kl", "response_length", "eos_share", "entropy", "explained_variance",
             "return_sd")


def run_cell(cfg, cell):
    """Train and judge a cell -> <its folder>/result.jsonl, one row"""
    out = base_folder(cfg, cell.world, cell.seed) / cell.name
    return_sd = logged(sd_folder(cfg, cell) / "metrics.jsonl")[0]["return_sd"]
    kl_coef = cell.kl_share * return_sd
    train(cfg, cell, out, cell.flags, kl_coef=kl_coef, steps=cell.steps,
          save_every=cell.judge_every)

    # The models along the run, then the last one.
    models = {int(folder.name.removeprefix("step_")): folder for folder in out.glob("step_*")}
    models[cell.steps] = out
    curve = {}
    for step in sorted(models):
        annotations = judged(cfg, cell, models[step])
        curve[step] = figures_of(annotations)
    metrics = logged(out / "metrics.jsonl")
    row = cell._asdict() | dict(kl_coef=kl_coef, curve=curve, ceiling=ceiling(annotations))
    row["last_step"] = {name: round(metrics[-1][name], 4) for name in LAST_STEP}
    row["seconds"] = round(sum(step["seconds"] for step in metrics), 1)
    write_jsonl(out / "result.jsonl", [row])
    if not cfg.keep_weights:
        drop_weights(out)


# ---------------------------------------------------------------- many cells

def key_of(row):
    return row["world"], row["seed"], row["name"]


def finished_cells(cfg):
    """The rows of finished cells in the results file, by key"""
    return {key_of(row): row for row in logged(Path(cfg.results)) if "curve" in row}


def run_cells(cfg, cells):
    """Make what the cells need, then the cells that have no row yet, and add their rows"""
    collect(cfg, cells)  # those that a stopped run has finished
    todo = unfinished(cfg, cells)
    logs = Path(cfg.out, "logs")

    make_bases(cfg, {(cell.world, cell.seed) for cell in todo})

    # The reward models.
    jobs = {}
    for world, seed, name in sorted({(cell.world, cell.seed, cell.reward_model) for cell in todo}):
        if not (base_folder(cfg, world, seed) / name / "rewards.json").exists():
            jobs[f"{world}_{seed}_{name}"] = partial(make_reward_model, cfg, world, seed, name)
    run_jobs(jobs, cfg.workers, logs)

    # One step of each arm, for its return_sd.
    jobs = {}
    for cell in todo:
        folder = sd_folder(cfg, cell)
        if not (folder / "metrics.jsonl").exists():
            name = f"{cell.world}_{cell.seed}_{folder.name}"
            jobs[name] = partial(measure_return_sd, cfg, cell)
    run_jobs(jobs, cfg.workers, logs)

    # The cells.
    jobs = {}
    for cell in todo:
        jobs[f"{cell.world}_{cell.seed}_{cell.name}"] = partial(run_cell, cfg, cell)
    try:
        run_jobs(jobs, cfg.workers, logs)
    finally:
        collect(cfg, todo)


def make_bases(cfg, worlds):
    """Make the bases that are not there yet; worlds: (name, seed)"""
    jobs = {}
    for world, seed in sorted(worlds):
        if not (base_folder(cfg, world, seed) / "diffs_half.jsonl").exists():
            jobs[f"{world}_{seed}"] = partial(make_base, cfg, world, seed)
    run_jobs(jobs, cfg.workers, Path(cfg.out, "logs"))


def unfinished(cfg, cells):
    """The cells without a row; fail() where a row was made with other settings"""
    done = finished_cells(cfg)
    todo = []
    for cell in cells:
        settings = json.loads(json.dumps(cell._asdict()))  # as they are in a row
        row = done.get(key_of(settings))
        if row is None:
            todo.append(cell)
        elif any(row[name] != value for name, value in settings.items()):
            fail(f"{cfg.results}: {cell.name} of seed {cell.seed} was run with other settings; "
                 "choose another --results")
    return todo


def collect(cfg, cells):
    """Add the rows of finished cells, and of their reward models, to the results file. A row that
    is there stays"""
    rows = {}
    for row in logged(Path(cfg.results)):
        rows[key_of(row)] = row
    for cell in cells:
        base = base_folder(cfg, cell.world, cell.seed)
        for row in logged(base / cell.name / "result.jsonl"):
            rows.setdefault(key_of(row), row)
        figures = base / cell.reward_model / "rewards.json"
        if figures.exists():
            row = reward_model_row(cell.world, cell.seed, cell.reward_model, figures)
            rows.setdefault(key_of(row), row)
    if rows:
        write_jsonl(cfg.results, [rows[key] for key in sorted(rows)])


def reward_model_row(world, seed, name, file):
    """Accuracy on both kinds of pairs, and the probe"""
    of_kind = {figures["kind"]: figures for figures in json.loads(file.read_text())}
    probe = {share["worse"]: round(share["right"], 2) for share in of_kind["probe"]["shares"]}
    return dict(world=world, seed=seed, name=name, probe=probe,
                accuracy=round(of_kind["preferences"]["accuracy"], 2),
                accuracy_edited=round(of_kind["edits"]["accuracy"], 2))


# ---------------------------------------------------------------- the parts

SHARES = (0.01, 0.02, 0.04, 0.08)
WIDER_SHARES = (0.005, *SHARES, 0.16)
RLHF_SHARES = (*WIDER_SHARES, 0.32)
WIDER_SEEDS = TUNING_SEEDS[:3]
ARMS = {"rlhf": ("rm_original", "sequence"), "sequence": ("rm_edited", "sequence"),
        "token": ("rm_token", "token")}
CREDIT = {
    "token": {"gamma1": (), "mean": ("--reward_scale=mean",), "gamma0": ("--gamma=0",)},
    "sequence": {"lam1": (), "lam98": ("--lam=0.98",), "lam95": ("--lam=0.95",),
                 "lam90": ("--lam=0.9",)},
}


def grid():
    """12 cells an arm: four weights of the KL times three ways of credit. The best cells of two
    arms lay at an edge, so both axes are wider for all arms, on three of the seeds, and PPO-RLHF's
    once more"""
    cells = []
    for seed in TUNING_SEEDS:
        for arm, (reward_model, level) in ARMS.items():
            for share in RLHF_SHARES if arm == "rlhf" else WIDER_SHARES:
                for credit, flags in CREDIT[level].items():
                    wider = share not in SHARES or credit == "lam90"
                    if wider and seed not in WIDER_SEEDS:
                        continue
                    name = f"grid_{arm}_{credit}_kl{share:g}"
                    cells.append(Cell("medium", seed, name, reward_model, level, share, flags))
    return cells


PAPER_SHARES = (0.02, 0.08, 0.32, 1.28)
PAPER_SHARE = 0.32  # the best of them, at both gammas


def paper():
    """A grid for Eq. 4 as in the paper: without an anchor, rewards have other units and tails"""
    cells = []
    for seed in WIDER_SEEDS:
        for credit in ("gamma1", "gamma0"):
            for share in PAPER_SHARES:
                name = f"paper_{credit}_kl{share:g}"
                flags = CREDIT["token"][credit]
                cells.append(Cell("medium", seed, name, "rm_paper", "token", share, flags))
    return cells


# What the grid chose: an arm's reward model, level, share of the KL, flags. The table is in
# EXPERIMENTS.md.
CHOSEN = {
    "rlhf": ("rm_original", "sequence", 0.16, ()),
    "sequence": ("rm_edited", "sequence", 0.01, ("--lam=0.95",)),
    "gamma1": ("rm_token", "token", 0.04, ("--reward_scale=mean",)),
    "gamma05": ("rm_token", "token", 0.02, ("--gamma=0.5",)),
    "gamma0": ("rm_token", "token", 0.02, ("--gamma=0",)),
}
REPORTED_STEPS = 100


def chosen(part, arm, world, seed, *, reward_model=None, flags=(), name=None, **changes):
    """A cell with an arm's settings, some of them changed"""
    own_model, level, share, own_flags = CHOSEN[arm]
    name = "_".join(filter(None, [part, arm, name]))
    return Cell(world, seed, name, reward_model or own_model, level, share, own_flags + flags,
                **changes)


def lengths():
    """How long a run has to be: longer runs of the chosen settings, on tuning seeds"""
    cells = []
    for steps in (100, 150):
        for seed in TUNING_SEEDS[:3]:
            for arm in ("sequence", "gamma1", "gamma0"):
                cells.append(chosen("lengths", arm, "medium", seed, steps=steps, judge_every=10,
                                    name=f"{steps}"))
    return cells


def horizons():
    """(a) Answers of 4, 10 and 25 items, four ways of credit; PPO-RLHF in the demo's world"""
    cells = []
    for world in ("medium", "short", "long"):
        for seed in REPORTED_SEEDS:
            for arm in CHOSEN:
                if arm != "rlhf" or world == "medium":
                    cells.append(chosen("horizons", arm, world, seed, steps=REPORTED_STEPS,
                                        judge_every=5))
    return cells


def edits():
    """(c) Wrong labels, editors that overlook flaws, as many flaws a line as in short answers"""
    cells = []
    for seed in REPORTED_SEEDS[:3]:
        for world in ("medium", "noise0", "noise40", "fixes50", "fixes75", "fixes100",
                      "medium_line"):
            for arm in ("sequence", "gamma0"):
                cells.append(chosen("edits", arm, world, seed))
    return cells


def losses():
    """(d) What the reward model learns: other losses, at both gammas"""
    names = ("rm_token", "rm_plain", "rm_paper", "rm_no_gaps", "rm_eq3", "rm_eq3_anchor", "rm_sum",
             "rm_keep")
    cells = []
    for seed in REPORTED_SEEDS[:3]:
        for reward_model in names:
            variant = "keep" if reward_model == "rm_keep" else ""
            for arm in ("gamma0", "gamma1"):
                cells.append(chosen("losses", arm, "medium", seed, reward_model=reward_model,
                                    name=reward_model, variant=variant))
        for credit in ("gamma0", "gamma1"):
            name = f"losses_{credit}_rm_paper_own_kl"
            flags = CREDIT["token"][credit]
            cells.append(Cell("medium", seed, name, "rm_paper", "token", PAPER_SHARE, flags))
    return cells


def why():
    """(f) The state's part, or variance? r_t + b(s_t) at both gammas; gamma 1 with lam 0"""
    cells = []
    for seed in REPORTED_SEEDS[:3]:
        for arm in ("gamma0", "gamma1"):
            for variant in ("", "constant", "state"):
                cells.append(chosen("why", arm, "medium", seed, name=variant, variant=variant))
        cells.append(chosen("why", "gamma1", "medium", seed, name="lam0", flags=("--lam=0",)))
    return cells


def run_rounds(cfg):
    """(e) The same number of edits in one round and in two: half of the pairs, then the answers of
    the policy that has learnt from them"""
    one = []
    half = []
    two = []
    for seed in REPORTED_SEEDS:
        one.append(chosen("rounds", "gamma0", "medium", seed, name="one"))
        half.append(chosen("rounds", "gamma0", "medium", seed, name="half",
                           reward_model="rm_half"))
        two.append(chosen("rounds", "gamma0", "medium", seed, name="two",
                          reward_model="rm_rounds"))
    kept = replace(cfg, keep_weights=True)
    run_cells(cfg, one)
    run_cells(kept, half)
    done = finished_cells(cfg)
    jobs = {}
    for cell, next_cell in zip(half, two):
        if key_of(next_cell._asdict()) not in done:
            jobs[f"answers_{cell.seed}"] = partial(edit_answers, cfg, cell)
    run_jobs(jobs, cfg.workers, Path(cfg.out, "logs"))
    run_cells(cfg, two)


def edit_answers(cfg, cell):
    """The answers of a cell's policy to as many prompts as it had pairs -> diffs_round.jsonl"""
    base = base_folder(cfg, cell.world, cell.seed)
    log = base / "round.log"
    first = [PRESET, f"--seed={cell.seed}"]
    pairs = len(logged(base / "edits_half.jsonl"))
    write_jsonl(base / "prompts_round.jsonl", logged(base / "data/prompts.jsonl")[:pairs])
    stage(log, "evaluate.py", "decode", *first, f"--model={base}/{cell.name}",
          f"--data={base}/prompts_round.jsonl", f"--response_len={RESPONSE_LEN['medium']}",
          f"--out={base}/answers_round.jsonl")
    stage(log, "edit.py", *first, "--editor=rules", f"--data={base}/answers_round.jsonl",
          f"--out={base}/edits_round.jsonl")
    stage(log, "diff.py", *first, f"--data={base}/edits_round.jsonl", f"--tokenizer={base}/sft",
          f"--out={base}/diffs_round.jsonl")


# ---------------------------------------------------------------- without RL

SFT_LR, SFT_EPOCHS = 2e-3, 3  # of SFT on the edited answers; chosen by the part "sft"
SAMPLES = 8


def run_sft(cfg):
    """Settings of SFT on the edited answers, on three of the tuning seeds"""
    done = finished_cells(cfg)
    seeds = TUNING_SEEDS[:3]
    make_bases(cfg, {("medium", seed) for seed in seeds})
    jobs = {}
    cells = []
    for seed in seeds:
        for lr in (3e-4, 1e-3, 2e-3, 4e-3):
            for epochs in (1, 3, 10):
                name = f"sft_lr{lr:g}_epochs{epochs}"
                cells.append(cell_without_rl(seed, name))
                if ("medium", seed, name) not in done:
                    jobs[f"{name}_{seed}"] = partial(sft_cell, cfg, seed, name, lr, epochs)
    run_jobs(jobs, cfg.workers, Path(cfg.out, "logs"))
    collect(cfg, cells)


def cell_without_rl(seed, name):
    return Cell("medium", seed, name, reward_model="", level="", kl_share=0.0)


def sft_cell(cfg, seed, name, lr, epochs):
    """SFT, then SFT on what the editor wrote -> <its folder>/result.jsonl, one row"""
    base = base_folder(cfg, "medium", seed)
    rows = []
    for row in logged(base / "edits.jsonl"):
        if row["edited"] is not None:
            rows.append(dict(instruction=row["instruction"], input="", output=row["edited"]))
    edited = base / f"{name}.jsonl"
    write_jsonl(edited, rows)
    stage(base / f"{name}.log", "sft.py", PRESET, f"--seed={seed}", f"--model={base}/sft",
          f"--data={edited}", f"--lr={lr:g}", f"--epochs={epochs}", f"--out={base}/{name}")
    annotations = judged(cfg, cell_without_rl(seed, name), base / name)
    row = row_without_rl(seed, name, annotations)
    write_jsonl(base / name / "result.jsonl", [row])


def row_without_rl(seed, name, annotations):
    """A row whose figures stand at "step" 0"""
    row = dict(world="medium", seed=seed, name=name, ceiling=ceiling(annotations))
    return row | dict(curve={0: figures_of(annotations)})


def run_baselines(cfg):
    """(b) What edits are worth without RL: accuracy of the reward models on both kinds of pairs,
    SFT on the edited answers, the best of 8 answers by each reward model"""
    names = ("rm_original", "rm_edited", "rm_token")
    done = finished_cells(cfg)
    make_bases(cfg, {("medium", seed) for seed in REPORTED_SEEDS
                     if ("medium", seed, "data_sft") not in done})
    jobs = {}
    for seed in REPORTED_SEEDS:
        if ("medium", seed, "data_sft") not in done:
            jobs[f"data_{seed}"] = partial(baselines_of_seed, cfg, seed, names)
    run_jobs(jobs, cfg.workers, Path(cfg.out, "logs"))
    cells = []
    for seed in REPORTED_SEEDS:
        cells.append(cell_without_rl(seed, "data_sft_edited"))
        for name in names:
            cells.append(chosen("data", "gamma0", "medium", seed, reward_model=name))
    collect(cfg, cells)


def baselines_of_seed(cfg, seed, names):
    base = base_folder(cfg, "medium", seed)
    for name in names:
        if not (base / name / "rewards.json").exists():
            make_reward_model(cfg, "medium", seed, name)
    sft_cell(cfg, seed, "data_sft_edited", SFT_LR, SFT_EPOCHS)
    found = {"data_sft": judged(cfg, cell_without_rl(seed, "data_sft"), base / "sft")}

    # Answers with other seeds: a reward model scores them, and the best of each question stays.
    log = base / "data.log"
    first = [PRESET, f"--seed={seed}"]
    samples = []
    for sample in range(SAMPLES):
        out = base / f"samples_{sample}.jsonl"
        stage(log, "evaluate.py", "decode", PRESET, f"--seed={1000 * seed + sample}",
              f"--model={base}/sft", f"--data={base}/data/eval.jsonl",
              f"--response_len={RESPONSE_LEN['medium']}", f"--out={out}")
        samples.append(out)
    for name in names:
        found[f"data_best_{name}"] = judged_best(base, name, samples, first, log)
    write_jsonl(base / "data_gamma0/result.jsonl",
                [row_without_rl(seed, name, found[name]) for name in found])


def judged_best(base, reward_model, samples, first, log):
    """Of the samples of each question the answer with the highest R -> gold annotations of those"""
    scored = []
    for out in samples:
        scores = out.with_name(f"{out.stem}_{reward_model}.jsonl")
        stage(log, "evaluate.py", "judge", *first, "--judge=reward_model", f"--outputs={out}",
              f"--reward_model={base}/{reward_model}", f"--reference={base}/data/eval.jsonl",
              f"--out={scores}")
        scored.append(logged(scores))
    best = []
    for rows in zip(*scored):
        row = max(rows, key=lambda row: row["scores"][1])
        best.append(dict(instruction=row["instruction"], input="", output=row["output_2"],
                         generator=f"best of {len(rows)}"))
    outputs = base / f"best_{reward_model}.jsonl"
    annotations = base / f"best_{reward_model}_annotations.jsonl"
    write_jsonl(outputs, best)
    stage(log, "evaluate.py", "judge", *first, "--judge=gold", f"--outputs={outputs}",
          f"--reference={base}/data/eval.jsonl", f"--out={annotations}")
    return logged(annotations)


PARTS = {"grid": grid, "paper": paper, "lengths": lengths, "horizons": horizons, "edits": edits,
         "losses": losses, "why": why}


def main(cfg):
    check_numbers(cfg, workers=COUNT)
    words = [*PARTS, "sft", "rounds", "data"]
    if not cfg.data or set(cfg.data) - set(words):
        fail(f"say which parts to run: {', '.join(words)}")
    for part in cfg.data:
        if part == "rounds":
            run_rounds(cfg)
        elif part == "sft":
            run_sft(cfg)
        elif part == "data":
            run_baselines(cfg)
        else:
            run_cells(cfg, PARTS[part]())
        say(f"{part}: done, see {cfg.results}")


if __name__ == "__main__":
    main(load_config(Config, "study"))
