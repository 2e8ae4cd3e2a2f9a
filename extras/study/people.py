"""People's edits to a policy: ParaDetox with a real small model, outside of the toy world.

    python data/paradetox/prepare.py
    python extras/study/people.py --model=FOLDER    # SmolLM2-135M; resumable

A policy learns to finish rude comments, from their first two words, as their authors did. People's
rewrites make a sequence-level and a token-level reward model, and PPO uses each of them. Rewrites
also mend spaces and capitals; here both sides are lower-case with the same spacing, so words and
punctuation differ. The policy is the whole model; reward models and judge have its lowest layers.

The judge is a sequence-level model that learnt from rewrites of other comments, which no stage has
seen: how often does it prefer the policy's comment to the person's rewrite of the same beginning?
Rewrites are mostly shorter, so the judge gets as many pairs with a longer rewrite as with a shorter
one. The shares of the KL, lam and reward_scale are those of the toy world's grid; nothing was tried
on the three seeds that are reported.

Adds one row per run to extras/study/people.jsonl and prints the table of EXPERIMENTS.md.
"""
import json, os, random, re, sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import encode_prompt, encode_response, load_tokenizer
from evaluate import mean_and_error, score_responses
from extras.report.arms import pm
from extras.study.jobs import exit_status, fork, run_jobs, stage
from extras.study.tables import markdown_table
from plumbing.command_line import load_config
from plumbing.files import COUNT, check_input, check_numbers, read_jsonl, write_jsonl
from plumbing.models import check_model
from plumbing.ranks import fail, say
from plumbing.record import logged

FINISH = "Finish this comment."
JUDGED = "Write a comment for an online discussion."
BEGINNING = 2                  # words that the policy is given
SFT_ROWS, EDITS = 1200, 1400   # the other comments' beginnings are the prompts of PPO
JUDGE_HELDOUT = 300            # pairs
TEST = 300                     # beginnings


@dataclass(frozen=True)
class Config:
    model: str = ""                         # a folder of SmolLM2-135M, or another small model
    data: str = "data/paradetox"            # of data/paradetox/prepare.py
    out: str = "out/study_people"
    results: str = "extras/study/people.jsonl"
    layers: int = 8                         # of reward models and judge: the policy's lowest
    seeds: int = 3                          # 0, 1, 2
    steps: int = 20                         # of PPO
    workers: int = 2                        # runs at a time, one core each
    dtype: str = "float32"


# ---------------------------------------------------------------- the data

def plain_text(text):
    """Lower case, no spaces before punctuation, no quotation marks around: so only words differ"""
    text = text.lower().strip().strip('"').strip()
    text = re.sub(r"\s+([.,!?;:'’)])", r"\1", text)
    text = re.sub(r"\s+n't\b", "n't", text)
    return re.sub(r"\s+", " ", text).rstrip(" .")


def continuations(rows):
    """Edits of whole comments -> edits of the part after the first words, where both sides begin
    with the same words; and the comments where no rewrite does"""
    kept = {}
    others = {}
    for row in rows:
        original = plain_text(row["original"])
        edited = plain_text(row["edited"] or "")
        if original == edited or not edited:
            continue
        words = original.split()
        same = words[:BEGINNING] == edited.split()[:BEGINNING]
        if same and len(words) > BEGINNING + 2 and len(edited.split()) > BEGINNING:
            beginning = " ".join(words[:BEGINNING])
            edit = dict(instruction=FINISH, input=beginning, original=original[len(beginning):],
                        edited=edited[len(beginning):])
            kept.setdefault(original, edit)
        elif not same:
            others.setdefault(original, dict(original=original, edited=edited))

    # A comment has up to three rewrites; it is used once.
    others = [pair for original, pair in others.items() if original not in kept]
    return list(kept.values()), others


def whole(row):
    """The comment of which a row has the beginning and the rest"""
    return row["input"] + row["original"]


def as_many_longer_as_shorter(pairs):
    """Pairs whose rewrites are longer, shorter and as long, in words -> as many of the first two:
    length alone says nothing then"""
    groups = defaultdict(list)
    for pair in pairs:
        difference = len(pair["edited"].split()) - len(pair["original"].split())
        groups[(difference > 0) - (difference < 0)].append(pair)
    n = min(len(groups[1]), len(groups[-1]))
    balanced = groups[1][:n] + groups[-1][:n] + groups[0]
    random.Random(0).shuffle(balanced)
    return balanced


