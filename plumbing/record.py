"""The record of a run: its config, inputs and versions, its lock, its logs, its checkpoints.

<out>/run.json (or <file>.run.json) holds the config, fingerprints of the inputs, hashes of the
code, the command, the commit and the versions. An interrupted run resumes by itself. If its config,
inputs or code have changed, it is refused and the differences are listed.

A checkpoint holds weights and Adam's moments as safetensors, for any number of ranks. The rest of a
run follows from its config and the step; PPO's adaptive KL coefficient is in metrics.jsonl.
"""
import ast, dataclasses, errno, fcntl, hashlib, inspect
import json, os, shutil, subprocess, sys, time, warnings
from pathlib import Path

import torch, transformers
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as states
from tqdm import tqdm
from transformers import GenerationConfig

from plumbing.command_line import extra
from plumbing.files import replacing, write_jsonl
from plumbing.ranks import RANK, WORLD, barrier, fail, say

# What a stage leaves in its folder, and next to a file while it is being made.
RESULTS = ("checkpoint_*", "step_*", "metrics.jsonl", "samples.jsonl", "config.json")
UNFINISHED = (".parts", ".replies", ".batches", ".batches.json")
FLAT = states.StateDictOptions(flatten_optimizer_state_dict=True)
FULL = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is, with one process
LOCKS = []  # open until the process ends, however it ends: the kernel then releases them

def is_file(out):
    """An output is a file if its suffix says so: edits.jsonl, but not out/rm_0.3 or out/sft.tiny"""
    return Path(out).suffix in (".jsonl", ".json", ".html", ".md")

def record_path(out):
    return Path(f"{out}.run.json") if is_file(out) else Path(out, "run.json")

def record_of(out):
    """The run.json of a run's output, {} if there is none"""
    path = record_path(out)
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        fail(f"{path} is torn or no record of a run; remove it, or choose another --out")

