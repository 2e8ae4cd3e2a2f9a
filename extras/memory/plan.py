"""The memory of a ppo.py run per GPU and phase, from the models' shapes alone: no GPU, no weights.

    WORLD_SIZE=8 python ppo.py --plan                           # the config, on 8 ranks
    WORLD_SIZE=16 LOCAL_WORLD_SIZE=8 python ppo.py --plan       # on two machines of 8
    WORLD_SIZE=8 python ppo.py --plan --policy=13B --reward_model=13B --gpu_gb=141
                                                                # 7B, 13B, 70B: LLaMA's shapes

Counted, not measured: a phase is the largest of a few moments, and a moment is the sum of the
tensors that exist then. Not counted: the CUDA context, NCCL's buffers, fragmentation; so `fits`
leaves 12% of the GPU free. GB are 1e9 bytes. plan_tracked.py compares these counts with torch's
memory tracker; three figures (0.35, 2.2, and the 4 at the end of update_memory()) were read off it,
all others follow from the code.

B sequences, S = P + T tokens, V vocabulary, c bytes of the computing dtype. Of a model m: h hidden,
i intermediate, kv numbers in a token's cache, `layer` parameters in one decoder layer, `root`
parameters outside of the layers.
"""
if __name__ == "__main__":
    raise SystemExit("plan.py is a part of: python ppo.py --plan")

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification,
                          LlamaConfig)

from plumbing.files import ABOVE_0, COUNT, check_numbers
from plumbing.models import check_fits, check_model
from plumbing.ranks import RANK, WORLD, say


def llama(hidden, intermediate, layers, heads, kv_heads):
    return dict(vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads)


SHAPES = {"7B": llama(4096, 11008, 32, 32, 32), "13B": llama(5120, 13824, 40, 40, 40),
          "70B": llama(8192, 28672, 80, 64, 8)}
PART = 128  # tokens whose log-probs common.token_logprobs computes at a time
RESERVE = 0.12  # of the GPU, for what is not counted
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "kv_cache")


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def shape(config, Auto):
    """Sizes of a model, counted on the meta device"""
    config.num_labels = 1
    config.token_classification_bias = False
    with torch.device("meta"):
        model = Auto.from_config(config)
    text = config.get_text_config()
    layers = model.base_model.layers
    params = parameters(model)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return SimpleNamespace(
        h=text.hidden_size, i=text.intermediate_size, V=text.vocab_size, head_dim=head_dim,
        kv=2 * text.num_key_value_heads * head_dim * len(layers), layers=len(layers),
        params=params, layer=parameters(layers[0]), root=params - sum(map(parameters, layers)),
        tied=text.tie_word_embeddings and hasattr(model, "lm_head"))


def largest_moment(*moments):
    """The moment with the most bytes; a moment is {part: bytes}"""
    return max(moments, key=lambda moment: sum(moment.values()))


# ---------------------------------------------------------------- one model in one phase
# Each function gives the bytes by part, shards included.

def forward_activations(m, B, S, c):
    """Inside a layer's MLP without gradients: gate, up and their product; the residual stream; cos
    and sin; the mask"""
    return B * S * (3 * m.i + 4 * m.h + 2 * m.head_dim) * c + B * S * S


def rollout_memory(m, ranks, B, P, T, c):
    """The full policy and its cache for B rows; the prompts go through at once, then one token a
    row"""
    weights = 4 * m.params / ranks + c * m.params
    kv_cache = B * (P + T) * m.kv * c
    prefill = dict(weights=weights, kv_cache=kv_cache,
                   activations=forward_activations(m, B, P, c))
    # At the last position: logits, softmax, cumulative sums.
    sampling = dict(weights=weights, kv_cache=kv_cache, logits=B * m.V * (c + 8))
    # The first gather, before it is split.
    gather = dict(weights=4 * m.params / ranks + 2 * c * m.root)
    return largest_moment(prefill, sampling, gather)


