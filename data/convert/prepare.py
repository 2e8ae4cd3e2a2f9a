"""Rows as people have them -> the rows that the stages read.

    python data/convert/prepare.py chats.jsonl pairs.csv.gz       # -> data/convert/*.jsonl
    python data/convert/prepare.py ultrafeedback.parquet --pairs=all --out=data/mine
    python data/convert/prepare.py helpsteer.jsonl --score=helpfulness

Files are JSONL, a JSON array, CSV or TSV (first line: names), parquet (needs pyarrow), or gzip of
these. The fields of a row say what it is; a text may also be a list of messages {role, content}:

    chosen, rejected           -> pref.jsonl     after a prompt, or conversations that begin alike
    response_a, response_b     -> pref.jsonl     with winner, preference, or score_a and score_b
    completions: a list        -> pref.jsonl     of texts and scores: the best against the worst
    messages or conversations  -> sft.jsonl      the last answer is `output`
    prompt, completion         -> sft.jsonl      also question, answer; instruction, response; ...
    prompt                     -> prompts.jsonl

AlpacaFarm's own rows pass through. The last user turn is `instruction`. The turns before it, the
system's too, stand in `input` as a transcript, and all of them in `messages`. Other fields are
kept. Equal answers, ties and rows that do not fit are dropped and counted; a malformed row ends the
run. It prints which field was taken for what, with one row before and after. The order of the rows
stays, but one with `messages` comes first.
"""
import csv, gzip, io, json, math, re, sys, zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plumbing.command_line import load_config
from plumbing.files import no_constant, write_jsonl
from plumbing.paint import plain
from plumbing.ranks import fail, say
from plumbing.record import begin, finish


@dataclass(frozen=True)
class Config:
    data: list[str] = ()            # files
    score: str | None = None        # the field of an answer's score; None: one of SCORES (below).
                                    # If a row has one answer: those to the same prompt are compared
    pairs: Literal["one", "all"] = "one"  # of several answers: the best and the worst, or every two
    out: str = "data/convert"
    overwrite: bool = False


# Names of fields, the first that a row has is taken. Two answers have one name and two endings.
PROMPTS = "instruction prompt question query history input context messages".split()
CONTEXTS = "input context".split()  # text that belongs to the prompt
SYSTEMS = "system system_prompt".split()
CHATS = "messages conversations conversation".split()
ANSWERS = "output completion response answer".split()
LISTS = "completions responses answers generations candidates outputs".split()
TEXTS = "response text answer content output completion generation".split()  # in an item of a list
TWO_ANSWERS = "output response answer completion conversation human_ref".split()
ENDINGS = [("1", "2"), ("a", "b"), ("A", "B"), ("0", "1")]
WINNERS = "preference winner preferred better_response_id".split()
SIGNED = "overall_preference preference_strength".split()  # below 0: the first answer is better
SCORES = "overall_score score rating reward rank".split()  # in a rank, 1 is best
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
         "developer": "system"}

# What a stage reads has its name from us alone: another field of such a name is left out.
OURS = ("instruction input output output_1 output_2 preference messages original edited edited_ids "
        "cut").split()
NEXT = {"sft": "python sft.py", "pref": "python edit.py", "prompts": "python ppo.py"}


class Dropped(Exception):
    """A row that is well formed but of no use; the text is the reason"""


# ---------------------------------------------------------------- files


