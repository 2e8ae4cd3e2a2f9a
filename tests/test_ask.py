"""evaluate.py ask: the answers are those of decode, the figures those of plain transformers, and
nothing that a model or a person writes can control the terminal. pytest tests/test_ask.py"""
import io, random, re, shutil, subprocess, sys, unicodedata
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common import encode_prompt, encode_response, load_tokenizer
from conftest import ROOT, python, rows_of, run
from extras.report import ask
from plumbing import paint
from test_evaluate import assert_refused, here, plain, write

QUESTIONS = ["List four fruits.", "Name three tools for a quiz, please."]  # a comma does not split
SAMPLING = ["--temperature=1.3", "--top_p=0.8", "--response_len=10", "--seed=5"]


@pytest.fixture(scope="module")
def other(world, tmp_path_factory):
    """A second language model with the first one's tokenizer and other weights"""
    folder = tmp_path_factory.mktemp("ask") / "other"
    shutil.copytree(world / "sft", folder)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def columns_of(stdout, count):
    """What stands in each column of a printed table of answers"""
    lines = [f"{line} " for line in stdout.split("\n") if "|" in line]
    parts = [line.split(" | ") for line in lines]
    assert all(len(part) == count for part in parts), stdout
    return ["\n".join(part[k].strip() for part in parts) for k in range(count)]


def pictured(text):
    """A text with the Unicode pictures of its control characters but newlines"""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) != "\n"}
    return text.translate(pictures | {127: 0xFFFD})


# ---------------------------------------------------------------- the answers

def test_the_answers_are_those_of_decode(world, other, tmp_path):
    """Two models, two instructions: the same draws as evaluate.py decode on a file of them"""
    rows = [dict(instruction=question, input="") for question in QUESTIONS]
    data = write(tmp_path / "data.jsonl", rows)
    expected = []
    for model in (world / "sft", other):
        out = tmp_path / f"{model.name}.jsonl"
        here("decode", f"--model={model}", f"--data={data}", f"--out={out}", "--batch=1", *SAMPLING)
        expected.append(rows_of(out))

    # One instruction on each line of stdin gives what the command line gives.
    words = [f"--model={world}/sft,{other}", *SAMPLING]
    said = here("ask", *words, *QUESTIONS, COLUMNS="2000").stdout
    with mock.patch.object(sys, "stdin", io.StringIO("\n\n".join(QUESTIONS) + "\n")):
        assert here("ask", *words, COLUMNS="2000").stdout == said

    tables = said.split(f"\n{QUESTIONS[1]}\n")
    assert len(tables) == 2 and tables[0].startswith(f"\n{QUESTIONS[0]}\n")
    for number, table in enumerate(tables):
        for k, column in enumerate(columns_of(table, 2)):
            title, note, _, answer = column.split("\n", 3)
            row = expected[k][number]
            assert title == str((world / "sft", other)[k])
            lines = pictured(row["output"]).split("\n")
            assert answer == "\n".join(line.strip() for line in lines)
            assert note.endswith(", cut") == ("cut" in row), note
    assert expected[0] != expected[1]


@pytest.mark.parametrize("name", ["rm", "rm_sequence"])
def test_the_reward_is_that_of_plain_transformers(world, name):
    scored = []

    def score(reward_model, level, prompt, ids, device):
        scored.append((prompt, ids))
        return real_score(reward_model, level, prompt, ids, device)

    real_score = ask.score
    with mock.patch.object(ask, "score", score):
        said = here("ask", f"--model={world}/sft", f"--reward_model={world}/{name}",
                    "--response_len=12", QUESTIONS[0]).stdout
    R, length = re.search(r"R = (\S+), length (\d+)", said).groups()
    [(prompt, ids)] = scored
    assert prompt == encode_prompt(load_tokenizer(world / name), dict(instruction=QUESTIONS[0]))
    assert int(length) == len(ids)
    with torch.no_grad():
        heads = plain(world / name)[0](torch.tensor([prompt + ids])).logits[0, :, 0].tolist()
    before, *r = heads[len(prompt) - 1:]
    expected = sum(r) / len(r) if name == "rm" else r[-1]
    assert float(R) == pytest.approx(expected, abs=6e-4)

    # Numbers mark the strong tokens, on one scale: those above 0.3 of the largest.
    shown = r if name == "rm" else [x - y for x, y in zip(r, [before, *r])]
    scale = max(map(abs, shown))
    strong = [f"{x:+.1f}" for x in shown if abs(x) > 0.3 * scale]
    assert re.findall(r"\(([+-]\d+\.\d)\)", said) == strong and strong


def test_an_answer_has_at_most_the_room_that_the_model_has(world):
    """The default --response_len=300 is more than the toy model's 256 positions"""
    said = here("ask", f"--model={world}/sft", "--temperature=30", "--top_p=1", "List.").stdout
    assert 100 < int(re.search(r"length (\d+)", said)[1]) < 256 or "cut" not in said
    long = " ".join(["apple"] * 300)
    assert_refused(here("ask", f"--model={world}/sft", long, ok=False), "tokens leaves no room")


