"""The memory of a ppo.py run per GPU and phase, from the models' shapes alone: no GPU, no weights.

    WORLD_SIZE=8 python ppo.py --plan=true                                                   # the config, on 8 ranks
    WORLD_SIZE=16 LOCAL_WORLD_SIZE=8 python ppo.py --plan=true                               # on two machines of 8
    WORLD_SIZE=8 python ppo.py --plan=true --policy=13B --reward_model=13B --gpu_gb=141      # 7B, 13B, 70B: LLaMA's

Counted, not measured: a phase is the largest of a few moments, and a moment is the sum of the tensors alive then. Not
counted: the CUDA context, NCCL's buffers, fragmentation; so `fits` leaves 12% of the GPU free. GB are 1e9 bytes.
plan_tracked.py holds the counts against torch's memory tracker; three figures (0.35, 2.2, and the 4 at the end of
update()) were read off it, all others follow from the code.

B sequences, S = P + T tokens, V vocabulary, c bytes of the computing dtype; of a model m: h hidden, i intermediate, kv
numbers in a token's cache, `layer` parameters in one decoder layer, `root` parameters outside of the layers.
"""
import dataclasses, os
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, LlamaConfig

from plumbing.files import check_fits, check_model, check_numbers
from plumbing.ranks import RANK, WORLD, say

SHAPES = {name: dict(vocab_size=32000, hidden_size=h, intermediate_size=i, num_hidden_layers=layers,
                     num_attention_heads=heads, num_key_value_heads=kv)
          for name, h, i, layers, heads, kv in (("7B", 4096, 11008, 32, 32, 32), ("13B", 5120, 13824, 40, 40, 40),
                                                ("70B", 8192, 28672, 80, 64, 8))}
RESERVE = 0.12  # of the GPU, for what is not counted
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "kv_cache")


def shape(config, Auto):
    """Sizes of a model, counted on the meta device"""
    config.num_labels, config.token_classification_bias = 1, False
    with torch.device("meta"):
        model = Auto.from_config(config)
    def count(module):
        return sum(p.numel() for p in module.parameters())
    text, layers, params = config.get_text_config(), model.base_model.layers, count(model)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return SimpleNamespace(h=text.hidden_size, i=text.intermediate_size, V=text.vocab_size, head_dim=head_dim,
                           kv=2 * text.num_key_value_heads * head_dim * len(layers), layers=len(layers), params=params,
                           layer=count(layers[0]), root=params - sum(map(count, layers)),
                           tied=text.tie_word_embeddings and hasattr(model, "lm_head"))


def largest(*moments):
    return max(moments, key=lambda moment: sum(moment.values()))


# ---------------------------------------------------------------- one model in one phase -> bytes by part, and shards

def forward_activations(m, B, S, c):
    """Inside a layer's MLP without gradients: gate, up and their product; the residual stream; cos, sin; the mask"""
    return B * S * (3 * m.i + 4 * m.h + 2 * m.head_dim) * c + B * S * S


def rollout(m, ranks, B, P, T, c):
    """The policy whole, its cache for B rows; the prompts go through at once, then one token a row"""
    weights, kv_cache = 4 * m.params / ranks + c * m.params, B * (P + T) * m.kv * c
    return largest(
        dict(weights=weights, kv_cache=kv_cache, activations=forward_activations(m, B, P, c)),
        dict(weights=weights, kv_cache=kv_cache, logits=B * m.V * (c + 8)),  # at the last position; softmax, sums
        dict(weights=4 * m.params / ranks + 2 * c * m.root))                 # the first gather, before it is split


def forward(m, ranks, B, S, T, c, *, held, head):
    """Scoring: a forward without gradients. held: bytes per weight of a shard; head: "logits" [B, T, V], "values" """
    shards = held * m.params / ranks
    return largest(
        dict(weights=shards + 2 * c * (m.root + m.layer)),                   # the first gather
        dict(weights=shards + c * m.root + 2 * c * m.layer, activations=forward_activations(m, B, S, c)),
        dict(weights=shards + c * m.root, logits=8 * B * T * m.V * (head == "logits")))  # float32: logits, log-softmax


def update(m, ranks, B, S, T, c, *, checkpointing, head):
    """Forward and backward of a micro-batch, the gradients of earlier ones in place"""
    shards = gradients = 4 * m.params / ranks
    inside = B * S * (4 * m.i + 12 * m.h) * c + B * S * S * c   # what a layer keeps for its backward; mask
    kept = m.layers * (B * S * m.h * c if checkpointing else inside)
    backward = dict(weights=shards + c * m.root + 2 * c * m.layer,           # this layer, and the next one on its way
                    gradients=gradients + 0.35 * c * m.layer, activations=kept + 2.2 * B * S * m.i * c)
    if checkpointing:  # of the last but one layer: its forward again, while the last one is being reduced in float32
        backward["activations"] += inside
        backward["gradients"] += 4 * m.layer
    return largest(
        backward,
        dict(weights=shards + c * m.root, gradients=gradients, activations=kept + 4 * B * S * m.h * c,
             logits=12 * B * T * m.V * (head == "logits")),                  # float32: log-softmax and two gradients
        dict(weights=shards + c * m.root * m.tied,                           # the root's gradient, reduced in float32;
             gradients=gradients + (c + 4) * m.root + 4 * m.layer * m.tied), # a tied embedding stays until it is
        dict(weights=shards + 2 * c * (m.root + m.layer), gradients=gradients))


# ---------------------------------------------------------------- the run

