"""JSONL files, and what a user may get wrong about rows, files and models: one line that says what is wrong and how to
fix it, before any model is loaded."""
import json
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from plumbing.ranks import fail


# ---------------------------------------------------------------- JSONL

def read_jsonl(path, fields):
    """The rows of a JSONL file (list of dict). fields: name -> kind, as in fits(). Unknown fields are kept.

    A malformed row ends the run with file:line."""
    rows = []
    with open_input(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(parse_row(line, fields, f"{path}:{number}"))
    if not rows:
        fail(f"{path}: no rows in it")
    return rows


def write_jsonl(path, rows):
    """One object per line. Written to a temporary file, then renamed: never half-written."""
    with replacing(path) as file:
        for row in rows:
            file.write(whole_characters(json.dumps(row, ensure_ascii=False)) + "\n")


@contextmanager
def replacing(path):
    """A file that gets its final name only when it is complete: written to a temporary file, synced, renamed"""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def whole_characters(text):
    """Replace lone surrogates by "?": they occur in JSON and cannot be written as UTF-8"""
    return text.encode("utf-8", "replace").decode()


def open_input(path):
    try:
        return open(path, "rb")
    except OSError as error:
        fail(f"{path}: {error.strerror}")


# ---------------------------------------------------------------- rows

def parse_row(line, fields, where):
    """One line of a JSONL file -> its row, checked"""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        fail(f"{where}: not JSON ({error})")
    check_row(row, fields, where)
    return row


def check_row(row, fields, where):
    """fail() unless a row of JSON is an object with the fields: name -> kind, as in fits(). More fields may be there."""
    if not isinstance(row, dict):
        fail(f"{where}: must be a JSON object, got {type(row).__name__}")
    for name, kind in fields.items():
        if name not in row:
            fail(f"{where}: no field {name!r}; the row has: {', '.join(row) or 'nothing'}")
        if not fits(row[name], kind):
            fail(f"{where}: {name} must be {kind_name(kind)}, got {json.dumps(row[name])[:60]}")
    if not fits(row.get("cut"), (list, type(None))):
        fail(f"{where}: cut must be a list of field names, got {json.dumps(row['cut'])[:60]}")


def fits(value, kind):
    """kind: None (anything), a type, a literal value, or a tuple of these. A bool is not an int."""
    if isinstance(kind, tuple):
        return any(fits(value, k) for k in kind)
    if isinstance(value, bool) and kind not in (None, bool):
        return False
    if isinstance(kind, type):
        return isinstance(value, kind)
    return kind is None or value == kind


def kind_name(kind):
    """A kind of fits(), in words: "str or null" """
    if isinstance(kind, tuple):
        return " or ".join(map(kind_name, kind))
    if kind is type(None):
        return "null"
    return getattr(kind, "__name__", str(kind))


# ---------------------------------------------------------------- inputs of a stage

def check_input(path, flag, made_by):
    """fail() unless the file or folder exists; made_by is the command that makes it"""
    if not Path(path).exists():
        fail(f"--{flag}={path} does not exist; make it with: {made_by}")


def check_model(path, flag, made_by, *, weights=True):
    """A model is a Hugging Face folder, or a name on the hub: org/name, where org is not a local folder.

    weights: True, False (its config and tokenizer are enough), or "new" (without weights it gets new ones)"""
    if is_on_hub(path):
        return
    if not Path(path, "config.json").exists():
        fail(f"--{flag}={path} holds no finished model (no config.json); make it with: {made_by}")
    if not weights or any(Path(path).glob("*.safetensors*")):
        return
    if any(Path(path).glob("pytorch_model*.bin*")):
        fail(f"--{flag}={path} has its weights in .bin, a pickle, which is never loaded; save it as safetensors")
    if weights != "new":
        fail(f"--{flag}={path} holds no weights (no .safetensors); make it with: {made_by}")


def is_on_hub(path):
    org = str(path).partition("/")[0]
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path))
    return bool(named) and org not in ("out", "data") and not Path(org).exists()


def check_numbers(cfg, *counts):
    """fail() unless these fields, of rows, tokens or steps, are at least 1 (or None), and lr and warmup make sense"""
    for name in counts:
        value = getattr(cfg, name)
        if value is not None and value < 1:
            fail(f"--{name} must be at least 1, got {value}")
    if not 0 <= getattr(cfg, "lr", 0) < math.inf:
        fail(f"--lr must be a number from 0 on, got {cfg.lr}")
    if not 0 <= getattr(cfg, "warmup", 0) <= 1:
        fail(f"--warmup is a share of the steps, 0 to 1, got {cfg.warmup}")


def check_fits(path, flag, length, *, speaks=False):
    """fail() unless the model has positions for rows of so many tokens, and the parts that common.load_model uses:
    the layers that FSDP shards, and the head with one number per token. speaks: it must be a language model."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:  # no such name on the hub, no network, an unknown family
        fail(f"--{flag}={path}: {str(error).strip().splitlines()[0]}")
    if speaks and "Classification" in " ".join(config.architectures or []):
        fail(f"--{flag}={path} is a reward model ({config.architectures[0]}), not a language model")
    room = getattr(config, "max_position_embeddings", length)
    if length > room:
        fail(f"--{flag}={path} has positions for {room} tokens, the longest row has {length}; lower the length limits")

    # A model on the meta device has its modules but takes no memory and no time.
    Auto = AutoModelForCausalLM if speaks else AutoModelForTokenClassification
    try:
        with torch.device("meta"):
            model = Auto.from_config(config)
        known = hasattr(model.base_model, "layers") and (speaks or hasattr(model, "score"))
    except ValueError:  # transformers has no such class for this family
        known = False
    if not known:
        fail(f"--{flag}={path} is of the family {config.model_type}; the stages take what is built as Llama is "
             "(model.layers, score)")