def fingerprint(path, pieces=16):
    """Of a file: a hash of its content. Of a model's folder: a hash of the record of its training,
    and of the sizes and `pieces` samples (64 KB each) of the files of its weights and tokenizer."""
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
            with open(file, "rb") as opened:
                for k in range(pieces):
                    opened.seek(k * size // pieces)
                    digest.update(opened.read(1 << 16))
    return digest.hexdigest()[:16]

def code_hashes(cfg, stage):
    """{"ppo": hash, "common": hash}: the code of a run. The stage's file is the one that defines
    cfg's Config, so a copy under another file name is the same stage."""
    files = {stage: Path(inspect.getfile(type(cfg)))}
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

def git(*words):
    """The output of a git command in the project, "" without git"""
    command = ["git", "-C", Path(__file__).parent, *words]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""

# ---------------------------------------------------------------- begin and finish a run

def begin(cfg, stage, *, unimportant=(), inputs=(), beside=(), paid=False, **facts):
    """Lock cfg.out (a folder, or a file with a suffix), compare its run.json with this run, write a
    new one. -> True if the run is finished already. Rank 0 decides; torchrun ends the others.
    stage: "ppo", ...; its code is compared, too. unimportant: fields that cannot change the result,
    so they may differ. inputs: files and folders that are read; their content is compared. beside:
    names that may be in cfg.out already. paid: the result cost money, so changed code is only a
    warning. facts: further entries of run.json."""
    out = Path(cfg.out)
    old = {} if cfg.overwrite else record_of(out)
    if RANK > 0:
        return bool(old.get("finished"))
    take(cfg, inputs)

    # Compare this run with what is there.
    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    seen = {str(path): fingerprint(path) for path in inputs}
    new = {"config": config, "inputs": seen, "code": code_hashes(cfg, stage), **facts}
    left = what_is_left(out, beside)
    if cfg.overwrite:
        # The record goes first: a result that is half deleted must not look finished.
        for path in (record_path(out), *results(out)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    elif old and (left or old["finished"]):
        refuse_changes(cfg, stage, old, new, unimportant, paid)
        if old["finished"]:
            return True
    elif not old and (out.is_file() if is_file(out) else left):
        fail(f"{out} holds something that no run of ours wrote; choose another --out, or "
             "--overwrite=true to replace it")

    # Begin, or resume after a run that was killed.
    for name in ("checkpoint.tmp", "saving.tmp", "saving_step.tmp"):
        shutil.rmtree(out / name, ignore_errors=True)
    started = old.get("started") or time.strftime("%Y-%m-%d %H:%M:%S")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    commit = git("rev-parse", "--short", "HEAD")
    dirty = bool(git("status", "--porcelain"))
    new |= dict(finished=False, command=" ".join(sys.argv), started=started, commit=commit)
    new |= dict(dirty=dirty, torch=torch.__version__, transformers=transformers.__version__)
    new |= dict(world_size=WORLD, device=device)
    with replacing(record_path(out)) as file:
        json.dump(new, file, indent=1)
    return False

def finish(cfg, *, keep_checkpoint=True, **facts):
    """Mark the run as finished in its run.json; keep its last checkpoint or delete it (rank 0)"""
    if RANK == 0:
        record = record_of(cfg.out) | facts
        record["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
        with replacing(record_path(cfg.out)) as file:
            json.dump(record, file, indent=1)
        if not keep_checkpoint:
            for folder in Path(cfg.out).glob("checkpoint_*"):
                shutil.rmtree(folder)

def take(cfg, inputs):
    """Lock cfg.out. fail() if it is in use, holds an input, or is not of the usual kind"""
    out = Path(cfg.out)
    usual = getattr(type(cfg), "out", None) or out
    if is_file(out) != is_file(usual):
        kind = "a file name" if is_file(usual) else "a folder, without the suffix of a file"
        fail(f"--out={out} must be {kind}, such as {usual}")
    if out.exists() and out.is_dir() == is_file(out):
        fail(f"--out={out} is there as a {'folder' if out.is_dir() else 'file'}; choose another")
    for path in (*inputs, getattr(cfg, "data", None)):
        if isinstance(path, (str, Path)) and (cfg.overwrite or is_file(out)):
            path = Path(path).resolve()
            target = out.resolve()
            if path == target or not {path, *path.parents}.isdisjoint(results(target)):
                fail(f"--out={out} is or holds {path}, which this run reads; choose another --out")
    try:
        record_path(out).parent.mkdir(parents=True, exist_ok=True)
        LOCKS.append(open(record_path(out).with_suffix(".lock"), "w"))
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileExistsError, NotADirectoryError):
        fail(f"--out={out} lies below something that is not a folder; choose another --out")
    except BlockingIOError:
        fail(f"another run is writing {out}; wait for it, or choose another --out")
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        say(f"warning: no locks on this file system; do not start two runs with --out={out}")

def results(out):
    """What runs of ours write, and --overwrite removes -> list of paths"""
    return [out] if is_file(out) else [path for name in RESULTS for path in out.glob(name)]

def what_is_left(out, beside):
    """What is there of an unfinished run, or of somebody else -> list of paths"""
    if is_file(out):
        paths = [out, *(Path(f"{out}{suffix}") for suffix in UNFINISHED)]
        return [path for path in paths if path.exists() and path.stat().st_size]
    ignored = (*beside, "run.json")
    return [path for path in out.glob("*") if path.name not in ignored and path.suffix != ".lock"]

def refuse_changes(cfg, stage, old, new, unimportant, paid):
    """fail() with the fields, inputs or code that differ from the earlier run's. Changed code is a
    warning if the result cost money, or if the run is finished and only common.py changed."""
    ignored = (*unimportant, "overwrite", "allow_changed_code", "out")
    differs = []
    for name, value in new["config"].items():
        then = old["config"].get(name, getattr(type(cfg), name, None))  # a new field: its default
        if name not in ignored and then != value:
            differs.append(f"{name}: {then!r} then, {value!r} now")
    for path, now in new["inputs"].items():
        if old["inputs"].get(path, now) != now:
            differs.append(f"the content of {path}")
    if differs:
        fail(f"{cfg.out} was made with a different config ({'; '.join(differs)}); choose another "
             "--out, or start again with --overwrite=true")

    then = old.get("code", {})  # not in an old record
    changed = [name for name, now in new["code"].items() if then.get(name, now) != now]
    script = Path(inspect.getfile(type(cfg))).name
    names = " and ".join(script if name == stage else f"{name}.py" for name in changed)
    if changed and (paid or old["finished"] and stage not in changed):
        say(f"warning: {names} changed since {cfg.out} was made; its results are kept")
    elif changed and getattr(cfg, "allow_changed_code", False):
        say(f"{names} changed since {cfg.out} was begun; continuing (--allow_changed_code=true)")
    elif changed:
        fail(f"{names} changed since {cfg.out} was begun; choose another --out, keep what is there "
             "(--allow_changed_code=true) or start again (--overwrite=true)")

def progress(steps, name, count):
    """tqdm on rank 0, counted from the start of the run, not of this process"""
    return tqdm(steps, name, count, initial=count - len(steps), disable=True if RANK else None,
                mininterval=1, dynamic_ncols=True)

def log_metrics(out, row, shown=None):
    """Write a row to metrics.jsonl and print it (the fields shown; None: all) (rank 0)"""
    if RANK == 0:
        with open(Path(out, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        figures = {name: row[name] for name in shown or row if name in row}
        say(" | ".join(f"{name} {x if isinstance(x, int) else format(x, '.3g')}"
                       for name, x in figures.items()))

def logged(path):
    """The rows of a metrics.jsonl or samples.jsonl, without the torn last line of a killed run"""
    text = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
    try:
        return [json.loads(line) for line in text.split("\n")[:-1] if line]
    except ValueError as error:
        fail(f"{path} is damaged ({error}); remove the line, or start again with --overwrite=true")

def trim_logs(out, done):
    """Remove what was logged after the last checkpoint: those steps are done again (rank 0)"""
    for path in (Path(out, "metrics.jsonl"), Path(out, "samples.jsonl")):
        if RANK == 0 and path.exists():
            write_jsonl(path, [row for row in logged(path) if row["step"] < done])

# ---------------------------------------------------------------- checkpoints and models. All ranks

def training_state(models, optimizer):
    """-> weights, optimizer state, and the tensors of both that a checkpoint holds"""
    weights, moments = states.get_state_dict(models, optimizer, options=FLAT)
    kept = dict(models.named_parameters()).keys() | moments.keys()  # a tied weight has two names
    tensors = {name: value for name, value in {**weights, **moments}.items()
               if name in kept and isinstance(value, torch.Tensor)}
    return weights, moments, tensors

def save_checkpoint(out, step, models, optimizer):
    """<out>/checkpoint_<step>/, each rank its shard; the earlier checkpoint is then deleted"""
    temporary, final = Path(out, "checkpoint.tmp"), Path(out, f"checkpoint_{step}")
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=WORLD > 1)
    dcp.save(training_state(models, optimizer)[2], storage_writer=writer)
    if RANK == 0:
        os.replace(temporary, final)
        for folder in set(Path(out).glob("checkpoint_*")) - {final}:
            shutil.rmtree(folder)
    barrier()

def load_checkpoint(out, models, optimizer):
    """Fill models and optimizer from the newest checkpoint -> its step, 0 without one"""
    steps = [int(folder.name.split("_")[1]) for folder in Path(out).glob("checkpoint_*")]
    if steps:
        weights, moments, tensors = training_state(models, optimizer)
        reader = dcp.HuggingFaceStorageReader(str(Path(out, f"checkpoint_{max(steps)}")))
        dcp.load(tensors, storage_reader=reader)  # in place, so weights and moments are filled too
        states.set_state_dict(models, optimizer, model_state_dict=weights, optim_state_dict=moments,
                              options=FLAT)
    return max(steps, default=0)

def save_model(model, tokenizer, out, dtype, *, sequence_pad=None):
    """A Hugging Face folder. All its files name the same eos; config.json comes last and makes it
    valid. sequence_pad: ...ForSequenceClassification reads the score at the last id but this."""
    state = states.get_model_state_dict(model, options=FULL)
    if RANK == 0:
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        state = {name: weight.to(dtype).contiguous() for name, weight in state.items()}
        folder = Path(out, "saving.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        model.config.eos_token_id = tokenizer.eos_token_id
        if model.can_generate():
            ends = sorted({tokenizer.eos_token_id, *getattr(tokenizer, "more_end_ids", ())})
            eos = ends if len(ends) > 1 else ends[0]
            model.generation_config = GenerationConfig(  # sampling as in evaluate.py decode
                do_sample=True, temperature=0.7, top_p=0.9, top_k=0, eos_token_id=eos,
                bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id)
        model.save_pretrained(folder, state_dict=state)
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        if hasattr(model, "score"):
            config |= dict(problem_type="regression", id2label={0: "reward"},
                           label2id={"reward": 0})
        if sequence_pad is not None:
            names = [name.replace("ForToken", "ForSequence") for name in config["architectures"]]
            config |= {"architectures": names, "pad_token_id": sequence_pad}
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(sequence_pad)
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        card = extra("card")
        if card:  # None where extras/ was deleted
            card.write(folder, out, tokenizer)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
            shutil.copymode(folder / "config.json", file)  # safetensors' is for its owner only
            os.replace(file, Path(out, file.name))
        folder.rmdir()
    barrier()

def save_step(model, tokenizer, out, step, dtype):
    """<out>/step_<step>/: the model as it was then. It exists only when complete."""
    temporary, final = Path(out, "saving_step.tmp"), Path(out, f"step_{step}")
    save_model(model, tokenizer, temporary, dtype)
    if RANK == 0:
        shutil.rmtree(final, ignore_errors=True)  # left by a run that was killed after this step
        os.replace(temporary, final)
