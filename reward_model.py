"""Stage 3. The reward model r_phi(s_t, a_t): what each token is worth, learnt from pairs.
(Figure 1: its left side is --loss=sequence, its right side --loss=eq4.)

    python reward_model.py                                 # Eq. 4 on out/diffs.jsonl -> out/rm
    python reward_model.py --loss=sequence data/toy/pref.jsonl     # the baseline: one reward per
                                                           # answer, learnt from preference pairs
    python reward_model.py out/diffs.jsonl out/diffs_2.jsonl       # the pairs of both files
    torchrun --nproc_per_node=8 reward_model.py
    python reward_model.py show --model=out/rm a.jsonl,b.jsonl     # answers of several files,
                                                           # tokens painted by r_t
    python reward_model.py show --model=out/rm out/edits.jsonl --html=out/rewards.html    # a page

A pair is a prompt and two answers: w is preferred to l. R(tau) = (1/T) sum_t r_t [1], and
p(w > l) = sigma(R_w - R_l) [2]. diff.py marks the unchanged tokens, U_0, and the changed ones, U_1.

    eq3, the exact likelihood [3]
        -log sigma( sum_U0 r_w / T_w - sum_U0 r_l / T_l  +  sum_U1 r_w / T_w - sum_U1 r_l / T_l )
    eq4, the paper's loss [4]
        -log sigma(                                         sum_U1 r_w / T_w - sum_U1 r_l / T_l )
    sequence, the sequence-level baseline
        -log sigma( r_w at its last token - r_l at its last token )

In [3] the paper writes sum_U0 once, as if r_t were equal on both sides. It is not: after the first
edit the states differ. So eq3 keeps both sums. Eq. 4 never trains r_t on U_0, but PPO sums it
there, too. `anchor` pulls it to 0 (our addition, off by default).
"""
import math, sys, time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

from common import (cosine, encode_prompt, encode_response, end_ids, load_model, load_tokenizer,
                    mean_rewards, my_micro_batches, optimizer_step, pack, rows_at,
                    sequence_rewards, setup, token_heads, tokenizer_hash, total_rewards, upcast)
from plumbing.command_line import extra, load_config
from plumbing.files import (ABOVE_0, ANY, AT_LEAST_0, COUNT, SHARE, check_input, check_numbers,
                            read_jsonl)
from plumbing.models import check_fits, check_model
from plumbing.ranks import fail, say, total
from plumbing.record import (begin, finish, load_checkpoint, log_metrics, progress, record_of,
                             save_checkpoint, save_model, trim_logs)
from plumbing.watch import listen_for_signals, stop_if_told

@dataclass(frozen=True)
class Config:
    model: str = "out/sft"          # backbone: the SFT model; it gets a new head of zeros
    data: list[str] = ("out/diffs.jsonl",)  # pairs from diff.py; loss=sequence also takes
                                    # preferences. Several files: the pairs of all of them
    out: str = "out/rm"
    loss: Literal["sequence", "eq3", "eq4"] = "eq4"
    anchor: float = 0.0             # weight of the mean r_t^2 over U_0 (try 0.1); not for sequence
    eval_data: str | None = None    # held-out pairs: preferences or diffs
    eval_every: int = 0             # steps between evaluations; 0: at the end only
    epochs: int = 1
    steps: int | None = None        # replaces epochs: runs with different numbers of pairs then
                                    # take equally many steps
    batch: int = 16                 # pairs per optimizer step, all ranks together
    micro_batch: int = 4            # pairs per forward and rank; changes memory and speed only
    lr: float = 3e-6                # peak; linear warm-up, then cosine to 0
    warmup: float = 0.03            # share of the steps
    head_lr_factor: float = 1.0     # the new head's rate is lr times this; < 1: rewards grow slowly
                                    # and the backbone does more of the learning
    max_tokens: int = 512           # prompt + answer; longer pairs are dropped and counted
    max_grad_norm: float | None = 1.0       # None: no clipping
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto: bfloat16 on GPU
                                            # (the weights are float32)
    activation_checkpointing: bool = False  # a third more computing for much less memory
    log_every: int = 1              # steps between lines of metrics.jsonl
    resume_every: int = 100         # steps between checkpoints
    wandb_project: str | None = None        # also send metrics.jsonl's rows there
    seed: int = 0                   # order of pairs
    overwrite: bool = False
    allow_changed_code: bool = False        # continue a run whose stage file or common.py changed

