"""diff.py against brute force, and what a person sees of it: pytest tests/test_diff.py"""
import functools, json, random, re, time, tracemalloc
from html.parser import HTMLParser

import pytest

import common
import diff
from conftest import rows_of, run
from extras.editors import stats
from extras.pages import safe
from extras.report import show_diffs
from plumbing import files


# ---------------------------------------------------------------- the alignment, by brute force

def alignments(a, b):
    """All common subsequences, each in all its places: every set of index pairs (i, j) with
    a[i] == b[j] that increases on both sides"""
    @functools.cache
    def below(i, j):
        if i == 0 or j == 0:
            return [()]
        found = {*below(i - 1, j), *below(i, j - 1)}
        if a[i - 1] == b[j - 1]:
            found |= {(*pairs, (i - 1, j - 1)) for pairs in below(i - 1, j - 1)}
        return list(found)

    return below(len(a), len(b))


def runs_of(pairs):
    """How many contiguous runs the pairs form"""
    runs = 0
    for k, (i, j) in enumerate(pairs):
        if k == 0 or pairs[k - 1] != (i - 1, j - 1):
            runs += 1
    return runs


def unchanged(mask):
    return [t for t, changed in enumerate(mask) if not changed]


def kept_pairs(changed_a, changed_b):
    """Two masks -> the index pairs of the unchanged tokens, in order"""
    return tuple(zip(unchanged(changed_a), unchanged(changed_b)))


def ends(a, b):
    """Lengths of the common beginning and, of what is left, of the common end"""
    head = common_beginning(a, b)
    tail = common_beginning(a[head:][::-1], b[head:][::-1])
    return head, tail


def common_beginning(a, b):
    length = 0
    for x, y in zip(a, b):
        if x != y:
            break
        length += 1
    return length


def tokens(draw, vocabulary, longest):
    """A random sequence of at most `longest` tokens"""
    return [draw.randrange(vocabulary) for _ in range(draw.randrange(longest + 1))]


def test_align_has_as_few_runs_as_any_longest_alignment_and_ties_fall_as_stated():
    draw = random.Random(1)
    for _ in range(1500):
        a = tuple(tokens(draw, draw.choice([2, 3, 4]), 7))
        b = tuple(tokens(draw, draw.choice([2, 3, 4]), 7))
        n = len(a)
        m = len(b)
        got = kept_pairs(*diff.align(list(a), list(b)))

        # Of the alignments that keep the common ends: the longest with the fewest runs.
        head, tail = ends(a, b)
        fixed = {(k, k) for k in range(head)}
        fixed |= {(n - k, m - k) for k in range(1, tail + 1)}
        every = [pairs for pairs in alignments(a, b) if fixed <= set(pairs)]
        longest = max(map(len, every))
        every = [pairs for pairs in every if len(pairs) == longest]
        fewest = min(map(runs_of, every))
        best = [pairs for pairs in every if runs_of(pairs) == fewest]
        assert got in best, (a, b, got, best)
        without_ends = max(map(len, alignments(a, b)))
        assert longest == without_ends, "keeping the common beginning and end costs nothing"

        # Ties, from the end: a pair; else the original's token is deleted; else the edited one's.
        i = n - tail
        j = m - tail
        while i > head and j > head:
            pairing = [pairs for pairs in best if (i - 1, j - 1) in pairs]
            without = [pairs for pairs in best if all(x != i - 1 for x, _ in pairs)]
            if pairing:
                best = pairing
                i -= 1
                j -= 1
            elif without:
                best = without
                i -= 1
            else:
                j -= 1
        assert [got] == best, (a, b, got, best)


def blamed(t, mask, other_mask, partner):
    """Is t an unchanged token right before which the other side has changed tokens, and its own
    side has none? partner: unchanged token -> its place on the other side"""
    if t not in partner or (t > 0 and mask[t - 1]):
        return False
    there = partner[t]
    return there > 0 and bool(other_mask[there - 1])


def test_gaps_by_definition():
    draw = random.Random(2)
    for _ in range(2000):
        a = tokens(draw, 3, 8)
        b = tokens(draw, 3, 8)
        plain_a, plain_b = diff.align(a, b)
        gaps_a, gaps_b = diff.align(a, b, gaps=True)
        pairs = kept_pairs(plain_a, plain_b)
        partner = dict(pairs)
        for t in range(len(a)):
            assert gaps_a[t] == (plain_a[t] or blamed(t, plain_a, plain_b, partner))
        partner = {j: i for i, j in pairs}
        for t in range(len(b)):
            assert gaps_b[t] == (plain_b[t] or blamed(t, plain_b, plain_a, partner))