def read_file(path):
    """The rows of a file, whatever its format -> list of (line or number of the row, row)"""
    try:
        content = Path(path).read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fail(f"{path}: a damaged gzip file ({error})")
    except OSError as error:
        fail(f"--data={path}: {error.strerror}")
    if content[:4] == b"PAR1":
        return parquet_rows(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8 text, gzip or parquet")

    suffix = Path(str(path).removesuffix(".gz")).suffix
    rows = csv_rows(path, text, suffix) if suffix in (".csv", ".tsv") else json_rows(path, text)
    if not rows:
        fail(f"{path}: no rows in it")
    for line, row in rows:
        if not isinstance(row, dict):
            fail(f"{path}:{line}: must be a JSON object, got {type(row).__name__}")
    return rows


def json_rows(path, text):
    """The rows of a JSON array, numbered from 1, or of JSONL with their lines"""
    line = 1
    try:
        if text.lstrip()[:1] == "[":
            return list(enumerate(json.loads(text, parse_constant=no_constant), 1))
        rows = []
        for line, row in enumerate(text.split("\n"), 1):
            if row.strip():
                rows.append((line, json.loads(row, parse_constant=no_constant)))
        return rows
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        fail(f"{path}:{line}: not JSON ({getattr(error, 'msg', error)})")


def csv_rows(path, text, suffix):
    """The rows of a table whose first line names the fields. A cell may hold messages as JSON."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if suffix == ".tsv" else ","
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    line = 1
    try:
        names = next(table, [])
        if len(set(names)) < len(names):
            raise ValueError("two columns have the same name")
        line = table.line_num + 1
        for cells in table:
            if cells and len(cells) != len(names):
                raise ValueError(f"{len(cells)} cells, but {len(names)} columns")
            values = {name: cell_value(cell) for name, cell in zip(names, cells)}
            values.pop("", None)  # the row number that pandas writes
            if cells:
                rows.append((line, values))
            line = table.line_num + 1
    except (csv.Error, ValueError) as error:
        fail(f"{path}:{line}: {error}")
    return rows


def cell_value(text):
    """A cell's text, or the messages in it"""
    if not re.match(r"""\[\s*\{\s*['"](role|content|from|value)['"]\s*:""", text):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"a cell looks like messages but is not JSON ({error}): "
                         "write them with json.dumps, or save as parquet") from None


def parquet_rows(path, content):
    """The rows of a parquet file, numbered from 1. What JSON does not have: NaN becomes null, a
    date its text."""
    try:
        import pyarrow.parquet
    except ImportError:
        fail(f"{path} is parquet: pip install pyarrow, or save it as JSONL")
    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
        fail(f"{path}: a damaged parquet file ({str(error).splitlines()[0]})")
    text = json.dumps(rows, default=str)
    return list(enumerate(json.loads(text, parse_constant=lambda word: None), 1))


# ---------------------------------------------------------------- texts and messages


def as_turns(value, name, role):
    """A text (one turn, of this role), a transcript or messages -> list of {role, content}"""
    if isinstance(value, str) and value.startswith("\n\nHuman:"):
        return transcript_turns(value)
    if isinstance(value, str):
        return [dict(role=role, content=value)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a text or a list of messages, got {quoted(value)}")

    turns = []
    for turn in value:
        if not isinstance(turn, dict) or not (turn.get("role") or turn.get("from")):
            raise ValueError(f"{name}: a message must have role and content, got {quoted(turn)}")
        said_by = turn.get("role") or turn["from"]
        said_by = ROLES.get(said_by, said_by)
        content = text_of(turn.get("content", turn.get("value")))
        if said_by not in ("system", "user", "assistant"):
            raise Dropped(f"a turn of {quoted(said_by)}")
        if content or said_by != "system":
            turns.append(dict(role=said_by, content=content))
    return turns


def text_of(content):
    """The text of a message: a text, or a list of parts of type text"""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(content, str):
        raise Dropped("a turn that is not text")
    return content


def transcript_turns(text):
    """Anthropic's form: "\\n\\nHuman: ...\\n\\nAssistant: ..." """
    turns = []
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    for role, content in zip(parts[::2], parts[1::2]):
        said_by = "user" if role == "Human" else "assistant"
        turns.append(dict(role=said_by, content=content.removeprefix(" ")))
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns.pop()  # a prompt ends with "Assistant:"
    return turns


def quoted(value):
    """The beginning of a value, for a message"""
    return json.dumps(value, ensure_ascii=False)[:60]


def first_of(names, row):
    """The first of these names with a value in the row, None without one"""
    return next((name for name in names if row.get(name) is not None), None)


def is_ours(row):
    """Was the row made here? Its messages then end with its instruction"""
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return last == dict(role="user", content=row.get("instruction"))


def prompt_turns(row, took):
    """The turns of a row's prompt, and the text that belongs to it. Notes in `took` what each field
    was taken for, as the functions below do."""
    if is_ours(row):
        took |= {name: name for name in ("instruction", "input", "messages") if name in row}
        return as_turns(row["messages"], "messages", "user"), ""
    name = first_of(PROMPTS, row)
    if name is None:
        raise ValueError(f"no prompt; the row has: {', '.join(row)}; it may be called: "
                         f"{', '.join(PROMPTS)}")
    took[name] = "instruction"
    turns = as_turns(row[name], name, "user")
    context = ""
    for other in CONTEXTS:
        if other in row and other != name and not context:
            took[other] = "input"
            context = row[other] or ""
            if not isinstance(context, str):
                raise ValueError(f"{other} must be a text or null, got {quoted(context)}")
    return turns, context


def asked(row, took, turns, context=""):
    """The turns before an answer -> instruction, input; messages, if they are more than one turn"""
    if not turns or turns[-1]["role"] != "user":
        raise Dropped("no user turn before the answer")
    name = first_of(SYSTEMS, row)
    if name and turns[0]["role"] != "system":
        if not isinstance(row[name], str):
            raise ValueError(f"{name} must be a text or null, got {quoted(row[name])}")
        took[name] = "input, messages"
        if row[name]:
            turns = [dict(role="system", content=row[name]), *turns]

    *earlier, last = turns
    if not earlier:
        return dict(instruction=last["content"], input=context)
    if context:
        last = last | dict(content=f"{last['content']}\n\n{context}")
    transcript = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in earlier]
    return dict(instruction=last["content"], input="\n\n".join(transcript),
                messages=[*earlier, last])


