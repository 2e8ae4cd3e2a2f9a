"""Stage 5. Which model is better, how good is the reward, and the paper's three tables.

    torchrun --nproc_per_node=8 evaluate.py decode --model=out/ppo --out=out/ppo/outputs.jsonl
    python evaluate.py judge --outputs=out/ppo/outputs.jsonl --out=out/ppo/annotations.jsonl    # ANTHROPIC_API_KEY
    python evaluate.py winrate out/ppo/annotations.jsonl                   # two files: their paired comparison
    python evaluate.py rewards --reward_model=out/rm data/toy/pref_heldout.jsonl data/toy/edits_heldout.jsonl
    python evaluate.py report out --out=out/report.html                    # several folders: seeds

decode   answers of a Llama-like language model, as AlpacaEval's model_outputs (instruction, input, output, generator)
judge    each pair (the reference's answer, ours) before Claude in both orders, or the toy's gold, or a reward model
winrate  the share of pairs that ours wins, its error, and what may have bent it: order, length, unreadable verdicts
rewards  a reward model on held-out pairs: accuracy, calibration, and whether r_t finds the tokens that people changed
report   Tables 1, 2 and 3 of the paper with ours beside them, and a page of figures, from run folders alone

decode, rewards and judge --judge=reward_model run a model: under torchrun too, with the same result on any number of
ranks. `python evaluate.py WORD --help` lists a word's fields.
"""
import json, math, random, re, shutil, statistics, sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import (RANK, WORLD, barrier, decode_response, encode_prompt, encode_response, fail, generate, load_model,
                    load_tokenizer, pack, read_jsonl, row_uniforms, say, setup, unsharded, whole_characters,
                    write_jsonl)
from reward_model import reward_level


@dataclass(frozen=True)
class DecodeConfig:
    model: str = "out/ppo"                      # a Hugging Face folder, or a name on the hub
    data: str = "data/alpacafarm/eval.jsonl"    # rows: instruction, input; what else they hold passes through
    out: str = "out/ppo/outputs.jsonl"
    generator: str | None = None                # the name that the outputs bear; None: the model folder's
    temperature: float = 0.7                    # AlpacaFarm's; 0: the likeliest token
    top_p: float = 0.9
    response_len: int = 300                     # tokens; an answer that was cut there bears `cut`
    batch: int = 64                             # rows decoded at once, similar in length; fixed, whatever the ranks
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    seed: int = 0                               # each row has its own draws
    overwrite: bool = False


@dataclass(frozen=True)
class JudgeConfig:
    outputs: str = "out/ppo/outputs.jsonl"      # ours
    reference: str = "data/alpacafarm/eval.jsonl"  # the model to beat; pairs are matched by instruction and input
    out: str = "out/ppo/annotations.jsonl"
    judge: Literal["claude", "gold", "reward_model"] = "claude"  # gold: the toy world's, fewer flaws win
    orders: int = 2                             # 2: both orders of each pair; 1: one, drawn at random (the old way)
    prompt: Literal["plain", "length_neutral"] = "plain"
    model: str = "claude-sonnet-4-6"            # claude: its API has no temperature any more, so ask in both orders
    max_tokens: int = 1024                      # claude: of a reply; room for models that think
    concurrency: int = 16                       # claude: requests in flight
    batch_api: bool = False                     # claude: half the price, within a day
    dry_run: bool = False                       # claude: requests, tokens, dollars, the first prompt; nothing is asked
    reward_model: str | None = None             # reward_model: its folder
    micro_batch: int = 16                       # reward_model: answers per forward and rank
    seed: int = 0                               # orders=1: which order
    overwrite: bool = False


@dataclass(frozen=True)
class WinrateConfig:
    data: list[str] = ()                        # one or two files of annotations
    json: bool = False
    resamples: int = 10_000                     # of the paired bootstrap
    seed: int = 0                               # its draws


@dataclass(frozen=True)
class RewardsConfig:
    reward_model: str = "out/rm"
    data: list[str] = ()                        # held-out preferences (output_1, output_2) or edits (original, edited)
    out: str | None = None                      # the report looks for <reward model>/rewards.json; None: print only
    json: bool = False
    max_tokens: int = 512                       # prompt + answer; longer pairs are dropped and counted
    micro_batch: int = 16                       # answers per forward and rank
    resamples: int = 200                        # of the pairs, for the standard error of an AUROC
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0                               # their draws
    overwrite: bool = False


