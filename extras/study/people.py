"""People's edits to a policy: ParaDetox with a real small model, outside of the toy world.

    python data/paradetox/prepare.py
    python extras/study/people.py --model=FOLDER      # SmolLM2-135M: hours on two cores, resumable

A policy learns to finish rude comments, from their first two words, as their authors did. People's
rewrites make a sequence-level and a token-level reward model, and PPO uses each of them. Rewrites
also mend spaces and capitals; here both sides are lower-case with the same spacing, so only words
differ. The judge is a sequence-level model that learnt from rewrites of other comments, which no
stage has seen: how often does it prefer the policy's comment to the person's rewrite of the same
beginning? The shares of the KL, lam and reward_scale are those of the toy world's grid; nothing was
tried on the three seeds that are reported.

Adds one row per run to extras/study/people.jsonl.
"""
import json, os, random, re, sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import encode_prompt, encode_response, load_tokenizer
from evaluate import mean_and_error, score_responses
from extras.study.jobs import exit_status, fork, stage
from plumbing.command_line import load_config
from plumbing.files import COUNT, check_input, check_numbers, read_jsonl, write_jsonl
from plumbing.models import check_model
from plumbing.ranks import fail, say
from plumbing.record import logged

FINISH = "Finish this comment."
JUDGED = "Write a comment for an online discussion."
BEGINNING = 2  # words that the policy is given


@dataclass(frozen=True)
class Config:
    model: str = ""                         # a folder of SmolLM2-135M, or another small model
    data: str = "data/paradetox"            # of data/paradetox/prepare.py
    out: str = "out/study_people"
    results: str = "extras/study/people.jsonl"
    layers: int = 8                         # the lowest so many layers of the model
    seeds: int = 3                          # 0, 1, 2
    steps: int = 40                         # of PPO
    dtype: str = "bfloat16"


# ---------------------------------------------------------------- the data

def plain_text(text):
    """Lower case, no spaces before punctuation, no quotation marks around: so only words differ"""
    text = text.lower().strip().strip('"').strip()
    text = re.sub(r"\s+([.,!?;:'’)])", r"\1", text)
    text = re.sub(r"\s+n't\b", "n't", text)
    return re.sub(r"\s+", " ", text).rstrip(" .")


def continuations(rows):
    """Edits of whole comments -> edits of the part after the first words, where both sides begin
    with the same words; and the comments where they do not"""
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
            kept.setdefault(row["original"], edit)
        elif not same:
            others.setdefault(row["original"], dict(original=original, edited=edited))
    return list(kept.values()), list(others.values())


def prepare(cfg):
    """The files of all stages. Each comment is in one of them alone"""
    out = Path(cfg.out, "data")
    fields = {"original": str, "edited": (str, type(None))}
    own, others = continuations(read_jsonl(f"{cfg.data}/edits_train.jsonl", fields))
    test, _ = continuations(read_jsonl(f"{cfg.data}/edits_test.jsonl", fields))
    random.Random(0).shuffle(own)
    sft = [dict(instruction=FINISH, input=row["input"], output=row["original"])
           for row in own[:2000]]
    edits = [row | dict(id=str(number), editor="human", model=None, stop_reason=None, usage=None)
             for number, row in enumerate(own[2000:3400])]
    judge = [dict(instruction=JUDGED, input="", output_1=row["original"], output_2=row["edited"],
                  preference=2) for row in others]
    write_jsonl(out / "sft.jsonl", sft)
    write_jsonl(out / "edits.jsonl", edits)
    write_jsonl(out / "prompts.jsonl", [dict(instruction=FINISH, input=row["input"])
                                        for row in own[3400:]])
    write_jsonl(out / "judge.jsonl", judge[300:])
    write_jsonl(out / "judge_heldout.jsonl", judge[:300])
    write_jsonl(out / "test.jsonl", [row | dict(output=row["original"]) for row in test])
    say(f"{out}: {len(sft)} comments for SFT, {len(edits)} edits, {len(own) - 3400} beginnings, "
        f"{len(judge)} pairs for the judge, {len(test)} beginnings to test on")


def lowest_layers(cfg):
    """The model's lowest layers, its embeddings and its head -> a folder"""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = Path(cfg.out, "backbone")
    model = AutoModelForCausalLM.from_pretrained(cfg.model, num_hidden_layers=cfg.layers)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(cfg.model).save_pretrained(out)


# ---------------------------------------------------------------- the stages

RM = ["--batch=16", "--micro_batch=16", "--lr=1e-4", "--warmup=0.05", "--max_tokens=128"]
PPO = ["--rollout_batch=64", "--rollout_micro_batch=64", "--score_micro_batch=32", "--batch=32",
       "--micro_batch=16", "--query_len=64", "--response_len=32", "--lr=5e-5", "--warmup_steps=3",
       "--save_every=10", "--resume_every=20"]