# ---------------------------------------------------------------- the equations

def pair_terms(r_w, response_w, changed_w, r_l, response_l, changed_l):
    """The three terms inside Eq. 3's sigma, [B] each: u0, u1_w, u1_l. R_w - R_l = u0 + u1_w - u1_l.

    r: rewards per token [B, T] (T of w and of l may differ); response: mask of real tokens, values
    outside it are ignored; changed: 1 = in U_1. u0 = sum_U0 r_w / T_w - sum_U0 r_l / T_l is what
    Eq. 4 drops."""
    in_u1_w = changed_w.bool()
    in_u1_l = changed_l.bool()
    u1_w = mean_rewards(r_w.masked_fill(~in_u1_w, 0), response_w)                          # [B]
    u1_l = mean_rewards(r_l.masked_fill(~in_u1_l, 0), response_l)
    u0_w = mean_rewards(r_w.masked_fill(in_u1_w, 0), response_w)
    u0_l = mean_rewards(r_l.masked_fill(in_u1_l, 0), response_l)
    return u0_w - u0_l, u1_w, u1_l

def pair_losses(r_w, response_w, changed_w, r_l, response_l, changed_l, *, loss, anchor=0.0):
    """Loss of each pair [B]; arguments as in pair_terms. loss: "sequence" (Eq. 2 with R at the last
    token), "eq3" (Eq. 3) or "eq4" (Eq. 4).

    anchor adds anchor * the mean of r_t^2 over the U_0 tokens of both sides together, or 0 if there
    are none. ValueError: anchor with sequence."""
    if loss == "sequence":
        if anchor:
            raise ValueError("anchor pulls token rewards to 0; a sequence reward has none")
        margin = sequence_rewards(r_w, response_w) - sequence_rewards(r_l, response_l)
        return -F.logsigmoid(margin)

    u0, u1_w, u1_l = pair_terms(r_w, response_w, changed_w, r_l, response_l, changed_l)
    margin = {"eq3": u0 + u1_w - u1_l, "eq4": u1_w - u1_l}[loss]
    losses = -F.logsigmoid(margin)

    if anchor:
        in_u0_w = response_w.bool() & ~changed_w.bool()                                    # [B, T]
        in_u0_l = response_l.bool() & ~changed_l.bool()
        squares_w = r_w.masked_fill(~in_u0_w, 0).square().sum(1)                           # [B]
        squares_l = r_l.masked_fill(~in_u0_l, 0).square().sum(1)
        tokens = (in_u0_w.sum(1) + in_u0_l.sum(1)).clamp(min=1)
        losses = losses + anchor * (squares_w + squares_l) / tokens
    return losses

def margins(scored, level):
    """R_w - R_l of each pair, [B]: Eq. 2 is its sigma. scored: what score_pairs returns"""
    r_w, response_mask_w, _, r_l, response_mask_l, _ = scored
    R_w = total_rewards(r_w, response_mask_w, level)
    R_l = total_rewards(r_l, response_mask_l, level)
    return R_w - R_l

def hits(margin):
    """Accuracy of each pair, [B]: 1 if w has the higher reward, 0 if l has, 0.5 for a tie"""
    w_is_higher = (margin > 0).to(margin.dtype)
    return torch.where(margin == 0, 0.5, w_is_higher)

# ---------------------------------------------------------------- pairs

