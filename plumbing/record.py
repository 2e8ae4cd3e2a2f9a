"""The record of a run: its config, inputs and versions, its lock, its logs, its checkpoints.

<out>/run.json (or <file>.run.json) holds the resolved config, the inputs' fingerprints, a hash of
the stage's code, the command, the commit and the versions. An interrupted run resumes by itself if
these are unchanged; otherwise it is refused and the differences are listed.

A checkpoint holds weights and Adam's moments as safetensors. Everything else of a run follows from
its config and the step (schedules, order of rows, draws); PPO's adaptive KL coefficient is in
metrics.jsonl. (torch.distributed.checkpoint's default format is not used: it unpickles.) A run may
be saved on any number of ranks and loaded on any other.
"""
import ast
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict)
from tqdm import tqdm

from plumbing.files import replacing, write_jsonl
from plumbing.ranks import RANK, WORLD, barrier, fail, say

# What a stage leaves in its folder, and next to a file while it is being made.
RESULTS = ("checkpoint_*", "step_*", "metrics.jsonl", "samples.jsonl", "config.json")
HALF_WRITTEN = ("checkpoint.tmp", "saving.tmp", "saving_step.tmp")
UNFINISHED = (".parts", ".replies", ".batches", ".batches.json")

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
LOCKS = []  # open until the process ends, however it ends: the kernel then releases them


# ---------------------------------------------------------------- run.json

def is_file(out):
    """An output is a file if its suffix says so: edits.jsonl, but not out/rm_0.3 or out/sft.small"""
    return Path(out).suffix in (".jsonl", ".json", ".html", ".md")


def record_path(out):
    """Where the record of a run is: in its folder, or next to its file"""
    return Path(f"{out}.run.json") if is_file(out) else Path(out, "run.json")


def record_of(out):
    """The run.json of a run's output, {} if there is none"""
    path = record_path(out)
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(out, record):
    with replacing(record_path(out)) as file:
        json.dump(record, file, indent=1)