# The reward model, kl_coef as a share of the return's sd at step 0, flags: the toy world's grid
# chose the shares and the flags.
ARMS = {"sequence": ("rm_sequence", 0.01, ["--level=sequence", "--lam=0.95"]),
        "gamma1": ("rm_token", 0.04, ["--level=token", "--reward_scale=mean"]),
        "gamma0": ("rm_token", 0.02, ["--level=token", "--gamma=0"])}


def make_models(cfg):
    """SFT, the judge, and the two reward models: the same for all seeds of PPO"""
    out = Path(cfg.out)
    run = partial(stage, out / "models.log")
    dtype = f"--dtype={cfg.dtype}"
    run("sft.py", f"--model={out}/backbone", f"--data={out}/data/sft.jsonl", "--epochs=3",
        "--batch=32", "--micro_batch=16", "--lr=3e-4", "--max_tokens=128", dtype,
        f"--out={out}/sft")
    run("diff.py", f"--data={out}/data/edits.jsonl", f"--tokenizer={out}/sft", "--gaps=true",
        f"--out={out}/diffs.jsonl")
    run("reward_model.py", f"--model={out}/backbone", f"--data={out}/data/judge.jsonl", *RM,
        "--loss=sequence", f"--eval_data={out}/data/judge_heldout.jsonl", dtype,
        f"--out={out}/judge")
    run("reward_model.py", f"--model={out}/sft", f"--data={out}/diffs.jsonl", *RM, "--epochs=2",
        "--loss=sequence", dtype, f"--out={out}/rm_sequence")
    run("reward_model.py", f"--model={out}/sft", f"--data={out}/diffs.jsonl", *RM, "--epochs=2",
        "--loss=eq4", "--anchor=0.3", dtype, f"--out={out}/rm_token")


def make_run(cfg, arm, seed):
    """PPO of an arm, and the judge's view of the models that it kept -> a row"""
    out = Path(cfg.out)
    reward_model, share, flags = ARMS[arm]
    run = partial(stage, out / f"{arm}_{seed}.log")
    prompts = len(logged(out / "data/prompts.jsonl"))
    own = [*PPO, *flags, f"--policy={out}/sft", f"--reward_model={out}/{reward_model}",
           f"--data={out}/data/prompts.jsonl", f"--seed={seed}", f"--dtype={cfg.dtype}"]
    run("ppo.py", *own, "--steps=1", "--kl_coef=0", "--lr_epochs=1",
        f"--out={out}/sd_{arm}_{seed}")
    return_sd = logged(out / f"sd_{arm}_{seed}/metrics.jsonl")[0]["return_sd"]
    kl_coef = share * return_sd
    folder = out / f"{arm}_{seed}"
    run("ppo.py", *own, f"--steps={cfg.steps}", f"--lr_epochs={cfg.steps * 64 / prompts:.6g}",
        f"--kl_coef={kl_coef:.6g}", f"--out={folder}")

    curve = {}
    models = {int(path.name.removeprefix("step_")): path for path in folder.glob("step_*")}
    models[cfg.steps] = folder
    for step, model in sorted(models.items()):
        curve[step] = judged(cfg, model, run)
    last = logged(folder / "metrics.jsonl")[-1]
    row = dict(arm=arm, seed=seed, steps=cfg.steps, kl_coef=kl_coef, curve=curve)
    row |= {name: last[name] for name in ("reward", "kl", "response_length", "eos_share")}
    return row


def judged(cfg, model, run):
    """The policy's comments against the persons' rewrites of the same beginnings -> figures"""
    out = Path(cfg.out)
    outputs = model / "outputs.jsonl"
    run("evaluate.py", "decode", f"--model={model}", f"--data={out}/data/test.jsonl",
        "--temperature=1", "--top_p=1", "--response_len=32", "--batch=150", f"--out={outputs}")
    scores = model / "scores.json"
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
    comments += [row["input"] + row["original"] for row in rows]
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


def main(cfg):
    check_numbers(cfg, layers=COUNT, seeds=COUNT, steps=COUNT)
    check_model(cfg.model, "model", "a folder of SmolLM2-135M with safetensors")
    check_input(f"{cfg.data}/edits_train.jsonl", "data", "python data/paradetox/prepare.py")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "data/test.jsonl").exists():
        prepare(cfg)
    if not (out / "backbone/tokenizer.json").exists():
        lowest_layers(cfg)
    make_models(cfg)
    done = {(row["arm"], row["seed"]): row for row in logged(Path(cfg.results))}
    for seed in range(cfg.seeds):
        for arm in ARMS:
            if (arm, seed) not in done:
                done[arm, seed] = make_run(cfg, arm, seed)
                write_jsonl(cfg.results, list(done.values()))
                last = done[arm, seed]["curve"][cfg.steps]
                say(f"{arm}, seed {seed}: {last['win_rate']:.1f}% against the rewrites")


if __name__ == "__main__":
    main(load_config(Config, "study"))
