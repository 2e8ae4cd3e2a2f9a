"""Stage 0. The starting policy pi_0: demonstrations -> a model that follows instructions.

    python sft.py --model=MODEL --data=data/toy/sft.jsonl    # one process
    torchrun --nproc_per_node=8 sft.py           # the paper's: LLaMA-7B, AlpacaFarm's split
    python sft.py --model=CHAT_MODEL --prompt_format=template --data=my.jsonl

sft.jsonl (instruction, input, output) -> out/sft, a Hugging Face folder. The loss is the mean of
-log pi(a_t | s_t) over the batch's real response tokens, EOS included. Prompts are masked. It is
the same for any micro-batch size and any number of ranks. The paper gives no settings of SFT; the
defaults are AlpacaFarm's published script. Run the same command again to resume a killed run.

The saved folder names the format of its prompts, and all later stages read it there. `alpaca` is
Alpaca's prompt. `template` is the chat template of --model, for a row's `messages` (role, content)
if it has them, else for one turn with its instruction and input. A response then ends with the
token that ends a turn.
"""
import math, time
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoConfig

from common import (cosine, encode_prompt, encode_response, load_model, load_tokenizer,
                    my_micro_batches, optimizer_step, pack, rows_at, setup, token_logprobs,
                    PROMPT, PROMPT_INPUT)
from plumbing.command_line import extra, load_config
from plumbing.files import (ABOVE_0, ANY, AT_LEAST_0, COUNT, SHARE, check_input, check_numbers,
                            read_jsonl)
from plumbing.models import check_fits, check_model, meta_model, recurrent_layer
from plumbing.ranks import fail, say, total
from plumbing.record import (begin, finish, load_checkpoint, log_metrics, progress, save_checkpoint,
                             save_model, trim_logs)
from plumbing.watch import listen_for_signals, stop_if_told

@dataclass(frozen=True)
class Config:
    model: str = "huggyllama/llama-7b"      # folder or hub name; no weights: new ones, from seed
    data: str = "data/alpacafarm/sft.jsonl" # instruction, input, output (cut: ["output"]: no EOS)
    out: str = "out/sft"
    prompt_format: Literal["alpaca", "template"] = "alpaca"  # template: --model's chat template
    epochs: int = 3
    batch: int = 128                # rows per optimizer step, all ranks together
    micro_batch: int = 4            # rows per forward and rank; changes memory and speed only
    lr: float = 2e-5                # peak; linear warm-up, then cosine to 0
    warmup: float = 0.03            # share of the steps
    max_tokens: int = 512           # prompt + response; longer rows are dropped and counted
    max_grad_norm: float | None = 1.0       # None: no clipping
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto: bfloat16 on GPU
                                            # (the weights are float32)
    activation_checkpointing: bool = False  # a third more computing for much less memory
    log_every: int = 1              # steps between lines of metrics.jsonl
    resume_every: int = 100         # steps between checkpoints
    wandb_project: str | None = None        # also send metrics.jsonl's rows there
    seed: int = 0                   # order of rows, new weights
    overwrite: bool = False
    allow_changed_code: bool = False        # continue a run whose stage file or common.py changed

# Alpaca's prompt as a chat template, for other tools. The turns before the last one are its input.
JINJA = """\
{%- macro transcript(turns) -%}
{%- for turn in turns -%}
{{ turn.role | capitalize }}: {{ turn.content }}{{ "" if loop.last else "\\n\\n" }}
{%- endfor -%}
{%- endmacro -%}
{%- set answered = messages[-1].role == "assistant" -%}
{%- set turns = messages[:-1] if answered else messages -%}
{%- if turns | length > 1 -%}
BOSPROMPT_INPUT
{%- else -%}
BOSPROMPT
{%- endif -%}
{%- if answered -%}{{ messages[-1].content }}{{ eos_token }}{%- endif -%}"""

def alpaca_template(tokenizer):
    """A chat template (Jinja) with which other tools prompt the model as encode_prompt() does"""
    fields = dict(instruction="{{ turns[-1].content }}", input="{{ transcript(turns[:-1]) }}")
    template = JINJA.replace("PROMPT_INPUT", PROMPT_INPUT.format(**fields))
    template = template.replace("PROMPT", PROMPT.format(**fields))
    row = dict(instruction="apple")
    begins_with_bos = encode_prompt(tokenizer, row)[0] == tokenizer.bos_token_id
    return template.replace("BOS", "{{ bos_token }}" if begins_with_bos else "")