# ---------------------------------------------------------------- kinds of rows


def convert(row, cfg, dropped):
    """A person's row -> kind ("sft", "pref", "prompts"), rows in our fields, and a dict: what
    each field was taken for.

    ValueError: the row is malformed. dropped: Counter of reasons, for pairs of a longer list"""
    took = {}
    names, endings = two_answers(row)
    several = next((name for name in LISTS if is_scored_list(row, name)), None)
    chat = None if is_ours(row) else answered_chat(row)
    answer = first_of(ANSWERS, row)
    if names:
        kind = "pref"
        rows = [pair_row(row, names, endings, cfg, took)]
    elif several:
        kind = "pref"
        rows = list_rows(row, several, cfg, took, dropped)
    elif chat:
        kind = "sft"
        rows = [chat_row(row, chat, took)]
    elif answer:
        kind = "sft"
        rows = [answer_row(row, answer, took)]
    else:
        kind = "prompts"
        turns, context = prompt_turns(row, took)
        rows = [asked(row, took, turns, context)]
    if rows and "messages" in rows[0] and not is_ours(row):
        took["earlier turns"] = "input, messages"
    extra = {name: value for name, value in row.items() if passes(name, value, took)}
    return kind, [new | extra for new in rows], took


def passes(name, value, took):
    """A field that was taken for nothing is kept, unless a stage would read something else in it"""
    if name == "cut":
        return isinstance(value, list)
    return name not in took and name not in OURS


def two_answers(row):
    """The names of a row's two answers, and how they end: None, None without two"""
    if "chosen" in row and "rejected" in row:
        return ("chosen", "rejected"), None
    for stem in TWO_ANSWERS:
        for endings in ENDINGS:
            for between in ("_", ""):
                names = [stem + between + ending for ending in endings]
                if names[0] in row and names[1] in row:
                    third = stem + between + chr(ord(endings[1]) + 1)
                    if third in row:
                        raise ValueError(f"more than two answers ({third}): write them as a list "
                                         "`responses`, and a list `scores`")
                    return names, endings
    return None, None


def pair_row(row, names, endings, cfg, took):
    """A row with two answers -> a row of pref.jsonl"""
    took[names[0]] = "output_1"
    took[names[1]] = "output_2"
    if endings:
        better = verdict(row, names, endings, cfg.score, took)
    elif has_equal_scores(row):
        raise Dropped("a tie")
    else:
        better = 1
    one, two = [as_turns(row[name], name, "assistant") for name in names]

    # A whole conversation holds the prompt; an answer alone follows it.
    turns = []
    context = ""
    if one and one[0]["role"] == "assistant":
        turns, context = prompt_turns(row, took)
    else:
        took["the turns before"] = "instruction"
    if not one or not two or one[:-1] != two[:-1]:
        raise Dropped("conversations that differ before their last turn")
    if one[-1]["role"] != "assistant" or two[-1]["role"] != "assistant":
        raise Dropped("a conversation that does not end with an answer")
    if one == two:
        raise Dropped("equal answers")
    new = asked(row, took, turns + one[:-1], context)
    return new | dict(output_1=one[-1]["content"], output_2=two[-1]["content"], preference=better)


