"""The toy world: pytest tests/test_toy.py"""
import difflib, hashlib, random, re, shutil, subprocess, sys
from collections import Counter
from itertools import product

import pytest
import sentencepiece
import torch
from conftest import ROOT, rows_of, run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common import decode_response, encode_prompt, encode_response, PROMPT
from data.toy.prepare import (CLOSING, HARMLESS, OCCASIONS, RUDE, VERBS, WORLDS, Config, gold,
                              items_of, main, mend, train_tokenizer, write_answer, write_pairs)
from extras.study.bag_of_tokens import count_differences, fit
from plumbing.command_line import load_config
from plumbing.files import write_jsonl

FILES = ["sft.jsonl", "pref.jsonl", "pref_heldout.jsonl", "prompts.jsonl", "val.jsonl",
         "eval.jsonl"]
NUMBERS, CATEGORIES, _ = WORLDS["short"]
ITEMS = items_of(WORLDS["short"])
LINES = sorted(ITEMS) + RUDE + HARMLESS + [CLOSING]
PROMPTS = [dict(instruction=f"{verb} {number} {category}{occasion}.", input="")
           for verb, number, category, occasion in product(VERBS, NUMBERS, CATEGORIES, OCCASIONS)]
ROW = {"instruction": "List three fruits.", "input": ""}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy world with its default settings"""
    out = tmp_path_factory.mktemp("toy")
    run("data/toy/prepare.py", f"--out={out}")
    return out


@pytest.fixture(scope="module")
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy / "model")


def asked_for(row):
    """-> the number and the category of an instruction, read in a way of the test's own"""
    for number, category in product(NUMBERS, CATEGORIES):
        if f" {number} {category}" in row["instruction"]:
            return NUMBERS[number], category


# ---------------------------------------------------------------- the tokenizer

def test_ids_are_sentencepieces(toy, tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=str(toy / "model" / "tokenizer.model"))
    assert tokenizer.bos_token_id == model.bos_id()
    assert tokenizer.eos_token_id == model.eos_id()
    assert tokenizer.unk_token_id == model.unk_id()
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    assert pieces == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))

    # Difficult texts, mixtures of the world's lines, and random characters.
    rng = random.Random(0)
    parts = [*LINES, *VERBS, *OCCASIONS, PROMPT, "\n", " ", "  ", "\t", "\r\n", "é", "日本", "🎉",
             "</s>", "<0x0A>", "x"]
    texts = ["", "  two", " ", "://x", "\n\n1.", " The", "The", "a  b ", "<s></s><unk>",
             "e\u0301 \u00a0\u200b", "ﬁ ½"]
    for _ in range(2000):
        texts.append("".join(rng.choices(parts, k=rng.randrange(1, 8))))
    for _ in range(500):
        text = "".join(map(chr, rng.choices(range(1, 0xD800), k=6)))
        texts.append(text.replace("\u2581", ""))

    for text in texts:
        ids = encode_response(tokenizer, text, eos=False)
        assert ids == model.encode(text), text
        assert decode_response(tokenizer, [*ids, tokenizer.eos_token_id]) == text


def test_few_tokens_and_none_across_lines(tokenizer):
    for line in LINES:
        assert len(encode_response(tokenizer, line, eos=False)) == 1, line
    lengths = {len(encode_prompt(tokenizer, row)) for row in PROMPTS}
    assert lengths == {8, 9}  # bos, template 3, verb, number, category, occasion or none, "."

    rng = random.Random(0)
    newline = encode_response(tokenizer, "\n", eos=False)
    for _ in range(500):
        lines = rng.choices(LINES, k=6)
        expected = []
        for line in lines:
            expected += newline + encode_response(tokenizer, line, eos=False)
        ids = encode_response(tokenizer, "\n".join(lines), eos=False)
        assert ids == expected[1:]


