"""Is the plan right? Its counts next to the peaks that torch's FSDPMemTracker sees, with fake ranks
and fake tensors.

    python extras/memory/plan_tracked.py 7B --ranks=8 --rollout=64 --score=32 --micro=8 \\
        --checkpointing=1                                                       # minutes, 1 GB

The model is sharded and run as ppo.py does it, with its own functions; nothing is computed and
nothing sent. One model at a time: what the others hold at rest is plain arithmetic.
"""
import argparse, sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
from extras.memory import plan
from plumbing.cache import in_place_cache


def sharded(Auto, config, mesh, *, frozen=False, checkpointing=False):
    """As common.load_model does it"""
    dtype = torch.bfloat16
    model = Auto.from_config(config, dtype=dtype if frozen else torch.float32)
    model.train(not frozen).requires_grad_(not frozen)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    return fully_shard(
        model, mesh=mesh, mp_policy=mixed, reshard_after_forward=True if frozen else None
    )


def peak_of(model, run):
    """Bytes at the peak of run(tracker)"""
    tracker = FSDPMemTracker(model)
    with tracker:
        run(tracker)
    return sum(parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values())


def packed(B, S, T):
    return (
        torch.ones(B, S, dtype=torch.long),
        torch.ones(B, S, dtype=torch.bool),
        torch.ones(B, T, dtype=torch.bool),
    )


@torch.no_grad()
def rollout_peak(config, mesh, B, P, T):
    """The larger of the prompts' forward and of the last token's, as in common.generate"""
    peaks = []
    for prefill in (True, False):
        policy = sharded(AutoModelForCausalLM, config, mesh).eval()

        def run(tracker):
            for part in policy.modules():
                if isinstance(part, FSDPModule):
                    part.set_reshard_after_forward(False, recurse=False)
                    part.unshard()
            cache = in_place_cache(config, room=P + T)
            ids, mask, _ = packed(B, P if prefill else P + T, 1)
            if not prefill:  # the cache is full but for the last place
                for layer in cache.layers:
                    one = torch.zeros(
                        B, config.num_key_value_heads, 1, config.head_dim, dtype=torch.bfloat16
                    )
                    layer.update(one, one)
                    layer.length = P + T - 1
                ids = ids[:, :1]
            logits = policy(
                input_ids=ids,
                attention_mask=mask,
                position_ids=torch.zeros_like(ids),
                use_cache=True,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]
            common.draw_tokens(logits, torch.zeros(B, 1), 1.0, 1.0, 0)

        peaks.append(peak_of(policy, run))
    return max(peaks)


def tracked(config, *, ranks, rollout, score, micro, P, T, checkpointing):
    """-> {phase: bytes at its peak on one of so many ranks}"""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    config.num_labels, config.token_classification_bias, config.classifier_dropout = 1, False, 0.0
    kinds = dict(
        policy=(AutoModelForCausalLM, common.token_logprobs, micro),
        value=(AutoModelForTokenClassification, common.token_heads, score),
    )
    peaks = {}
    with FakeTensorMode():
        peaks["rollout"] = rollout_peak(config, mesh, rollout, P, T)
        for name, (Auto, function, rows) in kinds.items():
            model = sharded(Auto, config, mesh, frozen=name == "value")
            with torch.no_grad():
                peaks[f"score {name}"] = peak_of(
                    model, lambda tracker: function(model, *packed(rows, P + T, T))
                )
            model = sharded(Auto, config, mesh, checkpointing=checkpointing)

            def update(tracker):
                for _ in range(2):  # in the second the gradients of the first are there
                    function(model, *packed(micro, P + T, T)).sum().backward()
                    tracker.reset_mod_stats()

            peaks[f"update {name}"] = peak_of(model, update)
    dist.destroy_process_group()
    return peaks


def counted(config, *, ranks, rollout, score, micro, P, T, checkpointing):
    """The same of the plan"""
    policy, value = (
        plan.shape(config, Auto) for Auto in (AutoModelForCausalLM, AutoModelForTokenClassification)
    )
    S = P + T
    options = dict(checkpointing=checkpointing)
    parts = {
        "rollout": plan.rollout_memory(policy, ranks, rollout, P, T, 2),
        "score policy": plan.forward_memory(policy, ranks, micro, S, T, 2, held=4, head="logits"),
        "update policy": plan.update_memory(
            policy, ranks, micro, S, T, 2, head="logits", **options
        ),
        "score value": plan.forward_memory(value, ranks, score, S, T, 2, held=2, head="values"),
        "update value": plan.update_memory(value, ranks, micro, S, T, 2, head="values", **options),
    }
    return {phase: sum(part.values()) for phase, part in parts.items()}


def compare(config, **point):
    """Print both and -> {phase: counted / tracked}"""
    one, two = counted(config, **point), tracked(config, **point)
    for phase in one:
        print(
            f"{phase:14} counted {one[phase] / 1e9:8.3f} GB, tracked {two[phase] / 1e9:8.3f} GB: "
            f"{one[phase] / two[phase] - 1:+.1%}",
            flush=True,
        )
    return {phase: one[phase] / two[phase] for phase in one}


if __name__ == "__main__":
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("model", help="7B, 13B, 70B, or a folder with a config.json")
    for name, default in dict(
        ranks=8, rollout=64, score=32, micro=8, P=192, T=300, checkpointing=0
    ).items():
        flags.add_argument(f"--{name}", type=int, default=default)
    point = vars(flags.parse_args())
    name = point.pop("model")
    compare(
        LlamaConfig(**plan.SHAPES[name])
        if name in plan.SHAPES
        else AutoConfig.from_pretrained(name),
        **point,
    )