def forward_memory(m, ranks, B, S, T, c, *, held, head):
    """Scoring: a forward without gradients. held: bytes per weight of a shard; head: "logits"
    [B, T, V] or "values" """
    shards = held * m.params / ranks
    gather = dict(weights=shards + 2 * c * (m.root + m.layer))
    inside = dict(weights=shards + c * m.root + 2 * c * m.layer,
                  activations=forward_activations(m, B, S, c))
    moments = [gather, inside]
    if head == "logits":  # all of them, and of a part their float32 copy and its log-softmax
        logits = (c * B * T + 8 * min(B * T, PART)) * m.V
        moments.append(dict(weights=shards + c * m.root, logits=logits))
    return largest_moment(*moments)


def update_memory(m, ranks, B, S, T, c, *, checkpointing, head):
    """Forward and backward of a micro-batch; the gradients of earlier ones exist"""
    shards = 4 * m.params / ranks
    gradients = 4 * m.params / ranks
    inside = B * S * (4 * m.i + 13 * m.h) * c  # what a layer keeps for its backward
    kept = m.layers * (B * S * m.h * c if checkpointing else inside)

    # Backward of a layer: its weights and the next one's, which is being gathered.
    backward = dict(weights=shards + c * m.root + 2 * c * m.layer,
                    gradients=gradients + 0.35 * c * m.layer,
                    activations=kept + 2.2 * B * S * m.i * c)
    if checkpointing:
        # Of the last but one layer: its forward again, while the last one is reduced in float32.
        backward["activations"] += inside
        backward["gradients"] += 4 * m.layer

    # The loss: all logits and their gradient; of a part log-softmax and two gradients in float32.
    logits = (2 * c * B * T + 12 * min(B * T, PART)) * m.V if head == "logits" else 0
    loss = dict(weights=shards + c * m.root, gradients=gradients,
                activations=kept + 4 * B * S * m.h * c, logits=logits)

    # The root's gradient is reduced in float32; a tied embedding stays until then.
    tied = 1 if m.tied else 0
    reduce = dict(weights=shards + c * m.root * tied,
                  gradients=gradients + (c + 4) * m.root + 4 * m.layer * tied)
    gather = dict(weights=shards + 2 * c * (m.root + m.layer), gradients=gradients)
    return largest_moment(backward, loss, reduce, gather)


# ---------------------------------------------------------------- the run

def phases(policy, value, ranks, cfg, c=2):
    """-> {phase: {part: bytes per GPU}} of a run whose models are sharded over `ranks` GPUs"""
    P = cfg.query_len
    T = cfg.response_len
    S = P + T
    both = policy.params + value.params
    trained = 4 * both / ranks
    moments = 2 * trained
    rest = dict(weights=trained + c * both / ranks, optimizer=moments)

    def with_rest(m, held, parts):
        """One model in a phase, and the other models at rest"""
        found = {}
        for part in PARTS:
            found[part] = rest.get(part, 0) + parts.get(part, 0)
        found["weights"] -= held * m.params / ranks
        return found

    def updating(m, other, head):
        parts = update_memory(m, ranks, cfg.micro_batch, S, T, c, head=head,
                              checkpointing=cfg.activation_checkpointing)
        parts["gradients"] += 4 * other.params / ranks
        parts["weights"] += c * other.root  # gathered for scoring
        return with_rest(m, 4, parts)

    def scoring(m, held, rows, head):
        parts = forward_memory(m, ranks, rows, S, T, c, held=held, head=head)
        return with_rest(m, held, parts)

    rollout = rollout_memory(policy, ranks, cfg.rollout_micro_batch, P, T, c)
    scores = []
    for held in (4, c):  # trained models, frozen models
        scores.append(scoring(policy, held, cfg.micro_batch, "logits"))
    for held in (4, c):
        scores.append(scoring(value, held, cfg.score_micro_batch, "values"))
    step = dict.fromkeys(PARTS, 0)
    # The fused Adam works in place.
    step |= dict(weights=rest["weights"], gradients=trained, optimizer=moments)
    return {
        "at rest": {part: rest.get(part, 0) for part in PARTS},
        "rollout": with_rest(policy, 4, rollout),
        "score": largest_moment(*scores),
        "update": largest_moment(updating(policy, value, "logits"),
                                 updating(value, policy, "values")),
        "optimizer step": step}


def peak(*args, **options):
    return max(sum(parts.values()) for parts in phases(*args, **options).values())


