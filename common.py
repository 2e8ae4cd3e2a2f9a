"""What the stages share, or what two of them must agree on: config, files, prompts and tokens, ranks, models, generation.

One alphabet in every file: B sequences, P prompt tokens, T response tokens, S = P + T, V vocabulary. A mask is True where
a token counts; it comes from lengths, never from `ids == pad`. Names: prompt_ids [B, P]; response_ids, response_mask,
logprobs, values, rewards, changed, ... [B, T], one column per response token a_1..a_T, whatever the padding around them.
"""
import dataclasses, difflib, errno, fcntl, functools, hashlib, inspect, json, math, os, random, re, shutil, subprocess, sys
import time, tomllib, types, typing
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default))  # torchrun sets them
                           for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ---------------------------------------------------------------- a user's mistake is one line

def fail(message):
    """One line on stderr, exit code 2. Every rank finds the same mistake; the others wait for rank 0 to be the one to say it."""
    if RANK > 0:
        time.sleep(10)  # torchrun ends us first, unless the mistake is this rank's own
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def say(*words):
    """print on rank 0, above the progress bar"""
    if RANK == 0:
        tqdm.write(" ".join(map(str, words)), file=sys.stdout)
        sys.stdout.flush()


def one_line(kind, error, trace):
    """sys.excepthook: Ctrl-C and a full or read-only disk are the user's business, not a traceback"""
    if kind is KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from here", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        print(f"{Path(sys.argv[0]).name}: cannot write {error.filename or ''}: {error.strerror}; what was written before is valid, "
              "free some space (or choose another --out) and run the same command again", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# ---------------------------------------------------------------- config: python stage.py [preset.toml ...] [--field=value ...]

TABLES = ("prepare", "sft", "edit", "edit.stats", "diff", "diff.show", "reward_model", "reward_model.show", "ppo", "evaluate",
          "evaluate.decode", "evaluate.judge", "evaluate.winrate", "evaluate.rewards", "evaluate.report")  # of a preset