def test_the_examples_in_the_docstrings():
    original = "red tea fig EOS".split()
    edited = "red pear fig plum EOS".split()
    assert diff.align(original, edited) == ([0, 1, 0, 0], [0, 1, 0, 1, 0])
    assert diff.align(original, edited, gaps=True) == ([0, 1, 0, 1], [0, 1, 0, 1, 0])
    assert diff.common_pairs("pqrs", "pxrsy") == [(0, 0), (2, 2), (3, 3)]


def test_cutting_would_blame_untouched_tokens():
    """Why diff.py drops long pairs. Two tokens are inserted at the front. If both answers were cut
    at five tokens, the untouched tokens 4 and 5 would be in U_1."""
    original = [1, 2, 3, 4, 5, 6, 0]
    edited = [8, 9, 1, 2, 3, 4, 5, 6, 0]
    assert diff.align(original, edited) == ([0] * 7, [1, 1] + [0] * 7)
    assert diff.align(original[:5], edited[:5]) == ([0, 0, 0, 1, 1], [1, 1, 0, 0, 0])


def test_speed():
    """The CPU time of align is at most three times that when this test was written: 300 edited
    answers of 150 tokens, then two unrelated answers of 512"""
    draw = random.Random(0)
    pairs = []
    for _ in range(300):  # three places changed, at most four tokens each
        a = [draw.randrange(4000) for _ in range(150)]
        b = list(a)
        for _ in range(3):
            at = draw.randrange(150)
            added = tokens(draw, 4000, 4)
            b[at:at + draw.randrange(5)] = added
        pairs.append((a, b))
    start = time.process_time()
    for a, b in pairs:
        diff.align(a, b)
    edited = time.process_time() - start

    a = [draw.randrange(4000) for _ in range(512)]
    b = [draw.randrange(4000) for _ in range(512)]
    start = time.process_time()
    diff.align(a, b)
    unrelated = time.process_time() - start
    assert edited < 1 and unrelated < 1.5, (edited, unrelated)


# ---------------------------------------------------------------- the stage

def edits(tmp_path, rows):
    """A file of edits with these rows"""
    path = tmp_path / "edits.jsonl"
    complete = []
    for k, row in enumerate(rows):
        complete.append(dict(id=str(k), instruction="List fruits.", input="", **row))
    files.write_jsonl(path, complete)
    return path


def test_what_is_dropped_is_counted_and_nothing_is_cut(world, tmp_path):
    data = edits(tmp_path, [
        dict(original="apple\npear", edited="apple\nplum"),
        dict(original="apple", edited="apple"),
        dict(original="apple", edited=None),
        dict(original="apple", edited=""),
        dict(original="apple\n" * 60, edited="pear\n" * 60),
        dict(original="apple", edited="tea and milk"),
    ])
    command = ["diff.py", data, f"--tokenizer={world}/sft"]
    out = f"--out={tmp_path}/diffs.jsonl"
    done = run(*command, out, "--max_tokens=100", "--max_changed=0.7")
    assert ("1 pairs of 6 rows, 1 changed share, 1 empty, 1 failed edit, 1 identical, 1 too long; "
            "25.0% of the tokens changed") in done.stdout
    (row,) = rows_of(tmp_path / "diffs.jsonl")
    assert row["id"] == "0"
    assert len(row["edited_ids"]) == len(row["edited_changed"]) == 4
    record = json.loads((tmp_path / "diffs.jsonl.run.json").read_text())
    assert record["dropped"] == {"changed share": 1, "empty": 1, "failed edit": 1, "identical": 1,
                                 "too long": 1}

    # Refusals. They write nothing, so the next run may have other values.
    out = f"--out={tmp_path}/d.jsonl"
    done = run(*command, out, "--max_changed=30", ok=False)
    assert done.returncode == 2 and "--max_changed must be above 0 and at most 1" in done.stderr
    done = run(*command, out, "--max_tokens=1", ok=False)
    assert done.returncode == 2 and "no pair is left" in done.stderr
    run(*command, out)


# ---------------------------------------------------------------- pictures

PAIRS = [
    dict(original="apple <b>\npear\x1b[2J", edited="apple <b>\nplum &amp; pear\x1b[2J"),
    dict(original="apple", edited="apple\npear"),
]


class Text(HTMLParser):
    """A page's tags, and its text as (innermost tag, text)"""

    def __init__(self, page):
        super().__init__()
        self.open = []
        self.spans = []
        self.tags = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        innermost = self.open[-1] if self.open else ""
        self.spans.append((innermost, data))