def phases(policy, value, ranks, cfg, c=2):
    """-> {phase: {part: bytes per GPU}} of a run whose models are sharded over `ranks` GPUs"""
    P, T = cfg.query_len, cfg.response_len
    S, trained = P + T, 4 * (policy.params + value.params) / ranks
    moments = 2 * trained
    rest = dict(weights=trained + c * (policy.params + value.params) / ranks, optimizer=moments)
    def beside(m, held, parts):  # the others at rest
        return {part: rest.get(part, 0) - (held * m.params / ranks if part == "weights" else 0) + parts.get(part, 0)
                for part in PARTS}
    def updating(m, other, head):
        parts = update(m, ranks, cfg.micro_batch, S, T, c, checkpointing=cfg.activation_checkpointing, head=head)
        parts["gradients"] += 4 * other.params / ranks
        parts["weights"] += c * other.root  # gathered for scoring
        return beside(m, 4, parts)
    def scoring(m, held, rows, head):
        return beside(m, held, forward(m, ranks, rows, S, T, c, held=held, head=head))
    return {
        "at rest": {part: rest.get(part, 0) for part in PARTS},
        "rollout": beside(policy, 4, rollout(policy, ranks, cfg.rollout_micro_batch, P, T, c)),
        "score": largest(*(scoring(policy, held, cfg.micro_batch, "logits") for held in (4, c)),
                         *(scoring(value, held, cfg.score_micro_batch, "values") for held in (4, c))),
        "update": largest(updating(policy, value, "logits"), updating(value, policy, "values")),
        "optimizer step": {part: 0 for part in PARTS} | dict(
            weights=rest["weights"], gradients=trained, optimizer=moments + trained)}  # a square root, all at once


def peak(*args, **options):
    return max(sum(parts.values()) for parts in phases(*args, **options).values())


def largest_that_fit(policy, value, ranks, cfg, c):
    """Each micro-batch as large as fits (powers of two, at most a rank's rows) -> {field: rows}, {} if none does"""
    limit, found = (1 - RESERVE) * cfg.gpu_gb * 1e9, {}
    for field, rows in (("rollout_micro_batch", cfg.rollout_batch), ("score_micro_batch", cfg.rollout_batch),
                        ("micro_batch", cfg.batch)):
        def fits(n):  # the phases are one after the other: the other fields do not matter
            small = dataclasses.replace(cfg, rollout_micro_batch=1, score_micro_batch=1, micro_batch=1)
            return peak(policy, value, ranks, dataclasses.replace(small, **{field: n}), c) <= limit
        sizes = [2 ** k for k in range(12) if 2 ** k <= max(1, rows // WORLD)]
        found[field] = max(filter(fits, sizes), default=0)
    return found if all(found.values()) else {}


def models_of(cfg):
    """The shapes of policy and value: named ones, or the folders' config.json; before there is one the paper's 7B"""
    def config(name, flag, made_by):
        default = type(cfg).__dataclass_fields__[flag].default
        if name == default and not Path(name).exists():
            say(f"{name} is not there yet: planned with LLaMA-7B's shape, the paper's")
            name = "7B"
        if name in SHAPES:
            return LlamaConfig(**SHAPES[name])
        check_model(name, flag, made_by, weights=False)
        check_fits(name, flag, cfg.query_len + cfg.response_len)
        return AutoConfig.from_pretrained(name)
    return (shape(config(cfg.policy, "policy", "python sft.py"), AutoModelForCausalLM),
            shape(config(cfg.reward_model, "reward_model", "python reward_model.py"), AutoModelForTokenClassification))


def show_plan(cfg):
    """Print the plan (rank 0)"""
    if RANK > 0:
        return
    check_numbers(cfg, "rollout_batch", "rollout_micro_batch", "score_micro_batch", "batch", "micro_batch",
                  "response_len")
    policy, value = models_of(cfg)
    ranks = min(WORLD, int(os.environ.get("LOCAL_WORLD_SIZE", WORLD)))  # sharded inside a machine, replicated across
    c = 4 if cfg.dtype == "float32" else 2
    plan = phases(policy, value, ranks, cfg, c)
    print(f"policy {policy.params / 1e9:.3g}B and value {value.params / 1e9:.3g}B parameters on {WORLD} rank(s), "
          f"sharded over {ranks}; {cfg.query_len} + {cfg.response_len} tokens; GB per GPU\n")
    print(f"{'':15}" + "".join(f"{part.replace('_', ' '):>13}" for part in (*PARTS, "total")))
    for phase, parts in plan.items():
        columns = (*(parts[part] for part in PARTS), sum(parts.values()))
        print(f"{phase:15}" + "".join(f"{x / 1e9:13.1f}" for x in columns))
    most = max(sum(parts.values()) for parts in plan.values()) / 1e9
    fits = most <= (1 - RESERVE) * cfg.gpu_gb
    print(f"\nThe peak is {most:.1f} GB: it {'fits' if fits else 'DOES NOT FIT'} on gpu_gb={cfg.gpu_gb:g}, of which "
          f"{RESERVE:.0%} are kept for what is not counted (CUDA context, NCCL, fragmentation).")
    found = largest_that_fit(policy, value, ranks, cfg, c)
    print("The largest micro-batches that fit: " + (", ".join(f"--{field}={n}" for field, n in found.items())
                                                    or "none; take larger GPUs or a smaller model"))
    if not cfg.activation_checkpointing and not fits:
        print("--activation_checkpointing=true makes the update smaller.")
    print(f"On disk: {12 * (policy.params + value.params) / 1e9:.0f} GB per checkpoint (two while one is written), "
          f"{c * policy.params / 1e9:.3g} GB per model folder.")