@dataclass(frozen=True)
class ReportConfig:
    data: list[str] = ()                        # run folders, or folders that hold them: one such folder per seed
    out: str = "out/report.html"                # report.md, the tables alone, goes beside it
    target: float | None = None                 # Table 3: also steps and hours to this win rate, in percent
    markdown: bool = False                      # print the tables as Markdown, not as text
    seed: int = 0                               # the bootstrap's draws
    overwrite: bool = False                     # replace a file that is no report of ours


# AlpacaFarm's pairwise prompt, in short. A row without input loses that block; --prompt=length_neutral adds NEUTRAL.
JUDGE_PROMPT = """Select the output (a) or (b) that best matches the given instruction. Choose your preferred output, \
which can be subjective.{neutral} Your answer should ONLY contain: Output (a) or Output (b).

## Instruction:
{instruction}

## Input:
{input}

## Output (a):
{first}

## Output (b):
{second}

## Which is best, Output (a) or Output (b)?"""
NEUTRAL = " Length is no merit: do not prefer an output for being longer or shorter, judge only what it says."
VERDICTS = {"output (a)": 1, "output (b)": 2, "draw": 1.5}


# ---------------------------------------------------------------- statistics

def mean_and_error(x):
    """Mean and its standard error sd(ddof=1) / sqrt(n); None where there is none"""
    mean = statistics.fmean(x) if x else None
    return mean, statistics.stdev(x, mean) / math.sqrt(len(x)) if len(x) > 1 else None


def points(preference):
    """1 (the reference won) .. 2 (ours won) -> 0 .. 100; 0 is a draw, like 1.5"""
    return 50.0 if preference == 0 else 100 * (preference - 1)


def win_rate(preferences):
    """preferences: in [1, 2], above 1.5 ours won; 1.5 or 0 a draw; None not counted -> percent, its error, counts"""
    p = [points(x) for x in preferences if x is not None]
    if not all(0 <= x <= 100 for x in p):
        raise ValueError("a preference is 1, 2, between them, 0 or None")
    rate, error = mean_and_error(p)
    return dict(win_rate=rate, standard_error=error, n_wins=sum(x > 50 for x in p), n_wins_base=sum(x < 50 for x in p),
                n_draws=sum(x == 50 for x in p), n_total=len(p))


def paired(a, b, *, resamples=10_000, seed=0):
    """Win rate of a minus that of b on the same questions, in points. The bootstrap draws questions.

    a, b: preferences as in win_rate; what is None in either is left out. low, high: 95%. p_value: two-sided."""
    d = [points(x) - points(y) for x, y in zip(a, b, strict=True) if None not in (x, y)]
    difference, error = mean_and_error(d)
    found = dict(difference=difference, standard_error=error, low=None, high=None, p_value=None, n_total=len(d))
    if len(d) < 2:
        return found
    d, draw = torch.tensor(d, dtype=torch.float64), torch.Generator().manual_seed(seed)
    means = torch.cat([d[torch.randint(len(d), (min(500, resamples - i), len(d)), generator=draw)].mean(1)
                       for i in range(0, resamples, 500)])
    found["low"], found["high"] = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    tail = min((means <= 0).sum().item(), (means >= 0).sum().item())
    return found | dict(p_value=min(1.0, 2 * max(1, tail) / resamples))


def tell(figures, indent=""):
    """Figures for people, every digit of them, one a line; a list of groups has one group a line"""
    for name, value in figures.items():
        if isinstance(value, dict):
            say(f"{indent}{name}")
            tell(value, indent + "  ")
        elif isinstance(value, list):
            for group in value:
                parts = (f"{k} {round(v, 4) if isinstance(v, float) else v}" for k, v in group.items())
                say(f"{indent}{name:<18}{'  '.join(parts)}")
        else:
            say(f"{indent}{name:<18}{'-' if value is None else value}")


# ---------------------------------------------------------------- decode