def prepare(cfg):
    """The files of all stages. Each comment is in one of them alone"""
    out = Path(cfg.out, "data")
    fields = {"original": str, "edited": (str, type(None))}
    test, test_others = continuations(read_jsonl(f"{cfg.data}/edits_test.jsonl", fields))
    seen = {whole(row) for row in test} | {pair["original"] for pair in test_others}
    own, others = continuations(read_jsonl(f"{cfg.data}/edits_train.jsonl", fields))
    own = [row for row in own if whole(row) not in seen]
    others = [pair for pair in others if pair["original"] not in seen]
    random.Random(0).shuffle(own)
    random.Random(1).shuffle(others)
    pairs = as_many_longer_as_shorter(others)
    rest = own[SFT_ROWS + EDITS:]
    if not rest or len(pairs) <= JUDGE_HELDOUT or not test:
        fail(f"--data={cfg.data} has too few comments: {len(own)} to finish (more than "
             f"{SFT_ROWS + EDITS} are needed), {len(pairs)} pairs for the judge (more than "
             f"{JUDGE_HELDOUT}), {len(test)} to test on")

    sft = [dict(instruction=FINISH, input=row["input"], output=row["original"])
           for row in own[:SFT_ROWS]]
    edits = [row | dict(id=str(number), editor="human", model=None, stop_reason=None, usage=None)
             for number, row in enumerate(own[SFT_ROWS:SFT_ROWS + EDITS])]
    judge = [dict(instruction=JUDGED, input="", output_1=pair["original"],
                  output_2=pair["edited"], preference=2) for pair in pairs]
    write_jsonl(out / "sft.jsonl", sft)
    write_jsonl(out / "edits.jsonl", edits)
    write_jsonl(out / "prompts.jsonl", [dict(instruction=FINISH, input=row["input"])
                                        for row in rest])
    write_jsonl(out / "judge.jsonl", judge[JUDGE_HELDOUT:])
    write_jsonl(out / "judge_heldout.jsonl", judge[:JUDGE_HELDOUT])
    write_jsonl(out / "test.jsonl", [row | dict(output=row["original"]) for row in test[:TEST]])
    say(f"{out}: {len(sft)} comments for SFT, {len(edits)} edits, {len(rest)} beginnings, "
        f"{len(judge)} pairs for the judge, {min(TEST, len(test))} beginnings to test on")


def lowest_layers(cfg):
    """The lowest layers of the SFT model, its embeddings and its head -> a folder"""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    sft = Path(cfg.out, "sft")
    model = AutoModelForCausalLM.from_pretrained(sft, num_hidden_layers=cfg.layers)
    model.save_pretrained(Path(cfg.out, "backbone"))
    AutoTokenizer.from_pretrained(sft).save_pretrained(Path(cfg.out, "backbone"))


# ---------------------------------------------------------------- the stages

SFT = ["--epochs=1", "--batch=32", "--micro_batch=16", "--lr=1e-4", "--max_tokens=128"]
RM = ["--batch=16", "--micro_batch=16", "--lr=1e-4", "--warmup=0.05", "--max_tokens=128"]
ROLLOUT = 32
PPO = [f"--rollout_batch={ROLLOUT}", f"--rollout_micro_batch={ROLLOUT}", "--score_micro_batch=32",
       "--batch=16", "--micro_batch=16", "--query_len=64", "--response_len=32", "--lr=2e-5",
       "--warmup_steps=3", "--save_every=10", "--resume_every=10"]

# The reward model, kl_coef as a share of the return's sd at step 0, flags: the toy world's grid
# chose the shares and the flags.
ARMS = {"sequence": ("rm_sequence", 0.01, ["--level=sequence", "--lam=0.95"]),
        "gamma0": ("rm_token", 0.02, ["--level=token", "--gamma=0"]),
        "gamma1": ("rm_token", 0.04, ["--level=token", "--reward_scale=mean"])}
NAMES = {"sft": "SFT", "sequence": "sequence level", "gamma0": "token level, gamma 0",
         "gamma1": "token level, gamma 1"}


