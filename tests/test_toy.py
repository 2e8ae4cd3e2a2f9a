"""The embedded world: pytest tests/test_toy.py"""

import difflib, random, re, shutil, subprocess, sys

import pytest
import sentencepiece
import torch
from conftest import ROOT, rows_of, run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common import decode_response, encode_prompt, encode_response, PROMPT
from plumbing.files import write_jsonl
from data.toy.prepare import (
    CATEGORIES,
    CLOSING,
    HARMLESS,
    ITEMS,
    NUMBERS,
    OCCASIONS,
    RUDE,
    VERBS,
    Config,
    gold,
    main,
    mend,
    write_answer,
    write_pairs,
)
from plumbing.command_line import load_config
from extras.study.bag_of_tokens import count_differences, fit

FILES = [
    "sft.jsonl",
    "pref.jsonl",
    "pref_heldout.jsonl",
    "prompts.jsonl",
    "val.jsonl",
    "eval.jsonl",
]
LINES = sorted(ITEMS) + RUDE + HARMLESS + [CLOSING]
PROMPTS = [
    dict(instruction=f"{verb} {number} {category}{occasion}.", input="")
    for verb in VERBS
    for number in NUMBERS
    for category in CATEGORIES
    for occasion in OCCASIONS
]
ROW = {"instruction": "List three fruits.", "input": ""}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The world as it is by default"""
    out = tmp_path_factory.mktemp("toy")
    run("data/toy/prepare.py", f"--out={out}")
    return out


@pytest.fixture(scope="module")
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy / "model")


# ---------------------------------------------------------------- the tokenizer


def test_ids_are_sentencepieces(toy, tokenizer):
    model = sentencepiece.SentencePieceProcessor(model_file=str(toy / "model" / "tokenizer.model"))
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [
        model.bos_id(),
        model.eos_id(),
        model.unk_id(),
    ]
    assert [model.id_to_piece(i) for i in range(len(model))] == tokenizer.convert_ids_to_tokens(
        range(len(tokenizer))
    )
    rng, parts = (
        random.Random(0),
        [
            *LINES,
            *VERBS,
            *OCCASIONS,
            PROMPT,
            "\n",
            " ",
            "  ",
            "\t",
            "\r\n",
            "é",
            "日本",
            "🎉",
            "</s>",
            "<0x0A>",
            "x",
        ],
    )
    texts = [
        "",
        "  two",
        " ",
        "://x",
        "\n\n1.",
        " The",
        "The",
        "a  b ",
        "<s></s><unk>",
        "e\u0301 \u00a0\u200b",
        "ﬁ ½",
    ]
    texts += ["".join(rng.choices(parts, k=rng.randrange(1, 8))) for _ in range(2000)]
    texts += [
        "".join(map(chr, rng.choices(range(1, 0xD800), k=6))).replace("\u2581", "")
        for _ in range(500)
    ]
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
        alone = [encode_response(tokenizer, line, eos=False) for line in lines]
        assert (
            encode_response(tokenizer, "\n".join(lines), eos=False)
            == sum(([*newline, *ids] for ids in alone), [])[1:]
        )


def test_model_is_tiny_and_has_no_weights(toy, tokenizer):
    assert not list((toy / "model").glob("*.safetensors*")) and not list(
        (toy / "model").glob("*.bin")
    )
    config = AutoConfig.from_pretrained(toy / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert config.vocab_size == len(tokenizer) and (
        config.initializer_range,
        config.tie_word_embeddings,
    ) == (0.08, False)


# ---------------------------------------------------------------- gold and mend


@pytest.mark.parametrize(
    "flaws, answer",
    [
        (0, "apple\npear\nplum\nEnjoy!"),
        (0, "apple\nA classic!\napple\nplum\nEnjoy!"),  # a harmless aside, an item said twice
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
    ],
)
def test_gold_by_hand(flaws, answer):
    assert gold(ROW, answer) == flaws


def test_gold_reads_the_prompt():
    answer = "apple\npear\nplum\nEnjoy!"
    assert [
        gold({"instruction": f"Name {words} for a quiz."}, answer)
        for words in ("three fruits", "four fruits", "three animals", "five tools")
    ] == [0, 1, 3, 5]
    with pytest.raises(SystemExit):
        gold({"instruction": "Who wrote Hamlet?"}, answer)


def test_gold_counts_planted_flaws():
    """An answer without flaws, and a number of flaws of different kinds planted in it one after the
    other"""
    rng = random.Random(0)
    for _ in range(2000):
        row = rng.choice(PROMPTS)
        number, category = next(
            (NUMBERS[n], c)
            for n in NUMBERS
            for c in CATEGORIES
            if f" {n} {c}" in row["instruction"]
        )
        lines = [*rng.sample(CATEGORIES[category], number), CLOSING]
        others, planted = sorted(ITEMS - set(CATEGORIES[category])), 0
        for at in rng.sample(range(number), rng.randrange(number + 1)):
            lines[at], planted = rng.choice(others), planted + 1
        for _ in range(rng.randrange(3)):
            lines.insert(rng.randrange(len(lines)), rng.choice(HARMLESS))
            lines.insert(rng.randrange(len(lines)), rng.choice([*RUDE, "x", "Apple", ""]))
            planted += 1
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
    """The world's own flawed answers, worse ones, and rubbish"""
    rng, rubbish = (
        random.Random(1),
        [*LINES, CLOSING, CLOSING, "", " apple", "apple ", "Enjoy", "\r", "x\ty", "日本"],
    )
    for k in range(count):
        row = rng.choice(PROMPTS)
        yield (
            row,
            (
                "\n".join(rng.choices(rubbish, k=rng.randrange(12)))
                if k % 3 == 0
                else write_answer(row, rng.choice([0.35, 0.6, 1.0, 2.0]), rng)
            ),
        )