def decode(cfg):
    from extras.checks import check_fits, check_input, check_model
    from extras.runs import begin, finish, logged, progress, record_of
    check_model(cfg.model, "model", "python ppo.py (or sft.py)")
    check_input(cfg.data, "data", "python data/toy/prepare.py or python data/alpacafarm/prepare.py")
    if cfg.temperature < 0 or not 0 < cfg.top_p <= 1 or cfg.batch < 1 or cfg.response_len < 1:
        fail("--temperature must be at least 0, --top_p in (0, 1], --batch and --response_len at least 1")
    if Path(cfg.out).suffix != ".jsonl":
        fail(f"--out must be a .jsonl file, got {cfg.out}")
    rows, tokenizer = read_jsonl(cfg.data, {"instruction": str}), load_tokenizer(cfg.model)
    prompts = [encode_prompt(tokenizer, row) for row in rows]
    check_fits(cfg.model, "model", max(map(len, prompts)) + cfg.response_len, speaks=True)
    anew = cfg.overwrite or not record_of(cfg.out)
    if begin(cfg, inputs=[cfg.data, cfg.model], rows=len(rows)):
        return say(f"{cfg.out} is finished; nothing to do")
    device, mesh, dtype = setup(cfg.dtype)

    # ---------------------------------------------------------------- fixed groups, whatever the ranks: a file for each
    order = sorted(range(len(rows)), key=lambda i: (-len(prompts[i]), i))  # the longest first: memory ends now or never
    groups = [order[i:i + cfg.batch] for i in range(0, len(order), cfg.batch)]
    parts = [Path(f"{cfg.out}.parts", f"{number}.jsonl") for number in range(len(groups))]
    if anew and RANK == 0:
        shutil.rmtree(parts[0].parent, ignore_errors=True)
    barrier()
    mine = list(zip(groups, parts))[RANK::WORLD]
    todo = [(group, part) for group, part in mine if not part.exists()]  # the others a killed run has left, whole
    model = load_model(cfg.model, device, mesh, dtype, frozen=True)
    with unsharded(model):
        for group, part in progress(todo, "decode", len(mine)):
            prompt_ids, prompt_mask, _ = pack([prompts[i] for i in group], [[]] * len(group), device)
            uniforms = torch.stack([row_uniforms(cfg.response_len, cfg.seed, i) for i in group])
            ids, mask = generate(model, prompt_ids, prompt_mask, max_new_tokens=cfg.response_len, uniforms=uniforms,
                                 eos_id=tokenizer.eos_token_id, temperature=cfg.temperature, top_p=cfg.top_p)  # [B, T]
            answers = [row[:length] for row, length in zip(ids.tolist(), mask.sum(1).tolist())]
            write_jsonl(part, [dict(row=i, output=decode_response(tokenizer, answer))
                               | ({} if answer[-1] == tokenizer.eos_token_id else {"cut": ["output"]})
                               for i, answer in zip(group, answers)])
    barrier()
    if RANK == 0:
        done = {row.pop("row"): row for part in parts for row in logged(part)}
        name = cfg.generator or Path(cfg.model).resolve().name
        rows = [row | {"input": row.get("input") or "", "generator": name} for row in rows]
        write_jsonl(cfg.out, [{k: v for k, v in row.items() if k != "cut"} | done[i] for i, row in enumerate(rows)])
        finish(cfg)
        shutil.rmtree(parts[0].parent)
        cut = sum("cut" in row for row in done.values())
        say(f"{cfg.out}: {len(rows)} answers, {cut} of them cut at {cfg.response_len} tokens")


# ---------------------------------------------------------------- judge

def matched(path_1, path_2, key, kinds):
    """The rows of two files about the same question, side by side; a question's k-th row goes with the other's k-th"""
    def by_question(path):
        found = defaultdict(list)
        for row in read_jsonl(path, {"instruction": str} | kinds):
            found[tuple(str(row.get(name) or "") for name in key)].append(row)
        return found

    rows_1, rows_2 = by_question(path_1), by_question(path_2)
    for here, there, path, other in ((rows_1, rows_2, path_1, path_2), (rows_2, rows_1, path_2, path_1)):
        alone = Counter({q: len(here[q]) for q in here}) - Counter({q: len(there[q]) for q in list(there)})
        if alone:
            fail(f"{other} lacks {alone.total()} of the rows of {path}, the first about {next(iter(alone))[0][:60]!r}; "
                 f"both must hold the same questions ({', '.join(key)})")
    return [pair for question in rows_1 for pair in zip(rows_1[question], rows_2[question])]


def parse_verdict(reply):
    """1: the answer shown first, 2: the second, 1.5: a draw; None: the reply says neither, or more than that"""
    return VERDICTS.get(reply.strip().strip("*").rstrip(".").lower()) if isinstance(reply, str) else None


def preference(verdicts, shown_first):
    """A pair's verdicts, and which output stood first in each -> 1, 2, or between them; None if one cannot be read"""
    parsed = [parse_verdict(reply) for reply in verdicts]
    if None in parsed:
        return None
    mean = statistics.fmean(p if first == 1 else 3 - p for p, first in zip(parsed, shown_first)) if parsed else 1.5
    return int(mean) if mean in (1, 2) else mean


