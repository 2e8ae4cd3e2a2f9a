"""diff.py against brute force, and what a person sees of it: pytest tests/test_diff.py"""

import functools, json, random, time
from html.parser import HTMLParser

import diff
from plumbing import files
from conftest import rows_of, run
from extras.pages import safe
from extras.report import show_diffs


def alignments(a, b):
    """Every set of index pairs (i, j), a[i] == b[j], that is increasing in both: all common
    subsequences, each in all its places"""

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
    return sum(k == 0 or pairs[k - 1] != (i - 1, j - 1) for k, (i, j) in enumerate(pairs))


def kept_pairs(changed_a, changed_b):
    return tuple(
        zip(
            *(
                [t for t, changed in enumerate(mask) if not changed]
                for mask in (changed_a, changed_b)
            )
        )
    )


def ends(a, b):
    """Lengths of the common beginning and, of what is left, of the common end"""
    head = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    tail = next(
        (k for k, (x, y) in enumerate(zip(a[head:][::-1], b[head:][::-1])) if x != y),
        min(len(a), len(b)) - head,
    )
    return head, tail


def test_align_has_as_few_runs_as_any_longest_alignment_and_ties_fall_as_stated():
    draw = random.Random(1)
    for _ in range(1500):
        a, b = (
            tuple(draw.randrange(draw.choice([2, 3, 4])) for _ in range(draw.randrange(8)))
            for _ in range(2)
        )
        head, tail = ends(a, b)
        n, m = len(a), len(b)
        fixed = {(k, k) for k in range(head)} | {(n - k, m - k) for k in range(1, tail + 1)}
        every = [pairs for pairs in alignments(a, b) if fixed <= set(pairs)]
        longest = max(map(len, every))
        fewest = min(runs_of(pairs) for pairs in every if len(pairs) == longest)
        best = [pairs for pairs in every if len(pairs) == longest and runs_of(pairs) == fewest]
        got = kept_pairs(*diff.align(list(a), list(b)))
        assert got in best, (a, b, got, best)
        assert longest == max(map(len, alignments(a, b))), (
            "the common beginning and end cost nothing"
        )
        i, j = n - tail, m - tail
        while (
            i > head and j > head
        ):  # ties, from the end: a pair, else the original's token goes, else the edited one's
            pairing, without = (
                [p for p in best if (i - 1, j - 1) in p],
                [p for p in best if all(x != i - 1 for x, _ in p)],
            )
            i, j, best = (
                (i - 1, j - 1, pairing)
                if pairing
                else (i - 1, j, without)
                if without
                else (i, j - 1, best)
            )
        assert [got] == best, (a, b, got, best)


def test_gaps_by_definition():
    """Blamed: an unchanged token right before which (at its place) the other side has changed
    tokens and its own side has none"""
    draw = random.Random(2)
    for _ in range(2000):
        a, b = ([draw.randrange(3) for _ in range(draw.randrange(9))] for _ in range(2))
        plain, gaps = diff.align(a, b), diff.align(a, b, gaps=True)
        partner = dict(kept_pairs(*plain))
        for t in range(len(a)):
            blamed = (
                t in partner
                and (t == 0 or not plain[0][t - 1])
                and partner[t] > 0
                and plain[1][partner[t] - 1]
            )
            assert gaps[0][t] == (plain[0][t] or blamed)
        partner = {j: i for i, j in partner.items()}
        for t in range(len(b)):
            blamed = (
                t in partner
                and (t == 0 or not plain[1][t - 1])
                and partner[t] > 0
                and plain[0][partner[t] - 1]
            )
            assert gaps[1][t] == (plain[1][t] or blamed)


def test_cutting_would_blame_untouched_tokens():
    """Why diff.py drops long pairs: an insertion of two at the front, both cut at five, and the
    tokens 4 and 5 are in U_1"""
    original, edited = [1, 2, 3, 4, 5, 6, 0], [8, 9, 1, 2, 3, 4, 5, 6, 0]
    assert diff.align(original, edited) == ([0] * 7, [1, 1] + [0] * 7)
    assert diff.align(original[:5], edited[:5]) == ([0, 0, 0, 1, 1], [1, 1, 0, 0, 0])


def edits(tmp_path, rows):
    files.write_jsonl(
        tmp_path / "edits.jsonl",
        [
            dict(id=str(k), instruction="List fruits.", input="", **row)
            for k, row in enumerate(rows)
        ],
    )
    return tmp_path / "edits.jsonl"


