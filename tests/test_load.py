"""A sharded model is from_pretrained's to the last bit, and only rank 0 holds it whole. pytest
tests/test_load.py"""

import torch
from conftest import ROOT, run
from transformers import LlamaConfig, LlamaForCausalLM

CHECK = """
import itertools, sys
sys.path.insert(0, {root!r})
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
import common
from plumbing import ranks
loads = []
kinds = [(None, False, torch.float32), (None, True, torch.bfloat16), ("zero", False, torch.float32)]
device, mesh, _ = common.setup("float32")
for Auto in (AutoModelForCausalLM, AutoModelForTokenClassification):
    def spy(*args, load=Auto.from_pretrained, **options):
        loads.append(ranks.RANK)
        return load(*args, **options)
    Auto.plain, Auto.from_pretrained = Auto.from_pretrained, spy
for path, (head, frozen, held) in itertools.product(sys.argv[1:], kinds):
    model = common.load_model(path, device, mesh, torch.bfloat16, head=head, frozen=frozen)
    Auto = AutoModelForTokenClassification if head else AutoModelForCausalLM
    options = dict(num_labels=1) if head else {}
    want = Auto.plain(path, dtype=held, **options)
    if head:
        want.score.weight.data.zero_()
        want.score.bias = None
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    buffers = dict(model.named_buffers()), dict(want.named_buffers())
    for ours, plain in ((state, want.state_dict()), buffers):
        assert ours and ours.keys() == plain.keys(), ours.keys() ^ plain.keys()
        for name, x in ours.items():
            assert x.dtype == plain[name].dtype and torch.equal(x, plain[name]), name
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in want.named_parameters()]
    is_tied = head or model.lm_head.weight is model.model.embed_tokens.weight
    assert head or is_tied == want.config.tie_word_embeddings
    assert model.get_input_embeddings().padding_idx is None
    assert all(p.requires_grad != frozen for p in model.parameters()) and model.training != frozen
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, 2, 8]])
        with common.unsharded(model):
            assert not any(isinstance(p, DTensor) for p in model.parameters())
        assert all(isinstance(p, DTensor) for p in model.parameters()) and model.training != frozen
        # what is trained keeps its root whole for the backward, what is frozen keeps nothing
        model(input_ids=ids)
        assert all(isinstance(p, DTensor) for p in model.parameters()) == frozen
        logits = want.to(torch.bfloat16)(input_ids=ids).logits
        assert torch.allclose(model.eval()(input_ids=ids).logits, logits, atol=0.02)
assert set(loads) <= {{0}}, loads
for checkpointing in (False, True):  # then a layer is computed once more, in the backward
    model = common.load_model(sys.argv[1], device, mesh, torch.float32, checkpointing=checkpointing)
    calls = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model(input_ids=ids).logits.sum().backward()
    assert len(calls) == len(model.model.layers) * (2 if checkpointing else 1), calls
x = torch.tensor([ranks.RANK + 1.0])
assert (ranks.total(x).item(), ranks.total(x, "max").item(), x.item()) == (3, 2, ranks.RANK + 1)
"""


def test_two_ranks_load_what_from_pretrained_loads(tmp_path):
    for name, tied in (("tied", True), ("untied", False)):
        config = LlamaConfig(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            pad_token_id=2,
            num_attention_heads=4,
            tie_word_embeddings=tied,
            eos_token_id=2,
        )  # pad is eos
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    (tmp_path / "check.py").write_text(CHECK.format(root=str(ROOT)))
    run(tmp_path / "check.py", tmp_path / "tied", tmp_path / "untied", ranks=2)


MACHINES = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import common
from plumbing import ranks
os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if each of the two ranks were a machine of its own
device, mesh, _ = common.setup("float32")
assert mesh.mesh_dim_names == ("replicate", "shard") and tuple(mesh.shape) == (2, 1), mesh
model = common.load_model(sys.argv[1], device, mesh, torch.float32)
held = [p.to_local().numel() == p.numel() for p in model.parameters()]
assert all(held), "a machine holds the complete model"
loss = model(input_ids=torch.tensor([[3 + ranks.RANK, 4]])).logits.square().sum()
loss.backward()
norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).full_tensor()
assert ranks.total(norm, "max") == norm, "the gradients of all machines add up to the same"
"""


def test_machines_hold_the_whole_model_each(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).save_pretrained(tmp_path / "model")
    (tmp_path / "check.py").write_text(MACHINES.format(root=str(ROOT)))
    run(tmp_path / "check.py", tmp_path / "model", ranks=2)
