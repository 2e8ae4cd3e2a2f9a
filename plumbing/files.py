"""JSONL files, and a user's mistakes in rows, files and numbers: one line says what is wrong and how
to fix it, before any model is loaded."""
import json, math, os
from contextlib import contextmanager
from pathlib import Path

from plumbing.ranks import fail


def read_jsonl(path, fields):
    """The rows of a JSONL file (list of dict). fields: name -> kind, as in fits(); unknown fields
    are kept. A malformed row ends the run with file:line."""
    try:
        file = open(path, "rb")
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    rows = []
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                fail(f"{path}:{number}: not JSON ({error})")
            check_row(row, fields, f"{path}:{number}")
            rows.append(row)
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
    """A file that gets its name only when it is complete: a temporary file, synced, then renamed"""
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


def check_row(row, fields, where):
    """fail() unless the row is an object with these fields (name -> kind, as in fits()) or more"""
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
    """A kind of fits() in words: "str or null" """
    if isinstance(kind, tuple):
        return " or ".join(map(kind_name, kind))
    return "null" if kind is type(None) else getattr(kind, "__name__", str(kind))


def check_input(path, flag, made_by):
    """fail() unless the file or folder exists; made_by is the command that makes it"""
    if not Path(path).exists():
        fail(f"--{flag}={path} does not exist; make it with: {made_by}")


def check_numbers(cfg, *counts):
    """fail() unless these fields, of rows, tokens or steps, are >= 1 or None; also checks lr, warmup"""
    for name in counts:
        value = getattr(cfg, name)
        if value is not None and value < 1:
            fail(f"--{name} must be at least 1, got {value}")
    if not 0 <= getattr(cfg, "lr", 0) < math.inf:
        fail(f"--lr must be a finite number of at least 0, got {cfg.lr}")
    if not 0 <= getattr(cfg, "warmup", 0) <= 1:
        fail(f"--warmup is a share of the steps, 0 to 1, got {cfg.warmup}")
