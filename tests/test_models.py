"""The weights are those of the folder, or the run ends. pytest tests/test_models.py"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    CONFIG_MAPPING,
)

from plumbing import models


def tiny(family="llama", **fields):
    config = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return CONFIG_MAPPING[family](**config | fields)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """llama, tied: language models; token, sequence: reward models"""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny()).save_pretrained(home / "llama")
    AutoModelForCausalLM.from_config(tiny(tie_word_embeddings=True)).save_pretrained(home / "tied")
    config = tiny(num_labels=1, token_classification_bias=False)
    model = AutoModelForTokenClassification.from_config(config)
    model.save_pretrained(home / "token")
    AutoModel.from_config(tiny()).save_pretrained(home / "backbone")
    return home


def changed(folder, out, rename=lambda name: name, drop=(), add=None, **config):
    """A copy of a model's folder with other names, without some tensors, with more of them"""
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    weights = {rename(name): w for name, w in weights.items() if name not in drop}
    save_file(weights | (add or {}), out / "model.safetensors", metadata={"format": "pt"})
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


def refused(capsys, words, folder, **options):
    with pytest.raises(SystemExit) as end:
        models.check_model(folder, "model", "python sft.py")
        models.check_fits(folder, "model", 16, **options)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1, said
    for part in words:
        assert part in said, (part, said)


@pytest.mark.parametrize(
    "name, head",
    [
        ("llama", None),
        ("tied", None),
        ("llama", "zero"),
        ("tied", "zero"),
        ("token", "zero"),
        ("token", "saved"),
        ("backbone", "zero"),
    ],
)
def test_expected_differences_pass(folders, name, head):
    """A new head on a language model, tied weights, a head that is replaced, a bare backbone"""
    models.check_model(folders / name, "model", "python sft.py")
    models.check_fits(folders / name, "model", 16, head=head)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_with_a_prefix(folders, tmp_path, capsys, prefix):
    folder = changed(folders / "llama", tmp_path / "m", rename=lambda name: prefix + name)
    refused(capsys, ["21 missing", "21 unexpected", f"begin with '{prefix}"], folder)
    refused(capsys, ["missing", f"{prefix}"], folder, head="zero")


def test_other_heads(folders, tmp_path, capsys):
    head = {"value_head.weight": torch.zeros(1, 16)}
    folder = changed(folders / "token", tmp_path / "a", drop=["score.weight"], add=head)
    refused(capsys, ["score.weight", "value_head.weight", "another name"], folder, head="saved")
    folder = changed(folders / "token", tmp_path / "b", add={"score.bias": torch.zeros(1)})
    refused(capsys, ["1 unexpected (score.bias)", "bias"], folder, head="saved")
    two = {"score.weight": torch.zeros(2, 16)}
    folder = changed(folders / "token", tmp_path / "c", drop=["score.weight"], add=two)
    refused(capsys, ["another shape", "has several"], folder, head="saved")
    refused(capsys, ["1 missing (lm_head.weight)", "backbone"], folders / "backbone")
    refused(capsys, ["score.weight"], folders / "llama", head="saved")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}
    refused(capsys, ["1 unexpected", "bias"], changed(folders / "llama", tmp_path / "d", add=bias))


def test_files_that_are_not_the_weights(folders, tmp_path, capsys):
    """A pointer, a torn file, a missing shard, an adapter, a quantised model"""
    folder = changed(folders / "llama", tmp_path / "pointer")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\nsize 9\n"
    )
    refused(capsys, ["git lfs pull", "model.safetensors"], folder)
    for torn in (weights[:100], weights[:-100], b""):
        (folder / "model.safetensors").write_bytes(torn)
        refused(capsys, ["copy it again", "model.safetensors"], folder)

    folder = changed(folders / "llama", tmp_path / "shards")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder / "model-1.safetensors")
    index = {name: f"model-{1 if name == 'lm_head.weight' else 2}.safetensors" for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    refused(capsys, ["lacks model-2.safetensors"], folder)
    rest = {name: w for name, w in tensors.items() if name != "lm_head.weight"}
    save_file(rest, folder / "model-2.safetensors")
    models.check_fits(folder, "model", 16)

    quantised = dict(quant_method="bitsandbytes", load_in_4bit=True)
    folder = changed(folders / "llama", tmp_path / "bnb", quantization_config=quantised)
    refused(capsys, ["quantised"], folder)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(capsys, ["adapter", "merge"], adapter)
    lora = {"base_model.model.layers.0.q_proj.lora_A.weight": torch.zeros(2, 16)}
    refused(capsys, ["adapter", "merge"], changed(folders / "llama", tmp_path / "lora", add=lora))


def test_foreign_code_is_neither_run_nor_offered(folders, tmp_path, capsys):
    folder = changed(
        folders / "llama", tmp_path / "m", model_type="mine", auto_map={"AutoConfig": "code.Mine"}
    )
    (folder / "code.py").write_text("raise AssertionError('foreign code ran')\n")
    refused(capsys, ["--model="], folder)


@pytest.mark.parametrize(
    "family, fields",
    [
        (
            "qwen3_5_text",
            dict(
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=16,
                linear_value_head_dim=16,
                num_hidden_layers=4,
            ),
        ),
        ("lfm2", dict(layer_types=["conv", "full_attention"])),
        ("jamba", {}),
        ("falcon_h1", {}),
    ],
)
def test_recurrent_layers_are_refused_by_name(tmp_path, capsys, family, fields):
    """Where rewards are learnt or tokens generated; sft.py trains them and warns"""
    config = tiny(family, **fields)
    config.save_pretrained(tmp_path / "m")
    for options in (dict(head="zero"), dict(head="saved"), dict()):
        with pytest.raises(SystemExit):
            models.check_fits(tmp_path / "m", "model", 16, **options)
        assert family.split("_text")[0] in capsys.readouterr().err