# ---------------------------------------------------------------- memory

def unrelated(tokens):
    draw = random.Random(1)
    return [[draw.randrange(14) for _ in range(tokens)] for _ in "ab"]


def test_unrelated_answers_take_little_memory():
    """Memory grows with the square of the length: a sixteenth of what 4,000 tokens may take"""
    a, b = unrelated(1000)
    tracemalloc.start()
    diff.align(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6 / 16


LONG = dict(instruction="q", input="", original="apple\n" * 900, edited="pear\n" * 900)


def no_alignment(*_, **__):
    raise AssertionError("a pair that is too long was aligned")


@pytest.mark.parametrize("words", [["diff.py"], ["diff.py", "show"], ["edit.py", "stats"]])
def test_the_gate_comes_before_the_alignment(world, tmp_path, monkeypatch, capsys, words):
    tokenizer = f"--tokenizer={world}/sft"
    path = tmp_path / "edits.jsonl"
    path.write_text((json.dumps(LONG) + "\n") * 2)
    monkeypatch.setattr(diff, "align", no_alignment)
    if words == ["edit.py", "stats"]:
        for flags in ([], [tokenizer]):
            stats.main([str(path), *flags])
            assert "2 rows: 0 edits pass the gate, 2 too long" in capsys.readouterr().out
    elif words == ["diff.py", "show"]:
        show_diffs.main([str(path), tokenizer])
        assert "2 pairs longer than --max_tokens=512 are not shown" in capsys.readouterr().out
    else:
        pair, why = diff.diff_row(LONG, common.load_tokenizer(f"{world}/sft"), max_tokens=512)
        assert why == "too long"
        assert "edited_changed" not in pair
        done = run("diff.py", path, tokenizer, f"--out={tmp_path}/diffs.jsonl", ok=False)
        assert "'too long': 2" in done.stderr


def test_show_draws_pairs_in_the_terminal(world, tmp_path):
    command = ["diff.py", "show", edits(tmp_path, PAIRS), f"--tokenizer={world}/sft", "--n=2"]
    shown = run(*command, "--gaps=true").stdout
    assert "apple <b>" in shown
    assert "{+" in shown
    assert "<~" in shown
    assert "\x1b" not in shown
    assert "<~" not in run(*command).stdout


def test_segments_hold_both_answers_and_draw_wraps():
    draw = random.Random(3)
    words = ["one ", "two ", "three ", "\n"]
    for _ in range(300):
        a = [draw.choice(words) for _ in range(draw.randrange(12))]
        b = [draw.choice(words) for _ in range(draw.randrange(12))]
        changed_a, changed_b = diff.align(a, b)
        spans = show_diffs.segments(a, changed_a, b, changed_b)
        assert "".join(text for kind, text in spans if kind != "+") == "".join(a)
        assert "".join(text for kind, text in spans if kind != "-") == "".join(b)
        drawn = show_diffs.draw(a, changed_a, b, changed_b, width=20, color=False)
        assert all(len(line) <= 20 for line in drawn.split("\n"))


def test_show_writes_a_page_that_holds_both_answers_as_text(world, tmp_path):
    path = tmp_path / "pairs.html"
    data = edits(tmp_path, PAIRS)
    command = ["diff.py", "show", data, f"--tokenizer={world}/sft", f"--html={path}"]
    run(*command, "--gaps=true")
    page = path.read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert "://" not in page

    # The headline says how much changed; the id is small.
    assert re.search(r"<h2>row \d · \d+% changed <small>\d</small></h2>", page)

    # The text of the original is all but what was inserted; that of the edited one likewise.
    text = Text(page)
    assert "script" not in text.tags
    assert "mark" in text.tags
    body = [span for span in text.spans if span[0] in ("p", "del", "ins", "mark")]
    original = "".join(data for tag, data in body if tag != "ins")
    edited = "".join(data for tag, data in body if tag != "del")
    assert "apple <b>\npear␛[2J" in original
    assert "apple <b>\nplum &amp; pear␛[2J" in edited
    assert safe("\udc80<\u202e") == "\N{REPLACEMENT CHARACTER}&lt;\N{REPLACEMENT CHARACTER}"

    # A page of ours is replaced, any other file is not.
    run(*command)
    path.write_text("mine")
    done = run(*command, ok=False)
    assert done.returncode == 2 and "--html=" in done.stderr
    assert path.read_text() == "mine"
