"""What a run leaves of itself beside its result, so that it can be trusted and go on: the record of its config, a lock,
metrics. The stages' main() uses it; no mathematics is in here.

<out>/run.json (or <file>.run.json) is the resolved config with the inputs' fingerprints, the command, the commit and
the versions. An interrupted run is resumed without being asked if that is the same, else refused with the differences.
"""
import dataclasses, fcntl, hashlib, json, os, shutil, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from common import RANK, WORLD, fail, say, write_jsonl


# ---------------------------------------------------------------- what wrote an output, and may it go on?

def is_file(out):
    """An output is a file if its name ends so: edits.jsonl, but not out/rm_0.3 or out/sft.small"""
    return Path(out).suffix in (".jsonl", ".json", ".html", ".md")


def record_path(out):
    """Where a run's resolved config stands: in its folder, or beside its file"""
    return Path(f"{out}.run.json") if is_file(out) else Path(out, "run.json")


def record_of(out):
    """The run.json of a run's output, {} if there is none"""
    return json.loads(record_path(out).read_text()) if record_path(out).exists() else {}


def fingerprint(path, sample=True):
    """What a run remembers of an input: a file's content; of a model's folder the run that made it, and of its weights
    the sizes and a sample (16 pieces of 64 KB of each file: no two trainings agree in them)"""
    path = Path(path)
    if not path.exists():
        return str(path)  # a name on the hub
    digest = hashlib.sha256(path.read_bytes() if path.is_file() else b"")
    for file in sorted(path.iterdir()) if path.is_dir() else []:
        if file.name in ("config.json", "run.json"):
            digest.update(file.read_bytes())
        elif file.suffix == ".safetensors" or file.name.startswith("tokenizer"):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as weights:
                for k in range(16 if sample else 0):
                    weights.seek(k * size // 16)
                    digest.update(weights.read(1 << 16))
    return digest.hexdigest()[:16]


@contextmanager
def replacing(path):
    """A file under its final name only when whole: written beside, synced, renamed"""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


LOCKS = []  # stay open until the process ends, however it ends: the kernel then drops them


def begin(cfg, *, free=(), inputs=(), beside=(), **facts):
    """Take cfg.out (a folder, or a file with a suffix): lock it, compare its run.json, write ours. -> True if finished.

    free: fields that cannot change the result, so that an interrupted run may go on with other values. inputs: files
    and folders read, whose content is compared too; beside: names that may stand in out already. Another config,
    another's lock or a stranger's files end the run, unless nothing of a result is there yet. Rank 0 decides; torchrun
    ends the others."""
    out, old = Path(cfg.out), {} if cfg.overwrite else record_of(cfg.out)
    if RANK > 0:
        return bool(old.get("finished"))
    usual = getattr(type(cfg), "out", None) or out
    if is_file(out) != is_file(usual):
        kind = "a file, named" if is_file(usual) else "a folder, not named as a file is"
        fail(f"--out={out} must be {kind}: such as {usual}")
    if out.exists() and out.is_dir() == is_file(out):
        fail(f"--out={out} is there as a {'folder' if out.is_dir() else 'file'}; choose another name")
    read = {Path(path).resolve() for path in (*inputs, getattr(cfg, "data", None)) if isinstance(path, (str, Path))}
    ours = ("checkpoint_*", "step_*", "metrics.jsonl", "samples.jsonl", "config.json")
    for path in read if cfg.overwrite or is_file(out) else ():
        inside = path.is_relative_to(out.resolve()) and path.relative_to(out.resolve()).parts
        if inside == () or inside and any(Path(inside[0]).match(name) for name in ours):
            fail(f"--out={out} is or holds {path}, which this run reads; choose another --out")
    try:
        record_path(out).parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        fail(f"--out={out} lies below something that is no folder; choose another --out")
    LOCKS.append(open(record_path(out).with_suffix(".lock"), "w"))
    try:
        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing {out}; wait for it, or choose another --out")

    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    seen = {str(path): fingerprint(path) for path in inputs}
    if is_file(out):  # what there is of a result: the file itself, or what a killed run had
        left = [path for path in map(Path, (out, *(f"{out}{rest}" for rest in (
            ".parts", ".replies", ".batches", ".batches.json")))) if path.exists() and path.stat().st_size]
    else:
        left = [f for f in out.glob("*") if f.name not in (*beside, "run.json") and f.suffix != ".lock"]
    if cfg.overwrite:
        record_path(out).unlink(missing_ok=True)  # first: what is half deleted is not finished
    if cfg.overwrite and is_file(out):
        out.unlink(missing_ok=True)
    elif cfg.overwrite:  # only what a run of ours leaves in a folder
        for path in (path for name in ours for path in out.glob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif not old and (out.is_file() if is_file(out) else left):
        fail(f"{out} holds something that no run of ours wrote; choose another --out, or replace it: --overwrite=true")
    elif old:
        then = {name: getattr(type(cfg), name, None) for name in config} | old["config"]  # a field that came later
        differs = [f"{name}: {then[name]!r} then, {value!r} now" for name, value in config.items()
                   if name not in (*free, "overwrite", "out") and then[name] != value]
        differs += [f"the content of {path}" for path in seen if path in old["inputs"] and old["inputs"][path] != (
            seen[path] if "started" in old else fingerprint(path, sample=False))]  # else: before weights were sampled
        if differs and (left or old["finished"]):
            fail(f"{out} is another config's ({'; '.join(differs)}); choose another --out, or start anew with "
                 "--overwrite=true")
        if old["finished"]:
            return True
    for rest in ("checkpoint.tmp", "saving.tmp", "saving_step.tmp"):  # half written by a run that was killed
        shutil.rmtree(out / rest, ignore_errors=True)

    def git(*words):
        try:
            done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
            return done.stdout.strip()
        except OSError:  # no git here
            return ""
    record = dict(config=config, inputs=seen, **facts, finished=False, command=" ".join(sys.argv),
                  started=old.get("started") or time.strftime("%Y-%m-%d %H:%M:%S"),
                  commit=git("rev-parse", "--short", "HEAD"), dirty=bool(git("status", "--porcelain")),
                  torch=torch.__version__, transformers=transformers.__version__, world_size=WORLD,
                  device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    with replacing(record_path(out)) as file:
        json.dump(record, file, indent=1)
    return False


def finish(cfg, *, keep_checkpoint=True, **facts):
    """Mark the run as finished in its run.json (rank 0). keep_checkpoint=False: its model stays, not its optimizer"""
    if RANK == 0:
        record = record_of(cfg.out) | facts | {"finished": time.strftime("%Y-%m-%d %H:%M:%S")}
        with replacing(record_path(cfg.out)) as file:
            json.dump(record, file, indent=1)
        for folder in Path(cfg.out).glob("checkpoint_*") if not keep_checkpoint else ():
            shutil.rmtree(folder)


def progress(steps, name, count):
    """tqdm on rank 0, counted from the start of the run, not of this process"""
    return tqdm(steps, name, count, initial=count - len(steps), disable=True if RANK else None, mininterval=1,
                dynamic_ncols=True)


def log_metrics(out, row, shown=None):
    """One object in metrics.jsonl and one printed line (of the fields shown; None: all) per step (rank 0)"""
    if RANK == 0:
        with open(Path(out, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        say(" | ".join(f"{name} {row[name]:.4g}" for name in shown or row if name in row))


def logged(path):
    """The rows of a metrics.jsonl or samples.jsonl, [] without one; the torn last line of a killed run is left out"""
    text = Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].split("\n") if line]


def trim_logs(out, done):
    """Drop what an interrupted run logged after its last checkpoint: those steps are done again (rank 0)"""
    for path in (Path(out, "metrics.jsonl"), Path(out, "samples.jsonl")):
        if RANK == 0 and path.exists():
            write_jsonl(path, [row for row in logged(path) if row["step"] < done])
