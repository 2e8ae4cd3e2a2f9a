"""Code used by several stages: prompts and tokens, ranks, models, forward, generation, optimiser.

B sequences, P prompt tokens, T response tokens, S tokens of both, V vocabulary. A mask is True
where a token counts; it comes from lengths, never from `ids == pad`. prompt_ids are [B, P];
response_ids, response_mask, logprobs, values, rewards, changed, ... are [B, T]: one column per
response token a_1..a_T. "All ranks": every process must call it, since they exchange tensors."""
import functools, hashlib, json, math, os, random
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification,
                          AutoTokenizer, GenerationConfig)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from plumbing.cache import in_place_cache
from plumbing.chat import template_prompt, use_template
from plumbing.command_line import extra
from plumbing.files import whole_characters
from plumbing.models import check_loaded
from plumbing.ranks import RANK, WORLD, fail

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# ---------------------------------------------------------------- text and tokens

PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:")
PROMPT_INPUT = ("Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request.\n\n"
                "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")

def load_tokenizer(path, prompt_format=None):
    """The tokenizer of a folder or of a name on the hub; no token is added to it. prompt_format:
    "alpaca" or "template"; None: what the folder has recorded, else "template" if it has a chat
    template. Attributes: prompt_format ("alpaca", or "template" and a hash), says_bos (None: its
    folder says nothing), more_end_ids. The first two are saved in tokenizer_config.json."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"no tokenizer in {path}: {str(error).splitlines()[0]}")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no eos token; a response could never end")
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id or ()
    except OSError:  # the model has no generation_config.json
        ends = ()
    tokenizer.more_end_ids = {ends} if isinstance(ends, int) else set(ends)
    tokenizer.more_end_ids.add(tokenizer.eos_token_id)

    # transformers does not save add_bos_token, so what it says is saved under a name of our own.
    config = get_tokenizer_config(path)
    tokenizer.says_bos = config.get("add_bos_token", config.get("says_bos"))
    recorded = config.get("prompt_format")
    unrecorded = "template" if tokenizer.chat_template else "alpaca"
    tokenizer.prompt_format = prompt_format or recorded or unrecorded
    if tokenizer.prompt_format != "alpaca":
        tokenizer.prompt_format = use_template(tokenizer, path)
    if recorded and not prompt_format and recorded != tokenizer.prompt_format:
        fail(f"{path} was trained on prompts of {recorded}, its chat template is another now")
    for name in ("says_bos", "prompt_format"):
        tokenizer.init_kwargs[name] = getattr(tokenizer, name)
    for text in ("apple pear", "  two", " ", "://x", "\n\n1."):
        if decode_response(tokenizer, encode_response(tokenizer, text)) != text:
            fail(f"the tokenizer of {path} does not give {text!r} back from its ids")
    return tokenizer

def end_ids(tokenizer):
    """The ids that end a response: eos, and others that the folder names"""
    return {tokenizer.eos_token_id, *getattr(tokenizer, "more_end_ids", ())}

@functools.cache
def response_prefix(tokenizer):
    """-> the text to put before a response to encode it, and that text's ids. SentencePiece adds a
    space to the start of any text, but a response is not the start of the text. So we encode a
    newline and the response, and drop the newline's ids: "The" becomes "The", not "▁The"."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    after_newline = tokenizer.encode("\nx", add_special_tokens=False)[len(newline):]
    if tokenizer.encode("x", add_special_tokens=False) == after_newline:
        return "", []
    return "\n", newline

def encode_prompt(tokenizer, row):
    """Alpaca's prompt of a row -> ids, with bos once for the model families that use one. Or the
    chat template's prompt; then None if the row's text holds a special token."""
    if getattr(tokenizer, "prompt_format", "alpaca") != "alpaca":
        return template_prompt(tokenizer, row)
    template = PROMPT_INPUT if row.get("input") else PROMPT
    text = whole_characters(template.format(instruction=row["instruction"], input=row.get("input")))
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    # tokenizer_config.json may say it. A bare Llama tokenizer.model does not, but its bos is <s>.
    needs_bos = getattr(tokenizer, "says_bos", None)
    if needs_bos is None:
        bos = tokenizer.bos_token_id
        needs_bos = tokenizer.bos_token == "<s>" or tokenizer.encode("x")[0] == bos
    return [tokenizer.bos_token_id] + ids if needs_bos else ids

