"""reward_model.py show --svg: an answer plain, edited and painted. docs/picture.svg is one of them.
pytest tests/test_picture.py"""
import re
import xml.etree.ElementTree as ElementTree

from conftest import ROOT, rows_of, run
from extras.report.picture import picture

SVG = "{http://www.w3.org/2000/svg}"


def texts_in(svg):
    """The texts of a picture, in its order"""
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_picture_has_its_colours_and_loads_nothing():
    svg = (ROOT / "docs/picture.svg").read_text(encoding="utf-8")
    assert "var(" not in svg and "script" not in svg and "href" not in svg and "url(" not in svg
    assert "@" not in svg
    assert "fill:rgb(214,82,56)" in svg and "fill:#fdfdfc" in svg  # a reward, and its own ground
    assert len(texts_in(svg)) > 20


def test_a_picture_of_any_text():
    """Markup and control characters are text; long lines break at spaces; nothing is lost"""
    original = "<b>bad</b> & \x1b[31m " + "long words " * 12 + "\n\nend"
    row = dict(instruction="Say <script>alert(1)</script> " + "often " * 40, original=original,
               edited=original.replace("bad", "good"))
    tokens = re.findall(r"\s|[^\s]+", original) + ["</s>"]
    edited = [token.replace("bad", "good") for token in tokens]
    changed = [int(a != b) for a, b in zip(tokens, edited)]
    rewards = [-2.0] + [0.1] * (len(tokens) - 1)
    before = dict(tokens=tokens, rewards=rewards, changed=changed)
    after = dict(tokens=edited, rewards=rewards, changed=changed)
    svg = picture(row, before, after)
    shown = texts_in(svg)
    joined = "".join(shown)
    for part in ("<b>bad</b>", "<b>good</b>", "␛[31m", "-2.0", "Say <script>"):
        assert part in joined, part
    assert joined.count("long ") == joined.count("words ") == 3 * 12
    assert "<script" not in svg
    width = ElementTree.fromstring(svg).get("width")
    for text in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        if text.get("textLength"):
            assert float(text.get("x")) + float(text.get("textLength")) < float(width)


def test_show_svg(world, tmp_path):
    command = ["reward_model.py", "show", f"--model={world}/rm", f"{world}/edits.jsonl"]
    path = tmp_path / "p.svg"
    rows = rows_of(world / "edits.jsonl")
    changed = [i for i, row in enumerate(rows, 1) if row["edited"] not in (None, row["original"])]
    same = next(i for i, row in enumerate(rows, 1) if row["edited"] == row["original"])
    for row in changed[:2]:
        run(*command, f"--svg={path}", f"--row={row}")  # a picture of ours is replaced
        assert rows[row - 1]["instruction"] in texts_in(path.read_text())

    for flags, said in (([f"--row={same}"], "has none"), (["--row=999"], "has 48 rows")):
        done = run(*command, f"--svg={path}", *flags, ok=False)
        assert done.returncode == 2 and said in done.stderr
    path.write_text("mine")
    done = run(*command, f"--svg={path}", f"--row={changed[0]}", ok=False)
    assert done.returncode == 2 and path.read_text() == "mine"
