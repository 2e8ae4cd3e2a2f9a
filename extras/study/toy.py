"""The evidence in the toy world: when token rewards pay, and why. One resumable command a part.

    python extras/study/toy.py grid        # each arm's settings, on seeds 100 to 105 only

A part trains its cells (a world, a seed, a reward, settings of PPO), judges the models that each
cell kept on the 300 questions of eval.jsonl with the gold judge, and writes <cell>/result.json. A
second run makes only what is missing. The weights of a judged cell are deleted.

kl_coef is a share of the standard deviation of the arm's return at step 0, which a run of one step
measures, because rewards of different models have different units.
"""
import json, shutil, sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.toy.prepare import gold, items_of, read_prompt, split_lines
from evaluate import mean_and_error, win_rate
from extras.study.jobs import run_jobs, stage
from plumbing.command_line import load_config
from plumbing.files import COUNT, check_numbers, replacing
from plumbing.ranks import fail, say
from plumbing.record import logged


@dataclass(frozen=True)
class Config:
    data: list[str] = ()         # the parts to run
    out: str = "out/study_toy"
    workers: int = 2             # cells at a time, one core each
    keep_weights: bool = False


TUNING_SEEDS = range(100, 106)   # settings are chosen on these, and nothing is reported on them
RESPONSE_LEN = {"short": 48, "medium": 64, "long": 128}  # tokens
PRESET = "config/demo.toml"
STEPS = 50


class Cell(NamedTuple):
    world: str             # short, medium or long
    seed: int
    name: str
    reward_model: str      # rm_original, rm_edited or rm_token
    level: str             # of PPO: token or sequence
    kl_share: float        # kl_coef as a share of the standard deviation of the return at step 0
    flags: tuple = ()      # other flags of ppo.py
    steps: int = STEPS
    save_every: int = 25   # steps between the models that are judged


# ---------------------------------------------------------------- a world and its reward models

def base_folder(cfg, world, seed):
    return Path(cfg.out, world, f"seed{seed}")


def make_base(cfg, world, seed):
    """The data, the SFT model, edits, diffs, and the three reward models with their figures"""
    base = base_folder(cfg, world, seed)
    base.mkdir(parents=True, exist_ok=True)
    run = partial(stage, base / "base.log")
    first = [PRESET, f"--seed={seed}"]
    pairs = base / "data/pref.jsonl"
    heldout = base / "data/pref_heldout.jsonl"
    run("data/toy/prepare.py", *first, f"--items={world}", f"--out={base}/data")
    run("sft.py", *first, f"--model={base}/data/model", f"--data={base}/data/sft.jsonl",
        f"--out={base}/sft")
    for data, edits in ((pairs, "edits"), (heldout, "edits_heldout")):
        run("edit.py", *first, "--editor=rules", f"--data={data}", f"--out={base}/{edits}.jsonl")
    run("diff.py", *first, f"--data={base}/edits.jsonl", f"--tokenizer={base}/sft",
        f"--out={base}/diffs.jsonl")
    reward_models = {"rm_original": [f"--data={pairs}", "--loss=sequence"],
                     "rm_edited": [f"--data={base}/diffs.jsonl", "--loss=sequence"],
                     "rm_token": [f"--data={base}/diffs.jsonl", "--loss=eq4", "--anchor=0.3"]}
    for name, flags in reward_models.items():
        make_reward_model(cfg, world, seed, name, flags)


def make_reward_model(cfg, world, seed, name, flags):
    """Train a reward model, and measure it on held-out pairs of both kinds"""
    base = base_folder(cfg, world, seed)
    run = partial(stage, base / "base.log")
    first = [PRESET, f"--seed={seed}"]
    run("reward_model.py", *first, f"--model={base}/sft", *flags, f"--out={base}/{name}")
    heldout = f"{base}/data/pref_heldout.jsonl,{base}/edits_heldout.jsonl"
    run("evaluate.py", "rewards", *first, f"--reward_model={base}/{name}", f"--data={heldout}",
        f"--out={base}/{name}/rewards.json")


# ---------------------------------------------------------------- a cell

def return_sd(cfg, cell):
    """The standard deviation of the arm's return at step 0, measured by a run of one step"""
    base = base_folder(cfg, cell.world, cell.seed)
    scale = [flag for flag in cell.flags if flag.startswith("--reward_scale")]
    words = [cell.reward_model, cell.level, *[flag.split("=")[1] for flag in scale]]
    out = base / "_".join(["return_sd", *words])
    if not (out / "metrics.jsonl").exists():
        train(cfg, cell, out, scale, kl_coef=0.0, steps=1, save_every=1)
        drop_weights(out)
    return logged(out / "metrics.jsonl")[0]["return_sd"]


def train(cfg, cell, out, flags, *, kl_coef, steps, save_every):
    """ppo.py with the settings of a cell; the learning rate reaches 0 at its last step"""
    base = base_folder(cfg, cell.world, cell.seed)
    prompts = sum(1 for _ in open(base / "data/prompts.jsonl"))
    epochs = steps * 64 / prompts  # the demo's rollout batch
    stage(f"{out}.log", "ppo.py", PRESET, f"--seed={cell.seed}", f"--policy={base}/sft",
          f"--reward_model={base}/{cell.reward_model}", f"--data={base}/data/prompts.jsonl",
          f"--level={cell.level}", f"--kl_coef={kl_coef:.6g}", f"--steps={steps}",
          f"--lr_epochs={epochs:.6g}", f"--save_every={save_every}", f"--resume_every={save_every}",
          f"--response_len={RESPONSE_LEN[cell.world]}", *flags, f"--out={out}")