# ---------------------------------------------------------------- the terminal

def escapes_left(text):
    """The control characters but newlines that remain without the codes of paint()"""
    text = re.sub(r"\033\[(0|30;48;5;\d+)m", "", text)
    return [c for c in text if unicodedata.category(c) == "Cc" and c != "\n"]


@pytest.mark.parametrize("colour", [False, True])
def test_control_characters_cannot_reach_the_terminal(world, capsys, colour):
    tokenizer = load_tokenizer(world / "sft")
    evil = "\033[2Japple\x07\r\033]0;title\x9b31m\tpear\x1b[0m"
    ids = encode_response(tokenizer, evil)
    rewards = [(-1.0) ** t for t in range(len(ids))]
    with mock.patch.object(paint, "in_colour", lambda: colour):
        for R, r in [(None, []), (0.5, rewards)]:
            text = ask.as_text("m\033[2J", tokenizer, ids, R, r, 1.0)
            assert escapes_left(text) == []
            ask.show([text, text])
            ask.show([text] * 9)
    said = capsys.readouterr().out
    assert escapes_left(said) == [] and "apple" in said and "␛" in said
    assert ("\033" in said) == colour

    said = here("ask", f"--model={world}/sft", "--response_len=2", evil, "--input=\033[2J").stdout
    assert escapes_left(said) == [] and "␛" in said


def width_of(text):
    """Columns, by a rule that is right for the letters of this test"""
    return sum(0 if c == "\u0301" else 2 if "\u4e00" <= c <= "\u9fff" else 1 for c in text)


@pytest.mark.parametrize("seed", range(20))
def test_no_letter_is_lost_and_no_line_is_wider(seed):
    draw = random.Random(seed)
    colours = ["", "\033[30;48;5;196m", "\033[30;48;5;46m"]
    text = ""
    for _ in range(draw.randrange(1, 60)):
        word = "".join(draw.choices("abc\u4e2d\u6587e\u0301 \n", k=draw.randrange(1, 9)))
        code = draw.choice(colours)
        text += code + word + (ask.COLOUR_OFF if code else "")
    width = draw.randrange(3, 30)
    lines = [ask.render(line, width) for line in ask.wrap(ask.cells(text), width)]

    shown = [re.sub(r"\033\[[\d;]*m", "", line) for line in lines]
    assert {width_of(line) for line in shown} == {width}
    plain = re.sub(r"\033\[[\d;]*m", "", text)
    assert re.sub(r"\s", "", "".join(shown)) == re.sub(r"\s", "", plain)
    for line in lines:  # no colour goes on behind the line
        assert re.fullmatch(r"([^\033]|\033\[30;48;5;\d+m[^\033]+\033\[0m)*", line), line


def test_narrow_terminals_show_the_answers_below_each_other(world):
    words = [f"--model={world}/sft,{world}/sft", "--response_len=5", QUESTIONS[0]]
    assert "|" in here("ask", *words, COLUMNS="51").stdout
    said = here("ask", *words, COLUMNS="50").stdout
    assert "|" not in said and said.count("length 5, cut") == 2


def test_a_pipe_of_broken_text(world):
    """Bytes that are no UTF-8 are asked as what they look like; the answers are plain text"""
    done = subprocess.run([python(), "evaluate.py", "ask", f"--model={world}/sft",
                           "--response_len=3"], cwd=ROOT, input=b"List \xff fruits.\n",
                          capture_output=True, timeout=300)
    assert done.returncode == 0 and b"length 3" in done.stdout, done.stderr
    assert b"\033" not in done.stdout and b"Traceback" not in done.stderr


# ---------------------------------------------------------------- mistakes

def test_mistakes_are_one_line(world, tmp_path):
    sft = f"--model={world}/sft"
    assert_refused(here("ask", "--model=", "Hi", ok=False), "--model")
    assert_refused(here("ask", "--model=out/none", "Hi", ok=False), "out/none", "ppo.py")
    assert_refused(here("ask", f"--model={world}/rm", "Hi", ok=False), "is a reward model")
    assert_refused(here("ask", sft, "--reward_model=out/none", "Hi", ok=False), "reward_model.py")
    assert_refused(here("ask", sft, f"--reward_model={world}/sft", "Hi", ok=False), "reward_model")
    assert_refused(here("ask", sft, "--top_p=2", "Hi", ok=False), "--top_p")
    assert_refused(here("ask", sft, "--temprature=1", "Hi", ok=False), "Did you mean 'temperature'")

    shutil.copytree(world / "rm", tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    tokenizer.add_tokens(["plumtree"])
    tokenizer.save_pretrained(tmp_path / "rm")
    done = here("ask", sft, f"--reward_model={tmp_path}/rm", "Hi", ok=False)
    assert_refused(done, "--reward_model=")


def test_torchrun_is_refused(world):
    done = run("evaluate.py", "ask", f"--model={world}/sft", "Hi", ok=False, RANK=0, WORLD_SIZE=2)
    assert_refused(done, "one process")
