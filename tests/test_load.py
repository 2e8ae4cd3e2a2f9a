"""A sharded model is from_pretrained's to the last bit, and only rank 0 loads all of it.
pytest tests/test_load.py"""
import torch
from conftest import ROOT, run
from transformers import LlamaConfig, LlamaForCausalLM

# What two ranks run. argv: the folders of the models.
CHECK = """
import sys
sys.path.insert(0, {root!r})
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
import common
from plumbing import ranks

paths = sys.argv[1:]
device, mesh, _ = common.setup("float32")
IDS = torch.tensor([[5, 6, 7, 2, 8]])
FULL = StateDictOptions(full_state_dict=True)

# Note the rank of each call of from_pretrained; `plain` is not noted.
loads = []
for Auto in (AutoModelForCausalLM, AutoModelForTokenClassification):
    def spy(*args, load=Auto.from_pretrained, **options):
        loads.append(ranks.RANK)
        return load(*args, **options)
    Auto.plain = Auto.from_pretrained
    Auto.from_pretrained = spy


def same_tensors(ours, plain):
    assert ours and ours.keys() == plain.keys(), ours.keys() ^ plain.keys()
    for name, x in ours.items():
        assert x.dtype == plain[name].dtype, name
        assert torch.equal(x, plain[name]), name


def sharded(model):
    return [isinstance(parameter, DTensor) for parameter in model.parameters()]


def plain_model(path, head, weights_dtype):
    if not head:
        return AutoModelForCausalLM.plain(path, dtype=weights_dtype)
    model = AutoModelForTokenClassification.plain(path, dtype=weights_dtype, num_labels=1)
    model.score.weight.data.zero_()
    model.score.bias = None
    return model


@torch.no_grad()
def compare(path, head, frozen, weights_dtype):
    model = common.load_model(path, device, mesh, torch.bfloat16, head=head, frozen=frozen)
    plain = plain_model(path, head, weights_dtype)
    same_tensors(get_model_state_dict(model, options=FULL), plain.state_dict())
    same_tensors(dict(model.named_buffers()), dict(plain.named_buffers()))
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in plain.named_parameters()]
    if not head:
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        assert tied == plain.config.tie_word_embeddings
    assert model.get_input_embeddings().padding_idx is None
    assert all(p.requires_grad != frozen for p in model.parameters())
    assert model.training != frozen

    # unsharded() gathers the weights, and gives them back.
    with common.unsharded(model):
        assert not any(sharded(model))
    assert all(sharded(model))
    assert model.training != frozen

    # After a forward, a trained model's root stays gathered for the backward; a frozen one's not.
    model(input_ids=IDS)
    assert all(sharded(model)) == frozen
    logits = plain.to(torch.bfloat16)(input_ids=IDS).logits
    assert torch.allclose(model.eval()(input_ids=IDS).logits, logits, atol=0.02)


for path in paths:
    compare(path, None, False, torch.float32)
    compare(path, None, True, torch.bfloat16)
    compare(path, "zero", False, torch.float32)
assert set(loads) <= {{0}}, loads

# With checkpointing, the backward computes each layer a second time.
for checkpointing, times in ((False, 1), (True, 2)):
    model = common.load_model(paths[0], device, mesh, torch.float32, checkpointing=checkpointing)
    calls = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model(input_ids=IDS).logits.sum().backward()
    assert len(calls) == len(model.model.layers) * times, calls

# total() leaves its argument as it is.
x = torch.tensor([ranks.RANK + 1.0])
assert ranks.total(x).item() == 3
assert ranks.total(x, "max").item() == 2
assert x.item() == ranks.RANK + 1
"""

# What two ranks run, as if each were a machine of its own. argv: the folder of a model.
MACHINES = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import common
from plumbing import ranks

os.environ["LOCAL_WORLD_SIZE"] = "1"
device, mesh, _ = common.setup("float32")
assert mesh.mesh_dim_names == ("replicate", "shard"), mesh
assert tuple(mesh.shape) == (2, 1), mesh
model = common.load_model(sys.argv[1], device, mesh, torch.float32)
complete = [p.to_local().numel() == p.numel() for p in model.parameters()]
assert all(complete), "a machine holds the complete model"

# The ranks read different tokens, but their gradients add up to the same.
ids = torch.tensor([[3 + ranks.RANK, 4]])
model(input_ids=ids).logits.square().sum().backward()
norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")).full_tensor()
assert ranks.total(norm, "max") == norm
"""

SMALL = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4)


def test_two_ranks_load_what_from_pretrained_loads(tmp_path):
    for name, tied in (("tied", True), ("untied", False)):
        config = LlamaConfig(**SMALL, tie_word_embeddings=tied, eos_token_id=2,
                             pad_token_id=2)  # pad is eos
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / name)
    (tmp_path / "check.py").write_text(CHECK.format(root=str(ROOT)))
    run(tmp_path / "check.py", tmp_path / "tied", tmp_path / "untied", ranks=2)


def test_each_machine_holds_the_complete_model(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "model")
    (tmp_path / "check.py").write_text(MACHINES.format(root=str(ROOT)))
    run(tmp_path / "check.py", tmp_path / "model", ranks=2)