def make_models(cfg):
    """SFT, the judge, and the two reward models: the same for all seeds of PPO"""
    out = Path(cfg.out)
    run = partial(stage, out / "models.log")
    dtype = f"--dtype={cfg.dtype}"
    say(f"SFT, judge and reward models; their output is in {out}/models.log")
    run("sft.py", f"--model={cfg.model}", f"--data={out}/data/sft.jsonl", *SFT, dtype,
        f"--out={out}/sft")
    if not (out / "backbone/tokenizer.json").exists():
        lowest_layers(cfg)
    run("diff.py", f"--data={out}/data/edits.jsonl", f"--tokenizer={out}/sft", "--gaps=true",
        f"--out={out}/diffs.jsonl")

    def train(name, data, *flags):
        run("reward_model.py", f"--model={out}/backbone", f"--data={data}", *RM, *flags, dtype,
            f"--out={out}/{name}")

    train("judge", f"{out}/data/judge.jsonl", "--loss=sequence",
          f"--eval_data={out}/data/judge_heldout.jsonl")
    train("rm_sequence", f"{out}/diffs.jsonl", "--epochs=2", "--loss=sequence")
    train("rm_token", f"{out}/diffs.jsonl", "--epochs=2", "--loss=eq4", "--anchor=0.3")


def make_run(cfg, arm, seed):
    """PPO of an arm, and the judge's view of the models that it kept -> result.jsonl, one row"""
    out = Path(cfg.out)
    reward_model, share, flags = ARMS[arm]
    run = partial(stage, out / f"{arm}_{seed}.log")
    prompts = len(logged(out / "data/prompts.jsonl"))
    own = [*PPO, *flags, f"--policy={out}/sft", f"--reward_model={out}/{reward_model}",
           f"--data={out}/data/prompts.jsonl", f"--seed={seed}", f"--dtype={cfg.dtype}"]

    # A run of one step measures the unit of the arm's reward.
    run("ppo.py", *own, "--steps=1", "--kl_coef=0", "--lr_epochs=1",
        f"--out={out}/sd_{arm}_{seed}")
    return_sd = logged(out / f"sd_{arm}_{seed}/metrics.jsonl")[0]["return_sd"]
    kl_coef = share * return_sd
    folder = out / f"{arm}_{seed}"
    run("ppo.py", *own, f"--steps={cfg.steps}", f"--lr_epochs={cfg.steps * ROLLOUT / prompts:.6g}",
        f"--kl_coef={kl_coef:.6g}", f"--out={folder}")

    models = {int(path.name.removeprefix("step_")): path for path in folder.glob("step_*")}
    models[cfg.steps] = folder
    curve = {}
    for step, model in sorted(models.items()):
        curve[step] = judged(cfg, model, folder / f"step{step}", run)
    metrics = logged(folder / "metrics.jsonl")
    row = dict(arm=arm, seed=seed, steps=cfg.steps, kl_coef=kl_coef, curve=curve)
    row |= {name: metrics[-1][name] for name in ("reward", "kl", "response_length", "eos_share")}
    row["seconds"] = round(sum(step["seconds"] for step in metrics), 1)
    write_jsonl(folder / "result.jsonl", [row])


def judge_sft(cfg):
    """The SFT model, as a run of 0 steps"""
    out = Path(cfg.out)
    figures = judged(cfg, out / "sft", out / "sft_judged", partial(stage, out / "sft.log"))
    write_jsonl(out / "sft_0/result.jsonl", [dict(arm="sft", seed=0, steps=0, curve={0: figures})])


def judged(cfg, model, name, run):
    """The policy's comments against the persons' rewrites of the same beginnings -> figures"""
    out = Path(cfg.out)
    outputs = Path(f"{name}.outputs.jsonl")
    scores = Path(f"{name}.scores.json")
    run("evaluate.py", "decode", f"--model={model}", f"--data={out}/data/test.jsonl",
        "--temperature=1", "--top_p=1", "--response_len=32", "--batch=150", f"--out={outputs}")
    child = fork(partial(score_comments, cfg, outputs, scores), out / "judge.log")
    if exit_status(os.waitpid(child, 0)[1]):
        fail(f"the judge failed; read {out}/judge.log")
    return json.loads(scores.read_text())