def test_mend_leaves_no_flaw_and_nothing_else_changes():
    for k, (row, answer) in enumerate(answers(6000)):
        mended = mend(row, answer, random.Random(k), p=1)
        assert gold(row, mended) == 0, (row, answer, mended)
        assert gold(row, answer) or mended == answer
        assert mend(row, answer, random.Random(k), p=0) == answer
        assert gold(row, mend(row, answer, random.Random(k), p=0.5)) <= gold(row, answer)
        kept = [line for line in answer.split("\n") if line in HARMLESS]
        assert [line for line in mended.split("\n") if line in HARMLESS] == kept
        if (
            k % 3
            # the world's own flaws (nothing follows a closing): one line touched for each at most
        ):
            changes = difflib.SequenceMatcher(
                None, answer.split("\n"), mended.split("\n"), autojunk=False
            ).get_opcodes()
            touched = sum(max(b - a, d - c) for kind, a, b, c, d in changes if kind != "equal")
            assert touched <= gold(row, answer), (row, answer, mended)


@pytest.mark.parametrize(
    "answer, pattern",
    [
        ("apple\nhorse\nmelon\nEnjoy!", r"apple\n(\w+)\nmelon\nEnjoy!"),  # substitution
        (
            "apple\npear\nAsk somebody else!\nMy favourite!\nplum\nEnjoy!",
            r"apple\npear\nMy favourite!\nplum\nEnjoy!",
        ),  # deletion
        ("apple\nA classic!\nEnjoy!", r"apple\n(\w+)\n(\w+)\nA classic!\nEnjoy!"),
        ("apple\npear\nplum", r"apple\npear\nplum\nEnjoy!"),
        (
            "apple\nred\npear\nplum\nEnjoy!",
            r"apple\npear\nplum\nEnjoy!",
        ),  # one too many, and wrong: one deletion mends both
        ("apple\nEnjoy!\npear\nplum\nEnjoy!", r"apple\npear\nplum\nEnjoy!"),
    ],
)
def test_each_kind_of_edit(answer, pattern):
    for seed in range(20):
        match = re.fullmatch(pattern, mend(ROW, answer, random.Random(seed), p=1))
        assert match and all(
            item in CATEGORIES["fruits"] and item not in answer for item in match.groups()
        )


def test_mend_does_it_with_probability_p():
    for answer in (
        "apple\nhorse\nplum\nEnjoy!",
        "apple\npear\nRUDE\nplum\nEnjoy!",
        "apple\npear\nEnjoy!",
        "apple\npear\nplum",
    ):
        left = sum(gold(ROW, mend(ROW, answer, random.Random(k), p=0.9)) for k in range(4000))
        assert abs(left / 4000 - 0.1) < 0.02, answer  # 4 standard errors


# ---------------------------------------------------------------- the rows