def has_equal_scores(row):
    """Do chosen and rejected have the same score? It may be called score_chosen, chosen-rating"""
    for name, value in row.items():
        other = name.replace("chosen", "rejected")
        is_score = "score" in name or "rating" in name
        if is_score and other != name and value not in (None, "") and value == row.get(other):
            return True
    return False


def verdict(row, names, endings, score, took):
    """Which of two answers is better: 1 or 2"""
    said_by = [name for name in WINNERS + SIGNED if name in row and not score]
    if said_by:
        took[said_by[0]] = "preference"
        return preferred(row[said_by[0]], said_by[0], names, endings)

    # A score ends as its answer does: response_a, score_a.
    for stem in [score] if score else SCORES:
        for between in ("_", ""):
            scores = [stem + between + ending for ending in endings]
            if scores[0] in row and scores[1] in row:
                took |= dict.fromkeys(scores, "preference")
                first, second = [goodness(row[name], name) for name in scores]
                if None in (first, second):
                    raise Dropped("an answer without a score")
                if first == second:
                    raise Dropped("a tie")
                return 1 if first > second else 2
    raise ValueError(f"nothing says which of {names[0]} and {names[1]} is better: no winner, no "
                     f"preference, no {score or 'score'}_{endings[0]}")


def preferred(value, name, names, endings):
    """A verdict, as people write it, on two answers with these names and endings -> 1 or 2"""
    if value in (None, ""):
        raise Dropped("no preference")
    text = str(value).strip().lower()
    figure = None if isinstance(value, bool) else as_number(text)
    if figure is not None and figure == int(figure):
        text = str(int(figure))  # pandas writes 1.0

    # In AlpacaEval's files 1.5 and 0 are draws, and 1.2 says how sure the judge was.
    of_alpaca_eval = figure is not None and endings == ("1", "2")
    if name in SIGNED and figure is not None:
        balance = figure
    elif of_alpaca_eval and (figure == 0 or 1 <= figure <= 2):
        balance = figure - 1.5 if figure else 0
    elif text == endings[0].lower() or text.endswith(f"_{endings[0].lower()}"):
        balance = -1
    elif text == endings[1].lower() or text.endswith(f"_{endings[1].lower()}"):
        balance = 1
    elif text.startswith("tie") or text in ("draw", "equal", "both", "neither"):
        balance = 0
    else:
        raise ValueError(f"{name} must be {endings[0]}, {endings[1]} or tie, got {quoted(value)}")
    if balance == 0:
        raise Dropped("a tie")
    return 1 if balance < 0 else 2


def as_number(value):
    """A finite number, also from a table's text; None for anything else"""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def goodness(value, name):
    """A score, larger is better; None without one. In a rank, 1 is the best."""
    if value in (None, ""):
        return None
    number = as_number(value)
    if number is None or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {quoted(value)}")
    return -number if "rank" in name else number


def is_scored_list(row, name):
    """Is the field a list of answers: objects with a text, or texts with a list of scores?"""
    items = row.get(name)
    if not isinstance(items, list):
        return False
    if items and isinstance(items[0], str):
        return any(isinstance(row.get(scores), list) for scores in names_of_scores(None))
    return not items or isinstance(items[0], dict) and first_of(TEXTS, items[0]) is not None


def names_of_scores(score):
    """What a list of scores may be called"""
    return [name + ending for name in ([score] if score else SCORES) for ending in ("", "s")]


def list_rows(row, name, cfg, took, dropped):
    """A row with a list of answers and their scores -> rows of pref.jsonl"""
    took[name] = "output_1, output_2"
    items = row[name]
    if items and isinstance(items[0], str):
        scores_in = first_of(names_of_scores(cfg.score), row)
        scores = row[scores_in] if scores_in else None
        if not isinstance(scores, list) or len(scores) != len(items):
            raise ValueError(f"{name} has {len(items)} answers; {scores_in or 'a list of scores'} "
                             f"must be a list of as many, got {quoted(scores)}")
        took[scores_in] = "preference"
        answers = [(item, goodness(score, scores_in)) for item, score in zip(items, scores)]
    else:
        answers = [scored_item(item, name, cfg.score) for item in items]

    turns, context = prompt_turns(row, took)
    question = asked(row, took, turns, context)
    pairs = better_and_worse(answers, cfg.pairs, dropped)
    return [question | dict(output_1=better, output_2=worse, preference=1)
            for better, worse in pairs]


