"""How a stage is started: stage.py [preset.toml ...] [--field=value ...]; later values win.

The fields, their types and defaults are the stage's own Config. A mistake is one line, exit code 2.
"""
import difflib, errno, importlib, inspect, os, sys, tomllib, types, typing
from pathlib import Path

from plumbing.ranks import WORLD, fail

# The tables that a preset may have: one per stage, and one per command word of a stage.
TABLES = ("prepare sft edit edit.stats diff diff.show reward_model reward_model.show ppo evaluate "
          "evaluate.decode evaluate.judge evaluate.winrate evaluate.best evaluate.rewards "
          "evaluate.report evaluate.ask").split()

# Fields that hold a path: a leading ~ means the home folder.
PATHS = ("data out model policy reward_model eval_data tokenizer outputs reference html source "
         "train guide json svg").split()
# The others send requests or write one file, so a second process would do their work twice.
MANY_PROCESSES = "sft reward_model ppo evaluate.decode evaluate.judge evaluate.rewards".split()
BOOLS = {"true": True, "1": True, "false": False, "0": False}

def load_config(Config, table, argv=None):
    """Config from its defaults, then the presets and flags of argv; later values win.

    table: the table of a preset that this stage reads; a copy under another file name reads the
    same. A positional argument that ends in .toml is a preset; any other is `data`."""
    sys.excepthook = one_line
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None, if it was closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # what a terminal cannot show becomes "?"
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(sys.modules[Config.__module__].__doc__ + "\n" + inspect.getsource(Config))
        raise SystemExit(0)

    if WORLD > 1 and table not in MANY_PROCESSES:
        fail("this runs in one process: start it with python, not with torchrun")
    kinds = typing.get_type_hints(Config)
    values = {}
    positional = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            name, text = read_flag(word, words, kinds)
            values[name] = parse(name, text, kinds[name], "command line")
        elif word.endswith(".toml"):
            where = f"{word} [{table}]"
            for given, value in read_preset(word, table).items():
                name = known(given, kinds, where)
                values[name] = parse(name, value, kinds[name], where)
        elif word.startswith("-") and word != "-":
            fail(f"command line: unknown option {word!r}; an option is written --name=value")
        else:
            positional.append(word)
    if positional:
        check_word(positional[0], table)
        name = known("data", kinds, "command line")
        values[name] = parse(name, positional, kinds[name], "command line")
    for name, value in values.items():
        if value == "" and name in PATHS and getattr(Config, name, None) != "":
            fail(f"command line: --{name} is empty; write a path, or leave it out")
    return Config(**values)

def check_word(word, table):
    """fail() if a positional argument is no file, but like a command word (stats, show)"""
    words = [name.removeprefix(f"{table}.") for name in TABLES if name.startswith(f"{table}.")]
    near = difflib.get_close_matches(word, words, 1)
    if near and not Path(word).exists():
        fail(f"command line: no file {word!r}. Did you mean the word {near[0]!r}? It comes first: "
             f"python {Path(sys.argv[0]).name} {near[0]} ...")

def read_flag(word, words, kinds):
    """--name=value, --name value or a bare --name of a bool -> name, text. Takes the value from
    `words`, the rest of the command line."""
    name, equals, text = word[2:].partition("=")
    name = known(name, kinds, "command line")
    if equals:
        return name, text
    if kinds[name] is bool and (not words or words[0].lower() not in BOOLS):
        return name, "true"
    if not words or words[0].startswith("--"):
        fail(f"command line: --{name} needs a value: write --{name}=value")
    return name, words.pop(0)

def known(name, kinds, where):
    """The field that a flag or a preset names, with - for _"""
    field = name.replace("-", "_")
    if field not in kinds:
        fail(f"{where}: unknown option {name!r}" + did_you_mean(field, kinds))
    return field

def did_you_mean(name, names, form="{!r}"):
    near = difflib.get_close_matches(name, names, 1)
    return f". Did you mean {form.format(near[0])}?" if near else f"; there are: {', '.join(names)}"

