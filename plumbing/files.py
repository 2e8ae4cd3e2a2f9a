"""JSONL files, and a user's mistakes in rows, files and numbers: one line says what is wrong and
how to fix it, before any model is loaded."""
import json, math, os
from contextlib import contextmanager, suppress
from pathlib import Path

from plumbing.ranks import fail

def read_jsonl(path, fields):
    """The rows (list of dict) of a JSONL file or a JSON array. fields: name -> kind, as in fits();
    unknown fields are kept, a missing `input` is "". A malformed row: fail() with file:line."""
    try:
        text = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    rows = []
    if text.lstrip()[:1] == b"[":
        with suppress(ValueError, RecursionError):
            rows = list(enumerate(json.loads(text, parse_constant=no_constant), 1))
    lines = [] if rows else text.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line, parse_constant=no_constant)))
            except (ValueError, RecursionError) as error:
                fail(f"{path}:{number}: not JSON ({error})")
    for number, row in rows:
        if isinstance(row, dict) and "input" in fields:
            row.setdefault("input", "")
        check_row(row, fields, f"{path}:{number}")
    if not rows:
        fail(f"{path}: no rows in it")
    return [row for _, row in rows]

def no_constant(word):
    raise ValueError(f"{word} is not JSON; write null, or leave the field out")

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

# Ranges of numbers, both ends included: (least, most).
COUNT = (1, math.inf)
AT_LEAST_0 = (0, math.inf)
ABOVE_0 = (math.ulp(0.0), math.inf)
SHARE = (0, 1)
ANY = (-math.inf, math.inf)

def check_numbers(cfg, **ranges):
    """fail() unless each field is None or a finite number in its range"""
    for name, (low, high) in ranges.items():
        value = getattr(cfg, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            least = "above 0" if low == ABOVE_0[0] else f"at least {low}"
            most = "finite" if high == math.inf else f"at most {high}"
            fail(f"--{name} must be {least} and {most}, got {value}")