def scored_item(item, name, score):
    """An item of a list of answers -> its text and its score"""
    text = first_of(TEXTS, item) if isinstance(item, dict) else None
    if text is None or not isinstance(item[text], str):
        raise ValueError(f"{name}: an answer must have a text (response), got {quoted(item)}")
    scores_in = [other for other in ([score] if score else SCORES) if other in item]
    if not scores_in:
        raise ValueError(f"{name}: an answer has no {score or 'score'}; it has: {', '.join(item)}; "
                         "name the field with --score=FIELD")
    return item[text], goodness(item[scores_in[0]], scores_in[0])


def better_and_worse(answers, pairs, dropped):
    """Answers (text, goodness or None) to one question -> pairs (better text, worse text).

    pairs: "one", the best and the worst, or "all". dropped: Counter of reasons"""
    scored = [answer for answer in answers if answer[1] is not None]
    if len(scored) < len(answers):
        dropped["an answer without a score"] += len(answers) - len(scored)
    scored.sort(key=lambda answer: -answer[1])  # of equals, the first stays first
    if len(scored) < 2:
        dropped["fewer than two answers with a score"] += 1
        return []
    chosen = combinations(scored, 2) if pairs == "all" else [(scored[0], scored[-1])]
    found = []
    for (better, most), (worse, least) in chosen:
        if most == least:
            dropped["a tie"] += 1
        elif better == worse:
            dropped["equal answers"] += 1
        else:
            found.append((better, worse))
    return found


def answered_chat(row):
    """The name of a field with messages, one of which is an answer; None without one"""
    name = first_of(CHATS, row)
    if name is None or not isinstance(row[name], list):
        return None
    roles = {turn["role"] for turn in as_turns(row[name], name, "user")}
    return name if "assistant" in roles else None


def chat_row(row, name, took):
    """A conversation -> a row of sft.jsonl: its last answer, and what was said before"""
    turns = as_turns(row[name], name, "user")
    took[name] = "instruction, output"
    while turns[-1]["role"] != "assistant":
        turns.pop()
        took["turns after the last answer"] = "left out"
    return asked(row, took, turns[:-1]) | dict(output=turns[-1]["content"])


def answer_row(row, name, took):
    """A prompt and one answer -> a row of sft.jsonl"""
    if row.get("label") is False or row.get("label") in ("False", "false"):
        raise Dropped("an answer with the label false")
    turns, context = prompt_turns(row, took)
    answer = as_turns(row[name], name, "assistant")
    took[name] = "output"
    if not answer or answer[-1]["role"] != "assistant":
        raise Dropped("a conversation that does not end with an answer")
    return asked(row, took, turns + answer[:-1], context) | dict(output=answer[-1]["content"])


# ---------------------------------------------------------------- all rows


def merged(rows, score):
    """Rows (where, row) with one answer and its score each -> those of one prompt as one row with a
    list of answers. Of the other fields it has those that agree."""
    together = defaultdict(list)  # the prompt -> its rows
    for where, row in rows:
        name = first_of(ANSWERS, row)
        if name and score not in row:
            fail(f"{where}: no field {score!r} (--score); the row has: {', '.join(row)}")
        prompt = [row.get(field) for field in PROMPTS + SYSTEMS] if name else where
        together[json.dumps(prompt)].append((where, row))

    found = []
    for same in together.values():
        where, first = same[0]
        name = first_of(ANSWERS, first)
        if name:
            answers = [{"text": row.get(name), score: row[score]} for _, row in same]
            agreed = {field: value for field, value in first.items()
                      if field not in (name, score)
                      and all(row.get(field) == value for _, row in same)}
            first = agreed | {"completions": answers}
        found.append((where, first))
    return found