def encode_response(tokenizer, text, *, eos=True):
    """The ids that a rollout of this text would have. eos=False: it was cut before it ended."""
    before, ids_before = response_prefix(tokenizer)
    before += getattr(tokenizer, "response_space", "")
    text = before + whole_characters(text)  # a "</s>" in it stays text, by split_special_tokens
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    ids = ids[len(ids_before):]
    return ids + [tokenizer.eos_token_id] if eos else ids

def decode_response(tokenizer, ids):
    """The inverse of encode_response: ids -> text, without the token that ended it"""
    _, ids_before = response_prefix(tokenizer)
    if ids and ids[-1] in end_ids(tokenizer):
        ids = ids[:-1]
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    text = decode([*ids_before, *ids])[len(decode(ids_before)):]
    return text.removeprefix(getattr(tokenizer, "response_space", ""))

def tokenizer_hash(tokenizer):
    """Equal for two tokenizers if their vocabulary and special ids agree (pad does not matter)"""
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([vocabulary, special]).encode()).hexdigest()

# ---------------------------------------------------------------- rows, random numbers, ranks

@functools.lru_cache(4)
def epoch_order(n, *key):
    """0..n-1 in the random order of a key, e.g. (seed, epoch). It is cached: do not change it"""
    order = list(range(n))
    random.Random(" ".join(map(str, key))).shuffle(order)
    return order