def read_pairs(path, flag, tokenizer, max_tokens, *, masks_needed=False):
    """A file of diffs or of preferences -> its pairs that fit, and how many rows it has.

    A pair is (prompt, w, l, changed_w, changed_l): lists of ids, and of 0/1 as long as the answers.
    masks_needed: preferences are refused, because they have no U_1."""
    if "edited_ids" in read_jsonl(path, {})[0]:
        pairs = read_diffs(path, flag, tokenizer)
    elif masks_needed:
        fail(f"--{flag}={path} has no edited_ids, so no U_1: --loss=eq3 and eq4 learn from "
             "diff.py's output (sequence takes both)")
    else:
        pairs = read_preferences(path, tokenizer)

    fitting = []
    for pair in pairs:
        _, w, l, _, _ = pair
        if w and l and pair_length(pair) <= max_tokens:
            fitting.append(pair)
    if not fitting:
        fail(f"--{flag}={path}: no pair fits in max_tokens={max_tokens}")
    return fitting, len(pairs)

def read_diffs(path, flag, tokenizer):
    """Pairs from diff.py's output: w is the edited answer, l the original. fail() if they were made
    with another tokenizer, or of prompts in another format"""
    record = record_of(path)
    if not record:
        fail(f"{path}: {path}.run.json, which names its tokenizer, is missing; make both with: "
             "python diff.py")
    made_of = record.get("prompt_format", "alpaca")
    if made_of != tokenizer.prompt_format:
        fail(f"--{flag}={path} holds prompts of {made_of}, the model's are of "
             f"{tokenizer.prompt_format}; make it again: python diff.py --tokenizer=MODEL")
    if record["tokenizer_hash"] != tokenizer_hash(tokenizer):
        fail(f"--{flag}={path} was made with another tokenizer than the model's; make it again: "
             "python diff.py --tokenizer=MODEL")

    names = ("prompt_ids", "edited_ids", "original_ids", "edited_changed", "original_changed")
    rows = read_jsonl(path, dict.fromkeys(names, list))
    pairs = []
    for row in rows:
        pairs.append(tuple(row[name] for name in names))

    V = len(tokenizer)
    again = "make the file again: python diff.py"
    for number, (prompt, w, l, changed_w, changed_l) in enumerate(pairs, 1):
        if len(w) != len(changed_w) or len(l) != len(changed_l):
            fail(f"{path}:{number}: a mask is not as long as its ids; {again}")
        ids = prompt + w + l
        if not all(type(i) is int and 0 <= i < V for i in ids):
            fail(f"{path}:{number}: holds ids that no token has; {again}")
    return pairs

def read_preferences(path, tokenizer):
    """Pairs from a file of preferences (pref.jsonl): w is the preferred answer. Nothing is known
    about their tokens, so all count as changed. An answer that `cut` names gets no EOS."""
    fields = {"instruction": str, "input": (str, type(None)), "output_1": str, "output_2": str,
              "preference": (1, 2)}
    pairs = []
    special = 0  # rows whose text holds a special token
    for row in read_jsonl(path, fields):
        winner, loser = "output_1", "output_2"
        if row["preference"] == 2:
            winner, loser = "output_2", "output_1"
        cut = row.get("cut") or []
        prompt = encode_prompt(tokenizer, row)
        if prompt is None:
            special += 1
            continue
        w = encode_response(tokenizer, row[winner], eos=winner not in cut)
        l = encode_response(tokenizer, row[loser], eos=loser not in cut)
        pairs.append((prompt, w, l, [1] * len(w), [1] * len(l)))
    if special:
        say(f"{path}: {special} rows hold a special token's text and are dropped")
    return pairs

def pair_length(pair):
    """Positions that a pair needs: its prompt and the longer answer"""
    prompt, w, l, _, _ = pair
    return len(prompt) + max(len(w), len(l))

def pair_cost(pair):
    """Tokens that a pair costs: its prompt, once, and both answers"""
    prompt, w, l, _, _ = pair
    return len(prompt) + len(w) + len(l)

