"""docs/lesson.md: its blocks run in order and print what the lesson says. pytest
tests/test_lesson.py"""
import codeop, contextlib, io, re, shlex, time

import pytest
from conftest import ROOT, run

LESSON = ROOT / "docs/lesson.md"
FENCE = "```"


def blocks_of(path):
    """The fenced blocks of a page -> list of (number of its first line, language, text)"""
    blocks = []
    inside = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith(FENCE):
            if inside:
                inside[2].append(line)
        elif inside:
            blocks.append((inside[0], inside[1], "\n".join(inside[2])))
            inside = None
        else:
            inside = (number + 1, line.removeprefix(FENCE), [])
    assert inside is None, f"{path.name}:{inside}: this block does not end"
    return blocks


def printed_by(block, path, namespace):
    """What a block of Python prints. A traceback names the page and its line."""
    number, _, text = block
    code = compile("\n" * (number - 1) + text, str(path), "exec")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, namespace)
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    return "\n".join(lines)


def test_the_lesson_prints_what_it_says(tmp_path):
    """In one namespace, as somebody who pastes the blocks. In less than 20 seconds of a CPU"""
    def here(text):
        return text.replace("out/lesson", f"{tmp_path}/lesson")

    blocks = blocks_of(LESSON)
    namespace = {}
    compared = 0
    seconds = time.process_time()
    for block, following in zip(blocks, [*blocks[1:], (0, "", "")]):
        number, language, text = block
        if language == "sh":
            for line in text.splitlines():
                words = shlex.split(here(line))
                assert words[0] == "python", f"{LESSON.name}:{number}"
                run(*words[1:])
        if language == "python":
            printed = printed_by((number, language, here(text)), LESSON, namespace)
            assert following[1] == "text" or not printed, f"{LESSON.name}:{number} prints {printed}"
            if following[1] == "text":
                assert printed == following[2], f"{LESSON.name}:{following[0]}"
                compared += 1
    seconds = time.process_time() - seconds
    texts = [number for number, language, _ in blocks if language == "text"]
    assert compared == len(texts) > 10
    assert seconds < 20


def test_the_blocks_can_be_pasted_into_python():
    """The prompt of Python 3.11 takes a blank line for the end of a function or a loop"""
    for number, language, text in blocks_of(LESSON):
        if language != "python":
            continue
        waiting = []
        for line in [*text.splitlines(), ""]:
            waiting.append(line)
            try:
                complete = codeop.compile_command("\n".join(waiting), symbol="single")
            except SyntaxError as error:
                pytest.fail(f"{LESSON.name}:{number}: cannot be pasted at {line!r}: {error}")
            if complete is not None:
                waiting = []
        assert not "".join(waiting).strip(), f"{LESSON.name}:{number}: {waiting}"


def test_the_form_of_the_lesson():
    """Each step asks before it shows, and explains after; an exercise has its answer folded away;
    the minutes make one hour"""
    page = LESSON.read_text(encoding="utf-8")
    lesson, exercises = page.split("\n## Exercises\n")
    steps = re.split(r"\n### \d\. ", lesson)[1:]
    assert len(steps) == 7
    for step in steps:
        asks = step.index("**Predict.**")
        shows = step.index(f"{FENCE}text")
        assert asks < step.index(f"{FENCE}python") < shows < step.index("**Explain.**")
    exercises = re.split(r"\n### \d\. ", exercises)[1:]
    assert len(exercises) == 3
    for exercise in exercises:
        question, answer = exercise.split("<details>")
        assert FENCE not in question and f"{FENCE}text" in answer and "</details>" in answer
    minutes = [int(found) for found in re.findall(r"^\| (\d+) \|", lesson, flags=re.M)]
    assert sum(minutes) == 60
