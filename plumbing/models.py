"""What can be wrong with a model's folder, found before it is loaded: weights that are missing or
have other names, a family or an attention that a stage does not know, too few positions."""
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from plumbing.command_line import extra
from plumbing.ranks import fail

RECURRENT = re.compile("conv|mamba|ssm|A_log|linear_att|recurrent|time_mix|rglru")

def check_model(path, flag, made_by, *, weights=True):
    """fail() unless path is a Hugging Face folder, or org/name on the hub (org is no local folder).
    weights: True, False (config and tokenizer are enough), or "new" (it may be given new ones)."""
    folder = Path(path)
    if is_on_hub(path):
        return
    if (folder / "adapter_config.json").exists():
        fail(f"--{flag}={path} is an adapter; merge it into its base model first")
    if not (folder / "config.json").exists():
        fail(f"--{flag}={path} holds no finished model (no config.json); make it with: {made_by}")
    if not weights or any(folder.glob("*.safetensors*")):
        return
    if any(folder.glob("pytorch_model*.bin*")):
        fail(f"--{flag}={path} has its weights as a pickle, never loaded here; save .safetensors")
    if weights != "new":
        fail(f"--{flag}={path} holds no weights (no .safetensors); make it with: {made_by}")

def is_on_hub(path):
    org = str(path).partition("/")[0]
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))
    return bool(named) and org not in ("out", "data") and not Path(org).exists()

def meta_model(config, head):
    """The modules and shapes of a model, without memory. None: transformers has no such class for
    this family, or it is not built as Llama is (model.layers, score)."""
    Auto = AutoModelForTokenClassification if head else AutoModelForCausalLM
    if head:
        config.update(dict(num_labels=1, token_classification_bias=False))
    try:
        with torch.device("meta"):
            model = Auto.from_config(config, trust_remote_code=False)
    except (ValueError, AttributeError):
        return None
    known = hasattr(model.base_model, "layers") and (not head or hasattr(model, "score"))
    return model if known else None

def recurrent_layer(model):
    """The first tensor, or type, of a layer that is not attention, or None"""
    names = [name for name, _ in model.base_model.layers.named_parameters()]
    types = getattr(model.config, "layer_types", None) or []
    return next(filter(RECURRENT.search, names + types), None)

def check_fits(path, flag, length, *, head=None, generates=True, vocabulary=0):
    """fail() unless common.load_model(path, head=head) gives the folder's own model, with positions
    for rows of `length` tokens and an embedding for each of `vocabulary` tokens. generates: the
    stage decodes with it. A local folder without weights passes: check_model() decides on that."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:  # not on the hub, no network, unknown family
        fail(f"--{flag}={path}: {str(error).strip().splitlines()[0]}")
    name = " ".join(config.architectures or [])
    text = config.get_text_config()
    if head is None and "Classification" in name:
        fail(f"--{flag}={path} is a reward model ({name}), not a language model")
    if getattr(config, "quantization_config", None):
        fail(f"--{flag}={path} is quantised; save it in bfloat16 first (model.dequantize())")
    room = getattr(text, "max_position_embeddings", None) or length
    if length > room:
        fail(f"--{flag}={path} has positions for {room} tokens, this run needs {length}; lower the "
             "length limits")
    if vocabulary > text.vocab_size:
        fail(f"--{flag}={path} has {text.vocab_size} embeddings for {vocabulary} tokens; "
             "resize the embeddings, or take the tokenizer that belongs to the weights")
    model = meta_model(config, head)
    if model is None:
        kind = "ForTokenClassification" if head else "ForCausalLM"
        fail(f"--{flag}={path}: {config.model_type} has no {kind} like Llama's: docs/families.md")
    if recurrent_layer(model) and (head or generates):
        fail(f"--{flag}={path} ({config.model_type}) has recurrent or linear layers "
             f"({recurrent_layer(model)}); generation and rewards need attention in each layer")
    headers = extra("weights")
    if headers and not is_on_hub(path):
        headers.check_headers(path, flag, model, head)

def check_loaded(path, model, head, info):
    """fail() unless transformers has found all weights: what it reports after loading"""
    reshaped = [name for name, *_ in info["mismatched_keys"]]
    compare(path, "model", model, head, info["missing_keys"], info["unexpected_keys"], reshaped)

def compare(path, flag, model, head, missing, unexpected, reshaped):
    """fail() unless the names are those that may differ: one line with how many weights, the first
    two names on each side, and what it looks like"""
    may_differ = ("rotary_emb.inv_freq",)
    if head or model.config.tie_word_embeddings:
        may_differ += ("lm_head.weight", "lm_head.bias")
    if head == "zero":
        may_differ += ("score.weight", "score.bias")
    sides = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    for side, names in sides.items():
        sides[side] = sorted(name for name in names if not name.endswith(may_differ))
    parts = [f"{len(names)} {side} ({', '.join(names[:2])})"
             for side, names in sides.items() if names]
    if parts:
        weights = extra("weights")
        hint = weights.looks_like(*sides.values()) if weights else ""
        fail(f"--{flag}={path}: the weights are not this model's: {', '.join(parts)}{hint}")