# ---------------------------------------------------------------- rewards of pairs

def padded(rows, filler, device):
    """Lists of different lengths -> a tensor [rows, longest], with filler after their ends"""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)

def score_pairs(model, pairs, device):
    """Both answers of each pair, in two rows -> r_w, response_mask_w, changed_w, r_l,
    response_mask_l, changed_l, [B, T] each, as pair_terms takes them. All ranks."""
    prompts, w, l, changed_w, changed_l = zip(*pairs)
    ids, mask, response_mask = pack(prompts * 2, w + l, device)                   # rows 0..B-1: w
    r = token_heads(model, ids, mask, response_mask)                              # [2B, T]
    changed = padded(changed_w + changed_l, 0, device)                            # [2B, T]
    return both_sides(r, response_mask, changed)

def both_sides(r, response_mask, changed):
    """[2B, T] each, with w in rows 0..B-1 -> r_w, response_mask_w, changed_w, and the same of l"""
    B = len(r) // 2
    w = r[:B], response_mask[:B], changed[:B]
    l = r[B:], response_mask[B:], changed[B:]
    return *w, *l

# ---------------------------------------------------------------- the same, faster

def score_pairs_shared_prompt(model, pairs, device):
    """score_pairs, with each prompt computed once for all its answers. They follow it in one row:

                    prompt   answer 1   answer 2   answer 3
        ids         p q r    a b        c          d e
        positions   0 1 2    3 4        3          3 4        each answer continues the prompt
        branches    0 0 0    1 1        2          3 3        0: the prompt; -1: padding

    The mask of this row. A token sees the prompt and its own answer, up to itself:

            p q r  a b  c  d e
        p   1 . .  . .  .  . .
        q   1 1 .  . .  .  . .
        r   1 1 1  . .  .  . .
        a   1 1 1  1 .  .  . .
        b   1 1 1  1 1  .  . .
        c   1 1 1  . .  1  . .
        d   1 1 1  . .  .  1 .
        e   1 1 1  . .  .  1 1

    So an answer gets the rewards that it gets alone. Only where prompt_can_be_shared. All ranks."""
    prompts, w, l, changed_w, changed_l = zip(*pairs)
    answers = w + l

    # The rows, padded on the right.
    rows, row_numbers, starts = rows_of_prompts(prompts * 2, answers)
    ids = padded([row["ids"] for row in rows], 0, device)                         # [rows, S]
    positions = padded([row["positions"] for row in rows], 0, device)             # [rows, S]
    branches = padded([row["branches"] for row in rows], -1, device)              # [rows, S]
    S = ids.shape[1]

    # The mask: the second index is the token that reads, the third the token that is read.
    is_prompt = (branches[:, None, :] == 0).expand(-1, S, -1)                     # [rows, S, S]
    same_branch = branches[:, :, None] == branches[:, None, :]                    # [rows, S, S]
    causal = torch.ones_like(same_branch).tril()                                  # [rows, S, S]
    seen = (is_prompt | same_branch) & causal                                     # [rows, S, S]
    outputs = model(input_ids=ids, attention_mask=seen[:, None], position_ids=positions,
                    use_cache=False)
    heads = upcast(outputs.logits[..., 0])                                        # [rows, S]

    # Take each answer's columns out of its row, to the left of [2B, T].
    row = torch.tensor(row_numbers, device=device)[:, None]                       # [2B, 1]
    start = torch.tensor(starts, device=device)[:, None]                          # [2B, 1]
    lengths = torch.tensor([[len(answer)] for answer in answers], device=device)  # [2B, 1]
    T = max(map(len, answers))
    t = torch.arange(T, device=device)
    response_mask = t < lengths                                                   # [2B, T]
    column = (start + t).clamp(max=S - 1)                                         # [2B, T]
    r = heads[row, column].masked_fill(~response_mask, 0)                         # [2B, T]
    changed = padded(changed_w + changed_l, 0, device)                            # [2B, T]
    return both_sides(r, response_mask, changed)