def largest_that_fit(policy, value, ranks, cfg, c):
    """Each micro-batch as large as fits: a power of two, at most the rows of a rank.

    -> {field: rows}, {} if none fits"""
    limit = (1 - RESERVE) * cfg.gpu_gb * 1e9
    found = {}
    rows_of = dict(rollout_micro_batch=cfg.rollout_batch, score_micro_batch=cfg.rollout_batch,
                   micro_batch=cfg.batch)
    for field, rows in rows_of.items():
        # The phases follow each other, so the other fields do not matter.
        small = dataclasses.replace(cfg, **dict.fromkeys(rows_of, 1))
        found[field] = 0
        for n in (2 ** k for k in range(12)):
            with_n = dataclasses.replace(small, **{field: n})
            if n <= max(1, rows // WORLD) and peak(policy, value, ranks, with_n, c) <= limit:
                found[field] = n
    return found if all(found.values()) else {}


def planned_config(cfg, flag, made_by):
    """The config of policy or reward model: a named shape, a folder's, or the paper's 7B before the
    folder exists"""
    name = getattr(cfg, flag)
    default = type(cfg).__dataclass_fields__[flag].default
    if name == default and not Path(name).exists():
        say(f"{name} is not there yet: planned with LLaMA-7B's shape, the paper's")
        name = "7B"
    if name in SHAPES:
        return LlamaConfig(**SHAPES[name])
    check_model(name, flag, made_by, weights=False)
    check_fits(name, flag, cfg.query_len + cfg.response_len, head="zero")
    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def models_of(cfg):
    """-> the shapes of policy and value"""
    policy = planned_config(cfg, "policy", "python sft.py")
    value = planned_config(cfg, "reward_model", "python reward_model.py")
    return shape(policy, AutoModelForCausalLM), shape(value, AutoModelForTokenClassification)


def show_plan(cfg):
    """Print the plan (rank 0)"""
    if RANK > 0:
        return
    check_numbers(cfg, rollout_batch=COUNT, rollout_micro_batch=COUNT, score_micro_batch=COUNT,
                  batch=COUNT, micro_batch=COUNT, query_len=COUNT, response_len=COUNT,
                  gpu_gb=ABOVE_0)
    policy, value = models_of(cfg)
    # Sharded inside a machine, replicated across machines.
    ranks = min(WORLD, int(os.environ.get("LOCAL_WORLD_SIZE", WORLD)))
    c = 4 if cfg.dtype == "float32" else 2
    plan = phases(policy, value, ranks, cfg, c)

    print(f"policy {policy.params / 1e9:.3g}B and value {value.params / 1e9:.3g}B parameters on "
          f"{WORLD} rank(s), sharded over {ranks}; {cfg.query_len} + {cfg.response_len} tokens; GB "
          "per GPU\n")
    titles = [*(part.replace("_", " ") for part in PARTS), "total"]
    print(f"{'':15}" + "".join(f"{title:>13}" for title in titles))
    for phase, parts in plan.items():
        columns = [*(parts[part] for part in PARTS), sum(parts.values())]
        print(f"{phase:15}" + "".join(f"{x / 1e9:13.1f}" for x in columns))

    most = max(sum(parts.values()) for parts in plan.values()) / 1e9
    fits = most <= (1 - RESERVE) * cfg.gpu_gb
    print(f"\nThe peak is {most:.1f} GB: it {'fits' if fits else 'DOES NOT FIT'} on "
          f"gpu_gb={cfg.gpu_gb:g}, of which {RESERVE:.0%} are kept for what is not counted (CUDA "
          "context, NCCL, fragmentation).")
    found = largest_that_fit(policy, value, ranks, cfg, c)
    flags = ", ".join(f"--{field}={n}" for field, n in found.items())
    flags = flags or "none; take larger GPUs or a smaller model"
    print(f"The largest micro-batches that fit: {flags}")
    if not cfg.activation_checkpointing and not fits:
        print("--activation_checkpointing=true makes the update smaller.")
    both = policy.params + value.params
    print(f"On disk: {12 * both / 1e9:.0f} GB per checkpoint (two while one is written), "
          f"{c * policy.params / 1e9:.3g} GB per model folder.")