def drop_weights(out):
    for path in [*out.glob("step_*"), *out.glob("checkpoint_*")]:
        shutil.rmtree(path)
    for path in out.glob("*.safetensors"):
        path.unlink()


def judged(cfg, cell, model, name):
    """The answers of a model to eval.jsonl and the gold judge's verdicts -> figures"""
    base = base_folder(cfg, cell.world, cell.seed)
    log = f"{base}/{name}.log"
    questions = base / "data/eval.jsonl"
    first = [PRESET, f"--seed={cell.seed}"]
    outputs = model / "outputs.jsonl"
    annotations = model / "annotations.jsonl"
    stage(log, "evaluate.py", "decode", *first, f"--model={model}", f"--data={questions}",
          f"--response_len={RESPONSE_LEN[cell.world]}", f"--generator={name}", f"--out={outputs}")
    stage(log, "evaluate.py", "judge", *first, "--judge=gold", f"--outputs={outputs}",
          f"--reference={questions}", f"--out={annotations}")
    return figures_of(logged(annotations))


def figures_of(annotations):
    """Win rate, flaws, items too many and too few an answer, and the ceiling: the win rate of
    answers without flaws"""
    figures = win_rate(row["preference"] for row in annotations)
    figures["flaws"] = mean_and_error([-row["scores"][1] for row in annotations])[0]
    over = []
    under = []
    for row in annotations:
        number, _, world = read_prompt(row)
        items = [line for line in split_lines(row["output_2"]) if line in items_of(world)]
        over.append(max(0, len(items) - number))
        under.append(max(0, number - len(items)))
    figures["over"] = mean_and_error(over)[0]
    figures["under"] = mean_and_error(under)[0]
    ceiling = [2 if gold(row, row["output_1"]) else 1.5 for row in annotations]
    figures["ceiling"] = win_rate(ceiling)["win_rate"]
    figures["preferences"] = [row["preference"] for row in annotations]
    return figures


def run_cell(cfg, cell):
    """Train and judge a cell -> <its folder>/result.json"""
    out = base_folder(cfg, cell.world, cell.seed) / cell.name
    kl_coef = cell.kl_share * return_sd(cfg, cell)
    train(cfg, cell, out, cell.flags, kl_coef=kl_coef, steps=cell.steps,
          save_every=cell.save_every)
    curve = {}
    for folder in sorted(out.glob("step_*"), key=lambda folder: int(folder.name[5:])):
        curve[int(folder.name[5:])] = judged(cfg, cell, folder, cell.name)
    curve[cell.steps] = judged(cfg, cell, out, cell.name)
    last = logged(out / "metrics.jsonl")[-1]
    result = dict(cell=cell._asdict(), kl_coef=kl_coef, curve=curve, last_step=last)
    with replacing(out / "result.json") as file:
        json.dump(result, file)
    if not cfg.keep_weights:
        drop_weights(out)


def run_cells(cfg, cells):
    """Make the worlds that the cells need, then the cells that have no result yet"""
    worlds = sorted({(cell.world, cell.seed) for cell in cells})
    bases = {}
    for world, seed in worlds:
        if not (base_folder(cfg, world, seed) / "rm_token/rewards.json").exists():
            bases[f"base_{world}_{seed}"] = partial(make_base, cfg, world, seed)
    run_jobs(bases, cfg.workers, Path(cfg.out, "logs"))

    # The runs of one step come first: cells of one arm share them.
    first = {}
    for cell in cells:
        scale = [flag for flag in cell.flags if flag.startswith("--reward_scale")]
        first.setdefault((cell.world, cell.seed, cell.reward_model, cell.level, *scale), cell)
    measures = {f"return_sd_{number}": partial(return_sd, cfg, cell)
                for number, cell in enumerate(first.values())}
    run_jobs(measures, cfg.workers, Path(cfg.out, "logs"))

    jobs = {}
    for cell in cells:
        if not (base_folder(cfg, cell.world, cell.seed) / cell.name / "result.json").exists():
            jobs[f"{cell.world}_{cell.seed}_{cell.name}"] = partial(run_cell, cfg, cell)
    run_jobs(jobs, cfg.workers, Path(cfg.out, "logs"))


# ---------------------------------------------------------------- the grid

SHARES = (0.01, 0.02, 0.04, 0.08)
ARMS = {"rlhf": ("rm_original", "sequence"), "sequence": ("rm_edited", "sequence"),
        "token": ("rm_token", "token")}
CREDIT = {
    "token": {"gamma1": (), "mean": ("--reward_scale=mean",), "gamma0": ("--gamma=0",)},
    "sequence": {"lam1": (), "lam98": ("--lam=0.98",), "lam95": ("--lam=0.95",)},
}


def grid_cells():
    """12 cells an arm: four weights of the KL times three ways of credit"""
    cells = []
    for seed in TUNING_SEEDS:
        for share in SHARES:
            for arm, (reward_model, level) in ARMS.items():
                for credit, flags in CREDIT[level].items():
                    name = f"grid_{arm}_{credit}_kl{share:g}"
                    cells.append(Cell("medium", seed, name, reward_model, level, share, flags))
    return cells


PARTS = {"grid": grid_cells}


def main(cfg):
    check_numbers(cfg, workers=COUNT)
    if not cfg.data or set(cfg.data) - set(PARTS):
        fail(f"say which parts to run: {', '.join(PARTS)}")
    for part in cfg.data:
        run_cells(cfg, PARTS[part]())
        say(f"{part}: done")


if __name__ == "__main__":
    main(load_config(Config, "study"))