def rows_at(start, stop, n, seed):
    """Rows start..stop of an endless stream: n rows, in a new order each epoch"""
    return [epoch_order(n, seed, k // n)[k % n] for k in range(start, stop)]

def row_uniforms(length, *key):
    """Random numbers for one row, [length] in [0, 1); they depend on its key, not the batch"""
    generator = random.Random(" ".join(map(str, key)))
    bits = [generator.getrandbits(24) for _ in range(length)]
    return torch.tensor(bits) / 2**24  # 24 bits are exact in float32 and never become 1.0

def setup(dtype="auto"):
    """-> device, mesh (None for a single CPU process in float32), compute dtype. All ranks."""
    cuda = torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if cuda else "float32"
    compute_dtype = getattr(torch, dtype)
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif WORLD == 1 and compute_dtype == torch.float32:
        return device, None, compute_dtype

    # Without torchrun, this process is a group of one.
    single_process = {}
    if "RANK" not in os.environ:
        single_process = dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **single_process)

    # On several machines, shard a model inside each machine and replicate it across them (HSDP).
    shape, names = (WORLD,), ("shard",)
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
    if per_machine < WORLD:
        shape, names = (WORLD // per_machine, per_machine), ("replicate", "shard")
    return device, dist.init_device_mesh(device.type, shape, mesh_dim_names=names), compute_dtype

def my_micro_batches(rows, lengths, micro_batch):
    """This rank's micro-batches of an optimizer batch, as lists of rows. lengths[row]: its tokens.
    The rows are sorted by length and dealt in snake order, so that no rank gets all the long ones:
        row, by length   0 1  2 3  4 5  6 7
        rank             1 0  0 1  1 0  0 1      with two ranks; two rows make a turn
    All ranks get equally many lists. For an empty one, run any row with weight 0, for FSDP."""
    order = sorted(rows, key=lambda row: (lengths[row], row))
    turns = math.ceil(len(order) / WORLD)
    my_rows = []
    for turn in range(turns):
        place = RANK if turn % 2 else WORLD - 1 - RANK
        my_rows += order[turn * WORLD:][place:place + 1]  # nothing, if the last turn is short
    return [my_rows[start:start + micro_batch] for start in range(0, turns, micro_batch)]

# ---------------------------------------------------------------- models

def load_model(path, device, mesh, dtype, *, head=None, frozen=False, checkpointing=False, seed=0):
    """A causal language model (head=None), or a backbone with one number per token (head="saved",
    or "zero": a new head). Trained: float32 master weights, computing in dtype. Frozen: weights in
    dtype. A folder without weights (the toy world's) is initialised from seed. All ranks."""
    # The config: no dropout, and a head that gives one number per token, without a bias.
    Auto = AutoModelForTokenClassification if head else AutoModelForCausalLM
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    dropouts = [name for name in vars(config) if "dropout" in name or name.endswith("pdrop")]
    config.update(dict.fromkeys(dropouts, 0.0))
    if head:
        config.update(dict(num_labels=1, token_classification_bias=False, classifier_dropout=0.0))

    # The full weights: one copy, in the host memory of rank 0.
    weights_dtype = dtype if frozen else torch.float32
    full_model = None
    if not mesh or RANK == 0:
        if Path(path).exists() and not any(Path(path).glob("*.safetensors*")):
            torch.manual_seed(seed)
            full_model = Auto.from_config(config, dtype=weights_dtype)
        else:
            full_model, info = Auto.from_pretrained(
                path, config=config, dtype=weights_dtype, use_safetensors=True,
                trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True)
            check_loaded(path, full_model, head, info)
        if head == "zero":
            torch.nn.init.zeros_(full_model.score.weight)

    # With a mesh, each rank starts from an empty model: shapes without memory (the meta device).
    with torch.device("meta"):
        model = Auto.from_config(config, dtype=weights_dtype) if mesh else full_model
    model.get_input_embeddings().padding_idx = None  # else EOS's embedding is frozen if it is pad
    model.train(not frozen).requires_grad_(not frozen)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if not mesh:
        return model.to(device)

    # Shard each layer, then the root; each rank gets memory for its own shards.
    shard(model, mesh, dtype, frozen=frozen)
    model.to_empty(device=device)

    # Hand out rank 0's weights; buffers, such as the rotary frequencies, are in no state dict.
    state = full_model.state_dict() if full_model else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)
    for name, buffer in model.named_buffers():
        if full_model:
            buffer.copy_(full_model.get_buffer(name))
        dist.broadcast(buffer, 0)
    return model

def shard(model, mesh, dtype, *, frozen):
    """FSDP over the mesh, in place: each layer is gathered alone, and the root is the rest"""
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    reshard = True if frozen else None  # None: the root stays gathered between forward and backward
    fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=reshard)
    for part in sharded_parts(model):
        part.set_gradient_divide_factor(1.0)  # losses are sums over global counts: gradients add up
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot average

def sharded_parts(model):
    return [module for module in model.modules() if hasattr(module, "unshard")]  # FSDP's

@contextmanager
def unsharded(model):
    """Full weights on every rank, in eval mode: inside, no rank waits for another. All ranks."""
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

# ---------------------------------------------------------------- forward: every shift by one

def upcast(x):
    """float32 for the half precisions; float64 stays"""
    return x.to(torch.promote_types(x.dtype, torch.float32))

def pack(prompts, responses, device):
    """Lists of ids -> ids, mask [B, S], right-aligned, and response_mask [B, T], left-aligned:
        prompts    responses          ids, S = 5       response_mask, T = 3
        [1 2]      [6 7 8]      ->    1 2 6 7 8        1 1 1
        [3 4 5]    [9]                . 3 4 5 9        1 0 0        (. is padding)"""
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    S, T = max(map(len, rows)), max(map(len, responses))
    ids = torch.tensor([[0] * (S - len(row)) + row for row in rows], device=device)        # [B, S]
    row_lengths = torch.tensor([[len(row)] for row in rows], device=device)                # [B, 1]
    response_lengths = torch.tensor([[len(r)] for r in responses], device=device)          # [B, 1]
    mask = torch.arange(S, device=device) >= S - row_lengths                               # [B, S]
    return ids, mask, torch.arange(T, device=device) < response_lengths                    # [B, T]