def judge_request(cfg, pair, first):
    """The arguments of client.messages.create; output `first` (1 theirs, 2 ours) is shown as (a)"""
    shown = dict(instruction=pair[0]["instruction"], input=pair[0].get("input") or "", first=pair[first - 1]["output"],
                 second=pair[2 - first]["output"], neutral=NEUTRAL if cfg.prompt == "length_neutral" else "")
    template = JUDGE_PROMPT if shown["input"] else JUDGE_PROMPT.replace("## Input:\n{input}\n\n", "")
    text = whole_characters(re.sub(r"\{(\w+)\}", lambda name: shown[name[1]], template))
    return dict(model=cfg.model, max_tokens=cfg.max_tokens, messages=[{"role": "user", "content": text}])


def judge(cfg):
    from extras.checks import check_fits, check_input, check_model, check_numbers
    from extras.runs import begin, finish, logged
    check_input(cfg.outputs, "outputs", "python evaluate.py decode")
    check_input(cfg.reference, "reference", "python data/toy/prepare.py or python data/alpacafarm/prepare.py")
    check_numbers(cfg, "concurrency", "max_tokens", "micro_batch")
    if cfg.orders not in (1, 2) or Path(cfg.out).suffix != ".jsonl":
        fail(f"--orders must be 1 or 2, --out a .jsonl file; got {cfg.orders} and {cfg.out}")
    if WORLD > 1 and cfg.judge != "reward_model":
        fail(f"--judge={cfg.judge} runs no model: start it with python, not with torchrun")
    pairs = matched(cfg.reference, cfg.outputs, ("instruction", "input"), {"output": str})  # (theirs, ours)
    orders = [[] if theirs["output"] == ours["output"] else  # the same twice: a draw, nobody is asked
              [1, 2] if cfg.orders == 2 else [random.Random(f"{cfg.seed} {i}").choice((1, 2))]
              for i, (theirs, ours) in enumerate(pairs)]
    cases = [(i, first) for i, firsts in enumerate(orders) for first in firsts]  # a pair, and the output shown as (a)
    if cfg.dry_run:
        from extras.claude_plan import show_plan
        if cfg.judge != "claude":
            return say(f"--judge={cfg.judge} asks no service: nothing to price")
        requests = [judge_request(cfg, pairs[i], first) for i, first in cases]
        plan = dict(requests=requests, answers=["Output (a)"] * len(requests), batch=cfg.batch_api)
        return show_plan(**plan) if requests else say("no two answers differ: nothing would be asked")
    scores, errors = None, {}
    if cfg.judge == "gold":
        from data.toy.prepare import gold
        scores = [[-gold(theirs, row["output"]) for row in (theirs, ours)] for theirs, ours in pairs]
    if cfg.judge == "reward_model":
        check_model(cfg.reward_model or fail("--judge=reward_model needs --reward_model=FOLDER"), "reward_model",
                    "python reward_model.py")
        level, tokenizer = reward_level(cfg.reward_model), load_tokenizer(cfg.reward_model)
        prompts = [encode_prompt(tokenizer, row) for pair in pairs for row in pair]
        answers = [encode_response(tokenizer, row["output"], eos="output" not in (row.get("cut") or []))
                   or [tokenizer.eos_token_id] for pair in pairs for row in pair]
        check_fits(cfg.reward_model, "reward_model", max(len(p) + len(a) for p, a in zip(prompts, answers)))
    free = ("concurrency", "batch_api", "dry_run", "micro_batch")
    finished = begin(cfg, free=free, inputs=[cfg.outputs, cfg.reference])
    if finished and not any(row["preference"] is None for row in logged(cfg.out)):
        return say(f"{cfg.out} is finished; nothing to do")

    # ---------------------------------------------------------------- replies[case]: "Output (a)", from whomever
    if cfg.judge == "claude":
        from extras.claude_judge import ask_judge
        replies, errors = ask_judge(cfg, {(i, first): judge_request(cfg, pairs[i], first) for i, first in cases})
    elif cfg.judge == "reward_model":
        from extras.held_out import score
        R = score(cfg.reward_model, level, prompts, answers, cfg.micro_batch, "auto")[0]            # all ranks
        scores = [R[i:i + 2] for i in range(0, len(R), 2)]
    if scores:  # who scores each answer alone sees no order
        replies = {(i, first): "Draw" if scores[i][0] == scores[i][1] else
                   "Output (a)" if scores[i][first - 1] > scores[i][2 - first] else "Output (b)" for i, first in cases}

    # ---------------------------------------------------------------- one row per pair
    if RANK == 0:
        rows, annotator = [], {"claude": cfg.model, "gold": "gold", "reward_model": cfg.reward_model}[cfg.judge]
        for i, ((theirs, ours), firsts) in enumerate(zip(pairs, orders)):
            verdicts = [replies.get((i, first)) for first in firsts]
            why = "; ".join(errors[i, first] for first in firsts if (i, first) in errors)
            rows.append({k: v for k, v in theirs.items() if k not in ("output", "generator", "cut")} | dict(
                input=theirs.get("input") or "",
                output_1=theirs["output"], generator_1=theirs.get("generator") or Path(cfg.reference).stem,
                output_2=ours["output"], generator_2=ours.get("generator") or Path(cfg.outputs).stem,
                annotator=annotator, preference=preference(verdicts, firsts), verdicts=verdicts, shown_first=firsts,
                **({"scores": scores[i]} if scores else {}), **({"error": why} if why else {})))
        write_jsonl(cfg.out, rows)
        preferences = [row["preference"] for row in rows]
        tell({cfg.out: win_rate(preferences) | {"n_unparsed": preferences.count(None)}})
        for rest in (".replies", ".batches"):
            Path(cfg.out + rest).unlink(missing_ok=True)
    finish(cfg)


