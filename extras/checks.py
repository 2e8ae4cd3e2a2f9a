"""What a user may get wrong about files and models, found before any work: one line that names it and the mend.

The stages' main() and common.read_jsonl use these; no mathematics is in here.
"""
import hashlib, json, math, re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from common import fail


def check_input(path, flag, made_by):
    """fail() unless the file or folder is there; made_by is the command that makes it"""
    if not Path(path).exists():
        fail(f"--{flag}={path} does not exist; make it with: {made_by}")


def check_model(path, flag, made_by, *, weights=True):
    """A model is a Hugging Face folder, or a name on the hub: org/name, where org is no folder of ours. weights:
    True, False (its config and tokenizer are enough), or "new" (there may be none: it gets new ones)"""
    org = str(path).partition("/")[0]
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and org not in ("out", "data") and not Path(org).exists()
    if not on_hub and not Path(path, "config.json").exists():
        fail(f"--{flag}={path} holds no finished model (no config.json); make it with: {made_by}")
    if weights and not on_hub and not any(Path(path).glob("*.safetensors*")):
        if any(Path(path).glob("pytorch_model*.bin*")):
            fail(f"--{flag}={path} has its weights in .bin, a pickle, which is never loaded; save it as safetensors")
        if weights != "new":
            fail(f"--{flag}={path} holds no weights (no .safetensors); make it with: {made_by}")


def check_numbers(cfg, *counts):
    """fail() unless these fields, of rows, tokens or steps, are at least 1 (or None), and lr and warmup sound"""
    for name in counts:
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            fail(f"--{name} must be at least 1, got {getattr(cfg, name)}")
    if not 0 <= getattr(cfg, "lr", 0) < math.inf:
        fail(f"--lr must be a number from 0 on, got {cfg.lr}")
    if not 0 <= getattr(cfg, "warmup", 0) <= 1:
        fail(f"--warmup is a share of the steps, 0 to 1, got {cfg.warmup}")


def check_fits(path, flag, length, *, speaks=False):
    """fail() unless rows of so many tokens have positions in the model, and the model has the parts that load_model
    knows: the layers that FSDP shards, the head that gives a number per token. speaks: it must be a language model."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:  # no such name on the hub, no network, an unknown family
        fail(f"--{flag}={path}: {str(error).strip().splitlines()[0]}")
    if speaks and "Classification" in " ".join(config.architectures or []):
        fail(f"--{flag}={path} is a reward model ({config.architectures[0]}): it has no words to say")
    room = getattr(config, "max_position_embeddings", length)
    if length > room:
        fail(f"--{flag}={path} has positions for {room} tokens, the longest row has {length}; lower the length limits")
    try:
        with torch.device("meta"):  # no memory, no time
            model = (AutoModelForCausalLM if speaks else AutoModelForTokenClassification).from_config(config)
        known = hasattr(model.base_model, "layers") and (speaks or hasattr(model, "score"))
    except ValueError:  # transformers has no such class for this family
        known = False
    if not known:
        fail(f"--{flag}={path} is of the family {config.model_type}; the stages take what is built as Llama is "
             "(model.layers, score)")


def tokenizer_hash(tokenizer):
    """Two tokenizers are one if their vocabulary and special ids agree (pad never matters here)"""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), ids]).encode()).hexdigest()


def open_input(path):
    try:
        return open(path, "rb")
    except OSError as error:
        fail(f"{path}: {error.strerror}")


def parse_row(line, fields, where):
    """One line of a JSONL file -> its row, checked"""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        fail(f"{where}: not JSON ({error})")
    check_row(row, fields, where)
    return row


def check_row(row, fields, where):
    """fail() unless a row of JSON is an object with the fields: name -> kind, as in fits(). More fields pass."""
    if not isinstance(row, dict):
        fail(f"{where}: must be a JSON object, got {type(row).__name__}")
    for name, kind in fields.items():
        if name not in row:
            fail(f"{where}: no field {name!r}; the row has: {', '.join(row) or 'nothing'}")
        if not fits(row[name], kind):
            kinds = " or ".join(getattr(k, "__name__", str(k)).replace("NoneType", "null")
                                for k in (kind if isinstance(kind, tuple) else (kind,)))
            fail(f"{where}: {name} must be {kinds}, got {json.dumps(row[name])[:60]}")
    if not fits(row.get("cut"), (list, type(None))):
        fail(f"{where}: cut must be a list of field names, got {json.dumps(row['cut'])[:60]}")


def fits(value, kind):
    """kind: None (anything), a type, a literal value, or a tuple of these. A bool is no int."""
    if isinstance(kind, tuple):
        return any(fits(value, k) for k in kind)
    match = isinstance(value, kind) if isinstance(kind, type) else kind is None or value == kind
    return match and (kind in (None, bool) or not isinstance(value, bool))
