"""Stage 5. Which model is better, how good is the reward, and the paper's three tables.

    torchrun --nproc_per_node=8 evaluate.py decode --model=out/ppo --out=out/ppo/outputs.jsonl
    python evaluate.py judge --outputs=out/ppo/outputs.jsonl --out=out/ppo/annotations.jsonl
    python evaluate.py winrate out/ppo/annotations.jsonl         # two files: a paired comparison
    python evaluate.py best out/ppo                              # the best model a run has kept
    python evaluate.py rewards --reward_model=out/rm pref_heldout.jsonl edits_heldout.jsonl
    python evaluate.py report out --out=out/report.html          # several folders: seeds
    python evaluate.py ask --model=out/sft,out/ppo "List four fruits."

decode   answers of a language model, as AlpacaEval's model_outputs (instruction, input, output,
         generator); --out=x.json is a file that its reader opens
judge    asks Claude (or the toy world's gold score, or a reward model) to compare each pair: the
         reference's answer and ours, in both orders. Claude needs ANTHROPIC_API_KEY
winrate  the share of pairs that ours wins, its error, and possible biases: order, length,
         unreadable verdicts
best     of each run the kept model with the highest win rate on val.jsonl's questions
rewards  a reward model on held-out pairs: accuracy, calibration, and whether r_t finds the tokens
         that people changed. On a probe: after the same prefix, is the better token above the
         worse one? Accuracy does not show that
report   what came out, in three sentences; Tables 1, 2 and 3 of the paper next to ours; a page, its
         figures as SVG and its numbers as JSON. All from run folders alone
ask      the answers of several models to an instruction, side by side in the terminal; with
         --reward_model its tokens are painted by r_t. Without an instruction it reads lines

decode, rewards and judge --judge=reward_model run a model. They also work under torchrun, with the
same result on any number of ranks. `python evaluate.py WORD --help` lists a word's fields.
"""
import json, math, random, re, shutil, statistics, sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import (decode_response, encode_prompt, encode_response, end_ids, generate,
                    load_model, load_tokenizer, my_micro_batches, pack,
                    reward_level, row_uniforms, setup, token_heads, total_rewards, unsharded)
from plumbing import claude
from plumbing.command_line import extra, load_config
from plumbing.files import (ABOVE_0, ANY, AT_LEAST_0, COUNT, check_input, check_numbers, read_jsonl,
                            replacing, whole_characters, write_jsonl)
from plumbing.models import check_fits, check_model
from plumbing.ranks import RANK, WORLD, barrier, fail, say, total
from plumbing.record import begin, finish, logged, progress, record_of

# ---------------------------------------------------------------- statistics

def mean_and_error(x):
    """The mean and its standard error sd(ddof=1) / sqrt(n); None if there are too few numbers"""
    mean = statistics.fmean(x) if x else None
    error = statistics.stdev(x, mean) / math.sqrt(len(x)) if len(x) > 1 else None
    return mean, error

def points(preference):
    """A preference from 1 (the reference won) to 2 (ours won) -> 0 to 100; 0 is a draw, like 1.5"""
    if preference == 0:
        return 50.0
    return 100 * (preference - 1)

def win_rate(preferences):
    """The win rate of Table 1 in percent, its standard error over pairs, and counts (dict).

    A preference is in [1, 2]; above 1.5, ours won. 1.5 or 0 is a draw. None is not counted."""
    scores = [points(x) for x in preferences if x is not None]
    if not all(0 <= x <= 100 for x in scores):
        raise ValueError("a preference is 1, 2, between them, 0 or None")
    rate, error = mean_and_error(scores)
    wins = sum(x > 50 for x in scores)
    losses = sum(x < 50 for x in scores)
    n = len(scores)
    return dict(win_rate=rate, standard_error=error, n_wins=wins, n_wins_base=losses,
                n_draws=n - wins - losses, n_total=n)

