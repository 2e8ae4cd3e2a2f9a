"""How a stage is started: stage.py [preset.toml ...] [--field=value ...], the rightmost winning.

The fields, their types and defaults are the stage's own Config; what is wrong is one line, exit code 2.
"""
import difflib, errno, inspect, os, sys, tomllib, types, typing
from pathlib import Path

from common import fail

TABLES = ("prepare sft edit edit.stats diff diff.show reward_model reward_model.show ppo evaluate evaluate.decode "
          "evaluate.judge evaluate.winrate evaluate.rewards evaluate.report").split()  # of a preset


FULL = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)


def parse(text, kind, where):
    """The text of a flag or preset as the field's annotated type; never guessed from the text itself."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # X | None
        return None if text == "None" else parse(text, next(a for a in args if a is not type(None)), where)
    if origin is typing.Literal:
        return text if text in args else fail(f"{where} must be one of {', '.join(args)}, got {text!r}")
    if origin is list:
        return [] if text in ("", "[]") else [parse(item, args[0], where) for item in text.split(",")]
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        fail(f"{where} must be {kind.__name__}{' (true or false)' if kind is bool else ''}, got {text!r}")


def did_you_mean(name, names, form="{!r}"):
    near = difflib.get_close_matches(name, names, 1)
    return f". Did you mean {form.format(near[0])}?" if near else f"; there are: {', '.join(names)}"


def read_preset(path, table):
    """field -> text of one [table] of a preset. Tables that no stage reads are refused."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path}: {getattr(error, 'strerror', None) or error}")
    for name, content in list(tables.items()):  # [evaluate.decode] stands inside [evaluate]
        inner = {k: v for k, v in content.items() if isinstance(v, dict)} if isinstance(content, dict) else {}
        tables |= {f"{name}.{k}": v for k, v in inner.items()}
    for name, content in tables.items():
        if name not in TABLES or not isinstance(content, dict):
            fail(f"{path}: {name!r} is not a table of a stage" + did_you_mean(name, TABLES, "[{}]"))
    return {k: ",".join(map(str, v)) if isinstance(v, list) else str(v)
            for k, v in tables.get(table, {}).items() if not isinstance(v, dict)}


def load_config(Config, table=None, argv=None):
    """Config from its defaults, then the presets and flags of argv, the rightmost winning. A positional argument that
    ends in .toml is a preset (its [table] is read; default: the script's name), any other is `data`."""
    sys.excepthook = one_line
    module = sys.modules[Config.__module__]
    table, argv = table or Path(module.__file__).stem, sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(module.__doc__ + "\n" + inspect.getsource(Config))
        raise SystemExit(0)
    given, positional = [], []  # (field, its text, where it stands)
    for word in argv:
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            given.append((name, text, "command line") if equals else fail(f"command line: write --{name}=value"))
        elif word.endswith(".toml"):
            given += [(name, text, f"{word} [{table}]") for name, text in read_preset(word, table).items()]
        else:
            positional.append(word)
    given += [("data", ",".join(positional), "command line")] if positional else []
    kinds, values = typing.get_type_hints(Config), {}
    for name, text, where in given:
        if name not in kinds:
            fail(f"{where}: unknown option {name!r}" + did_you_mean(name, kinds))
        values[name] = parse(text, kinds[name], f"{where}: {name}")
    return Config(**values)


def one_line(kind, error, trace):
    """sys.excepthook: Ctrl-C and a full or read-only disk are the user's business, not a traceback"""
    if kind is BrokenPipeError:  # `| head` has seen enough
        os._exit(0)
    if kind is KeyboardInterrupt:
        anew = ", without --overwrite," if any(word.startswith("--overwrite") for word in sys.argv) else ""
        print(f"\ninterrupted: the same command{anew} goes on from here", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in FULL or "No space left on device" in str(error):
        where = getattr(error, "filename", None) or ""
        why = getattr(error, "strerror", None) or "No space left on device"
        print(f"{Path(sys.argv[0]).name}: cannot write {where}: {why}; what was written before is valid: free some "
              "space (or choose another --out), run the same command again", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