def begin_with_messages(rows):
    """Move the first row that has `messages` to the front, in place. Readers that infer the fields
    of a long file from its beginning (datasets) must see that one there."""
    first = next((number for number, row in enumerate(rows) if "messages" in row), 0)
    if rows:
        rows.insert(0, rows.pop(first))


def say_unused_scores(rows):
    """Several answers to one prompt, with different scores, are perhaps no demonstrations"""
    scores = defaultdict(set)  # prompt, name of the score -> scores
    for row in rows:
        name = first_of(SCORES, row)
        if name:
            scores[row["instruction"], row["input"], name].add(str(row[name]))
    names = Counter(key[2] for key, different in scores.items() if len(different) > 1)
    for name, count in names.items():
        say(f"warning: {count:,} prompts have several answers that differ in {name}; "
            f"--score={name} makes pairs of them")


def shown(row, most=600):
    """A row on one line for the terminal, long texts and lists cut"""
    def cut(value):
        if isinstance(value, str):
            return value if len(value) <= 60 else value[:59] + "…"
        if isinstance(value, list):
            return [cut(item) for item in value[:4]] + ["…"] * (len(value) > 4)
        if isinstance(value, dict):
            return {name: cut(item) for name, item in value.items()}
        return value

    line = plain(json.dumps(cut(row), ensure_ascii=False))
    return line if len(line) <= most else line[:most - 1] + "…"


def tell(group, kind, took):
    """What was taken for what in a group of rows, and its first row before and after"""
    fields = ", ".join(f"{name} -> {ours}" for name, ours in took)
    say(f"{group['count']:,} rows -> {kind}.jsonl: {fields}")
    if group["kept"]:
        say(f"  as they are: {', '.join(sorted(group['kept']))}")
    if group["left_out"]:
        say(f"  left out: {', '.join(sorted(group['left_out']))}")
    say(f"  before: {shown(group['before'])}")
    say(f"  after:  {shown(group['after'])}")


def main(cfg):
    if not cfg.data:
        fail("name the files: python data/convert/prepare.py FILE ...")
    out = Path(cfg.out)
    for path in cfg.data:
        if Path(path).resolve() in [(out / f"{kind}.jsonl").resolve() for kind in NEXT]:
            fail(f"--data={path} would be overwritten; choose another --out")
    rows = []
    for path in cfg.data:
        rows += [(f"{path}:{line}", row) for line, row in read_file(path)]
    if cfg.score:
        rows = merged(rows, cfg.score)

    # All rows are converted before anything is written.
    kinds = {kind: [] for kind in NEXT}
    dropped = Counter()
    groups = {}  # kind, what was taken for what -> how many rows, the first one before and after
    for where, row in rows:
        try:
            kind, converted, took = convert(row, cfg, dropped)
        except Dropped as reason:
            dropped[str(reason)] += 1
            continue
        except ValueError as error:
            fail(f"{where}: {error}")
        kinds[kind] += converted
        if converted:
            new = dict(count=0, before=row, after=converted[0], kept=set(), left_out=set())
            group = groups.setdefault((kind, tuple(took.items())), new)
            group["count"] += len(converted)
            for name in row.keys() - took.keys():
                as_it_is = passes(name, row[name], took)
                group["kept" if as_it_is else "left_out"].add(name)

    reasons = ", ".join(f"{count:,} ({reason})" for reason, count in dropped.most_common())
    for (kind, took), group in groups.items():
        tell(group, kind, took)
    say(f"dropped: {reasons or 'nothing'}")
    say_unused_scores(kinds["sft"])
    if not groups:
        fail(f"no row is left; dropped: {reasons}")
    beside = ("prepare.py", "__pycache__")
    if begin(cfg, "prepare", paid=True, inputs=cfg.data, beside=beside):
        return say(f"{cfg.out} is finished; nothing to do")

    # A file of an earlier run (--overwrite=true) must not look like one of this run.
    for kind, rows in kinds.items():
        begin_with_messages(rows)
        path = out / f"{kind}.jsonl"
        path.unlink(missing_ok=True)
        if rows:
            write_jsonl(path, rows)
            say(f"{path}: {len(rows):,} rows; next: {NEXT[kind]} --data={path}")
    finish(cfg, rows={kind: len(rows) for kind, rows in kinds.items()}, dropped=dict(dropped))


if __name__ == "__main__":
    main(load_config(Config, "prepare"))