def fingerprint(path, sample=True):
    """What a run remembers of an input. Of a file: a hash of its content. Of a model's folder: the
    run that made it, and the size and a sample of its weights (16 pieces of 64 KB of each file; no
    two trainings agree in them)."""
    path = Path(path)
    if not path.exists():
        return str(path)  # a name on the hub
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.name in ("config.json", "run.json"):
            digest.update(file.read_bytes())
        elif file.suffix == ".safetensors" or file.name.startswith("tokenizer"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            if sample:
                digest.update(pieces(file, size))
    return digest.hexdigest()[:16]


def pieces(file, size, count=16):
    """`count` pieces of 64 KB, evenly spaced over a file"""
    found = b""
    with open(file, "rb") as opened:
        for k in range(count):
            opened.seek(k * size // count)
            found += opened.read(1 << 16)
    return found


def code_hashes(cfg, stage):
    """{"ppo": hash, "common": hash}: the code of a run. The stage's file is the one that defines
    cfg's Config, so a copy under another file name is the same stage."""
    files = {stage: Path(sys.modules[type(cfg).__module__].__file__)}
    if "common" in sys.modules:
        files["common"] = Path(sys.modules["common"].__file__)
    return {name: code_hash(file) for name, file in files.items()}


def code_hash(path):
    """A hash of a file's syntax tree without docstrings: comments and layout do not count"""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- begin and finish a run

def begin(cfg, stage, *, unimportant=(), inputs=(), beside=(), paid=False, **facts):
    """Take cfg.out (a folder, or a file with a suffix): lock it, compare its run.json, write a new
    one. -> True if the run is finished already.

    stage: "ppo", ...; its code is compared, too. unimportant: fields that cannot change the result, so an
    interrupted run may continue with other values. inputs: files and folders that are read; their
    content is compared. beside: names that may be in cfg.out already. paid: the result cost money,
    so changed code is only a warning. facts: further entries of run.json. The run is refused if its
    config, an input or its code has changed, if another process holds the lock, or if cfg.out holds
    files that no run of ours wrote. Rank 0 decides; torchrun ends the others."""
    out = Path(cfg.out)
    old = {} if cfg.overwrite else record_of(cfg.out)
    if RANK > 0:
        return bool(old.get("finished"))
    check_out(cfg, inputs)
    lock(out)

    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    seen = {str(path): fingerprint(path) for path in inputs}
    code = code_hashes(cfg, stage)
    left = what_is_there(out, beside)
    if cfg.overwrite:
        remove_result(out)
    elif old:
        if left or old["finished"]:
            refuse_changes(cfg, old, config, seen, unimportant)
            refuse_changed_code(cfg, stage, old, code, paid)
        if old["finished"]:
            return True
    elif out.is_file() if is_file(out) else left:
        fail(f"{out} holds something that no run of ours wrote; choose another --out, or replace "
             "it: --overwrite=true")

    for name in HALF_WRITTEN:  # by a run that was killed
        shutil.rmtree(out / name, ignore_errors=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    started = old.get("started") or time.strftime("%Y-%m-%d %H:%M:%S")
    write_record(cfg.out, dict(
        config=config, inputs=seen, code=code, **facts, finished=False, command=" ".join(sys.argv),
        started=started, commit=git("rev-parse", "--short", "HEAD"),
        dirty=bool(git("status", "--porcelain")), torch=torch.__version__,
        transformers=transformers.__version__, world_size=WORLD, device=device))
    return False


def finish(cfg, *, keep_checkpoint=True, **facts):
    """Mark the run as finished in its run.json (rank 0). keep_checkpoint=False: the model is kept,
    its optimizer is not"""
    if RANK > 0:
        return
    record = record_of(cfg.out) | facts | {"finished": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_record(cfg.out, record)
    if not keep_checkpoint:
        for folder in Path(cfg.out).glob("checkpoint_*"):
            shutil.rmtree(folder)


def check_out(cfg, inputs):
    """fail() unless cfg.out is of the right kind (file or folder) and holds none of the inputs"""
    out = Path(cfg.out)
    usual = getattr(type(cfg), "out", None) or out
    if is_file(out) != is_file(usual):
        kind = "a file name" if is_file(usual) else "a folder, without the suffix of a file"
        fail(f"--out={out} must be {kind}, such as {usual}")
    if out.exists() and out.is_dir() == is_file(out):
        fail(f"--out={out} is there as a {'folder' if out.is_dir() else 'file'}; choose another name")

    if cfg.overwrite or is_file(out):
        for path in (*inputs, getattr(cfg, "data", None)):
            if isinstance(path, (str, Path)) and would_delete(out.resolve(), Path(path).resolve()):
                fail(f"--out={out} is or holds {Path(path).resolve()}, which this run reads; choose "
                     "another --out")
    try:
        record_path(out).parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        fail(f"--out={out} lies below something that is not a folder; choose another --out")


def would_delete(out, path):
    """Is an input the output itself, or in a part of its folder that --overwrite removes?"""
    if not path.is_relative_to(out):
        return False
    inside = path.relative_to(out).parts
    return not inside or any(Path(inside[0]).match(name) for name in RESULTS)


def lock(out):
    """fail() if another process writes this output"""
    LOCKS.append(open(record_path(out).with_suffix(".lock"), "w"))
    try:
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing {out}; wait for it, or choose another --out")


def what_is_there(out, beside):
    """What an earlier run has left of this output -> list of paths"""
    if is_file(out):
        paths = [out, *(Path(f"{out}{suffix}") for suffix in UNFINISHED)]
        return [path for path in paths if path.exists() and path.stat().st_size]
    ignored = (*beside, "run.json")
    return [path for path in out.glob("*") if path.name not in ignored and path.suffix != ".lock"]


def remove_result(out):
    """Remove what runs of ours leave, and nothing else. The record goes first: a result that is
    half deleted must not look finished."""
    record_path(out).unlink(missing_ok=True)
    if is_file(out):
        out.unlink(missing_ok=True)
        return
    for name in RESULTS:
        for path in out.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def refuse_changes(cfg, old, config, seen, unimportant):
    """fail() with the fields and the inputs that differ from the earlier run's"""
    ignored = (*unimportant, "overwrite", "allow_changed_code", "out")
    differs = []
    for name, value in config.items():
        # A field that the earlier run did not have counts as its default.
        then = old["config"].get(name, getattr(type(cfg), name, None))
        if name not in ignored and then != value:
            differs.append(f"{name}: {then!r} then, {value!r} now")

    for path, now in seen.items():
        if path not in old["inputs"]:
            continue
        if "started" not in old:  # an old record: weights were not sampled then
            now = fingerprint(path, sample=False)
        if old["inputs"][path] != now:
            differs.append(f"the content of {path}")
    if differs:
        fail(f"{cfg.out} was made with a different config ({'; '.join(differs)}); choose another "
             "--out, or start again with --overwrite=true")


def refuse_changed_code(cfg, stage, old, code, paid):
    """fail() if the stage's file has changed since the run began, or common.py has while the run is
    unfinished. Only a warning: common.py after the end, and any change where the result cost money.
    A record without hashes passes."""
    then = old.get("code", {})
    changed = [name for name in code if name in then and then[name] != code[name]]
    if not changed:
        return
    script = Path(sys.modules[type(cfg).__module__].__file__).name
    names = " and ".join(script if name == stage else f"{name}.py" for name in changed)
    if paid or (old["finished"] and stage not in changed):
        say(f"warning: {names} changed since {cfg.out} was made; its results are kept")
    elif getattr(cfg, "allow_changed_code", False):
        say(f"{names} changed since {cfg.out} was begun; continuing (--allow_changed_code=true)")
    else:
        fail(f"{names} changed since {cfg.out} was begun: its results would be of two programs. "
             "Choose another --out, keep what is there with --allow_changed_code=true, or start "
             "again with --overwrite=true")


def git(*words):
    """The output of a git command in the project, "" without git"""
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True,
                              text=True)
        return done.stdout.strip()
    except OSError:
        return ""


# ---------------------------------------------------------------- logs

def progress(steps, name, count):
    """tqdm on rank 0, counted from the start of the run, not of this process"""
    return tqdm(steps, name, count, initial=count - len(steps), disable=True if RANK else None,
                mininterval=1, dynamic_ncols=True)


def log_metrics(out, row, shown=None):
    """One object in metrics.jsonl and one printed line (of the fields shown; None: all) per step
    (rank 0)"""
    if RANK == 0:
        with open(Path(out, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        say(" | ".join(f"{name} {row[name]:.4g}" for name in shown or row if name in row))


def logged(path):
    """The rows of a metrics.jsonl or samples.jsonl, [] without one. The torn last line of a killed
    run is left out."""
    if not Path(path).exists():
        return []
    text = Path(path).read_text(encoding="utf-8")
    lines = text[:text.rfind("\n") + 1].split("\n")
    return [json.loads(line) for line in lines if line]


def trim_logs(out, done):
    """Remove what an interrupted run logged after its last checkpoint: those steps are done again
    (rank 0)"""
    for path in (Path(out, "metrics.jsonl"), Path(out, "samples.jsonl")):
        if RANK == 0 and path.exists():
            write_jsonl(path, [row for row in logged(path) if row["step"] < done])


# ---------------------------------------------------------------- checkpoints

def training_state(models, optimizer):
    """-> weights, optimizer state, and the tensors of both that a checkpoint holds. All ranks."""
    weights, moments = get_state_dict(models, optimizer, options=FLAT)
    own = {name for name, _ in models.named_parameters()}  # of tied weights only the first name
    tensors = {}
    for name, value in {**weights, **moments}.items():
        if isinstance(value, torch.Tensor) and (name in own or name in moments):
            tensors[name] = value
    return weights, moments, tensors


def save_checkpoint(out, step, models, optimizer):
    """<out>/checkpoint_<step>/: weights and Adam's moments, each rank its shard. The earlier
    checkpoint is then deleted. All ranks."""
    final = Path(out, f"checkpoint_{step}")
    temporary = Path(out, "checkpoint.tmp")
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=WORLD > 1)
    tensors = training_state(models, optimizer)[2]
    dcp.save(tensors, no_dist=not dist.is_initialized(), storage_writer=writer)

    if RANK == 0:
        os.replace(temporary, final)
        for folder in Path(out).glob("checkpoint_*"):
            if folder != final:
                shutil.rmtree(folder)
    barrier()


def load_checkpoint(out, models, optimizer):
    """Fill models and optimizer from the newest checkpoint -> how many steps it has done, 0 without
    one. All ranks."""
    steps = [int(folder.name.split("_")[1]) for folder in Path(out).glob("checkpoint_*")]
    if not steps:
        return 0
    step = max(steps)
    weights, moments, tensors = training_state(models, optimizer)
    reader = HuggingFaceStorageReader(str(Path(out, f"checkpoint_{step}")))
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())

    # The second name of a tied weight is not in the checkpoint; it keeps its own tensor.
    weights = {name: tensors.get(name, weight) for name, weight in weights.items()}
    moments = {name: tensors.get(name, moment) for name, moment in moments.items()}
    set_state_dict(models, optimizer, options=FLAT, model_state_dict=weights,
                   optim_state_dict=moments)
    return step


# ---------------------------------------------------------------- models for other tools

def save_model(model, tokenizer, out, dtype, *, sequence=False):
    """A Hugging Face folder that other tools load. config.json comes last and makes it valid.

    sequence: named ...ForSequenceClassification. That class reads the score at the last id that is
    not pad, so pad must not be eos. All ranks."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if RANK == 0:
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        state = {name: weight.to(dtype).contiguous() for name, weight in state.items()}
        folder = Path(out, "saving.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, state_dict=state)

        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        if sequence:
            config["architectures"] = [name.replace("ForToken", "ForSequence")
                                       for name in config["architectures"]]
            config["pad_token_id"] = pad_that_is_not_eos(tokenizer)
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config["pad_token_id"])
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2))

        for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, Path(out, file.name))
        folder.rmdir()
    barrier()


def pad_that_is_not_eos(tokenizer):
    for id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0):
        if id is not None and id != tokenizer.eos_token_id:
            return id


def save_step(model, tokenizer, out, step, dtype):
    """<out>/step_<step>/: the model as it was then; the folder exists only when it is complete. All
    ranks."""
    temporary = Path(out, "saving_step.tmp")
    final = Path(out, f"step_{step}")
    save_model(model, tokenizer, temporary, dtype)
    if RANK == 0:
        # A run that was killed later, and resumed from before, has left one.
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