def parse(text, kind, where):
    """The text of a flag or preset as the field's annotated type; never guessed from the text itself."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # X | None
        return None if text == "None" else parse(text, next(a for a in args if a is not type(None)), where)
    if origin is typing.Literal:
        if text in args:
            return text
        fail(f"{where} must be one of {', '.join(args)}, got {text!r}")
    if origin is list:
        return [] if text in ("", "[]") else [parse(item, args[0], where) for item in text.split(",")]
    if kind is bool and text.lower() in ("true", "1", "false", "0"):
        return text.lower() in ("true", "1")
    try:
        if kind is not bool:
            return kind(text)
    except ValueError:
        pass
    fail(f"{where} must be {kind.__name__}{' (true or false)' if kind is bool else ''}, got {text!r}")


def load_config(Config, table=None, argv=None):
    """Config from its defaults, then the presets and flags of argv, the rightmost winning. A positional argument that ends in
    .toml is a preset (its [table] is read; default: the script's name), any other is `data`."""
    sys.excepthook = one_line
    module = sys.modules[Config.__module__]
    table, argv = table or Path(module.__file__).stem, sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(module.__doc__ + "\n" + inspect.getsource(Config))
        raise SystemExit(0)
    kinds, values, positional = typing.get_type_hints(Config), {}, []

    def put(name, text, origin):
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, 1)
            fail(f"{origin}: unknown option {name!r}" + (f". Did you mean {near[0]!r}?" if near else "; --help lists them"))
        values[name] = parse(text, kinds[name], f"{origin}: {name}")

    for word in argv:
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            if not equals:
                fail(f"command line: write --{name}=value")
            put(name, text, "command line")
        elif word.endswith(".toml"):
            try:
                preset = tomllib.loads(Path(word).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                fail(f"{word}: {getattr(error, 'strerror', None) or error}")
            flat = {name: preset[name] for name in preset}
            for name in [n for n in preset if isinstance(preset[n], dict)]:  # [evaluate.decode] is a table inside a table
                flat |= {f"{name}.{inner}": v for inner, v in preset[name].items() if isinstance(v, dict)}
            for name, content in flat.items():
                if name not in TABLES or not isinstance(content, dict):
                    near = difflib.get_close_matches(name, TABLES, 1)
                    fail(f"{word}: {name!r} is not a table of a stage" + (f". Did you mean [{near[0]}]?" if near else ""))
            for name, value in flat.get(table, {}).items():
                if not isinstance(value, dict):
                    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                    put(name, text, f"{word} [{table}]")
        else:
            positional.append(word)
    if positional:
        put("data", ",".join(positional), "command line")
    return Config(**values)


# ---------------------------------------------------------------- files

def check_input(path, flag, made_by):
    """fail() unless the file or folder is there; made_by is the command that makes it"""
    if not Path(path).exists():
        fail(f"--{flag}={path} does not exist; make it with: {made_by}")


def check_model(path, flag, made_by):
    """A model is a Hugging Face folder, or a name on the hub: org/name, where org is no folder of ours"""
    org, _, name = str(path).partition("/")
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and org not in ("out", "data") and not Path(org).exists()
    if not on_hub and not Path(path, "config.json").exists():
        fail(f"--{flag}={path} holds no finished model (no config.json); make it with: {made_by}")


def fits(value, kind):
    """kind: None (anything), a type, a literal value, or a tuple of these. A bool is no int."""
    if isinstance(kind, tuple):
        return any(fits(value, k) for k in kind)
    if isinstance(kind, type):
        return isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
    return kind is None or (value == kind and not isinstance(value, bool))


def read_jsonl(path, fields):
    """The rows of a JSONL file (list of dict). fields: name -> kind, as in fits(). A malformed row ends the run with
    file:line. Extra fields pass."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                fail(f"{path}:{number}: not JSON ({error})")
            if row is None and not line.strip():
                continue
            if not isinstance(row, dict):
                fail(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
            for name, kind in fields.items():
                if name not in row:
                    fail(f"{path}:{number}: no field {name!r}; the row has: {', '.join(row) or 'nothing'}")
                if not fits(row[name], kind):
                    kinds = " or ".join(getattr(k, "__name__", str(k)).replace("NoneType", "null")
                                        for k in (kind if isinstance(kind, tuple) else (kind,)))
                    fail(f"{path}:{number}: {name} must be {kinds}, got {json.dumps(row[name])[:60]}")
            rows.append(row)
    return rows or fail(f"{path}: no rows in it")


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


def write_jsonl(path, rows):
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n")


def fingerprint(path):
    """What a run remembers of an input: a file's content; of a model's folder its config, the run that made it, its files' sizes"""
    path, digest = Path(path), hashlib.sha256()
    if not path.exists():
        return str(path)  # a name on the hub
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    for file in sorted(path.iterdir()):
        if file.name in ("config.json", "run.json"):
            digest.update(file.read_bytes())
        elif file.suffix == ".safetensors" or file.name.startswith("tokenizer"):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def record_path(out):
    """Where a run's resolved config stands: in its folder, or beside its file"""
    return Path(f"{out}.run.json") if Path(out).suffix else Path(out, "run.json")


LOCKS = []  # stay open until the process ends, however it ends: the kernel then drops them


def begin(cfg, *, free=(), inputs=(), beside=(), **facts):
    """Take cfg.out (a folder, or a file with a suffix): lock it, compare its run.json, write ours. -> True if finished before.

    free: fields that cannot change the result, so that an interrupted run may go on with other values. inputs: the files and
    folders read, whose content is compared too; beside: names that may stand in out already. Another config, another's lock or a stranger's files end the run."""
    out, record_at, is_file = Path(cfg.out), record_path(cfg.out), bool(Path(cfg.out).suffix)
    config = json.loads(json.dumps(dataclasses.asdict(cfg)))
    record = {"config": config, "inputs": {str(path): fingerprint(path) for path in inputs}, **facts, "finished": False}
    if RANK == 0:
        record_at.parent.mkdir(parents=True, exist_ok=True)
        LOCKS.append(open(record_at.with_suffix(".lock"), "w"))
        try:
            fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is writing {out}; wait for it, or choose another --out")
    old = record_of(out)
    if not cfg.overwrite:
        if not old and (out.is_file() or any(f.suffix != ".lock" and f.name not in beside for f in out.glob("*"))):
            fail(f"{out} holds something that no run of ours wrote; choose another --out, or replace it with --overwrite=true")
        differs = [f"{name}: {old['config'].get(name)!r} then, {value!r} now" for name, value in config.items()
                   if old and name not in (*free, "overwrite", "out") and old["config"].get(name) != value]
        differs += [f"the content of {path}" for path, seen in record["inputs"].items() if old and old["inputs"].get(path) != seen]
        if differs:
            fail(f"{out} is another config's ({'; '.join(differs)}); choose another --out, or start anew with --overwrite=true")
        if old and old["finished"]:
            return True
    elif RANK == 0 and is_file:
        out.unlink(missing_ok=True)
    elif RANK == 0:  # only what a run of ours leaves in a folder
        for file in (out / name for name in ("metrics.jsonl", "samples.jsonl", "config.json")):
            file.unlink(missing_ok=True)
        for folder in (*out.glob("checkpoint_*"), *out.glob("step_*")):
            shutil.rmtree(folder)
    if RANK == 0:
        def git(*words):
            return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
        record |= {"command": " ".join(sys.argv), "commit": git("rev-parse", "--short", "HEAD"),
                   "dirty": bool(git("status", "--porcelain")), "torch": torch.__version__, "world_size": WORLD,
                   "transformers": transformers.__version__,
                   "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
        with replacing(record_at) as file:
            json.dump(record, file, indent=1)
    return False


def record_of(out):
    """The run.json of a run's output, {} if there is none"""
    return json.loads(record_path(out).read_text()) if record_path(out).exists() else {}


def finish(cfg, **facts):
    """Mark the run as finished in its run.json (rank 0)"""
    if RANK == 0:
        record = record_of(cfg.out) | facts | {"finished": time.strftime("%Y-%m-%d %H:%M:%S")}
        with replacing(record_path(cfg.out)) as file:
            json.dump(record, file, indent=1)


def progress(steps, name, count):
    """tqdm on rank 0, counted from the start of the run, not of this process"""
    return tqdm(steps, name, count, initial=count - len(steps), disable=True if RANK else None, dynamic_ncols=True, mininterval=1)


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


# ---------------------------------------------------------------- text and tokens

PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n### Response:")
PROMPT_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:")


def load_tokenizer(path):
    """The folder's or hub's tokenizer; nothing is added to it. It must give back what it encodes."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        fail(f"no tokenizer in {path}: {str(error).splitlines()[0]}")
    if tokenizer.eos_token_id is None:
        fail(f"the tokenizer of {path} has no eos token; a response could never end")
    return tokenizer


@functools.cache
def lead(tokenizer):
    """A response follows a ':', it does not begin a text. Where sentencepiece would put its dummy space before it, we encode it
    behind a newline (a byte token, which never merges) and take that away again. -> (text, ids) of what goes before."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    dummy = tokenizer.encode("x", add_special_tokens=False) != tokenizer.encode("\nx", add_special_tokens=False)[len(newline):]
    return ("\n", newline) if dummy else ("", [])


def encode_prompt(tokenizer, row):
    """Alpaca's prompt of a row -> ids, with bos once where the model family puts one"""
    template = PROMPT_INPUT if row.get("input") else PROMPT
    text = template.format(instruction=row["instruction"], input=row.get("input"))
    bos = tokenizer.bos_token == "<s>" or tokenizer.encode("x")[0] == tokenizer.bos_token_id  # Llama's bare model: "<s>"
    return [tokenizer.bos_token_id] * bos + tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_response(tokenizer, text, *, eos=True):
    """A response, as a rollout would hold it -> ids. eos=False: it was cut, it did not end by itself."""
    before, ids_before = lead(tokenizer)
    ids = tokenizer.encode(before + text, add_special_tokens=False, split_special_tokens=True)  # "</s>" in a text is text
    return ids[len(ids_before):] + [tokenizer.eos_token_id] * eos


def decode_response(tokenizer, ids):
    """The exact inverse: ids, up to a final EOS -> text"""
    before, ids_before = lead(tokenizer)
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    return tokenizer.decode([*ids_before, *ids], clean_up_tokenization_spaces=False)[len(before):]


def token_texts(tokenizer, ids):
    """The text of each token, for pictures: joined they are the response. A part of a character is "" until its last byte."""
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = decode_response(tokenizer, [*ids[:end], tokenizer.eos_token_id])
        whole = end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(done):] if whole else "")
        done = text if whole else done
    return texts