def paired(a, b, *, resamples=10_000, seed=0):
    """Win rate of a minus that of b on the same questions, in points (dict). A bootstrap that draws
    questions gives low and high, the 95% interval, and p_value (two-sided).

    a, b: preferences as in win_rate. A question that is None in either is left out."""
    differences = []
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            differences.append(points(x) - points(y))
    n = len(differences)
    difference, error = mean_and_error(differences)
    figures = dict(difference=difference, standard_error=error, low=None, high=None, p_value=None,
                   n_total=n)
    if n < 2:
        return figures

    # Draw n questions with replacement, many times; 500 times at once, to save memory.
    differences = torch.tensor(differences, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    means = []
    for start in range(0, resamples, 500):
        size = min(500, resamples - start)
        questions = torch.randint(n, (size, n), generator=draw)                        # [size, n]
        means.append(differences[questions].mean(1))
    means = torch.cat(means)                                                       # [resamples]

    interval = torch.tensor([0.025, 0.975], dtype=torch.float64)
    figures["low"], figures["high"] = means.quantile(interval).tolist()
    below = (means <= 0).sum().item()
    above = (means >= 0).sum().item()
    tail = max(1, min(below, above))  # no number of resamples proves that p is 0
    figures["p_value"] = min(1.0, 2 * tail / resamples)
    return figures

def tell(figures, indent=""):
    """Print figures, rounded, one per line; a list of groups has one line per group"""
    for name, value in figures.items():
        if isinstance(value, dict):
            say(f"{indent}{name}")
            tell(value, indent + "  ")
        elif isinstance(value, list):
            for group in value:
                parts = [f"{key} {rounded(x)}" for key, x in group.items()]
                say(f"{indent}{name:<18}{'  '.join(parts)}")
        else:
            shown = "-" if value is None else rounded(value)
            say(f"{indent}{name:<18}{shown}")

def rounded(x):
    """Two decimals, or four digits of a small number, are enough to read; --json=true has all"""
    if not isinstance(x, float):
        return x
    return f"{x:.2f}" if abs(x) >= 10 else f"{x:.4g}"

# ---------------------------------------------------------------- decode

@dataclass(frozen=True)
class DecodeConfig:
    model: str = "out/ppo"                      # a Hugging Face folder, or a name on the hub
    data: str = "data/alpacafarm/eval.jsonl"    # rows: instruction, input; other fields are kept
    out: str = "out/ppo/outputs.jsonl"          # .json: an array, as AlpacaEval reads it
    generator: str | None = None                # the name in the outputs; None: the model folder's
    temperature: float = 0.7                    # AlpacaFarm's; 0: the most likely token
    top_p: float = 0.9
    response_len: int = 300                     # tokens; answers cut there get a `cut` field
    batch: int = 64                             # rows decoded at once; changing it changes samples
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    seed: int = 0                               # each row has its own draws
    overwrite: bool = False
    allow_changed_code: bool = False            # continue although evaluate.py or common.py changed

def check_decode(cfg):
    """What can be wrong before the model is loaded -> rows, tokenizer, prompts (lists of ids)"""
    check_model(cfg.model, "model", "python ppo.py (or sft.py)")
    check_input(cfg.data, "data", "python data/toy/prepare.py or python data/alpacafarm/prepare.py")
    check_numbers(cfg, temperature=AT_LEAST_0, top_p=(ABOVE_0[0], 1), response_len=COUNT,
                  batch=COUNT, seed=ANY)
    if Path(cfg.out).suffix not in (".jsonl", ".json"):
        fail(f"--out must be a .jsonl or .json file, got {cfg.out}")
    rows = read_jsonl(cfg.data, {"instruction": str, "input": (str, type(None))})
    tokenizer = load_tokenizer(cfg.model)
    prompts = [encode_prompt(tokenizer, row) for row in rows]
    kept = [i for i, prompt in enumerate(prompts) if prompt is not None]
    if len(kept) < len(rows):
        say(f"{cfg.data}: {len(rows) - len(kept)} rows hold a special token's text and are dropped")
        rows = [rows[i] for i in kept]
        prompts = [prompts[i] for i in kept]
    if not rows:
        fail(f"{cfg.data}: no row is left to answer")
    longest = max(map(len, prompts)) + cfg.response_len
    check_fits(cfg.model, "model", longest, vocabulary=len(tokenizer))
    return rows, tokenizer, prompts

def decode(cfg):
    rows, tokenizer, prompts = check_decode(cfg)
    is_new = cfg.overwrite or not record_of(cfg.out)
    if begin(cfg, "evaluate", inputs=[cfg.data, cfg.model], rows=len(rows)):
        return say(f"{cfg.out} is finished; nothing to do")
    device, mesh, dtype = setup(cfg.dtype)

    # The groups do not depend on the number of ranks. Each is written to a file of its own. The
    # longest prompts come first, so an out-of-memory error comes at once.
    order = sorted(range(len(rows)), key=lambda i: (-len(prompts[i]), i))
    groups = [order[start:start + cfg.batch] for start in range(0, len(order), cfg.batch)]
    folder = Path(f"{cfg.out}.parts")
    parts = [folder / f"{number}.jsonl" for number in range(len(groups))]
    if is_new and RANK == 0:
        shutil.rmtree(folder, ignore_errors=True)
    barrier()

    # Every WORLD-th group is this rank's; those that an interrupted run has finished are kept.
    my_groups = list(zip(groups, parts))[RANK::WORLD]
    todo = [(group, part) for group, part in my_groups if not part.exists()]
    model = load_model(cfg.model, device, mesh, dtype, frozen=True)
    with unsharded(model):
        for group, part in progress(todo, "decode", len(my_groups)):
            write_jsonl(part, answer(cfg, model, tokenizer, prompts, group, device))
    barrier()

    if RANK == 0:
        outputs, cut = gather(cfg, rows, parts)
        write_outputs(cfg.out, outputs)
        finish(cfg)
        shutil.rmtree(folder)
        reference = f" --reference={cfg.data}" if "output" in rows[0] else ""
        annotations = Path(cfg.out).stem.removesuffix("outputs") + "annotations.jsonl"
        say(f"{cfg.out}: {len(rows)} answers, {cut} of them cut at {cfg.response_len} tokens; "
            f"next: python evaluate.py judge --outputs={cfg.out}{reference} "
            f"--out={Path(cfg.out).with_name(annotations)}")

def answer(cfg, model, tokenizer, prompts, group, device):
    """Decode one group of rows -> list of {row, output, cut?}"""
    group_prompts = [prompts[i] for i in group]
    no_responses = [[] for _ in group]
    prompt_ids, prompt_mask, _ = pack(group_prompts, no_responses, device)             # [B, P]
    uniforms = torch.stack([row_uniforms(cfg.response_len, cfg.seed, i) for i in group])
    ids, response_mask = generate(model, prompt_ids, prompt_mask, max_new_tokens=cfg.response_len,
                                  eos_id=end_ids(tokenizer), temperature=cfg.temperature,
                                  top_p=cfg.top_p, uniforms=uniforms)                  # [B, T]
    lengths = response_mask.sum(1).tolist()
    answers = []
    for i, row_ids, length in zip(group, ids.tolist(), lengths):
        response = row_ids[:length]
        row = dict(row=i, output=decode_response(tokenizer, response))
        if response[-1] not in end_ids(tokenizer):
            row["cut"] = ["output"]
        answers.append(row)
    return answers

def gather(cfg, rows, parts):
    """The answers in all parts -> the rows of model_outputs, in the data's order, and how many
    answers were cut"""
    answers = {}  # number of the row -> its output, and `cut` if it was cut
    for part in parts:
        for row in logged(part):
            answers[row.pop("row")] = row

    generator = cfg.generator or Path(cfg.model).resolve().name
    outputs = []
    for i, row in enumerate(rows):
        output = {field: value for field, value in row.items() if field != "cut"}
        output["input"] = row.get("input") or ""
        output["generator"] = generator
        outputs.append(output | answers[i])
    return outputs, sum("cut" in row for row in answers.values())

def write_outputs(path, rows):
    """One row per line, or, in a .json file, an array: AlpacaEval's reader takes only that"""
    if Path(path).suffix == ".jsonl":
        write_jsonl(path, rows)
        return
    with replacing(path) as file:
        text = json.dumps(rows, ensure_ascii=False, indent=1)
        file.write(whole_characters(text) + "\n")

# ---------------------------------------------------------------- judge

# AlpacaFarm's pairwise prompt, shortened. A row without input has no block "## Input", and
# --prompt=length_neutral adds NEUTRAL.
JUDGE_PROMPT = """Select the output (a) or (b) that best matches the given instruction. Choose \
your preferred output, which can be subjective.{neutral} Your answer should ONLY contain: \
Output (a) or Output (b).

## Instruction:
{instruction}

## Input:
{input}

## Output (a):
{first}

## Output (b):
{second}

## Which is best, Output (a) or Output (b)?"""
NEUTRAL = (" Length is no merit: do not prefer an output for being longer or shorter, judge only "
           "what it says.")
VERDICTS = {"output (a)": 1, "output (b)": 2, "draw": 1.5}

@dataclass(frozen=True)
class JudgeConfig:
    outputs: str = "out/ppo/outputs.jsonl"      # ours
    reference: str = "data/alpacafarm/eval.jsonl"  # the model to beat; paired by instruction, input
    out: str = "out/ppo/annotations.jsonl"
    judge: Literal["claude", "gold", "reward_model"] = "claude"  # gold: the toy world's flaw count
    orders: int = 2                             # 2: both orders of each pair; 1: a random one
    prompt: Literal["plain", "length_neutral"] = "plain"
    model: str = "claude-sonnet-4-6"            # claude: its API has no temperature any more
    max_tokens: int = 1024                      # claude: of a reply; room for models that think
    concurrency: int = 16                       # claude: requests in flight
    batch_api: bool = False                     # claude: half the price, within a day
    dry_run: bool = False                       # claude: show the cost and a prompt, ask nothing
    reward_model: str | None = None             # reward_model: its folder
    micro_batch: int = 16                       # reward_model: answers per forward and rank
    seed: int = 0                               # orders=1: which order
    overwrite: bool = False

def matched(path_1, path_2, key, kinds):
    """The rows of two files about the same question, as pairs; duplicates are matched in order.
    key: the fields that make a question; kinds: fields that must be there, for read_jsonl"""
    rows_1 = by_question(path_1, key, kinds)
    rows_2 = by_question(path_2, key, kinds)
    fail_if_missing(rows_1, rows_2, path_1, path_2, key)
    fail_if_missing(rows_2, rows_1, path_2, path_1, key)
    pairs = []
    for question in rows_1:
        pairs += zip(rows_1[question], rows_2[question])
    return pairs

def by_question(path, key, kinds):
    """question (a tuple of the fields in key) -> its rows"""
    found = defaultdict(list)
    for row in read_jsonl(path, {"instruction": str, "input": (str, type(None))} | kinds):
        question = tuple(str(row.get(name) or "") for name in key)
        found[question].append(row)
    return found

def fail_if_missing(rows, others, path, other_path, key):
    """fail() unless every row of `path` has a partner in `other_path`"""
    missing = Counter()  # question -> rows without a partner
    for question in rows:
        lacking = len(rows[question]) - len(others.get(question, []))
        if lacking > 0:
            missing[question] = lacking
    if missing:
        first = next(iter(missing))[0]
        fail(f"{other_path} lacks {missing.total()} of the rows of {path}, the first about "
             f"{first[:60]!r}; both must hold the same questions ({', '.join(key)})")

def orders_of(cfg, pair, i):
    """Which output of the i-th pair is shown first in each request (1 theirs, 2 ours): [1, 2], or a
    random one. [] for equal outputs: they are a draw, and nobody is asked."""
    theirs, ours = pair
    if theirs["output"] == ours["output"]:
        return []
    if cfg.orders == 2:
        return [1, 2]
    return [random.Random(f"{cfg.seed} {i}").choice((1, 2))]

def build_request(cfg, pair, first):
    """The judge of Section 3.1: the arguments of client.messages.create; output `first` (1 theirs,
    2 ours) is shown as (a)"""
    row = pair[0]
    shown = dict(instruction=row["instruction"], input=row.get("input") or "", neutral="")
    shown["first"] = pair[first - 1]["output"]
    shown["second"] = pair[2 - first]["output"]
    if cfg.prompt == "length_neutral":
        shown["neutral"] = NEUTRAL
    template = JUDGE_PROMPT
    if not shown["input"]:
        template = template.replace("## Input:\n{input}\n\n", "")

    # All at once, so that braces in an answer stay as they are.
    text = re.sub(r"\{(\w+)\}", lambda name: shown[name[1]], template)
    message = {"role": "user", "content": whole_characters(text)}
    return dict(model=cfg.model, max_tokens=cfg.max_tokens, messages=[message])

def ask_once(client, request):
    """One request to Claude -> Reply, with the reason where no reply came"""
    import anthropic
    try:
        return claude.read_message(client.messages.create(**request))
    except (anthropic.APIError, json.JSONDecodeError, UnicodeDecodeError) as error:
        return claude.read_error(error)

def parse_verdict(reply):
    """1: the answer shown first, 2: the second, 1.5: a draw; None: the reply says something else"""
    if not isinstance(reply, str):
        return None
    return VERDICTS.get(reply.strip().strip("*").rstrip(".").lower())

def preference(verdicts, shown_first):
    """A pair's verdicts, and which output was shown first in each -> 1, 2, or between them; None if
    a verdict cannot be read"""
    parsed = [parse_verdict(reply) for reply in verdicts]
    if None in parsed:
        return None
    if not parsed:
        return 1.5
    preferences = []
    for verdict, first in zip(parsed, shown_first):
        preferences.append(verdict if first == 1 else 3 - verdict)
    mean = statistics.fmean(preferences)
    return int(mean) if mean in (1, 2) else mean

def verdict_of(scores, first):
    """The verdict of a judge that scores each answer separately, in words of Claude's prompt"""
    shown_first = scores[first - 1]
    shown_second = scores[2 - first]
    if shown_first == shown_second:
        return "Draw"
    return "Output (a)" if shown_first > shown_second else "Output (b)"

def check_judge(cfg):
    """What can be wrong before anybody is asked"""
    check_input(cfg.outputs, "outputs", "python evaluate.py decode")
    check_input(cfg.reference, "reference",
                "python data/toy/prepare.py or python data/alpacafarm/prepare.py")
    check_numbers(cfg, orders=(1, 2), max_tokens=COUNT, concurrency=COUNT, micro_batch=COUNT,
                  seed=ANY)
    if Path(cfg.out).suffix != ".jsonl":
        fail(f"--out must be a .jsonl file, got {cfg.out}")
    if WORLD > 1 and cfg.judge != "reward_model":
        fail(f"--judge={cfg.judge} runs no model: start it with python, not with torchrun")

def judge(cfg):
    check_judge(cfg)
    pairs = matched(cfg.reference, cfg.outputs, ("instruction", "input"), {"output": str})
    orders = [orders_of(cfg, pair, i) for i, pair in enumerate(pairs)]
    cases = [(i, first) for i, firsts in enumerate(orders) for first in firsts]
    if cfg.dry_run:
        return dry_run(cfg, pairs, cases)

    # Rows that the judge cannot read end the run here, before anything is written.
    scores = None  # of each pair: theirs, ours
    if cfg.judge == "gold":
        scores = gold_scores(pairs)
    elif cfg.judge == "reward_model":
        level, prompts, answers = encode_pairs(cfg, pairs)

    unimportant = ("concurrency", "batch_api", "dry_run", "micro_batch")
    inputs = [cfg.outputs, cfg.reference]
    finished = begin(cfg, "evaluate", unimportant=unimportant, inputs=inputs, paid=True)
    if finished and not any(row["preference"] is None for row in logged(cfg.out)):
        return say(f"{cfg.out} is finished; nothing to do")

    # replies[i, first]: "Output (a)", "Output (b)" or "Draw". Claude may also reply something else,
    # or not at all (None).
    errors = {}
    if cfg.judge == "claude":
        requests = {(i, first): build_request(cfg, pairs[i], first) for i, first in cases}
        replies, errors = ask_judge(cfg, requests)
    else:
        if cfg.judge == "reward_model":
            R, _ = score_responses(cfg.reward_model, level, prompts, answers, cfg.micro_batch,
                                   "auto")  # all ranks
            scores = [R[k:k + 2] for k in range(0, len(R), 2)]
        replies = {(i, first): verdict_of(scores[i], first) for i, first in cases}

    if RANK == 0:
        rows = []
        for i, (pair, firsts) in enumerate(zip(pairs, orders)):
            verdicts = [replies.get((i, first)) for first in firsts]
            row = annotation(cfg, pair, verdicts, firsts)
            if scores:
                row["scores"] = scores[i]
            reasons = [errors[i, first] for first in firsts if (i, first) in errors]
            if reasons:
                row["error"] = "; ".join(reasons)
            rows.append(row)
        write_jsonl(cfg.out, rows)
        preferences = [row["preference"] for row in rows]
        tell({cfg.out: win_rate(preferences) | {"n_unparsed": preferences.count(None)}})
        for suffix in (".replies", ".batches"):
            Path(cfg.out + suffix).unlink(missing_ok=True)
    finish(cfg)
    say(f"next: python evaluate.py winrate {cfg.out}")

def gold_scores(pairs):
    """The toy world's judge: minus the number of flaws of both answers of each pair. Ends the run
    if a question is not of the toy world."""
    from data.toy.prepare import gold
    scores = []
    for theirs, ours in pairs:
        scores.append([-gold(theirs, theirs["output"]), -gold(theirs, ours["output"])])
    return scores

def dry_run(cfg, pairs, cases):
    """The cost of Claude's verdicts, before anything is asked"""
    if cfg.judge != "claude":
        return say(f"--judge={cfg.judge} does not call Claude, so there is no cost")
    if not cases:
        return say("no two answers differ: nothing would be asked")
    requests = [build_request(cfg, pairs[i], first) for i, first in cases]
    claude.show_price(requests, ["Output (a)"] * len(requests), batch=cfg.batch_api)

def annotation(cfg, pair, verdicts, firsts):
    """A row of annotations.jsonl. Other fields of the reference's row are kept."""
    theirs, ours = pair
    left_out = ("output", "generator", "cut")
    row = {field: value for field, value in theirs.items() if field not in left_out}
    row["input"] = theirs.get("input") or ""
    row["output_1"] = theirs["output"]
    row["generator_1"] = theirs.get("generator") or Path(cfg.reference).stem
    row["output_2"] = ours["output"]
    row["generator_2"] = ours.get("generator") or Path(cfg.outputs).stem
    annotators = {"claude": cfg.model, "gold": "gold", "reward_model": cfg.reward_model}
    row["annotator"] = annotators[cfg.judge]
    row["preference"] = preference(verdicts, firsts)
    row["verdicts"] = verdicts
    row["shown_first"] = firsts
    return row

def ask_judge(cfg, requests):
    """Ask Claude. requests: (pair, output shown first) -> arguments of messages.create. -> replies
    and errors by the same keys.

    Each reply is written to <out>.replies at once, so after a kill the same command asks only for
    what is missing. A verdict that cannot be read is asked for up to three times, and again by the
    next run."""
    log = Path(f"{cfg.out}.replies")
    ledger = Path(f"{cfg.out}.batches")
    if cfg.overwrite:
        log.unlink(missing_ok=True)
        ledger.unlink(missing_ok=True)
    if not cfg.batch_api and claude.under_way(ledger):
        fail(f"{cfg.out}: some pairs are already submitted (and paid for) as a batch; continue "
             f"with --batch_api=true (or remove {ledger})")

    earlier = earlier_replies(cfg, log)
    write_jsonl(log, earlier)
    replies = {tuple(row["case"]): row["reply"] for row in earlier}
    errors = {}
    usage = Counter(input_tokens=0, output_tokens=0)
    cases = {f"{i}-{first}": (i, first) for i, first in requests}  # keys as the API takes them

    # The three steps of claude.ask_until_read.
    def build(key, attempt):
        return requests[cases[key]]

    def ask(asked, attempt):
        batches = ledger if cfg.batch_api else None
        return claude.ask_claude(asked, ask_once, stop, concurrency=cfg.concurrency,
                                 batches=batches)

    def take(key, reply):
        case = cases[key]
        replies[case] = reply.text
        usage.update(reply.usage or {})
        file.write(json.dumps(dict(case=case, reply=reply.text)) + "\n")
        file.flush()
        if parse_verdict(reply.text) is not None:
            errors.pop(case, None)
            return False, ""
        errors[case] = reply.error or f"no verdict ({reply.stop_reason})"
        refused = reply.stop_reason == "refusal"
        hopeless = reply.error and not reply.again
        return not (refused or hopeless), ""

    todo = [key for key, case in cases.items() if parse_verdict(replies.get(case)) is None]
    with claude.stopping() as stop, open(log, "a", encoding="utf-8") as file:
        claude.ask_until_read(todo, build, ask, take, stop, attempts=3, name="judge",
                              count=len(requests))
    if stop.is_set():
        say(f"stopped; the replies are in {log}, the same command continues")
        raise SystemExit(130)
    cost = claude.dollars(cfg.model, usage, cfg.batch_api)
    cost = "unknown" if cost is None else f"{cost:.2f}"
    say(f"{usage['input_tokens']:,} tokens in, {usage['output_tokens']:,} out, {cost} dollars")
    return replies, errors

def earlier_replies(cfg, log):
    """What an interrupted run has logged, else what a finished one has written, whose unreadable
    verdicts are asked for again -> list of {case, reply}"""
    found = logged(log)
    if found:
        return found
    for i, row in enumerate(logged(cfg.out)):
        for first, reply in zip(row["shown_first"], row["verdicts"]):
            found.append(dict(case=[i, first], reply=reply))
    return found

def encode_pairs(cfg, pairs):
    """--judge=reward_model -> its level; prompts and answers as lists of ids: theirs and ours of
    the first pair, theirs and ours of the second, ..."""
    if not cfg.reward_model:
        fail("--judge=reward_model needs --reward_model=FOLDER")
    check_model(cfg.reward_model, "reward_model", "python reward_model.py")
    level = reward_level(cfg.reward_model)
    tokenizer = load_tokenizer(cfg.reward_model)
    prompts = []
    answers = []
    for pair in pairs:
        for row in pair:
            complete = "output" not in (row.get("cut") or [])
            ids = encode_response(tokenizer, row["output"], eos=complete)
            prompt = encode_prompt(tokenizer, row)
            if prompt is None:
                fail(f"the row about {row['instruction'][:60]!r} holds a special token's text, "
                     f"which --reward_model={cfg.reward_model} would misread; remove the row from "
                     f"{cfg.reference} and {cfg.outputs}")
            prompts.append(prompt)
            answers.append(ids or [tokenizer.eos_token_id])
    longest = max(len(prompt) + len(ids) for prompt, ids in zip(prompts, answers))
    check_fits(cfg.reward_model, "reward_model", longest, head="saved", vocabulary=len(tokenizer))
    return level, prompts, answers

# ---------------------------------------------------------------- winrate

@dataclass(frozen=True)
class WinrateConfig:
    data: list[str] = ()                        # one or two files of annotations
    json: bool = False
    resamples: int = 10_000                     # of the paired bootstrap
    seed: int = 0                               # its draws

def read_annotations(path):
    number = (int, float, type(None))
    fields = {"instruction": str, "input": (str, type(None)), "output_1": str, "output_2": str,
              "preference": number}
    rows = read_jsonl(path, fields)
    for row in rows:
        if not (row["preference"] in (None, 0) or 1 <= row["preference"] <= 2):
            fail(f"{path}: preference must be 1, 2, between them, 0 or null, got "
                 f"{row['preference']} at {row['instruction'][:60]!r}")
    return rows

def summary(rows):
    """The figures that `winrate` prints for one file"""
    flips = []   # of pairs judged in both orders: 100 where the place won, not the answer
    firsts = []  # of verdicts that are no draw: 100 where (a), the answer shown first, won
    for row in rows:
        verdicts = [parse_verdict(reply) for reply in row.get("verdicts") or []]
        if len(verdicts) == 2 and set(verdicts) <= {1, 2}:
            flips.append(100 if verdicts[0] == verdicts[1] else 0)
        for verdict in verdicts:
            if verdict in (1, 2):
                firsts.append(100 if verdict == 1 else 0)

    scored = [row for row in rows if row["preference"] is not None]
    figures = win_rate(row["preference"] for row in rows)
    figures["n_unparsed"] = len(rows) - len(scored)
    figures["order_flips"] = mean_and_error(flips)[0]      # percent
    figures["first_position"] = mean_and_error(firsts)[0]  # percent; 50 is fair
    figures["length_1"] = statistics.fmean(len(row["output_1"]) for row in rows)  # characters
    figures["length_2"] = statistics.fmean(len(row["output_2"]) for row in rows)
    figures["by_length"] = by_length(scored)
    return figures

def longer_by(row):
    """How many characters longer ours is than the reference's answer"""
    return len(row["output_2"]) - len(row["output_1"])

def by_length(rows):
    """The win rate in each third of the pairs, sorted by how much longer ours is"""
    rows = sorted(rows, key=longer_by)
    found = []
    for k in range(3):
        third = rows[len(rows) * k // 3:len(rows) * (k + 1) // 3]
        if third:
            group = {"ours_longer_by": f"{longer_by(third[0])} to {longer_by(third[-1])}"}
            found.append(group | win_rate(row["preference"] for row in third))
    return found

def winrate(cfg):
    check_numbers(cfg, resamples=COUNT, seed=ANY)
    if len(cfg.data) not in (1, 2):
        fail("winrate needs one or two files of annotations: python evaluate.py winrate "
             "out/ppo/annotations.jsonl")
    for path in cfg.data:
        check_input(path, "data", "python evaluate.py judge")
    figures = {path: summary(read_annotations(path)) for path in cfg.data}
    if len(cfg.data) == 2:
        key = ("instruction", "input", "output_1")
        pairs = matched(*cfg.data, key, {"output_1": str})
        first = [one["preference"] for one, _ in pairs]
        second = [two["preference"] for _, two in pairs]
        difference = paired(first, second, resamples=cfg.resamples, seed=cfg.seed)
        figures["first minus second, paired"] = difference
    if cfg.json:
        shown = figures if len(cfg.data) == 2 else figures[cfg.data[0]]
        say(json.dumps(shown, indent=1))
    else:
        tell(figures)

# ---------------------------------------------------------------- best

@dataclass(frozen=True)
class BestConfig:
    data: list[str] = ()                        # run folders

def best(cfg):
    """Print "run model" for each run: its model with the highest win rate, of equals the earliest.
    The questions are those of val_annotations.jsonl, never eval's. Win rates go to stderr."""
    if not cfg.data:
        fail("best needs run folders: python evaluate.py best out/ppo")
    for run in map(Path, cfg.data):
        check_input(run, "data", "python ppo.py")
        rates = {}
        for model in kept_models(run):
            file = model / "val_annotations.jsonl"
            if not file.exists():
                continue
            figures = win_rate(row["preference"] for row in read_annotations(file))
            if figures["n_total"] == 0:
                continue
            rates[model] = figures["win_rate"]
            error = figures["standard_error"] or 0
            print(f"{model}: {rates[model]:.1f} ± {error:.1f}", file=sys.stderr)
        if not rates:
            fail(f"{run} holds no val_annotations.jsonl with a verdict in it; make one with: "
                 "python evaluate.py judge")
        print(run.name, max(rates, key=rates.get))

def kept_models(run):
    """The folders of a run's models, the earliest first: step_5, step_10, ..., then the run"""
    numbered = []
    for folder in run.glob("step_*"):
        number = folder.name.removeprefix("step_")
        if number.isdigit():
            numbered.append((int(number), folder))
    return [folder for _, folder in sorted(numbered)] + [run]

# ---------------------------------------------------------------- rewards

@dataclass(frozen=True)
class RewardsConfig:
    reward_model: str = "out/rm"
    data: list[str] = ()                        # held-out preferences, edits (original, edited), or
                                                # a probe (prefix, better, worse, kind)
    out: str | None = None                      # the report reads <reward model>/rewards.json
    json: bool = False
    max_tokens: int = 512                       # prompt + answer; longer pairs are dropped
    micro_batch: int = 16                       # answers per forward and rank
    resamples: int = 200                        # of the pairs, for an AUROC's standard error
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0                               # their draws
    overwrite: bool = False
    allow_changed_code: bool = False            # continue although evaluate.py or common.py changed

def read_held_out(path, tokenizer, max_tokens):
    """A file of preferences, edits or a probe -> dict: data (its path), kind, pairs (row, prompt,
    better answer, worse answer; ids), dropped (reason -> count)"""
    first = read_jsonl(path, {})[0]
    if "prefix" in first:
        return read_probe(path, tokenizer, max_tokens)
    kind = "edits" if "edited" in first else "preferences"
    fields = {"instruction": str, "input": (str, type(None))}
    if kind == "edits":
        fields |= {"original": str, "edited": (str, type(None))}
    else:
        fields |= {"output_1": str, "output_2": str, "preference": (1, 2)}

    pairs = []
    dropped = Counter()
    for row in read_jsonl(path, fields):
        w, l = better_and_worse(row, kind)
        if row[w] is None:
            dropped["failed edit"] += 1
            continue
        if row[w] == row[l]:
            dropped["identical"] += 1
            continue
        cut = row.get("cut") or []
        prompt = encode_prompt(tokenizer, row)
        if prompt is None:
            dropped["special token in the prompt"] += 1
            continue
        better = encode_response(tokenizer, row[w], eos=w not in cut)
        worse = encode_response(tokenizer, row[l], eos=l not in cut)
        if better and worse and len(prompt) + max(len(better), len(worse)) <= max_tokens:
            pairs.append((row, prompt, better, worse))
        else:
            dropped["empty or too long"] += 1
    dropped = dict(dropped)
    if not pairs:
        fail(f"{path}: no pair is left; dropped: {dropped}")
    return dict(data=path, kind=kind, pairs=pairs, dropped=dropped)

def read_probe(path, tokenizer, max_tokens):
    """A probe: two continuations of one prefix -> as read_held_out(). A pair's answers are prefix +
    better and prefix + worse, each encoded as a whole; row["at"] is the first id that differs"""
    fields = {"instruction": str, "input": (str, type(None)), "prefix": str, "better": str,
              "worse": str, "kind": str}
    pairs = []
    dropped = Counter()
    for number, row in enumerate(read_jsonl(path, fields), 1):
        if row["better"] == row["worse"]:
            fail(f"{path}:{number}: better and worse are the same")
        prompt = encode_prompt(tokenizer, row)
        if prompt is None:
            dropped["special token in the prompt"] += 1
            continue
        better = encode_response(tokenizer, row["prefix"] + row["better"])
        worse = encode_response(tokenizer, row["prefix"] + row["worse"])
        differs = [at for at, (w, l) in enumerate(zip(better, worse)) if w != l]
        if not differs:
            dropped["the tokenizer sees no difference"] += 1
            continue
        at = differs[0]

        # A token can cross the end of the prefix: then the two differ where nothing was decided.
        shared = decode_response(tokenizer, [*better[:at], tokenizer.eos_token_id])
        if len(shared) < len(row["prefix"]):
            dropped["a token crosses the end of the prefix"] += 1
        elif len(prompt) + max(len(better), len(worse)) > max_tokens:
            dropped["too long"] += 1
        else:
            pairs.append((row | dict(at=at), prompt, better, worse))
    dropped = dict(dropped)
    if not pairs:
        fail(f"{path}: no row is left; dropped: {dropped}")
    return dict(data=path, kind="probe", pairs=pairs, dropped=dropped)

def probe_figures(pairs, r_w, r_l):
    """Is r of the better token above r of the worse one, after the same prefix? pairs: from
    read_probe(); r_w, r_l: lists of r_t. -> n, and for each kind the share that is (percent)"""
    right = defaultdict(list)
    for (row, _, _, _), better, worse in zip(pairs, r_w, r_l):
        at = row["at"]
        right[row["kind"]].append(100 * half_if_tied(better[at], worse[at]))
    shares = []
    for kind, values in right.items():
        share, error = mean_and_error(values)
        shares.append(dict(worse=kind, right=share, standard_error=error, n=len(values)))
    return dict(n=len(pairs), shares=shares)

def better_and_worse(row, kind):
    """The names of the fields that hold a pair's better and worse answer"""
    if kind == "edits":
        return "edited", "original"
    if row["preference"] == 1:
        return "output_1", "output_2"
    return "output_2", "output_1"

@torch.no_grad()
def score_responses(path, level, prompts, responses, micro_batch, dtype):
    """A reward model's R of each response (list of float), and its r_t (list of lists). A sequence
    model has no token rewards: its r_t are the differences between consecutive prefix scores. All
    ranks."""
    device, mesh, dtype = setup(dtype)
    model = load_model(path, device, mesh, dtype, head="saved", frozen=True)
    n = len(responses)
    T = max(map(len, responses))
    lengths = [len(prompt) + len(ids) for prompt, ids in zip(prompts, responses)]
    R = torch.zeros(n, device=device)                                                  # [n]
    r = torch.zeros(n, T, device=device)                                               # [n, T]
    for part in my_micro_batches(range(n), lengths, micro_batch):
        my_rows = part or [0]  # this rank has no rows left, but the forward is collective
        my_prompts = [prompts[row] for row in my_rows]
        my_responses = [responses[row] for row in my_rows]
        ids, mask, response_mask = pack(my_prompts, my_responses, device)
        heads = token_heads(model, ids, mask, response_mask)                           # [B, T]
        my_R = total_rewards(heads, response_mask, level)                              # [B]
        if level == "sequence":
            heads = heads - token_heads(model, ids, mask, response_mask, before=True)
        if part:
            R[part] = my_R
            r[part, :heads.shape[1]] = heads

    # Every rank filled only its own rows, so the sum collects them.
    R = total(R).tolist()
    r = total(r).tolist()
    return R, [row[:len(ids)] for row, ids in zip(r, responses)]

def pair_figures(pairs, R_w, R_l):
    """Accuracy of Table 2 (a tie is half), margin and calibration, next to the rule "the longer
    answer wins".
    pairs: (row, prompt, w, l); R_w, R_l: rewards of their better and worse answers"""
    margins = [w - l for w, l in zip(R_w, R_l)]
    right = [100 * half_if_tied(w, l) for w, l in zip(R_w, R_l)]
    longer = [100 * half_if_tied(len(w), len(l)) for _, _, w, l in pairs]
    accuracy, accuracy_error = mean_and_error(right)
    margin, margin_error = mean_and_error(margins)
    longer_wins, longer_error = mean_and_error(longer)
    return dict(n=len(pairs), accuracy=accuracy, standard_error=accuracy_error, margin=margin,
                margin_error=margin_error, longer_wins=longer_wins, longer_wins_error=longer_error,
                calibration=calibration(margins))

def half_if_tied(w, l):
    """1 if w is larger, 0 if l is, 0.5 if they are equal"""
    if w == l:
        return 0.5
    return 1.0 if w > l else 0.0

def calibration(margins, bins=10):
    """Does sigma(R_w - R_l), Eq. 2, mean what it says? The model is confident in the answer with
    the higher reward, by 0.5 to 1. -> expected calibration error, and bins by confidence (dict)"""
    filled = defaultdict(list)  # number of the bin -> (confidence, right) of its pairs
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 500)))
        number = min(int((confidence - 0.5) * 2 * bins), bins - 1)
        filled[number].append((confidence, half_if_tied(margin, 0)))

    found = []
    ece = 0.0
    for _, pairs in sorted(filled.items()):
        confidence = statistics.fmean(confidence for confidence, _ in pairs)
        accuracy = statistics.fmean(right for _, right in pairs)
        found.append(dict(confidence=confidence, accuracy=accuracy, n=len(pairs)))
        ece += len(pairs) * abs(confidence - accuracy)
    return dict(ece=ece / max(1, len(margins)), bins=found)