def check(cfg):
    """What can be wrong before a model is loaded -> tokenizer, the rows of --data, and those that
    fit: their numbers in the file (from 1), prompts and responses (lists of ids)"""
    check_numbers(cfg, epochs=COUNT, batch=COUNT, micro_batch=COUNT, lr=AT_LEAST_0, warmup=SHARE,
                  max_tokens=COUNT, max_grad_norm=ABOVE_0, log_every=COUNT, resume_every=COUNT,
                  seed=ANY)
    if cfg.wandb_project:
        extra("wandb_mirror", "--wandb_project").check(cfg)
    check_model(cfg.model, "model", "python data/toy/prepare.py, or name any Llama-like model",
                weights="new")
    check_input(cfg.data, "data", "python data/toy/prepare.py or python data/alpacafarm/prepare.py")
    fields = {"instruction": str, "input": (str, type(None)), "output": str}
    rows = read_jsonl(cfg.data, fields)
    tokenizer = load_tokenizer(cfg.model, cfg.prompt_format)

    numbers = []
    prompts = []
    responses = []
    special = 0  # rows whose text holds a special token
    for number, row in enumerate(rows, 1):
        cut = row.get("cut") or []
        prompt = encode_prompt(tokenizer, row)
        if prompt is None:
            special += 1
            continue
        response = encode_response(tokenizer, row["output"], eos="output" not in cut)
        if response and len(prompt) + len(response) <= cfg.max_tokens:
            numbers.append(number)
            prompts.append(prompt)
            responses.append(response)
    if special:
        say(f"{cfg.data}: {special} rows hold a special token's text and are dropped")
    if not numbers:
        fail(f"{cfg.data}: no row fits in max_tokens={cfg.max_tokens}")

    longest = max(len(p) + len(r) for p, r in zip(prompts, responses))
    check_fits(cfg.model, "model", longest, generates=False, vocabulary=len(tokenizer))
    config = AutoConfig.from_pretrained(cfg.model, trust_remote_code=False)
    as_reward_model = meta_model(config, "zero")
    if as_reward_model is None or recurrent_layer(as_reward_model):
        say(f"warning: no reward model can be made of --model={cfg.model} ({config.model_type}): "
            "reward_model.py and ppo.py need attention layers and transformers' token classifier")
    return tokenizer, rows, numbers, prompts, responses

def main(cfg):
    # ---------------------------------------------------------------- inputs
    tokenizer, rows, numbers, prompts, responses = check(cfg)
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    unimportant = ("micro_batch", "resume_every", "log_every", "wandb_project")
    inputs = [cfg.model, cfg.data]

    # An alpaca model's chat template is ours; a chat model's own one is kept.
    if cfg.prompt_format == "alpaca":
        template = alpaca_template(tokenizer)
        if tokenizer.chat_template not in (None, template):
            say(f"the chat template of --model={cfg.model} is replaced by Alpaca's prompt; to "
                "train in it: --prompt_format=template")
        tokenizer.chat_template = template
    if begin(cfg, "sft", unimportant=unimportant, inputs=inputs, rows=len(rows),
             prompt_format=tokenizer.prompt_format):
        return say(f"{cfg.out} is finished; nothing to do")
    mirror = None
    if cfg.wandb_project:
        mirror = extra("wandb_mirror").mirror(cfg)

    # ---------------------------------------------------------------- model
    device, mesh, dtype = setup(cfg.dtype)
    model = load_model(cfg.model, device, mesh, dtype, checkpointing=cfg.activation_checkpointing,
                       seed=cfg.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=0.0, fused=True)

    # The rows seen in all epochs, a row once per epoch. Only the last batch may be smaller.
    rows_seen = len(prompts) * cfg.epochs
    steps = math.ceil(rows_seen / cfg.batch)
    done = load_checkpoint(cfg.out, model, optimizer)
    saved = done  # the steps that the newest checkpoint has done
    trim_logs(cfg.out, done)
    listen_for_signals()
    resumed = f", {done} are done" if done else ""
    say(f"{len(prompts)} of {len(rows)} rows fit, {steps} steps of {cfg.batch}{resumed}")

    # ---------------------------------------------------------------- loop
    for step in progress(range(done, steps), "sft", steps):
        stop_if_told(cfg, step, saved, model, optimizer, device)  # all ranks
        started = time.time()
        stop = min((step + 1) * cfg.batch, rows_seen)
        batch = rows_at(step * cfg.batch, stop, len(prompts), cfg.seed)
        tokens = sum(len(responses[row]) for row in batch)  # of all ranks

        # Gradients add up over micro-batches and ranks to that of the mean over the batch's tokens.
        loss_sum = torch.zeros((), device=device)
        for part in my_micro_batches(batch, lengths, cfg.micro_batch):
            # This rank has no rows left, but the forward is collective: run a row with weight 0.
            my_rows = part or batch[:1]
            weight = 1 if part else 0
            my_prompts = [prompts[row] for row in my_rows]
            my_responses = [responses[row] for row in my_rows]
            ids, mask, response_mask = pack(my_prompts, my_responses, device)
            logprobs = token_logprobs(model, ids, mask, response_mask)  # [B, T], all ranks
            loss = -logprobs.sum() / tokens * weight
            loss.backward()
            loss_sum += loss.detach()

        lr = cfg.lr * cosine(step, steps, cfg.warmup)
        where = f"step {step}, rows {[numbers[row] for row in batch[:8]]}..."
        norm = optimizer_step(model.parameters(), optimizer, lr, cfg.max_grad_norm, where)

        # One line of metrics.jsonl.
        loss = total(loss_sum).item()  # all ranks
        last = step == steps - 1
        if step % cfg.log_every == 0 or last:
            seconds = time.time() - started
            all_tokens = sum(lengths[row] for row in batch)  # with prompts
            row = dict(step=step, loss=loss, lr=lr, grad_norm=norm, seconds=seconds,
                       tokens=all_tokens)
            log_metrics(cfg.out, row)
            if mirror:
                mirror(row)
        if (step + 1) % cfg.resume_every == 0 and not last:
            saved = step + 1
            save_checkpoint(cfg.out, saved, model, optimizer)  # all ranks

    save_model(model, tokenizer, cfg.out, dtype)  # all ranks
    finish(cfg, keep_checkpoint=False)
    say(f"{cfg.out}: done, loss {loss:.4g} at the last of {steps} steps; next: python edit.py, "
        f"python diff.py --tokenizer={cfg.out}, python reward_model.py --model={cfg.out}")

if __name__ == "__main__":
    main(load_config(Config, "sft"))