def forward(model, ids, mask, response_mask, *, before, **options):
    """The outputs at the response tokens of left-padded rows, or one token before: [tokens, V] or
    [tokens, 1], row by row. Position 0 is a row's first real token."""
    read = F.pad(response_mask.flip(1), (ids.shape[1] - response_mask.shape[1], 0))        # [B, S]
    read = read.roll(-1, 1) if before else read
    joined = extra("joined")  # None where extras/ was deleted: then the padding is computed, too
    if joined and joined.is_exact(model):
        return joined.forward(model, ids, mask, read)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    outputs = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                    **options).logits
    return outputs[read[:, -outputs.shape[1]:]]

def logprobs_of(ids, logits, temperature):
    """log pi [N] of ids [N] from logits [N, V], in float32"""
    scores = upcast(logits) if temperature == 1 else upcast(logits) / temperature
    return -F.cross_entropy(scores, ids, reduction="none")

def token_logprobs(model, ids, mask, response_mask, temperature=1.0):
    """log pi(a_t | s_t) [B, T], Section 2.2: from the logits one position before a_t. All ranks."""
    T = response_mask.shape[1]
    logits = forward(model, ids, mask, response_mask, before=True, logits_to_keep=T + 1)
    response_ids = ids[:, -T:][response_mask.flip(1)]
    parts = []  # the backward computes each again: there is no float32 copy of all logits
    for part in zip(response_ids.split(128), logits.split(128)):
        parts.append(checkpoint(logprobs_of, *part, temperature, use_reentrant=False))
    logprobs = torch.cat(parts)
    return logprobs.new_zeros(response_mask.shape).masked_scatter(response_mask, logprobs)

def token_heads(model, ids, mask, response_mask, *, before=False):
    """Head outputs [B, T]: r_t of Section 2.2, at a_t; before: V(s_t), one earlier. All ranks."""
    heads = upcast(forward(model, ids, mask, response_mask, before=before)[:, 0])
    return heads.new_zeros(response_mask.shape).masked_scatter(response_mask, heads)

# ---------------------------------------------------------------- what a reward model says

def last_token(mask):
    """True at the last token of each row, wherever the response begins, [B, T] -> [B, T]"""
    tokens_from_here = mask.long().flip(1).cumsum(1).flip(1)
    return mask.bool() & (tokens_from_here == 1)

def sequence_rewards(r, response_mask):
    """R of a sequence-level model: r at the last real token, [B, T] -> [B]"""
    return r.masked_fill(~last_token(response_mask), 0).sum(1)

def mean_rewards(r, response_mask):
    """R(tau) of Eq. 1: the mean of r_t over the real tokens, [B, T] -> [B]"""
    tokens = response_mask.sum(1).clamp(min=1)
    return r.masked_fill(~response_mask.bool(), 0).sum(1) / tokens

def total_rewards(r, response_mask, level):
    """R of a reward model of that level ("token" or "sequence"), [B, T] -> [B]"""
    return (sequence_rewards if level == "sequence" else mean_rewards)(r, response_mask)

def reward_level(path):
    """The level of the reward model in a folder: "token" or "sequence" """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        names = " ".join(config.architectures or [])
    except (OSError, ValueError) as error:
        fail(f"{path} is no model ({str(error).splitlines()[0]})")
    if "ForTokenClassification" in names:
        return "token"
    if "ForSequenceClassification" in names:
        return "sequence"
    fail(f"{path} is no reward model ({names or 'no class'}); make one: python reward_model.py")

# ---------------------------------------------------------------- generation

def draw_tokens(logits, u, temperature, top_p, top_k):
    """One token per row [B] from logits [B, V] and random numbers u [B, 1], by inverse CDF:
    torch.multinomial is ten times slower. NaN logits give index V, which is not a token."""
    if temperature == 0:
        return logits.argmax(-1)
    scores = upcast(logits) / temperature
    if top_k > 0:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)

    # The target must stay below the total, or searchsorted lands beyond the last token.
    cdf = torch.softmax(scores, -1).cumsum(-1)                                             # [B, V]
    total = cdf[:, -1:]                                                                    # [B, 1]
    just_below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(u.to(cdf) * total, just_below_total)
    return torch.searchsorted(cdf, target, right=True)[:, 0]

