"""Is the plan right? Its counts next to the peaks that torch's FSDPMemTracker sees, with fake ranks
and fake tensors.

    python extras/memory/plan_tracked.py 7B --ranks=8 --rollout=64 --score=32 --micro=8 \\
        --checkpointing=1                                                       # minutes, 1 GB

The model is sharded and run as in ppo.py, with its functions; nothing is computed and nothing is
sent. Only one model at a time: what the others hold at rest is plain arithmetic.
"""
import argparse, sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification,
                          LlamaConfig)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
from extras import joined
from extras.memory import plan
from plumbing.cache import in_place_cache


def sharded(Auto, config, mesh, *, frozen=False, checkpointing=False):
    """A model sharded like those of common.load_model. Frozen: in bfloat16, without gradients"""
    dtype = torch.bfloat16
    model = Auto.from_config(config, dtype=dtype if frozen else torch.float32)
    model.train(not frozen).requires_grad_(not frozen)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    reshard = True if frozen else None
    return fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=reshard)


def peak_of(model, run):
    """Bytes at the peak of run(tracker)"""
    tracker = FSDPMemTracker(model)
    with tracker:
        run(tracker)
    devices = tracker.get_tracker_snapshot("peak").values()
    return sum(parts["Total"] for parts in devices)


def ones(B, S, T):
    """Full sequences, as from common.pack: ids [B, S], mask [B, S], response_mask [B, T]"""
    ids = torch.ones(B, S, dtype=torch.long)
    mask = torch.ones(B, S, dtype=torch.bool)
    response_mask = torch.ones(B, T, dtype=torch.bool)
    return ids, mask, response_mask


def full_rows(model, B, S, T):
    """What common.token_logprobs or token_heads gives for full rows, laid end to end, [B T]. Theirs
    find the real tokens with nonzero(), which fake tensors do not have."""
    read = (torch.arange(B)[:, None] * S + torch.arange(S - T - 1, S - 1)).flatten()
    is_head = hasattr(model, "score")
    keep = {} if is_head else dict(logits_to_keep=read)
    ids = torch.ones(1, B * S, dtype=torch.long)
    outputs = joined.run(model, ids, torch.arange(S).repeat(B)[None], [S] * B, **keep)
    if is_head:
        return common.upcast(outputs[read, 0])
    parts = []
    for part in zip(torch.ones_like(read).split(128), outputs.split(128)):
        parts.append(checkpoint(common.logprobs_of, *part, 1.0, use_reentrant=False))
    return torch.cat(parts)


def gather_all(model):
    """All weights on every rank, as in a rollout"""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()


def fill_cache(cache, config, B, length):
    """A cache that holds `length` tokens of B rows"""
    shape = (B, config.num_key_value_heads, 1, config.head_dim)
    token = torch.zeros(shape, dtype=torch.bfloat16)
    for layer in cache.layers:
        layer.update(token, token)  # allocates the room
        layer.length = length


@torch.no_grad()
def rollout_peak(config, mesh, B, P, T):
    """The larger peak of the prompts' forward and of the last token's, as in common.generate"""
    def run_and_draw(cache, ids, mask):
        logits = policy(input_ids=ids, attention_mask=mask, position_ids=torch.zeros_like(ids),
                        use_cache=True, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        common.draw_tokens(logits, torch.zeros(B, 1), 1.0, 1.0, 0)

    def run_prompts(tracker):
        cache = in_place_cache(config, room=P + T)
        ids, mask, _ = ones(B, P, 1)
        run_and_draw(cache, ids, mask)

    def run_last_token(tracker):
        cache = in_place_cache(config, room=P + T)
        ids, mask, _ = ones(B, P + T, 1)
        fill_cache(cache, config, B, P + T - 1)
        run_and_draw(cache, ids[:, :1], mask)

    peaks = []
    for run in (run_prompts, run_last_token):
        policy = sharded(AutoModelForCausalLM, config, mesh).eval()

        def gathered(tracker):
            gather_all(policy)
            run(tracker)
        peaks.append(peak_of(policy, gathered))
    return max(peaks)


def tracked(config, *, ranks, rollout, score, micro, P, T, checkpointing):
    """-> {phase: bytes at its peak on one of so many ranks}"""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))
    config.num_labels = 1
    config.token_classification_bias = False
    config.classifier_dropout = 0.0
    S = P + T

    def score_and_update(name, Auto, rows, *, frozen):
        model = sharded(Auto, config, mesh, frozen=frozen)

        def score_rows(tracker):
            full_rows(model, rows, S, T)
        with torch.no_grad():
            peaks[f"score {name}"] = peak_of(model, score_rows)
        model = sharded(Auto, config, mesh, checkpointing=checkpointing)

        def update_twice(tracker):  # the second time the gradients of the first exist
            for _ in range(2):
                full_rows(model, micro, S, T).sum().backward()
                tracker.reset_mod_stats()
        peaks[f"update {name}"] = peak_of(model, update_twice)

    peaks = {}
    as_on_a_gpu = mock.patch.object(joined, "attention_dtype", lambda x: x.dtype)
    with FakeTensorMode(), as_on_a_gpu:
        peaks["rollout"] = rollout_peak(config, mesh, rollout, P, T)
        score_and_update("policy", AutoModelForCausalLM, micro, frozen=False)
        score_and_update("value", AutoModelForTokenClassification, score, frozen=True)
    dist.destroy_process_group()
    return peaks


def counted(config, *, ranks, rollout, score, micro, P, T, checkpointing):
    """-> {phase: bytes} of the same phases, as plan.py counts them"""
    policy = plan.shape(config, AutoModelForCausalLM)
    value = plan.shape(config, AutoModelForTokenClassification)
    S = P + T
    c = 2  # bytes of bfloat16

    def update(m, head):
        return plan.update_memory(m, ranks, micro, S, T, c, head=head, checkpointing=checkpointing)

    parts = {
        "rollout": plan.rollout_memory(policy, ranks, rollout, P, T, c),
        "score policy": plan.forward_memory(policy, ranks, micro, S, T, c, held=4, head="logits"),
        "update policy": update(policy, "logits"),
        "score value": plan.forward_memory(value, ranks, score, S, T, c, held=2, head="values"),
        "update value": update(value, "values")}
    return {phase: sum(part.values()) for phase, part in parts.items()}


def compare(config, **point):
    """Print both and -> {phase: counted / tracked}"""
    count = counted(config, **point)
    peaks = tracked(config, **point)
    ratios = {phase: count[phase] / peaks[phase] for phase in count}
    for phase, ratio in ratios.items():
        print(f"{phase:14} counted {count[phase] / 1e9:8.3f} GB, "
              f"tracked {peaks[phase] / 1e9:8.3f} GB: {ratio - 1:+.1%}", flush=True)
    return ratios


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("model", help="7B, 13B, 70B, or a folder with a config.json")
    defaults = dict(ranks=8, rollout=64, score=32, micro=8, P=192, T=300, checkpointing=0)
    for name, default in defaults.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    point = vars(flags.parse_args())
    name = point.pop("model")
    if name in plan.SHAPES:
        config = LlamaConfig(**plan.SHAPES[name])
    else:
        config = AutoConfig.from_pretrained(name)
    compare(config, **point)