def test_model_is_tiny_and_has_no_weights(toy, tokenizer):
    assert not list((toy / "model").glob("*.safetensors*"))
    assert not list((toy / "model").glob("*.bin"))
    config = AutoConfig.from_pretrained(toy / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert config.vocab_size == len(tokenizer)
    assert config.initializer_range == 0.08
    assert config.tie_word_embeddings is False


# ---------------------------------------------------------------- the horizon

# The first 16 hex digits of the files' hashes before the horizon became a field.
SHORT_FILES = {
    "sft.jsonl": "e8df01e3cfee5bce",
    "pref.jsonl": "d4fed913751478eb",
    "pref_heldout.jsonl": "a29efa4f9a4d25e1",
    "prompts.jsonl": "4750fc7464ec9ef8",
    "val.jsonl": "f79da71e670a4857",
    "eval.jsonl": "9974afb9414928c7",
    "model/tokenizer.model": "547d6c1e9a862bdb",
}


def test_short_is_the_world_it_always_was(toy):
    for name, digest in SHORT_FILES.items():
        assert hashlib.sha256((toy / name).read_bytes()).hexdigest()[:16] == digest, name


@pytest.mark.parametrize("items, least, most", [("short", 3, 5), ("medium", 8, 12),
                                                ("long", 20, 30)])
def test_horizons(items, least, most):
    """As many items as the name says, each a line of one token, none in two categories; about as
    many flaws an answer in every world, and as many a line with flaws_per=line"""
    world = WORLDS[items]
    assert (min(world.numbers.values()), max(world.numbers.values())) == (least, most)
    names = [item for names in world.categories.values() for item in names]
    assert len(set(names)) == len(names)
    assert all(len(names) > most for names in world.categories.values())
    pieces = sentencepiece.SentencePieceProcessor(
        model_proto=train_tokenizer(world, world.vocab_size))
    for line in [*names, *RUDE, *HARMLESS, CLOSING]:
        assert len(pieces.encode(line)) == 1, line

    rng = random.Random(0)
    flaws = {"answer": [], "line": []}
    for flaws_per, counts in flaws.items():
        for _ in range(2000):
            number = rng.choice(list(world.numbers))
            row = dict(instruction=f"List {number} tools for a game.", input="")
            counts.append(gold(row, write_answer(row, 1.0, rng, flaws_per)))
    assert abs(sum(flaws["answer"]) / 2000 - 2.35) < 0.15
    per_line = (0.40 + 0.06) * sum(world.numbers.values()) / 3
    assert abs(sum(flaws["line"]) / 2000 - per_line - 0.5) < 0.4


def test_a_world_is_told_by_its_numbers():
    """An item of the long world is an odd line in the short one, and no rule ever writes it"""
    assert gold(ROW, "apple\npear\nwatermelon\nEnjoy!") == 2
    medium = {"instruction": "List eight fruits.", "input": ""}
    eight = "apple\npear\nplum\nmango\ncherry\npeach\nlemon\nkiwi\nEnjoy!"
    assert gold(medium, eight) == 0
    for seed in range(50):
        assert set(mend(ROW, "", random.Random(seed)).split("\n")) <= {*LINES}
    assert gold({"instruction": "Name twenty-five drinks for a quiz.", "input": ""}, "") == 26


# ---------------------------------------------------------------- the probe

def test_probe(toy):
    """Better and worse begin with the same prefix; whole answers that begin with prefix + worse and
    then go on rightly have one flaw more than those with better"""
    rows = rows_of(toy / "probe.jsonl")
    questions = [row["instruction"] for row in rows_of(toy / "eval.jsonl")]
    assert [row["instruction"] for row in rows] == [q for q in questions for _ in range(6)]
    kinds = Counter(row["kind"] for row in rows)
    assert len(kinds) == 6 and set(kinds.values()) == {300}
    for row in rows:
        number, category = asked_for(row)
        assert gold(row, finished(row, row["better"], number, category)) == 0, row
        assert gold(row, finished(row, row["worse"], number, category)) == 1, row


def finished(row, continuation, number, category):
    """The prefix, the continuation, then what is missing; nothing if the continuation is empty"""
    text = row["prefix"] + continuation
    if not continuation:
        return text
    lines = text.split("\n")
    spare = [item for item in CATEGORIES[category] if item not in lines]
    closed = lines[-1] == CLOSING
    if not closed:
        missing = max(0, number - sum(line in ITEMS for line in lines))
        lines += spare[:missing] + [CLOSING]
    return "\n".join(lines)


# ---------------------------------------------------------------- gold and mend

@pytest.mark.parametrize("flaws, answer", [
    (0, "apple\npear\nplum\nEnjoy!"),
    (0, "apple\nA classic!\napple\nplum\nEnjoy!"),  # a harmless aside and a repeated item
    (1, "apple\nhorse\nplum\nEnjoy!"),
    (1, "apple\npear\nWhat a dumb question!\nplum\nEnjoy!"),
    (1, "apple\npear\nEnjoy!"),
    (1, "apple\npear\nplum"),
    (1, "apple\npear\nplum\nmango\nEnjoy!"),
    (1, "apple\npear\nplum\nEnjoy!\nEnjoy!"),
    (1, "apple\npear\nEnjoy!\nplum"),
    (2, "apple\npear\nplum\nEnjoy!\n"),
    (2, "horse\ntiger\nplum\nEnjoy!"),
    (4, ""),
    (6, "\n"),
    (5, "no"),
    (2, "apple\nPEAR\nplum\nEnjoy!"),
    (3, "apple\n\ud800\nplum\nmango\nEnjoy"),
    (5, "apple, pear, plum. Enjoy!"),
])
def test_gold_by_hand(flaws, answer):
    assert gold(ROW, answer) == flaws


def test_gold_reads_the_prompt():
    answer = "apple\npear\nplum\nEnjoy!"
    flaws = {"three fruits": 0, "four fruits": 1, "three animals": 3, "five tools": 5}
    for words, count in flaws.items():
        assert gold({"instruction": f"Name {words} for a quiz."}, answer) == count, words
    with pytest.raises(SystemExit):
        gold({"instruction": "Who wrote Hamlet?"}, answer)


def test_gold_counts_planted_flaws():
    """Flaws of different kinds are planted in an answer without flaws; gold finds as many"""
    rng = random.Random(0)
    for _ in range(2000):
        row = rng.choice(PROMPTS)
        number, category = asked_for(row)
        lines = [*rng.sample(CATEGORIES[category], number), CLOSING]
        others = sorted(ITEMS - set(CATEGORIES[category]))
        planted = 0

        # Items of another category.
        for at in rng.sample(range(number), rng.randrange(number + 1)):
            lines[at] = rng.choice(others)
            planted += 1

        # Harmless asides, which do not count, and odd lines, which do.
        for _ in range(rng.randrange(3)):
            lines.insert(rng.randrange(len(lines)), rng.choice(HARMLESS))
            lines.insert(rng.randrange(len(lines)), rng.choice([*RUDE, "x", "Apple", ""]))
            planted += 1

        # One item too many; no closing, or two.
        if rng.random() < 0.3:
            lines.insert(0, rng.choice(CATEGORIES[category]))
            planted += 1
        if rng.random() < 0.3:
            lines.remove(CLOSING)
            planted += 1
        elif rng.random() < 0.3:
            lines.insert(rng.randrange(len(lines)), CLOSING)
            planted += 1
        assert gold(row, "\n".join(lines)) == planted, (row, lines)


def answers(count):
    """-> (row, answer), `count` times: every third answer is rubbish, the others are the toy
    world's own flawed answers and worse ones"""
    rng = random.Random(1)
    rubbish = [*LINES, CLOSING, CLOSING, "", " apple", "apple ", "Enjoy", "\r", "x\ty", "日本"]
    for k in range(count):
        row = rng.choice(PROMPTS)
        if k % 3 == 0:
            yield row, "\n".join(rng.choices(rubbish, k=rng.randrange(12)))
        else:
            yield row, write_answer(row, rng.choice([0.35, 0.6, 1.0, 2.0]), rng)


def changes_between(one, two):
    """The edit operations that turn one list of lines into another"""
    matcher = difflib.SequenceMatcher(None, one, two, autojunk=False)
    return [change for change in matcher.get_opcodes() if change[0] != "equal"]


def harmless_asides(answer):
    return [line for line in answer.split("\n") if line in HARMLESS]


def test_mend_leaves_no_flaw_and_nothing_else_changes():
    for k, (row, answer) in enumerate(answers(6000)):
        flaws = gold(row, answer)
        mended = mend(row, answer, random.Random(k), p=1)
        assert gold(row, mended) == 0, (row, answer, mended)
        if flaws == 0:
            assert mended == answer
        assert harmless_asides(mended) == harmless_asides(answer)

        assert mend(row, answer, random.Random(k), p=0) == answer
        assert gold(row, mend(row, answer, random.Random(k), p=0.5)) <= flaws

        # In the world's own answers nothing follows a closing: at most one line per flaw changes.
        if k % 3:
            touched = 0
            for _, a, b, c, d in changes_between(answer.split("\n"), mended.split("\n")):
                touched += max(b - a, d - c)
            assert touched <= flaws, (row, answer, mended)


@pytest.mark.parametrize("answer, pattern", [
    # A substitution; a deletion; two insertions; a closing inserted.
    ("apple\nhorse\nmelon\nEnjoy!", r"apple\n(\w+)\nmelon\nEnjoy!"),
    ("apple\npear\nAsk somebody else!\nMy favourite!\nplum\nEnjoy!",
     r"apple\npear\nMy favourite!\nplum\nEnjoy!"),
    ("apple\nA classic!\nEnjoy!", r"apple\n(\w+)\n(\w+)\nA classic!\nEnjoy!"),
    ("apple\npear\nplum", r"apple\npear\nplum\nEnjoy!"),
    # One item too many, and one wrong: a single deletion fixes both. A closing too early.
    ("apple\nred\npear\nplum\nEnjoy!", r"apple\npear\nplum\nEnjoy!"),
    ("apple\nEnjoy!\npear\nplum\nEnjoy!", r"apple\npear\nplum\nEnjoy!"),
])
def test_each_kind_of_edit(answer, pattern):
    for seed in range(20):
        match = re.fullmatch(pattern, mend(ROW, answer, random.Random(seed), p=1))
        assert match
        for item in match.groups():
            assert item in CATEGORIES["fruits"] and item not in answer


@pytest.mark.parametrize("answer", [
    "apple\nhorse\nplum\nEnjoy!", "apple\npear\nRUDE\nplum\nEnjoy!", "apple\npear\nEnjoy!",
    "apple\npear\nplum"])
def test_mend_fixes_with_probability_p(answer):
    left = sum(gold(ROW, mend(ROW, answer, random.Random(k), p=0.9)) for k in range(4000))
    assert abs(left / 4000 - 0.1) < 0.02  # 4 standard errors


# ---------------------------------------------------------------- the rows

def test_rows(toy):
    files = {name: rows_of(toy / name) for name in FILES}
    counts = [len(files[name]) for name in FILES]
    assert counts == [8000, 800, 1000, 852, 144, 300]

    # No row contains the truth.
    prompt = {"instruction", "input"}
    pair = prompt | {"output_1", "output_2", "preference"}
    reference = prompt | {"output", "generator", "dataset"}
    fields = [prompt | {"output"}, pair, pair, prompt, reference, reference]
    for name, expected in zip(FILES, fields):
        assert all(set(row) == expected for row in files[name]), name

    # No prompt of the evaluation is trained on.
    asked = {name: {row["instruction"] for row in rows} for name, rows in files.items()}
    assert asked["sft.jsonl"] <= asked["prompts.jsonl"]
    assert asked["pref.jsonl"] <= asked["prompts.jsonl"]
    assert asked["pref_heldout.jsonl"] <= asked["eval.jsonl"]
    assert not asked["prompts.jsonl"] & asked["val.jsonl"]
    assert not asked["prompts.jsonl"] & asked["eval.jsonl"]
    assert not asked["val.jsonl"] & asked["eval.jsonl"]

    # The references are better than the demonstrations.
    def mean_flaws(name):
        return sum(gold(row, row["output"]) for row in files[name]) / len(files[name])
    assert 1.5 < mean_flaws("sft.jsonl") < 2.2
    assert 0.6 < mean_flaws("eval.jsonl") < 1.1


def kinds_of(row, seed):
    """The kinds of flaws in a demonstration, and the kinds of edits that fix it"""
    number, category = asked_for(row)
    lines = row["output"].split("\n")
    items = [line for line in lines if line in ITEMS]
    found = {
        "wrong": any(item not in CATEGORIES[category] for item in items),
        "rude": any(line in RUDE for line in lines),
        "missing": len(items) < number,
        "extra": len(items) > number,
        "no closing": CLOSING not in lines,
        "two closings": lines.count(CLOSING) == 2,
        "harmless": any(line in HARMLESS for line in lines),
        "none": gold(row, row["output"]) == 0,
    }
    mended = mend(row, row["output"], random.Random(seed)).split("\n")
    edits = {change[0] for change in changes_between(lines, mended)}
    return {kind for kind, is_there in found.items() if is_there} | edits


def test_every_kind_of_flaw_and_edit_occurs(toy):
    rows = rows_of(toy / "sft.jsonl")
    kinds = Counter()
    for k, row in enumerate(rows):
        kinds.update(kinds_of(row, k))
    for kind in ("wrong", "rude", "missing", "extra", "no closing", "two closings", "harmless",
                 "none", "replace", "delete", "insert"):
        assert kinds[kind] / len(rows) > 0.03, (kind, kinds)
    assert 0.6 < kinds["wrong"] / len(rows) < 0.85
    assert kinds["none"] / len(rows) < 0.25


def wrong_labels(rows):
    """-> the share of wrong labels among the pairs that are not draws, the number of draws"""
    wrong = 0
    draws = 0
    for row in rows:
        flaws_1 = gold(row, row["output_1"])
        flaws_2 = gold(row, row["output_2"])
        if flaws_1 == flaws_2:
            draws += 1
        elif (flaws_1 < flaws_2) == (row["preference"] == 2):
            wrong += 1
    return wrong / (len(rows) - draws), draws


def test_a_quarter_of_the_labels_is_wrong(toy):
    rows = write_pairs(PROMPTS, 10000, Config(), random.Random(0), noise=0.25, draws=True)
    share, draws = wrong_labels(rows)
    assert abs(share - 0.25) < 0.02 and draws > 1000
    share, draws = wrong_labels(rows_of(toy / "pref.jsonl"))
    assert abs(share - 0.25) < 0.075 and draws > 80
    assert wrong_labels(rows_of(toy / "pref_heldout.jsonl")) == (0, 0)


# ---------------------------------------------------------------- what a reward needs to know

def better_and_worse(row):
    if row["preference"] == 1:
        return row["output_1"], row["output_2"]
    return row["output_2"], row["output_1"]


def only_right_and_wrong(row, answer):
    """Every item becomes "apple" if it is right for the row's prompt, else "horse" """
    _, category = asked_for(row)
    lines = []
    for line in answer.split("\n"):
        if line in CATEGORIES[category]:
            line = "apple"
        elif line in ITEMS:
            line = "horse"
        lines.append(line)
    return "\n".join(lines)


def test_bag_of_tokens_cannot_tell_but_a_bag_with_the_prompt_can(toy, tokenizer, tmp_path):
    test = rows_of(toy / "pref_heldout.jsonl")
    prompts = rows_of(toy / "prompts.jsonl")
    train = write_pairs(prompts, 4000, Config(), random.Random(0), noise=0.0, draws=False)

    def without_prompt(rows):
        return count_differences([better_and_worse(row) for row in rows], tokenizer)

    def with_prompt(rows):
        pairs = []
        for row in rows:
            better, worse = better_and_worse(row)
            pairs.append((only_right_and_wrong(row, better), only_right_and_wrong(row, worse)))
        return count_differences(pairs, tokenizer)

    def accuracy(features):
        margins = features(test) @ fit(features(train), 1e-3)
        return (margins > 0).double().mean().item()

    assert accuracy(without_prompt) < 0.75
    assert accuracy(with_prompt) > 0.9

    row = bag_of_tokens(toy, toy / "pref.jsonl", tmp_path / "bag.jsonl")
    assert row["name"] == "bag_of_tokens" and row["n"] == 1000
    assert 0.5 < row["accuracy"] < 0.75
    binomial = (row["accuracy"] * (1 - row["accuracy"]) / 1000) ** 0.5
    assert abs(row["standard_error"] - binomial) < 2e-3


def bag_of_tokens(toy, train, out):
    """Run the script -> its one row"""
    run("extras/study/bag_of_tokens.py", f"--train={train}", f"--data={toy}/pref_heldout.jsonl",
        f"--tokenizer={toy}/model", f"--out={out}")
    rows = rows_of(out)
    assert len(rows) == 1
    return rows[0]


def test_bag_of_tokens_learns_from_edits(toy, tmp_path):
    edits = []
    for k, row in enumerate(rows_of(toy / "sft.jsonl")[:800]):
        edited = mend(row, row["output"], random.Random(k))
        if k % 9 == 0:
            edited = None  # a failed edit
        edits.append(row | {"id": k, "original": row["output"], "edited": edited})
    write_jsonl(tmp_path / "edits.jsonl", edits)
    row = bag_of_tokens(toy, tmp_path / "edits.jsonl", tmp_path / "bag.jsonl")
    assert 0.5 < row["accuracy"] < 0.75


# ---------------------------------------------------------------- runs

def test_same_seed_same_bytes(toy, tmp_path):
    run("data/toy/prepare.py", f"--out={tmp_path}/same", PYTHONHASHSEED=1)
    run("data/toy/prepare.py", f"--out={tmp_path}/other", "--seed=1", PYTHONHASHSEED=2)
    model_files = [f"model/{file.name}" for file in (toy / "model").iterdir()]
    for name in [*FILES, "probe.jsonl", *model_files]:
        content = (toy / name).read_bytes()
        assert (tmp_path / "same" / name).read_bytes() == content, name
        differs = (tmp_path / "other" / name).read_bytes() != content
        assert differs == name.endswith("jsonl"), name


def test_again_refused_overwritten(toy, tmp_path):
    out = shutil.copytree(toy, tmp_path / "w")

    def times():
        return {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.suffix != ".lock"}

    # The same command has nothing to do; another seed is refused; neither touches a file.
    before = times()
    assert "finished; nothing to do" in run("data/toy/prepare.py", f"--out={out}").stdout
    done = run("data/toy/prepare.py", f"--out={out}", "--seed=1", ok=False)
    assert done.returncode == 2
    assert "seed: 0 then, 1 now" in done.stderr and done.stderr.count("\n") == 1
    assert times() == before

    # --overwrite writes every file again.
    run("data/toy/prepare.py", f"--out={out}", "--seed=1", "--prompt_rows=7", "--overwrite=true")
    assert len(rows_of(out / "prompts.jsonl")) == 7
    after = times()
    assert not [file for file in before if before[file] == after.get(file)]


@pytest.mark.parametrize("flag, words", [
    ("--vocab_size=300", "--vocab_size=300 does not fit"),
    ("--vocab_size=5000", "Please set it to a value"),
    ("--eval_rows=0", "--eval_rows must be at least 1"),
    ("--prompt_rows=0", "--prompt_rows must be at least 1"),
    ("--eval_rows=1200", "1296 prompts"),
    ("--flaws=0", "--flaws must be above 0"),
    ("--hidden_size=30", "--heads=4"),
    ("--sft_row=3", "Did you mean 'sft_rows'?"),
])
def test_mistakes(tmp_path, capfd, flag, words):
    with pytest.raises(SystemExit) as end:
        main(load_config(Config, "prepare", argv=[f"--out={tmp_path}/w", flag]))
    said = capfd.readouterr().err
    assert end.value.code == 2
    assert words in said and said.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_the_default_folder_holds_the_script(tmp_path):
    """python data/toy/prepare.py, from an empty clone and from another working directory"""
    script = tmp_path / "data/toy/prepare.py"
    plumbing = [f"plumbing/{path.name}" for path in ROOT.glob("plumbing/*.py")]
    for name in ["common.py", "data/toy/prepare.py", *plumbing]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    done = subprocess.run([sys.executable, script, "--sft_rows=20"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "data/toy/sft.jsonl")) == 20


def test_trainers_do_not_know_the_world():
    for name in ("sft.py", "diff.py", "reward_model.py", "ppo.py", "common.py"):
        assert not re.search(r"data\.toy|prepare import|\bgold\b", (ROOT / name).read_text()), name