def rows_of_prompts(prompts, answers):
    """One row for each different prompt, with its answers after it -> list of dict(ids, positions,
    branches); and for each answer the number of its row and the column where it starts"""
    rows = []
    row_of = {}  # prompt -> the number of its row
    row_numbers = []
    starts = []
    for prompt, answer in zip(prompts, answers):
        P = len(prompt)
        key = tuple(prompt)
        if key not in row_of:
            row_of[key] = len(rows)
            positions = list(range(P))
            rows.append(dict(ids=list(prompt), positions=positions, branches=[0] * P))
        row = rows[row_of[key]]
        row_numbers.append(row_of[key])
        starts.append(len(row["ids"]))

        branch = row["branches"][-1] + 1
        row["ids"] += answer
        row["positions"] += range(P, P + len(answer))
        row["branches"] += [branch] * len(answer)
    return rows, row_numbers, starts

def prompt_can_be_shared(model):
    """Is the mask of score_pairs_shared_prompt exact for this model? Only with full attention in
    every layer, computed by torch's sdpa. A sliding window is a mask of its own, which ours would
    replace. sdpa has no soft-capping. Eager attention adds the mask to its scores, where True and
    False are 1 and 0 and hide nothing."""
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or []
    for layer_type in layer_types:
        if layer_type != "full_attention":
            return False
    if getattr(config, "sliding_window", None) is not None:
        return False
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    return config._attn_implementation == "sdpa"

def fastest_scorer(model):
    """score_pairs_shared_prompt where it is exact, score_pairs for all other models"""
    return score_pairs_shared_prompt if prompt_can_be_shared(model) else score_pairs

# ---------------------------------------------------------------- figures

@torch.no_grad()
def figure_sums(scored, losses, level):
    """What is logged of a micro-batch: name -> its sum over the pairs (float64)"""
    r_w, response_mask_w, _, r_l, response_mask_l, _ = scored
    margin = margins(scored, level)                                                        # [B]
    u0, u1_w, u1_l = pair_terms(*scored)
    r_eos_w = sequence_rewards(r_w, response_mask_w)
    r_eos_l = sequence_rewards(r_l, response_mask_l)
    figures = dict(loss=losses, accuracy=hits(margin), margin=margin)
    figures |= dict(u0=u0, u1_w=u1_w, u1_l=u1_l)
    figures["r_eos"] = (r_eos_w + r_eos_l) / 2
    return {name: figure.double().sum() for name, figure in figures.items()}

@torch.no_grad()
def held_out_figures(model, pairs, cfg, device):
    """Means over held-out pairs: accuracy (a tie is half), margin R_w - R_l, loss. All ranks."""
    level = "sequence" if cfg.loss == "sequence" else "token"
    score = fastest_scorer(model)
    lengths = [pair_cost(pair) for pair in pairs]
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for part in my_micro_batches(range(len(pairs)), lengths, cfg.micro_batch * 2):
        # This rank has no pairs left, but the forward is collective: run a pair with weight 0.
        mine = part or [0]
        weight = 1 if part else 0
        scored = score(model, [pairs[i] for i in mine], device)  # all ranks
        margin = margins(scored, level)                                                    # [B]
        losses = -F.logsigmoid(margin)
        figures = torch.stack([hits(margin).sum(), margin.sum(), losses.sum()])
        sums += figures.double() * weight
    means = total(sums) / len(pairs)  # all ranks
    accuracy, margin, loss = means.tolist()
    return dict(eval_accuracy=accuracy, eval_margin=margin, eval_loss=loss)

# ---------------------------------------------------------------- the stage