@torch.no_grad()
def generate(model, prompt_ids, prompt_mask, *, max_new_tokens, eos_id, temperature=1.0, top_p=1.0,
             top_k=0, uniforms=None):
    """Sample: left-padded prompts [B, P] -> response_ids, response_mask [B, T]; EOS counts, then 0
    follows. eos_id: one id, a set, or None: no response ends early. temperature 0: argmax.
    ValueError in train mode.
    uniforms [B, max_new_tokens] in [0, 1): one random number per token; None: torch draws them.
    Finished rows are removed from the batch, and rows from the end fill their slots:
        slot     0 1 2 3 4
        alive    y n y n y       two rows have ended, left = 3
        holes      1             finished slots among the first 3
        movers           4       living slots after them
        stay     0 4 2           new slot i takes what old slot stay[i] held: the fewest copies"""
    if model.training:
        raise ValueError("generate needs model.eval(): in train mode checkpointing drops the cache")
    B, P = prompt_ids.shape
    device = prompt_ids.device
    cache = in_place_cache(model.config, room=P + max_new_tokens)
    if uniforms is None:
        uniforms = torch.rand(B, max_new_tokens, device=device)
    uniforms = uniforms.to(device)                                        # [B, max_new_tokens]
    response_ids, lengths = prompt_ids.new_zeros(B, max_new_tokens), prompt_ids.new_zeros(B)
    ends = [eos_id] if isinstance(eos_id, int) else list(eos_id or ())
    ends = torch.tensor(ends, dtype=torch.long, device=device)

    # The next forward has a slot for each unfinished row; rows[slot] is its row number.
    rows = torch.arange(B, device=device)                              # [slots]
    ids = prompt_ids                                                   # [slots, P], then [slots, 1]
    positions = (prompt_mask.long().cumsum(1) - 1).clamp(min=0)        # as ids
    mask = F.pad(prompt_mask.bool(), (0, max_new_tokens), value=True)  # [slots, P + max_new_tokens]
    for t in range(max_new_tokens):
        logits = model(input_ids=ids, attention_mask=mask[:, :P + t], position_ids=positions,
                       past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        tokens = draw_tokens(logits, uniforms[rows, t:t + 1], temperature, top_p, top_k)
        if int(tokens.max()) >= logits.shape[1]:
            fail("the model's logits are NaN: its weights are broken; go back to an earlier model")
        response_ids[rows, t] = tokens
        lengths[rows] = t + 1
        alive = ~torch.isin(tokens, ends)                              # [slots]
        left = int(alive.sum())
        if left == 0:
            break
        if left < len(rows):
            holes = (~alive[:left]).nonzero()[:, 0]
            movers = alive[left:].nonzero()[:, 0] + left
            stay = torch.arange(left, device=device)
            stay[holes] = movers
            cache.batch_select_indices(stay)
            rows, mask = rows[stay], mask[stay]
            positions, tokens = positions[stay], tokens[stay]
        ids = tokens[:, None]
        positions = positions[:, -1:] + 1
    T = int(lengths.max())
    return response_ids[:, :T], torch.arange(T, device=device) < lengths[:, None]

# ---------------------------------------------------------------- optimisation

def cosine(step, steps, warmup):
    """The share of the learning rate at a step (from 0): linear warm-up, then a half cosine to 0"""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

def optimizer_step(parameters, optimizer, lr, max_grad_norm, where):
    """Clip all gradients together, step, clear them -> the norm before clipping. A parameter group
    learns at lr times its lr_factor. Exits if the norm is inf or NaN. All ranks."""
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
    if not math.isfinite(norm):
        fail(f"{where}: the gradient's norm is {norm}; saves are kept; lower --lr or see the rows")
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