def test_rows(toy):
    files = {name: rows_of(toy / name) for name in FILES}
    assert {name: len(rows) for name, rows in files.items()} == dict(
        zip(FILES, (8000, 800, 1000, 852, 144, 300))
    )
    pair = {"instruction", "input", "output_1", "output_2", "preference"}
    reference = {"instruction", "input", "output", "generator", "dataset"}
    for name, fields in zip(
        FILES,
        (
            {"instruction", "input", "output"},
            pair,
            pair,
            {"instruction", "input"},
            reference,
            reference,
        ),
    ):
        assert all(set(row) == fields for row in files[name]), name  # no row holds the truth
    asked = {name: {row["instruction"] for row in rows} for name, rows in files.items()}
    assert (
        asked["sft.jsonl"] | asked["pref.jsonl"] <= asked["prompts.jsonl"]
        and asked["pref_heldout.jsonl"] <= asked["eval.jsonl"]
    )
    assert (
        not asked["prompts.jsonl"] & (asked["val.jsonl"] | asked["eval.jsonl"])
        and not asked["val.jsonl"] & asked["eval.jsonl"]
    )
    mean = {
        name: sum(gold(row, row["output"]) for row in files[name]) / len(files[name])
        for name in ("sft.jsonl", "eval.jsonl")
    }
    assert (
        1.5 < mean["sft.jsonl"] < 2.2 and 0.6 < mean["eval.jsonl"] < 1.1
    )  # the reference is better than what is imitated


def test_every_kind_of_flaw_and_edit_occurs(toy):
    kinds = dict.fromkeys(
        (
            "wrong",
            "rude",
            "missing",
            "extra",
            "no closing",
            "two closings",
            "harmless",
            "none",
            "replace",
            "delete",
            "insert",
        ),
        0,
    )
    rows = rows_of(toy / "sft.jsonl")
    for k, row in enumerate(rows):
        answer, lines = row["output"], row["output"].split("\n")
        number, category = next(
            (NUMBERS[n], c)
            for n in NUMBERS
            for c in CATEGORIES
            if f" {n} {c}" in row["instruction"]
        )
        items = [line for line in lines if line in ITEMS]
        kinds["wrong"] += any(item not in CATEGORIES[category] for item in items)
        kinds["rude"] += any(line in RUDE for line in lines)
        kinds["missing"] += len(items) < number
        kinds["extra"] += len(items) > number
        kinds["no closing"] += CLOSING not in lines
        kinds["two closings"] += lines.count(CLOSING) == 2
        kinds["harmless"] += any(line in HARMLESS for line in lines)
        kinds["none"] += gold(row, answer) == 0
        for kind in {
            c[0]
            for c in difflib.SequenceMatcher(
                None, lines, mend(row, answer, random.Random(k)).split("\n")
            ).get_opcodes()
        }:
            kinds[kind] = kinds.get(kind, 0) + 1
    shares = {kind: count / len(rows) for kind, count in kinds.items()}
    assert all(share > 0.03 for share in shares.values()), shares
    assert 0.6 < shares["wrong"] < 0.85 and shares["none"] < 0.25, shares


def test_a_quarter_of_the_labels_is_wrong(toy):
    def wrong(rows):  # share of the pairs that are no draws, and the draws
        flaws = [
            (gold(row, row["output_1"]), gold(row, row["output_2"]), row["preference"])
            for row in rows
        ]
        clear = [(one < two) == (preference == 2) for one, two, preference in flaws if one != two]
        return sum(clear) / len(clear), len(flaws) - len(clear)

    share, draws = wrong(
        write_pairs(PROMPTS, 10000, Config(), random.Random(0), noise=0.25, draws=True)
    )
    assert abs(share - 0.25) < 0.02 and draws > 1000
    share, draws = wrong(rows_of(toy / "pref.jsonl"))
    assert abs(share - 0.25) < 0.075 and draws > 80
    assert wrong(rows_of(toy / "pref_heldout.jsonl")) == (0, 0)


# ---------------------------------------------------------------- what a reward needs to know


def test_bag_of_tokens_cannot_tell_but_a_bag_with_the_prompt_can(toy, tokenizer, tmp_path):
    test = rows_of(toy / "pref_heldout.jsonl")
    clean = write_pairs(
        rows_of(toy / "prompts.jsonl"), 4000, Config(), random.Random(0), noise=0.0, draws=False
    )

    def pairs(rows):
        return [
            (row[f"output_{row['preference']}"], row[f"output_{3 - row['preference']}"])
            for row in rows
        ]

    def accuracy(features):
        return (features(test) @ fit(features(clean), 1e-3) > 0).double().mean().item()

    assert accuracy(lambda rows: count_differences(pairs(rows), tokenizer)) < 0.75

    def with_prompt(rows):  # the same counts, of items that the prompt makes right or wrong
        marked = []
        for row in rows:
            right = next(CATEGORIES[c] for c in CATEGORIES if f" {c}" in row["instruction"])
            marked.append(
                tuple(
                    "\n".join(
                        "apple" if line in right else "horse" if line in ITEMS else line
                        for line in answer.split("\n")
                    )
                    for answer in pairs([row])[0]
                )
            )
        return count_differences(marked, tokenizer)

    assert accuracy(with_prompt) > 0.9

    run(
        "extras/study/bag_of_tokens.py",
        f"--train={toy}/pref.jsonl",
        f"--data={toy}/pref_heldout.jsonl",
        f"--tokenizer={toy}/model",
        f"--out={tmp_path}/bag.jsonl",
    )
    (row,) = rows_of(tmp_path / "bag.jsonl")
    assert row["name"] == "bag_of_tokens" and 0.5 < row["accuracy"] < 0.75 and row["n"] == 1000
    assert (
        abs(row["standard_error"] - (row["accuracy"] * (1 - row["accuracy"]) / 1000) ** 0.5) < 2e-3
    )