# ---------------------------------------------------------------- winrate

def read_annotations(path):
    number = (int, float, type(None))
    rows = read_jsonl(path, {"instruction": str, "output_1": str, "output_2": str, "preference": number})
    for row in rows:
        if not (row["preference"] in (None, 0) or 1 <= row["preference"] <= 2):
            fail(f"{path}: preference must be 1, 2, between them, 0 or null, got {row['preference']} at "
                 f"{row['instruction'][:60]!r}")
    return rows


def summary(rows):
    """All that `winrate` says of one file"""
    verdicts = [[parse_verdict(reply) for reply in row.get("verdicts") or []] for row in rows]
    both = [pair for pair in verdicts if len(pair) == 2 and set(pair) <= {1, 2}]
    picks = [100 * (verdict == 1) for pair in verdicts for verdict in pair if verdict in (1, 2)]
    def longer(row):
        return len(row["output_2"]) - len(row["output_1"])
    scored = sorted((row for row in rows if row["preference"] is not None), key=longer)
    thirds = [scored[len(scored) * k // 3:len(scored) * (k + 1) // 3] for k in range(3)]
    return win_rate(row["preference"] for row in rows) | dict(
        n_unparsed=len(rows) - len(scored),
        order_flips=mean_and_error([100 * (a == b) for a, b in both])[0],   # %: of pairs seen both ways, the place won
        first_position=mean_and_error(picks)[0],                            # %: of verdicts, those for (a); 50 is fair
        length_1=statistics.fmean(len(row["output_1"]) for row in rows),    # characters, of the reference
        length_2=statistics.fmean(len(row["output_2"]) for row in rows),    # of ours
        by_length=[dict(ours_longer_by=f"{longer(third[0])} to {longer(third[-1])}",
                        **win_rate(row["preference"] for row in third)) for third in thirds if third])


def winrate(cfg):
    from extras.checks import check_input, check_numbers
    check_numbers(cfg, "resamples")
    if len(cfg.data) not in (1, 2):
        fail("winrate needs one or two files of annotations: python evaluate.py winrate out/ppo/annotations.jsonl")
    for path in cfg.data:
        check_input(path, "data", "python evaluate.py judge")
    figures = {path: summary(read_annotations(path)) for path in cfg.data}
    if len(cfg.data) == 2:
        pairs = matched(*cfg.data, ("instruction", "input", "output_1"), {"output_1": str})
        both = ([row["preference"] for row in side] for side in zip(*pairs))
        figures["first minus second, paired"] = paired(*both, resamples=cfg.resamples, seed=cfg.seed)
    say(json.dumps(figures if len(cfg.data) == 2 else figures[cfg.data[0]], indent=1)) if cfg.json else tell(figures)


# ---------------------------------------------------------------- rewards, report: beside the story

def rewards(cfg):
    from extras.held_out import write_rewards
    write_rewards(cfg)


def report(cfg):
    from extras.report import write_report
    write_report(cfg)


WORDS = dict(decode=(decode, DecodeConfig), judge=(judge, JudgeConfig), winrate=(winrate, WinrateConfig),
             rewards=(rewards, RewardsConfig), report=(report, ReportConfig))

if __name__ == "__main__":
    from extras.command_line import load_config
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in ("--help", "-h"):
        print(__doc__)
    elif word not in WORDS:
        fail(f"the first word must be one of {', '.join(WORDS)}" + (f", got {word!r}" if word else ""))
    else:
        run, Config = WORDS[word]
        run(load_config(Config, f"evaluate.{word}", sys.argv[2:]))