def test_what_is_dropped_is_counted_and_nothing_is_cut(world, tmp_path):
    data = edits(
        tmp_path,
        [
            dict(original="apple\npear", edited="apple\nplum"),
            dict(original="apple", edited="apple"),
            dict(original="apple", edited=None),
            dict(original="apple", edited=""),
            dict(original="apple\n" * 60, edited="pear\n" * 60),
            dict(original="apple", edited="tea and milk"),
        ],
    )
    done = run(
        "diff.py",
        data,
        f"--tokenizer={world}/sft",
        f"--out={tmp_path}/diffs.jsonl",
        "--max_tokens=100",
        "--max_changed=0.7",
    )
    assert (
        "1 pairs of 6 rows, 1 changed share, 1 empty, 1 failed edit, 1 identical, 1 too long; "
        "25.0% of the tokens changed"
        in done.stdout
    )
    (row,) = rows_of(tmp_path / "diffs.jsonl")
    assert row["id"] == "0" and len(row["edited_ids"]) == len(row["edited_changed"]) == 4
    done = run(
        "diff.py",
        data,
        f"--tokenizer={world}/sft",
        f"--out={tmp_path}/d.jsonl",
        "--max_changed=30",
        ok=False,
    )
    assert done.returncode == 2 and "--max_changed is a share" in done.stderr
    done = run(
        "diff.py",
        data,
        f"--tokenizer={world}/sft",
        f"--out={tmp_path}/d.jsonl",
        "--max_tokens=1",
        ok=False,
    )
    assert done.returncode == 2 and "no pair is left" in done.stderr
    run(
        "diff.py", data, f"--tokenizer={world}/sft", f"--out={tmp_path}/d.jsonl"
    )  # nothing came of it: another value is no mistake
    record = json.loads((tmp_path / "diffs.jsonl.run.json").read_text())
    assert record["dropped"] == {
        "changed share": 1,
        "empty": 1,
        "failed edit": 1,
        "identical": 1,
        "too long": 1,
    }


def test_speed():
    """CPU time of align, three times what it took when this was written: 300 edited answers of 150
    tokens, 512 unrelated tokens"""
    draw = random.Random(0)
    pairs = []
    for _ in range(300):  # three places changed, at most four tokens each
        a = [draw.randrange(4000) for _ in range(150)]
        b = list(a)
        for _ in range(3):
            at = draw.randrange(150)
            b[at : at + draw.randrange(5)] = [
                draw.randrange(4000) for _ in range(draw.randrange(5))
            ]
        pairs.append((a, b))
    start = time.process_time()
    for a, b in pairs:
        diff.align(a, b)
    typical = time.process_time() - start
    unrelated = [[draw.randrange(4000) for _ in range(512)] for _ in range(2)]
    start = time.process_time()
    diff.align(*unrelated)
    assert typical < 1 and time.process_time() - start < 1.5, (typical, time.process_time() - start)


# ---------------------------------------------------------------- pictures

PAIRS = [
    dict(original="apple <b>\npear\x1b[2J", edited="apple <b>\nplum &amp; pear\x1b[2J"),
    dict(original="apple", edited="apple\npear"),
]


class Text(HTMLParser):
    """The text of a page by the tag it stands in, and its tags"""

    def __init__(self, page):
        super().__init__()
        self.open, self.spans, self.tags = [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.spans.append((self.open[-1] if self.open else "", data))


def test_show_draws_pairs_in_the_terminal(world, tmp_path):
    data = edits(tmp_path, PAIRS)
    done = run("diff.py", "show", data, f"--tokenizer={world}/sft", "--n=2", "--gaps=true")
    assert (
        "apple <b>" in done.stdout
        and "{+" in done.stdout
        and "<~" in done.stdout
        and "\x1b" not in done.stdout
    )
    assert "<~" not in run("diff.py", "show", data, f"--tokenizer={world}/sft", "--n=2").stdout


def test_segments_hold_both_answers_and_draw_wraps():
    draw = random.Random(3)
    for _ in range(300):
        a, b = (
            [draw.choice(["one ", "two ", "three ", "\n"]) for _ in range(draw.randrange(12))]
            for _ in range(2)
        )
        spans = show_diffs.segments(a, diff.align(a, b)[0], b, diff.align(a, b)[1])
        assert "".join(text for kind, text in spans if kind != "+") == "".join(a)
        assert "".join(text for kind, text in spans if kind != "-") == "".join(b)
        lines = show_diffs.draw(
            a, diff.align(a, b)[0], b, diff.align(a, b)[1], width=20, color=False
        ).split("\n")
        assert all(len(line) <= 20 for line in lines)


def test_show_writes_a_page_that_holds_both_answers_as_text(world, tmp_path):
    page = tmp_path / "pairs.html"
    run(
        "diff.py",
        "show",
        edits(tmp_path, PAIRS),
        f"--tokenizer={world}/sft",
        f"--html={page}",
        "--gaps=true",
    )
    text = Text(page.read_text(encoding="utf-8"))
    body = [span for span in text.spans if span[0] in ("p", "del", "ins", "mark")]
    assert (
        "script" not in text.tags
        and "\x1b" not in page.read_text(encoding="utf-8")
        and "://" not in page.read_text(encoding="utf-8")
    )
    original = "".join(data for tag, data in body if tag != "ins")
    edited = "".join(data for tag, data in body if tag != "del")
    assert (
        "apple <b>\npear␛[2J" in original
        and "apple <b>\nplum &amp; pear␛[2J" in edited
        and ("mark" in text.tags)
    )
    assert safe("\udc80<\u202e") == "\N{REPLACEMENT CHARACTER}&lt;\N{REPLACEMENT CHARACTER}"
    run(
        "diff.py", "show", edits(tmp_path, PAIRS), f"--tokenizer={world}/sft", f"--html={page}"
    )  # a page of ours is replaced
    page.write_text("mine")
    done = run(
        "diff.py",
        "show",
        edits(tmp_path, PAIRS),
        f"--tokenizer={world}/sft",
        f"--html={page}",
        ok=False,
    )
    assert done.returncode == 2 and "--html=" in done.stderr and page.read_text() == "mine"