def check(cfg):
    """What can be wrong before a model is loaded -> tokenizer, pairs, how many rows --data has,
    held-out pairs"""
    if cfg.wandb_project:
        extra("wandb_mirror", "--wandb_project").check(cfg)
    check_model(cfg.model, "model", "python sft.py")
    if not cfg.data:
        fail("--data names no file of pairs; make one with: python edit.py, then python diff.py")
    for path in cfg.data:
        check_input(path, "data", "python edit.py, then python diff.py")
    if cfg.eval_data:
        check_input(cfg.eval_data, "eval_data", "python diff.py, or data/*/prepare.py")
    check_numbers(cfg, anchor=AT_LEAST_0, eval_every=AT_LEAST_0, epochs=COUNT, steps=COUNT,
                  batch=COUNT, micro_batch=COUNT, lr=AT_LEAST_0, warmup=SHARE,
                  head_lr_factor=ABOVE_0, max_tokens=COUNT, max_grad_norm=ABOVE_0,
                  log_every=COUNT, resume_every=COUNT, seed=ANY)
    if cfg.anchor and cfg.loss == "sequence":
        fail("--anchor pulls token rewards to 0; with --loss=sequence there are none: leave it at "
             "0")

    tokenizer = load_tokenizer(cfg.model)
    pairs = []
    count = 0
    for path in cfg.data:
        found, rows = read_pairs(path, "data", tokenizer, cfg.max_tokens,
                                 masks_needed=cfg.loss != "sequence")
        pairs += found
        count += rows
    held_out = []
    if cfg.eval_data:
        held_out, _ = read_pairs(cfg.eval_data, "eval_data", tokenizer, cfg.max_tokens)
    longest = max(pair_length(pair) for pair in pairs + held_out)
    check_fits(cfg.model, "model", longest, head="zero", vocabulary=len(tokenizer))
    if cfg.loss == "sequence" and sequence_pad(tokenizer) is None:
        fail(f"--model={cfg.model}: its tokenizer has no token but EOS that no text contains; a "
             "sequence-level model needs one as its pad. Train a token-level one: --loss=eq4")
    config = AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
    if cfg.loss == "sequence" and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        fail(f"--model={cfg.model}: transformers has no ...ForSequenceClassification for "
             f"{config.model_type}, so nobody could open it. Train a token-level one: --loss=eq4")
    return tokenizer, pairs, count, held_out

def sequence_pad(tokenizer):
    """The id to pad a sequence-level model's input with, or None. transformers reads the score at
    the last id that is not pad. So pad is neither EOS nor a token that text can contain."""
    special = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
    for id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *special):
        if id is None or id in end_ids(tokenizer):
            continue
        text = tokenizer.convert_ids_to_tokens(id)
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if id not in ids:
            return id
    return None