def read_preset(path, table):
    """field -> value of one [table] of a preset. A table that no stage reads is an error."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        fail(f"{path}: {getattr(error, 'strerror', None) or error}")
    # [evaluate.decode] is a table inside the table [evaluate].
    for name, content in list(tables.items()):
        if isinstance(content, dict):
            inner = {key: value for key, value in content.items() if isinstance(value, dict)}
            tables |= {f"{name}.{key}": value for key, value in inner.items()}
    script = Path(sys.argv[0])
    for name, content in tables.items():
        if name not in TABLES or not isinstance(content, dict):
            hint = did_you_mean(name, TABLES, "[{}]")
            if name == script.stem:
                hint = f"; {script.name} reads [{table}]"
            fail(f"{path}: {name!r} is not a table of a stage{hint}")
    fields = tables.get(table, {}).items()
    return {name: value for name, value in fields if not isinstance(value, dict)}

def parse(name, given, kind, where):
    """A value as the field's annotated type, never guessed from the text itself.

    given: the text of a flag, a list of positional words, or a preset's value. The items of a list
    are divided by commas, unless the text names an existing path; those of a tuple are not."""
    where = f"{where}: {name}"
    texts = [str(text) for text in (given if isinstance(given, list) else [given])]
    origin = typing.get_origin(kind)
    if origin not in (list, tuple):
        if len(texts) > 1:
            fail(f"{where} takes one value, got {len(texts)}: {' '.join(texts)}")
        return parse_text(name, "".join(texts), kind, where)
    items = []
    for text in texts:
        if origin is list and "," in text and not Path(os.path.expanduser(text)).exists():
            items += text.split(",")
        elif text not in ("", "[]"):
            items.append(text)
    return [parse_text(name, item, typing.get_args(kind)[0], where) for item in items]

def parse_text(name, text, kind, where):
    """A text as a bool, an int, a float, a str, one of a Literal's words, or None"""
    args = typing.get_args(kind)
    if name in PATHS:
        text = os.path.expanduser(text)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):  # X | None
        kind = next(arg for arg in args if arg is not type(None))
        return None if text == "None" else parse_text(name, text, kind, where)
    if typing.get_origin(kind) is typing.Literal:
        if text not in args:
            fail(f"{where} must be one of {', '.join(args)}, got {text!r}")
        return text
    try:
        return BOOLS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        hint = " (true or false)" if kind is bool else ""
        fail(f"{where} must be {kind.__name__}{hint}, got {text!r}")

def extra(name, needed_by=""):
    """A module of extras/: extra("memory.plan", "--plan"). If the folder is missing: one line that
    says what needs it, or None if nothing does."""
    try:
        return importlib.import_module(f"extras.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("extras"):
            raise
        if not needed_by:
            return None
        fail(f"{needed_by} needs the folder extras/ of this project, which is missing here")

def one_line(kind, error, trace):
    """sys.excepthook: Ctrl-C and a full or read-only disk are one line, not a traceback"""
    not_ours = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
                errno.ENAMETOOLONG)
    disk = (errno.ENOSPC, errno.EDQUOT, *not_ours)
    full = "No space left on device"  # as safetensors says it, without an error number
    if kind is BrokenPipeError:  # `| head` has read enough
        os._exit(141)  # as other programs do
    if kind is KeyboardInterrupt:
        overwrites = any(word.startswith("--overwrite") for word in sys.argv)
        without = ", without --overwrite," if overwrites else ""
        print(f"\ninterrupted: what was saved is kept; the same command{without} continues from "
              "there", file=sys.stderr)
    elif (isinstance(error, OSError) and error.errno in disk) or full in str(error):
        where = getattr(error, "filename", None) or ""
        why = getattr(error, "strerror", None) or full
        what, fix = "write", "free some space (or choose another --out), run the same command again"
        if getattr(error, "errno", None) in not_ours:
            what, fix = "open", "choose another path, or change what is there"
        print(f"{Path(sys.argv[0]).name}: cannot {what} {where}: {why}; what was written before is "
              f"valid: {fix}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