def test_bag_of_tokens_learns_from_edits(toy, tmp_path):
    rows = [
        row
        | {
            "id": k,
            "original": row["output"],
            "edited": mend(row, row["output"], random.Random(k)) if k % 9 else None,
        }
        for k, row in enumerate(rows_of(toy / "sft.jsonl")[:800])
    ]
    write_jsonl(tmp_path / "edits.jsonl", rows)
    run(
        "extras/study/bag_of_tokens.py",
        f"--train={tmp_path}/edits.jsonl",
        f"--data={toy}/pref_heldout.jsonl",
        f"--tokenizer={toy}/model",
        f"--out={tmp_path}/bag.jsonl",
    )
    assert 0.5 < rows_of(tmp_path / "bag.jsonl")[0]["accuracy"] < 0.75


# ---------------------------------------------------------------- runs


def test_same_seed_same_bytes(toy, tmp_path):
    run("data/toy/prepare.py", f"--out={tmp_path}/same", PYTHONHASHSEED=1)
    run("data/toy/prepare.py", f"--out={tmp_path}/other", "--seed=1", PYTHONHASHSEED=2)
    for name in FILES + [f"model/{file.name}" for file in (toy / "model").iterdir()]:
        assert (toy / name).read_bytes() == (tmp_path / "same" / name).read_bytes(), name
        assert (
            (toy / name).read_bytes() != (tmp_path / "other" / name).read_bytes()
        ) == name.endswith("jsonl"), name


def test_again_refused_overwritten(toy, tmp_path):
    out = shutil.copytree(toy, tmp_path / "w")

    def state():
        return {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.suffix != ".lock"}

    before = state()
    assert "finished; nothing to do" in run("data/toy/prepare.py", f"--out={out}").stdout
    done = run("data/toy/prepare.py", f"--out={out}", "--seed=1", ok=False)
    assert (
        done.returncode == 2
        and "seed: 0 then, 1 now" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert state() == before
    run("data/toy/prepare.py", f"--out={out}", "--seed=1", "--prompt_rows=7", "--overwrite=true")
    assert len(rows_of(out / "prompts.jsonl")) == 7 and not [
        file for file in before if before[file] == state().get(file)
    ]


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--vocab_size=300", "--vocab_size=300 does not fit"),
        ("--vocab_size=5000", "Please set it to a value"),
        ("--eval_rows=0", "--eval_rows must be at least 1"),
        ("--prompt_rows=0", "--prompt_rows must be at least 1"),
        ("--eval_rows=1200", "1296 prompts"),
        ("--flaws=0", "--flaws must be above 0"),
        ("--hidden_size=30", "--heads=4"),
        ("--sft_row=3", "Did you mean 'sft_rows'?"),
    ],
)
def test_mistakes(tmp_path, capfd, flag, words):
    with pytest.raises(SystemExit) as end:
        main(load_config(Config, "prepare", argv=[f"--out={tmp_path}/w", flag]))
    said = capfd.readouterr().err
    assert (
        end.value.code == 2
        and words in said
        and said.count("\n") == 1
        and not (tmp_path / "w").exists()
    )


def test_the_default_folder_holds_the_script(tmp_path):
    """python data/toy/prepare.py, from an empty clone and from another working directory"""
    for name in (
        "common.py",
        *(f"plumbing/{path.name}" for path in ROOT.glob("plumbing/*.py")),
        "data/toy/prepare.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, tmp_path / "data/toy/prepare.py", "--sft_rows=20"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and len(rows_of(tmp_path / "data/toy/sft.jsonl")) == 20, done.stderr


def test_trainers_do_not_know_the_world():
    for name in ("sft.py", "diff.py", "reward_model.py", "ppo.py", "common.py"):
        assert not re.search(r"data\.toy|prepare import|\bgold\b", (ROOT / name).read_text()), name
