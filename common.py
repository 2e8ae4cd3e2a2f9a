"""What the stages share, or two of them must agree on: files, prompts and tokens, ranks, models, forward, generation.

One alphabet in every file: B sequences, P prompt tokens, T response tokens, S of both, V vocabulary. A mask is True
where a token counts; it comes from lengths, never from `ids == pad`. Names: prompt_ids [B, P]; response_ids,
response_mask, logprobs, values, rewards, changed, ... [B, T]: one column per response token a_1..a_T, whatever the
padding around them. What is beside the story stands in extras/ and is imported where it is used.
"""
import functools
import hashlib
import json
import math
import os
import random
import statistics
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification,
                          AutoTokenizer)
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from plumbing.cache import in_place_cache
from plumbing.files import whole_characters
from plumbing.ranks import RANK, WORLD, fail

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ---------------------------------------------------------------- text and tokens

PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
          "\n\n### Instruction:\n{instruction}\n\n### Response:")
PROMPT_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")


def load_tokenizer(path):
    """The folder's or hub's tokenizer; nothing is added to it"""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"no tokenizer in {path}: {str(error).splitlines()[0]}")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no eos token; a response could never end")
    return tokenizer


@functools.cache
def response_prefix(tokenizer):
    """A response follows a ':', it does not begin a text. Where sentencepiece would put its dummy space before it, we
    encode it behind a newline (a byte token, which never merges) and take that away again. -> text, ids before it."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    behind = tokenizer.encode("\nx", add_special_tokens=False)[len(newline):]
    return ("\n", newline) if tokenizer.encode("x", add_special_tokens=False) != behind else ("", [])


def encode_prompt(tokenizer, row):
    """Alpaca's prompt of a row -> ids, with bos once where the model family puts one: where encode() does, and where it
    is <s>, since a bare Llama tokenizer.model adds none by itself"""
    template = PROMPT_INPUT if row.get("input") else PROMPT
    text = whole_characters(template.format(instruction=row["instruction"], input=row.get("input")))
    bos = tokenizer.bos_token == "<s>" or tokenizer.encode("x")[0] == tokenizer.bos_token_id
    return [tokenizer.bos_token_id] * bos + tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_response(tokenizer, text, *, eos=True):
    """A response, as a rollout would hold it -> ids. eos=False: it was cut, it did not end by itself."""
    before, ids_before = response_prefix(tokenizer)
    text = whole_characters(text)
    ids = tokenizer.encode(before + text, add_special_tokens=False, split_special_tokens=True)  # a "</s>" in it is text
    return ids[len(ids_before):] + [tokenizer.eos_token_id] * eos


def decode_response(tokenizer, ids):
    """The exact inverse: ids, up to a final EOS -> text"""
    before, ids_before = response_prefix(tokenizer)
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    return tokenizer.decode([*ids_before, *ids], clean_up_tokenization_spaces=False)[len(before):]


def token_texts(tokenizer, ids):
    """The text of each token, for pictures; joined they are the response. A token that ends inside
    a character gets "", and the token that completes it gets the character."""
    texts = []
    done = ""
    for end in range(1, len(ids) + 1):
        text = decode_response(tokenizer, [*ids[:end], tokenizer.eos_token_id])
        complete = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(done):] if complete else "")
        done = text if complete else done
    return texts


def tokenizer_hash(tokenizer):
    """Two tokenizers are the same if their vocabulary and special ids agree (pad does not matter)"""
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([vocabulary, special]).encode()).hexdigest()


def rows_at(start, stop, n, seed):
    """Rows start..stop of an endless stream, n rows in a new order each epoch; a batch may span two epochs"""
    return [epoch_order(n, seed, k // n)[k % n] for k in range(start, stop)]


@functools.lru_cache(4)
def epoch_order(n, *key):
    """0..n-1 in the order of a key, such as (seed, epoch); the list is shared: not to be changed"""
    order = list(range(n))
    random.Random(" ".join(map(str, key))).shuffle(order)
    return order


def row_uniforms(length, *key):
    """The draws of one row, [length] in [0, 1): from its own key, such as (seed, step, row): no neighbours, no rank"""
    draw = random.Random(" ".join(map(str, key)))
    return torch.tensor([draw.getrandbits(24) for _ in range(length)]) / 2**24  # 24 bits: exact in float32, never 1.0


# ---------------------------------------------------------------- ranks

def setup(dtype="auto"):
    """-> device, mesh (None: one process, a CPU, float32: nothing to shard or cast), compute dtype. All ranks."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    compute = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if cuda else torch.float32
    if cuda:
        torch.cuda.set_device(device)
    elif WORLD == 1 and compute == torch.float32:
        return device, None, compute
    lonely = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)  # without torchrun
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **lonely)
    node = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))  # several machines: shard inside one, replicate across (HSDP)
    shape, names = ((WORLD // node, node), ("replicate", "shard")) if node < WORLD else ((WORLD,), ("shard",))
    return device, dist.init_device_mesh(device.type, shape, mesh_dim_names=names), compute


def my_micro_batches(rows, lengths, micro_batch):
    """This rank's micro-batches of an optimizer batch: lists of row numbers, rows of similar length together, the same
    number of lists on every rank (one may be empty: run any row with weight 0, for FSDP's collectives). lengths[row]:
    its tokens. Rows are dealt to and fro, so that no rank has all the long ones."""
    order = sorted(rows, key=lambda row: (lengths[row], row))  # of two ranks: 1 0 0 1 1 0 0 1 ...
    mine = [row for k, row in enumerate(order) if k % (2 * WORLD) in (WORLD - 1 - RANK, WORLD + RANK)]
    return [mine[i:i + micro_batch] for i in range(0, -(-len(order) // WORLD), micro_batch)]


# ---------------------------------------------------------------- models

def load_model(path, device, mesh, dtype, *, head=None, frozen=False, checkpointing=False, seed=0):
    """A causal language model (head=None), or a backbone with one number per token: head="saved", or "zero", a new one.

    Trained: float32 master weights, computing in dtype. Frozen: held in dtype. A folder without weights (the toy
    world's) is initialised from seed. Sharded over mesh if there is one. All ranks."""
    Auto, config = AutoModelForTokenClassification if head else AutoModelForCausalLM, AutoConfig.from_pretrained(path)
    config.update({name: 0.0 for name in vars(config) if "dropout" in name or name.endswith("pdrop")})
    if head:
        config.num_labels, config.token_classification_bias, config.classifier_dropout = 1, False, 0.0
    held = dtype if frozen else torch.float32
    whole = None
    if not mesh or RANK == 0:  # one whole copy in host memory: the other ranks get their shards from it
        if Path(path).exists() and not any(Path(path).glob("*.safetensors*")):
            torch.manual_seed(seed)
            whole = Auto.from_config(config, dtype=held)
        else:
            whole = Auto.from_pretrained(path, config=config, dtype=held, use_safetensors=True)
        if head == "zero":
            torch.nn.init.zeros_(whole.score.weight)
    with torch.device("meta"):
        model = Auto.from_config(config, dtype=held) if mesh else whole
    model.get_input_embeddings().padding_idx = None  # where pad is eos, it would keep EOS's embedding from learning
    model.train(not frozen).requires_grad_(not frozen)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if mesh:
        mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=mixed)
        # the root's weights stay whole between forward and backward (None); a frozen model has no backward
        fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=True if frozen else None)
        for part in sharded_parts(model):
            part.set_gradient_divide_factor(1.0)  # the losses are sums over global counts: gradients add up
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot average
        model.to_empty(device=device)
        set_model_state_dict(model, whole.state_dict() if whole else {}, options=StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True))
        for name, buffer in model.named_buffers():  # rotary frequencies: in no state dict
            if whole:
                buffer.copy_(whole.get_buffer(name))
            dist.broadcast(buffer, 0)
    return model.to(device)


def sharded_parts(model):
    return [module for module in model.modules() if hasattr(module, "unshard")]  # FSDP's


@contextmanager
def unsharded(model):
    """Whole weights on every rank and eval mode: no collectives inside, ranks may decode to any length. All ranks."""
    training = model.training
    model.eval()
    for part in sharded_parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in sharded_parts(model):
            part.reshard()
            part.set_reshard_after_forward(part is not model or not training, recurse=False)
        model.train(training)


# ---------------------------------------------------------------- forward: every shift by one is done here, once

def upcast(x):
    """float32 for the half precisions; float64 stays"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pack(prompts, responses, device):
    """Lists of ids -> ids, mask [B, S] and response_mask [B, T]. Rows end together, in the last column: padding is as
    little as can be, and logits are needed for the last T + 1 columns only."""
    S, T = max(len(p) + len(r) for p, r in zip(prompts, responses)), max(map(len, responses))
    ids = torch.tensor([[0] * (S - len(p) - len(r)) + p + r for p, r in zip(prompts, responses)], device=device)
    P, R = torch.tensor([(len(p), len(r)) for p, r in zip(prompts, responses)], device=device).T[..., None]  # [B, 1]
    mask = torch.arange(S, device=device) >= S - P - R                                              # [B, S]
    return ids, mask, torch.arange(T, device=device) < R                                            # [B, T]


def to_left(x, response_mask):
    """[B, T] with the rows' ends in the last column -> their beginnings in the first, 0 behind their ends"""
    T = response_mask.shape[1]
    columns = torch.arange(T, device=x.device) + T - response_mask.sum(1, keepdim=True)            # [B, T]
    return x.gather(1, columns.clamp(max=T - 1)).masked_fill(~response_mask, 0)


def forward(model, ids, mask, **options):
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **options).logits


def token_logprobs(model, ids, mask, response_mask, temperature=1.0):
    """log pi(a_t | s_t) [B, T]: the logits of the position before a_t. All ranks."""
    B, T = response_mask.shape
    logits = upcast(forward(model, ids, mask, logits_to_keep=T + 1)[:, :-1]) / temperature          # [B, T, V]
    logprobs = -F.cross_entropy(logits.flatten(0, 1), ids[:, -T:].flatten(), reduction="none")
    return to_left(logprobs.view(B, T), response_mask)


def token_heads(model, ids, mask, response_mask, *, before=False):
    """The head's outputs [B, T]: r_t at a_t's position (a_t has been read); before: V(s_t), one earlier. All ranks."""
    T, heads = response_mask.shape[1], upcast(forward(model, ids, mask)[..., 0])                    # [B, S]
    return to_left(heads[:, -T - 1:-1] if before else heads[:, -T:], response_mask)


# ---------------------------------------------------------------- what a reward model says of a response

def last_token(mask):
    """True at the last token of each row, wherever the response begins, [B, T] -> [B, T]"""
    later = mask.long().flip(1).cumsum(1).flip(1)  # tokens from here on
    return mask.bool() & (later == 1)


def sequence_rewards(r, response_mask):
    """A sequence-level model's R: r at the last real token, [B, T] -> [B]"""
    return r.masked_fill(~last_token(response_mask), 0).sum(1)


def mean_rewards(r, response_mask):
    """R(tau) [1]: the mean of r_t over the real tokens, [B, T] -> [B]"""
    tokens = response_mask.sum(1).clamp(min=1)
    return r.masked_fill(~response_mask.bool(), 0).sum(1) / tokens


def total_rewards(r, response_mask, level):
    """R of a reward model of that level ("token" or "sequence"), [B, T] -> [B]"""
    if level == "sequence":
        return sequence_rewards(r, response_mask)
    return mean_rewards(r, response_mask)


def reward_level(path):
    """"token" or "sequence": what kind of reward model a folder holds"""
    try:
        kinds = " ".join(AutoConfig.from_pretrained(path).architectures or [])
    except (OSError, ValueError) as error:
        fail(f"{path} is no model ({str(error).splitlines()[0]})")
    if "ForTokenClassification" in kinds:
        return "token"
    if "ForSequenceClassification" in kinds:
        return "sequence"
    fail(f"{path} is no reward model (config.json says {kinds or 'nothing'}); make one with: "
         "python reward_model.py")


# ---------------------------------------------------------------- generation

def draw_tokens(logits, u, temperature, top_p, top_k):
    """One token per row [B] of logits [B, V], by inverse CDF (torch.multinomial is ten times slower). u [B, 1]"""
    if temperature == 0:
        return logits.argmax(-1)
    scores = upcast(logits) / temperature
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    cdf = torch.softmax(scores, -1).cumsum(-1)
    whole = cdf[:, -1:]
    target = torch.minimum(u.to(cdf) * whole, torch.nextafter(whole, whole * 0))  # rounding must not reach the end
    return torch.searchsorted(cdf, target, right=True)[:, 0]  # NaN: V, no token


@torch.no_grad()
def generate(model, prompt_ids, prompt_mask, *, max_new_tokens, eos_id, temperature=1.0, top_p=1.0, top_k=0,
             uniforms=None):
    """Sample responses: left-padded prompts [B, P] -> response_ids [B, T], response_mask [B, T]; T is the longest row,
    EOS is counted, what lies behind it is 0. Rows that have ended leave the batch: no token behind an EOS is computed.

    uniforms [B, max_new_tokens] in [0, 1): the draw of each token; None: torch's generator. eos_id None: never ends.
    temperature 0: argmax. ValueError in train mode."""
    if model.training:
        raise ValueError("generate needs model.eval(): in train mode activation checkpointing drops the KV cache")
    B, P = prompt_ids.shape
    cache, device = in_place_cache(model.config, room=P + max_new_tokens), prompt_ids.device
    uniforms = torch.rand(B, max_new_tokens, device=device) if uniforms is None else uniforms.to(device)
    mask = F.pad(prompt_mask.bool(), (0, max_new_tokens), value=True)                          # [B, P + max_new_tokens]
    response_ids, lengths = prompt_ids.new_zeros(B, max_new_tokens), prompt_ids.new_zeros(B)
    rows = torch.arange(B, device=device)        # the row of the batch that each line still computed belongs to
    ids, positions = prompt_ids, (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
    for t in range(max_new_tokens):
        logits = model(input_ids=ids, attention_mask=mask[:, :P + t], position_ids=positions, past_key_values=cache,
                       use_cache=True, logits_to_keep=1).logits[:, -1]                              # [lines, V]
        tokens = draw_tokens(logits, uniforms[rows, t:t + 1], temperature, top_p, top_k)
        if int(tokens.max()) >= logits.shape[1]:
            fail("the model's logits are NaN: its weights are broken; go back to an earlier model")
        response_ids[rows, t], lengths[rows] = tokens, t + 1
        alive = tokens != eos_id if eos_id is not None else torch.ones_like(tokens, dtype=torch.bool)
        left = int(alive.sum())
        if left == 0:
            break
        if left < len(rows):  # lines from the end move into the places of those that ended: the least to copy
            stay = torch.arange(left, device=device)
            stay[~alive[:left]] = alive[left:].nonzero()[:, 0] + left
            cache.batch_select_indices(stay)
            rows, mask, positions, tokens = rows[stay], mask[stay], positions[stay], tokens[stay]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
    T = int(lengths.max())
    return response_ids[:, :T], torch.arange(T, device=device) < lengths[:, None]


# ---------------------------------------------------------------- optimisation

def cosine(step, steps, warmup):
    """The share of the learning rate at a step (0-based): linear warm-up, then a half cosine to 0"""
    warm = max(1, round(warmup * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def optimizer_step(parameters, optimizer, lr, max_grad_norm, where):
    """Clip all gradients together, step (a group at lr times its lr_factor), clear -> the norm before clipping. Not
    finite: the run stops. All ranks."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_grad_norm is None else max_grad_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        fail(f"{where}: the gradient's norm is {norm}; what was saved before is kept. "
             "Lower --lr, or look at the rows")
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------- statistics

def mean_and_error(x):
    """Mean and its standard error sd(ddof=1) / sqrt(n); None where there is none"""
    mean = statistics.fmean(x) if x else None
    error = statistics.stdev(x, mean) / math.sqrt(len(x)) if len(x) > 1 else None
    return mean, error