def tokenizer_hash(tokenizer):
    """Two tokenizers are one if their vocabulary and special ids agree (pad never matters here)"""
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), ids]).encode()).hexdigest()


def rows_at(start, stop, n, seed):
    """Rows start..stop of an endless stream: n rows in a new order each epoch. What an epoch leaves over opens the next batch."""
    return [epoch_order(n, seed, k // n)[k % n] for k in range(start, stop)]


@functools.lru_cache(4)
def epoch_order(n, *key):
    order = list(range(n))
    random.Random(" ".join(map(str, key))).shuffle(order)
    return order


def row_uniforms(length, *key):
    """The draws of one row, [length] in [0, 1): from its own key (seed, step, row) alone, not from its neighbours or rank"""
    draw = random.Random(" ".join(map(str, key)))
    return torch.tensor([draw.getrandbits(24) for _ in range(length)]) / 2**24  # 24 bits: exact in float32, never 1.0


# ---------------------------------------------------------------- ranks

def setup(dtype="auto"):
    """-> device, mesh (None: one process on a CPU, nothing is sharded), compute dtype. All ranks."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    compute = getattr(torch, dtype) if dtype != "auto" else torch.bfloat16 if cuda else torch.float32
    if cuda:
        torch.cuda.set_device(device)
    elif WORLD == 1:
        return device, None, compute
    lonely = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)  # python, without torchrun
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **lonely)
    node = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))  # several machines: shard inside one, replicate across (HSDP)
    shape, names = ((WORLD // node, node), ("replicate", "shard")) if node < WORLD else ((WORLD,), ("shard",))
    return device, init_device_mesh(device.type, shape, mesh_dim_names=names), compute


def total(x, op="sum"):
    """Sum (or max) of a tensor over the ranks. All ranks."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return x


def deal(rows, lengths, micro_batch):
    """This rank's micro-batches of an optimizer batch: lists of row numbers, rows of similar length together, the same number of
    lists on every rank (a list may be empty: run any row with weight 0, for FSDP's collectives). lengths[row]: its tokens."""
    order = sorted(rows, key=lambda row: (lengths[row], row))
    mine = [row for turn, start in enumerate(range(0, len(order), WORLD))  # dealt to and fro, so that no rank has all the long ones
            for place, row in enumerate(order[start:start + WORLD]) if place == (RANK if turn % 2 else WORLD - 1 - RANK)]
    count = -(-(-(-len(order) // WORLD)) // micro_batch)  # of the rank with the most rows
    return [mine[i * micro_batch:(i + 1) * micro_batch] for i in range(count)]


# ---------------------------------------------------------------- models

def reward_level(path):
    """"token" or "sequence": what kind of reward model a folder holds"""
    kinds = " ".join(json.loads(Path(path, "config.json").read_text()).get("architectures") or [])
    return "token" if "ForTokenClassification" in kinds else "sequence" if "ForSequenceClassification" in kinds else \
        fail(f"{path} is no reward model (its config.json says {kinds or 'nothing'}); make one with: python reward_model.py")


def fit_positions(path, flag, length):
    """fail() if rows are longer than the model's positions"""
    room = getattr(AutoConfig.from_pretrained(path), "max_position_embeddings", length)
    if length > room:
        fail(f"--{flag}={path} has positions for {room} tokens, the longest row has {length}; lower the length limits")


def load_model(path, device, mesh, dtype, *, head=None, frozen=False, checkpointing=False, seed=0):
    """A causal language model (head=None), or a backbone with one number per token: head="saved", or "zero" (a new one).

    Trained: float32 master weights, computing in dtype. Frozen: held in dtype. A folder without weights (the toy world's) is
    initialised from seed. Sharded over mesh if there is one. All ranks."""
    Auto, config = AutoModelForCausalLM, AutoConfig.from_pretrained(path)
    for name in [name for name in vars(config) if "dropout" in name or name.endswith("pdrop")]:
        setattr(config, name, 0.0)
    if head:
        Auto = AutoModelForTokenClassification
        config.num_labels, config.token_classification_bias, config.classifier_dropout = 1, False, 0.0
    held = dtype if frozen else torch.float32
    if Path(path).exists() and not any(Path(path).glob("*.safetensors*")):
        torch.manual_seed(seed)
        model = Auto.from_config(config, dtype=held)
    else:
        model = Auto.from_pretrained(path, config=config, dtype=held, use_safetensors=True)
    if head == "zero":
        torch.nn.init.zeros_(model.score.weight)
    model.get_input_embeddings().padding_idx = None  # where pad is eos, it would keep EOS's embedding from learning
    model.train(not frozen).requires_grad_(not frozen)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if mesh is None:
        return model.to(device)
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=True if frozen else None)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the losses are sums over global counts: gradients add up
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model.to(device)  # buffers


@contextmanager
def unsharded(model):
    """Whole weights on every rank and eval mode: no collectives inside, so ranks may decode to different lengths. All ranks."""
    parts, training = [m for m in model.modules() if isinstance(m, FSDPModule)], model.training
    model.eval()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)
        model.train(training)


def save_model(model, tokenizer, out, dtype, *, sequence=False):
    """A Hugging Face folder that anything loads; config.json comes last and makes it valid. All ranks.

    sequence: named ...ForSequenceClassification, whose class pools the last id that is not pad: so pad must not be eos."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if RANK == 0:
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        folder = Path(out, "saving.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, state_dict={name: w.to(dtype).contiguous() for name, w in state.items()})
        config = json.loads((folder / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
        if sequence:
            config["architectures"] = [name.replace("ForTokenClassification", "ForSequenceClassification")
                                       for name in config["architectures"]]
            ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
            config["pad_token_id"] = next(i for i in ids if i is not None and i != tokenizer.eos_token_id)
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config["pad_token_id"])
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, Path(out, file.name))
        folder.rmdir()
    barrier()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def training_state(models, optimizer):
    """-> weights, optimizer state, and the tensors of both that a checkpoint holds: of tied weights one. All ranks."""
    weights, moments = get_state_dict(models, optimizer, options=FLAT)
    own = {name for name, _ in models.named_parameters()}  # a tied weight has its first name here
    return weights, moments, {k: v for k, v in {**weights, **moments}.items()
                              if isinstance(v, torch.Tensor) and (k in own or k in moments)}


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_checkpoint(out, step, models, optimizer):
    """<out>/checkpoint_<step>/: weights and Adam's moments as safetensors, each rank its shard; the earlier one goes. All ranks.

    Everything else of a run follows from its config and the step: schedules, the order of rows, the draws. (DCP's default format
    is not used: it unpickles.)"""
    final, temporary = Path(out, f"checkpoint_{step}"), Path(out, "checkpoint.tmp")
    if RANK == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    dcp.save(training_state(models, optimizer)[2], no_dist=not dist.is_initialized(),
             storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=WORLD > 1))
    if RANK == 0:
        os.replace(temporary, final)
        for folder in Path(out).glob("checkpoint_*"):
            if folder != final:
                shutil.rmtree(folder)
    barrier()


def clear_checkpoints(out):
    """A finished run keeps its model, not its optimizer"""
    if RANK == 0:
        for folder in Path(out).glob("checkpoint_*"):
            shutil.rmtree(folder)


def load_checkpoint(out, models, optimizer):
    """Fill models and optimizer from the newest checkpoint -> the number of steps it has done; 0 if there is none. All ranks."""
    step = max((int(folder.name.split("_")[1]) for folder in Path(out).glob("checkpoint_*")), default=0)
    if step:
        weights, moments, tensors = training_state(models, optimizer)
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(Path(out, f"checkpoint_{step}"))),
                 no_dist=not dist.is_initialized())
        set_state_dict(models, optimizer, model_state_dict={k: tensors.get(k, w) for k, w in weights.items()},  # tied: filled too
                       optim_state_dict={k: tensors.get(k, m) for k, m in moments.items()}, options=FLAT)
    return step


# ---------------------------------------------------------------- forward: every shift by one is done here, once

def upcast(x):
    """float32 for the half precisions; float64 stays"""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pack(prompts, responses, device):
    """Lists of ids -> ids, mask [B, S] and response_mask [B, T]. Rows end together, in the last column: padding is as little as
    can be, and logits are needed for the last T + 1 columns only."""
    S, T = max(len(p) + len(r) for p, r in zip(prompts, responses)), max(map(len, responses))
    ids = torch.tensor([[0] * (S - len(p) - len(r)) + p + r for p, r in zip(prompts, responses)], device=device)
    starts = torch.tensor([S - len(p) - len(r) for p, r in zip(prompts, responses)], device=device)
    lengths = torch.tensor([len(r) for r in responses], device=device)
    mask = torch.arange(S, device=device) >= starts[:, None]                                        # [B, S]
    return ids, mask, torch.arange(T, device=device) < lengths[:, None]                             # [B, T]


def to_left(x, response_mask):
    """[B, T] with the rows' ends in the last column -> their beginnings in the first, 0 behind their ends"""
    T = response_mask.shape[1]
    columns = torch.arange(T, device=x.device) + T - response_mask.sum(1, keepdim=True)            # [B, T]
    return x.gather(1, columns.clamp(max=T - 1)).masked_fill(~response_mask, 0)


def forward(model, ids, mask, **options):
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **options).logits


def token_logprobs(model, ids, mask, response_mask, temperature=1.0):
    """log pi(a_t | s_t) [B, T]: the logits of the position before a_t. All ranks."""
    B, T = response_mask.shape
    logits = upcast(forward(model, ids, mask, logits_to_keep=T + 1)[:, :-1]) / temperature          # [B, T, V]
    logprobs = -F.cross_entropy(logits.flatten(0, 1), ids[:, -T:].flatten(), reduction="none")
    return to_left(logprobs.view(B, T), response_mask)


def token_heads(model, ids, mask, response_mask, *, before=False):
    """The head's outputs [B, T]: r_t at the position of a_t, which the model has read; before=True: V(s_t), one earlier. All ranks."""
    T, heads = response_mask.shape[1], upcast(forward(model, ids, mask)[..., 0])                    # [B, S]
    return to_left(heads[:, -T - 1:-1] if before else heads[:, -T:], response_mask)


# ---------------------------------------------------------------- generation

class InPlaceLayer(DynamicLayer):
    """transformers' DynamicLayer copies the whole cache at every token (torch.cat); this one writes into room taken once."""

    def __init__(self, room):
        super().__init__()
        self.room, self.length = room, 0

    def update(self, keys, values, *_, **__):
        B, heads, n, size = keys.shape
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys = keys.new_empty(B, heads, self.room, size)
            self.values = values.new_empty(B, heads, self.room, values.shape[3])
        start, self.length = self.length, self.length + n
        self.keys[:B, :, start:self.length], self.values[:B, :, start:self.length] = keys, values
        return self.keys[:B, :, :self.length], self.values[:B, :, :self.length]

    def get_seq_length(self):
        return self.length


def draw_tokens(logits, u, temperature, top_p, top_k):
    """One token per row [B] from logits [B, V], by inverse CDF: torch.multinomial is ten times slower. u [B, 1] in [0, 1)"""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(upcast(logits) / temperature, -1)
    if 0 < top_k < probs.shape[1]:
        probs = probs.masked_fill(probs < probs.topk(top_k).values[:, -1:], 0)
    if top_p < 1:  # the fewest tokens that hold top_p of the mass: those before which less than that has gone by
        sorted_probs, order = probs.sort(descending=True, stable=True)
        gone = sorted_probs.cumsum(-1) - sorted_probs
        probs = probs.masked_fill(torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, gone >= top_p * probs.sum(-1, True)), 0)
    cdf = probs.cumsum(-1)
    whole = cdf[:, -1:]
    target = torch.minimum(u.to(cdf) * whole, torch.nextafter(whole, torch.zeros_like(whole)))  # rounding must not reach the end
    return torch.searchsorted(cdf, target, right=True)[:, 0]


@torch.no_grad()
def generate(model, prompt_ids, prompt_mask, *, max_new_tokens, eos_id, temperature=1.0, top_p=1.0, top_k=0, uniforms=None):
    """Sample responses: left-padded prompts [B, P] -> response_ids [B, T], response_mask [B, T]; T is the longest row, EOS is
    counted, what lies behind it is 0. Rows that have ended leave the batch, so only real tokens are computed.

    uniforms [B, max_new_tokens] in [0, 1): the draw of each token; None: torch's generator. eos_id None: never ends.
    temperature 0: argmax. The model must be in eval mode (ValueError): with activation checkpointing it drops its cache else."""
    if model.training:
        raise ValueError("generate needs model.eval(): in train mode activation checkpointing silently drops the KV cache")
    B, P = prompt_ids.shape
    room = P + max_new_tokens
    layers = [InPlaceLayer(room) for _ in range(model.config.get_text_config().num_hidden_layers)]
    cache, device = Cache(layers=layers), prompt_ids.device
    uniforms = torch.rand(B, max_new_tokens, device=device) if uniforms is None else uniforms.to(device)
    mask = F.pad(prompt_mask.bool(), (0, max_new_tokens), value=True)                               # [B, P + max_new_tokens]
    response_ids = prompt_ids.new_zeros(B, max_new_tokens)
    lengths = prompt_ids.new_zeros(B)
    rows = torch.arange(B, device=device)        # the row of the batch that each line still computed belongs to
    ids, positions = prompt_ids, (prompt_mask.long().cumsum(1) - 1).clamp(min=0)
    for t in range(max_new_tokens):
        logits = model(input_ids=ids, attention_mask=mask[:, :P + t], position_ids=positions, past_key_values=cache,
                       use_cache=True, logits_to_keep=1).logits[:, -1]                              # [lines, V]
        tokens = draw_tokens(logits, uniforms[rows, t:t + 1], temperature, top_p, top_k)
        response_ids[rows, t] = tokens
        lengths[rows] = t + 1
        alive = tokens != eos_id if eos_id is not None else torch.ones_like(tokens, dtype=torch.bool)
        left = int(alive.sum())
        if left == 0:
            break
        if left < len(rows):  # lines from the end move into the places of those that ended: less to copy than all that stay
            stay = torch.arange(left, device=device)
            stay[~alive[:left]] = alive[left:].nonzero()[:, 0] + left
            for layer in layers:
                for store in (layer.keys, layer.values):
                    store[:left][~alive[:left]] = store[stay[~alive[:left]]]
            rows, mask, positions, tokens = rows[stay], mask[stay], positions[stay], tokens[stay]
        ids, positions = tokens[:, None], positions[:, -1:] + 1
    T = int(lengths.max())
    return response_ids[:, :T], torch.arange(T, device=device) < lengths[:, None]


# ---------------------------------------------------------------- optimisation

def cosine(step, steps, warmup):
    """The share of the learning rate at a step (0-based): linear warm-up, then a half cosine to 0"""
    warm = max(1, round(warmup * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def optimizer_step(parameters, optimizer, lr, max_grad_norm, where):
    """Clip all gradients together, step, clear -> the norm before clipping. Not finite: the run stops. All ranks."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_grad_norm is None else max_grad_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    if not math.isfinite(norm):
        fail(f"{where}: the gradient's norm is {norm}; nothing was updated, the last checkpoint is good. Lower --lr, or look at the rows")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