def main(cfg):
    # ---------------------------------------------------------------- inputs
    tokenizer, pairs, count, held_out = check(cfg)
    lengths = [pair_cost(pair) for pair in pairs]
    inputs = [cfg.model, *cfg.data]
    if cfg.eval_data:
        inputs.append(cfg.eval_data)

    # True if the pairs come from edits: then some tokens are unchanged. The report uses this to
    # label the run.
    edits = any(0 in changed_w for _, _, _, changed_w, _ in pairs)
    unimportant = ("micro_batch", "resume_every", "log_every", "wandb_project")
    if begin(cfg, "reward_model", unimportant=unimportant, inputs=inputs, pairs=len(pairs),
             edits=edits):
        return say(f"{cfg.out} is finished; nothing to do")
    mirror = None
    if cfg.wandb_project:
        mirror = extra("wandb_mirror").mirror(cfg)

    # ---------------------------------------------------------------- model
    device, mesh, dtype = setup(cfg.dtype)
    model = load_model(cfg.model, device, mesh, dtype, head="zero",
                       checkpointing=cfg.activation_checkpointing)
    level = "sequence" if cfg.loss == "sequence" else "token"
    score = fastest_scorer(model)
    backbone = dict(params=model.base_model.parameters(), lr_factor=1.0)
    head = dict(params=model.score.parameters(), lr_factor=cfg.head_lr_factor)
    optimizer = torch.optim.AdamW([backbone, head], lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0, fused=True)

    # The pairs seen in all epochs, a pair once per epoch. Only the last batch may be smaller.
    pairs_seen = cfg.steps * cfg.batch if cfg.steps else len(pairs) * cfg.epochs
    steps = math.ceil(pairs_seen / cfg.batch)
    done = load_checkpoint(cfg.out, model, optimizer)
    saved = done  # the steps that the newest checkpoint has done
    trim_logs(cfg.out, done)
    listen_for_signals()
    resumed = f", continuing after step {done}" if done else ""
    say(f"{len(pairs)} of {count} pairs fit, {steps} steps of {cfg.batch}{resumed}")

    # ---------------------------------------------------------------- loop
    for step in progress(range(done, steps), "reward model", steps):
        stop_if_told(cfg, step, saved, model, optimizer, device)  # all ranks
        started = time.time()
        stop = min((step + 1) * cfg.batch, pairs_seen)
        batch = rows_at(step * cfg.batch, stop, len(pairs), cfg.seed)

        # Gradients add up over micro-batches and ranks to that of the mean over the batch's pairs.
        sums = defaultdict(float)
        for part in my_micro_batches(batch, lengths, cfg.micro_batch):
            # This rank has no pairs left, but the forward is collective: run a pair with weight 0.
            mine = part or batch[:1]
            weight = 1 if part else 0
            scored = score(model, [pairs[i] for i in mine], device)  # all ranks
            losses = pair_losses(*scored, loss=cfg.loss, anchor=cfg.anchor)                # [B]
            loss = losses.sum() / len(batch) * weight
            loss.backward()
            for name, figure in figure_sums(scored, losses, level).items():
                sums[name] += figure * weight

        lr = cfg.lr * cosine(step, steps, cfg.warmup)
        where = f"step {step}, pairs {batch[:8]}... (of those that fit, from 0)"
        norm = optimizer_step(model.parameters(), optimizer, lr, cfg.max_grad_norm, where)

        # One line of metrics.jsonl, with held-out figures where they are due.
        all_sums = total(torch.stack(list(sums.values())))  # [7], all ranks
        figures = all_sums / len(batch)
        means = dict(zip(sums, figures.tolist()))
        tokens = sum(lengths[i] for i in batch)
        speed = tokens / (time.time() - started)
        row = dict(step=step, **means, lr=lr, grad_norm=norm, tokens=tokens, tokens_per_s=speed)
        last = step == steps - 1
        evaluate = last
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            evaluate = True
        if held_out and evaluate:
            row |= held_out_figures(model, held_out, cfg, device)  # all ranks
        if step % cfg.log_every == 0 or last or "eval_loss" in row:
            row["seconds"] = time.time() - started
            shown = ("step", "loss", "accuracy", "margin", "r_eos", "grad_norm", "tokens_per_s",
                     "eval_accuracy")
            log_metrics(cfg.out, row, shown)
            if mirror:
                mirror(row)
        if (step + 1) % cfg.resume_every == 0 and not last:
            saved = step + 1
            save_checkpoint(cfg.out, saved, model, optimizer)  # all ranks

    pad = sequence_pad(tokenizer) if level == "sequence" else None
    save_model(model, tokenizer, cfg.out, dtype, sequence_pad=pad)  # all ranks
    finish(cfg, keep_checkpoint=False)
    accuracy = f"accuracy {row['accuracy']:.3f} on the last batch"
    if held_out:
        accuracy = f"accuracy {row['eval_accuracy']:.3f} on {len(held_out)} held-out pairs"
    say(f"{cfg.out}: done, {accuracy}; next: python ppo.py --policy={cfg.model} "
        f"--reward_model={cfg.out} --level={level}")

if __name__ == "__main__":
    if sys.argv[1:2] == ["show"]:
        extra("report.show_rewards", "reward_model.py show").main(sys.argv[2:])
    else:
        main(load_config(Config, "reward_model"))