def check_rewards(cfg):
    """What can be wrong before the model is loaded -> level, tokenizer, the held-out files"""
    check_model(cfg.reward_model, "reward_model", "python reward_model.py")
    if not cfg.data:
        fail("rewards needs held-out files: evaluate.py rewards data/toy/pref_heldout.jsonl")
    for path in cfg.data:
        check_input(path, "data", "python data/toy/prepare.py, or python edit.py")
    check_numbers(cfg, max_tokens=COUNT, micro_batch=COUNT, resamples=COUNT, seed=ANY)
    if cfg.out and Path(cfg.out).suffix != ".json":
        fail(f"--out={cfg.out} must end in .json; the report reads {cfg.reward_model}/rewards.json")
    level = reward_level(cfg.reward_model)
    tokenizer = load_tokenizer(cfg.reward_model)
    files = [read_held_out(path, tokenizer, cfg.max_tokens) for path in cfg.data]
    pairs = [pair for file in files for pair in file["pairs"]]
    longest = max(len(prompt) + max(len(w), len(l)) for _, prompt, w, l in pairs)
    check_fits(cfg.reward_model, "reward_model", longest, head="saved", vocabulary=len(tokenizer))
    return level, tokenizer, files

def rewards(cfg):
    level, tokenizer, files = check_rewards(cfg)
    inputs = [*cfg.data, cfg.reward_model]
    if cfg.out and begin(cfg, "evaluate", unimportant=("micro_batch", "json"), inputs=inputs):
        return say(f"{cfg.out} is finished; nothing to do")

    # R and r_t of the better answers, then of the worse ones, of all files together.
    pairs = [pair for file in files for pair in file["pairs"]]
    prompts = [prompt for _, prompt, _, _ in pairs]
    better = [w for _, _, w, _ in pairs]
    worse = [l for _, _, _, l in pairs]
    R, r = score_responses(cfg.reward_model, level, prompts + prompts, better + worse,
                           cfg.micro_batch, cfg.dtype)  # all ranks

    # The figures of each file.
    found = []
    start = 0
    for file in files:
        stop = start + len(file["pairs"])
        w = slice(start, stop)
        l = slice(len(pairs) + start, len(pairs) + stop)
        figures = dict(reward_model=cfg.reward_model, level=level, data=file["data"],
                       kind=file["kind"], dropped=file["dropped"])
        if file["kind"] == "probe":
            figures |= probe_figures(file["pairs"], r[w], r[l])
        else:
            figures |= pair_figures(file["pairs"], R[w], R[l])
        if file["kind"] == "edits":
            figures["edited_wins"] = 100.0  # by construction: the editor made it the better one
            figures |= figures_of_tokens(cfg, file["pairs"], r[w], r[l], tokenizer)
        found.append(figures)
        start = stop

    if cfg.out and RANK == 0:
        with replacing(cfg.out) as opened:
            json.dump(found, opened, indent=1)
        finish(cfg)
    if cfg.json:
        say(json.dumps(found, indent=1))
    else:
        tell({figures["data"]: figures for figures in found})
        say(f"next: python ppo.py --reward_model={cfg.reward_model} --level={level}")