def score_comments(cfg, outputs, scores):
    """Win rate of the policy's comments (beginning and continuation) against the rewrites, and the
    judge's mean score of policy, rewrite and original"""
    out = Path(cfg.out)
    tokenizer = load_tokenizer(f"{out}/judge")
    prompt = encode_prompt(tokenizer, dict(instruction=JUDGED, input=""))
    rows = logged(outputs)
    comments = [row["input"] + row["output"] for row in rows]
    comments += [row["input"] + row["edited"] for row in rows]
    comments += [whole(row) for row in rows]
    responses = [encode_response(tokenizer, comment) for comment in comments]
    R, _ = score_responses(f"{out}/judge", "sequence", [prompt] * len(responses), responses, 32,
                           "auto")
    n = len(rows)
    ours, theirs, rude = R[:n], R[n:2 * n], R[2 * n:]
    won, error = mean_and_error([100.0 * (a > b) for a, b in zip(ours, theirs)])
    above, _ = mean_and_error([100.0 * (a > b) for a, b in zip(ours, rude)])
    words = mean_and_error([len(row["output"].split()) for row in rows])[0]
    figures = dict(win_rate=won, standard_error=error, above_original=above, words=words,
                   distinct=len({row["output"] for row in rows}) / n,
                   score=mean_and_error(ours)[0], score_rewrite=mean_and_error(theirs)[0],
                   score_original=mean_and_error(rude)[0])
    scores.write_text(json.dumps(figures))


# ---------------------------------------------------------------- all runs, and the table

def collect(cfg):
    """The rows of finished runs, in the results file and in the run folders -> {(arm, seed): row}.
    fail() where a row has other steps"""
    rows = {}
    found = logged(Path(cfg.results))
    for path in sorted(Path(cfg.out).glob("*/result.jsonl")):
        found += logged(path)
    for row in found:
        if row["steps"] not in (0, cfg.steps):
            fail(f"{cfg.results}: {row['arm']} of seed {row['seed']} had {row['steps']} steps, not "
                 f"{cfg.steps}; choose another --results and --out")
        rows.setdefault((row["arm"], row["seed"]), row)
    if rows:
        write_jsonl(cfg.results, [rows[key] for key in sorted(rows)])
    return rows


def last(row):
    """The judge's figures of a run's last model"""
    return row["curve"][max(row["curve"], key=int)]


def print_table(rows):
    """One row an arm: the judge's figures of the last models, means over seeds. rows: {(arm, seed):
    its row}"""
    table = []
    for arm, name in NAMES.items():
        mine = [row for row in rows.values() if row["arm"] == arm]
        if not mine:
            continue

        # The difference to the sequence level is paired, seed by seed.
        paired = []
        for row in mine:
            other = rows.get(("sequence", row["seed"]))
            if arm in ("gamma0", "gamma1") and other:
                paired.append(last(row)["win_rate"] - last(other)["win_rate"])
        cells = [name, figure_of(mine, "win_rate")]
        cells.append(pm(*mean_and_error(paired), sign="+") if paired else "")
        cells += [figure_of(mine, "above_original"), figure_of(mine, "score", 2)]
        table.append([*cells, figure_of(mine, "words"), len(mine)])
    say(markdown_table(["policy", "wins against the rewrite, %", "minus sequence level",
                        "above the original, %", "judge's score", "words", "runs"], table))


def figure_of(rows, name, digits=1):
    return pm(*mean_and_error([last(row)[name] for row in rows]), digits)


def main(cfg):
    check_numbers(cfg, layers=COUNT, seeds=COUNT, steps=COUNT, workers=COUNT)
    check_model(cfg.model, "model", "a folder of SmolLM2-135M with safetensors")
    for name in ("edits_train.jsonl", "edits_test.jsonl"):
        check_input(f"{cfg.data}/{name}", "data", "python data/paradetox/prepare.py")
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    if not Path(cfg.out, "data/test.jsonl").exists():
        prepare(cfg)
    make_models(cfg)

    # The runs that have no row yet; a stopped run goes on where it was.
    done = collect(cfg)
    jobs = {}
    if ("sft", 0) not in done:
        jobs["sft"] = partial(judge_sft, cfg)
    for arm in ARMS:
        for seed in range(cfg.seeds):
            if (arm, seed) not in done:
                jobs[f"{arm}_{seed}"] = partial(make_run, cfg, arm, seed)
    try:
        run_jobs(jobs, cfg.workers, Path(cfg.out, "logs"))
    finally:
        done = collect(cfg)
    print_table(done)


if __name__ == "__main__":
    main(load_config(Config, "study"))