def figures_of_tokens(cfg, pairs, r_w, r_l, tokenizer):
    """{"tokens": ...}: does r_t find what was changed? {} where extras/ was deleted"""
    if not Path(__file__).with_name("extras").exists():
        say("accuracy and calibration only: the figures of single tokens need the folder extras/")
        return {}
    module = extra("report.rewards", "the token figures")
    tokens = module.token_figures(pairs, r_w, r_l, tokenizer, resamples=cfg.resamples,
                                  seed=cfg.seed)
    return {"tokens": tokens}

# ---------------------------------------------------------------- report

@dataclass(frozen=True)
class ReportConfig:
    data: list[str] = ()                        # run folders, or folders that hold them, one a seed
    out: str = "out/report.html"                # next to it: report.md, report.json, report/*.svg
    target: float | None = None                 # Table 3: also steps and hours to this win rate (%)
    markdown: bool = False                      # print the tables as Markdown, not as text
    seed: int = 0                               # the bootstrap's draws
    overwrite: bool = False                     # replace a file that is no report of ours

def report(cfg):
    check_numbers(cfg, target=(0, 100), seed=ANY)
    extra("report.write", "evaluate.py report").write_report(cfg)

# ---------------------------------------------------------------- ask

@dataclass(frozen=True)
class AskConfig:
    data: tuple[str, ...] = ()                  # instructions; none: each line of stdin is one
    model: list[str] = ("out/sft", "out/ppo")   # Hugging Face folders, or names on the hub
    reward_model: str | None = None             # a reward model that paints the answers' tokens
    input: str = ""                             # the input that goes with each instruction
    temperature: float = 0.7                    # as decode's; 0: the most likely token
    top_p: float = 0.9
    response_len: int = 300                     # tokens; fewer where a model has no more positions
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPU
    seed: int = 0                               # each instruction has its own draws

def ask(cfg):
    check_numbers(cfg, temperature=AT_LEAST_0, top_p=(ABOVE_0[0], 1), response_len=COUNT, seed=ANY)
    extra("report.ask", "evaluate.py ask").ask(cfg)

# ---------------------------------------------------------------- the command words

WORDS = dict(decode=(decode, DecodeConfig), judge=(judge, JudgeConfig),
             winrate=(winrate, WinrateConfig), best=(best, BestConfig),
             rewards=(rewards, RewardsConfig), report=(report, ReportConfig),
             ask=(ask, AskConfig))

if __name__ == "__main__":
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in ("--help", "-h"):
        print(__doc__)
    elif word not in WORDS:
        got = f", got {word!r}" if word else ""
        fail(f"the first word must be one of {', '.join(WORDS)}{got}")
    else:
        run, Config = WORDS[word]
        run(load_config(Config, f"evaluate.{word}", sys.argv[2:]))
