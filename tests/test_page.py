"""The person's page of edit.py: nothing typed is lost, and each byte that was not edited stays.

All decisions are the server's, so they are tested over HTTP. extras/editors/walk.py walks through
the page in a real browser."""

import json, os, random, re, subprocess, sys, threading, time
import urllib.error, urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import diff, edit
from extras.editors import desk as desk_module, page, stats
from extras.editors.desk import Desk, edits_of, shared_rows
from extras.editors.drafts import Draft, Drafts, read_drafts
from extras.editors.texts import in_browser, restore_line_ends


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


class Clock:
    """A time that only moves when a test says so"""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Service:
    """The page's server on a few rows, without edit.py around it"""

    def __init__(self, n=6, **options):
        self.rows = {}
        for i in range(n):
            row = {"id": f"k{i}", "instruction": f"<b>Do</b> {i} & more", "input": ""}
            self.rows[f"k{i}"] = row | {"original": f"teh <i>answer</i> {i}\nis wrong"}
        self.done = {}
        self.clock = Clock()
        self.options = options
        self.start()

    def start(self):
        self.drafts = Drafts("drafts.jsonl")
        self.desk = Desk(self.rows, self.done, self.save, self.drafts, clock=self.clock,
                         **self.options)
        self.server = page.make_server(self.desk, "secret")
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret/"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def save(self, key, edited, error, facts):
        self.done[key] = {**self.rows[key], "edited": edited, "error": error, **facts}

    def call(self, action, tab="a", who="Ann", **arguments):
        body = json.dumps({"tab": tab, "who": who, **arguments}).encode()
        with urllib.request.urlopen(self.url + action, body) as reply:
            return json.load(reply)


@pytest.fixture
def make_service():
    made = []

    def make(*words, **options):
        made.append(Service(*words, **options))
        return made[-1]

    yield make
    for service in made:
        service.stop()


@pytest.fixture
def service(make_service):
    return make_service()


def save(service, row, text, **more):
    return service.call("save", id=row["id"], version=row["version"], text=text, **more)


# ---------------------------------------------------------------- drafts


def test_typed_text_stays_with_its_row(service):
    """Skip, back, take back, another tab, a new server: the text is in the field again"""
    first = service.call("hello")["row"]
    service.call("draft", id="k0", text="typed 0", count=1)
    second = service.call("skip", id="k0", text="typed 0!")["row"]
    assert second["id"] == "k1"
    third = service.call("skip", id="k1", text="typed 1")["row"]
    assert third["id"] == "k2"
    assert service.call("back", id="k2", text="typed 2")["row"]["text"] == "typed 1"
    assert service.call("back", id="k1", text="typed 1")["row"]["text"] == "typed 0!"

    # A new server has only the disk.
    service.stop()
    service.start()
    kept = {key: draft.text for (key, _), draft in read_drafts("drafts.jsonl").items()}
    assert kept == {"k0": "typed 0!", "k1": "typed 1", "k2": "typed 2"}
    again = service.call("hello", tab="b")["row"]
    assert (again["id"], again["text"]) == ("k2", "typed 2")  # not skipped, and typed in
    assert first["text"] == "teh <i>answer</i> 0\nis wrong"


def test_back_is_where_one_came_from(service):
    service.call("hello")
    service.call("skip", id="k0", text=in_browser(service.rows["k0"]["original"]))
    row = service.call("skip", id="k1", text="x")["row"]
    row = save(service, row, "text of k2")["row"]
    assert row["id"] == "k3"
    came = []
    for _ in range(3):
        row = service.call("back", id=row["id"], text=row["text"])["row"]
        came.append(row["id"])
    assert came == ["k2", "k1", "k0"]

    # Further back there is only what was saved before.
    reply = service.call("back", id="k0", text=row["text"])
    assert reply["row"]["id"] == "k2"
    reply = service.call("back", id="k2", text="text of k2")
    assert reply["row"]["id"] == "k2"
    assert reply["note"] == "There is no row before this one."


def test_skipped_rows_come_round(service):
    """The second skip of a row does not show it at once again"""
    row = service.call("hello")["row"]
    seen = []
    for _ in range(13):
        seen.append(row["id"])
        row = service.call("skip", id=row["id"], text=row["text"])["row"]
    assert seen == ["k0", "k1", "k2", "k3", "k4", "k5"] * 2 + ["k0"]


def test_original_text_and_back_again(service):
    """Alt+R throws nothing away: it goes round through the texts of a row"""
    service.call("hello")
    original = in_browser(service.rows["k0"]["original"])
    row = service.call("reset", id="k0", text="mine")["row"]
    assert (row["text"], row["others"]) == (original, 1)
    service.stop()
    service.start()
    row = service.call("reset", id="k0", text=original)["row"]
    assert (row["text"], row["others"]) == ("mine", 0)
    service.call("reset", id="k0", text="mine")
    service.call("reset", id="k0", text="yours")
    assert service.call("reset", id="k0", text=original)["row"]["text"] == "mine"


def test_two_tabs_do_not_lose_each_others_text(service):
    """A tab that slept while another one took its row: the text of both is kept"""
    assert service.call("hello", tab="a")["row"]["id"] == "k0"
    assert service.call("hello", tab="b")["row"]["id"] == "k1"
    service.call("draft", tab="a", id="k0", text="from a", count=1)
    service.clock.now += desk_module.LEASE + 1
    service.call("alive", tab="c")
    reply = service.call("hello", tab="c")
    assert (reply["row"]["id"], reply["row"]["text"]) == ("k0", "from a")
    service.call("draft", tab="c", id="k0", text="from a and c", count=1)
    reply = service.call("draft", tab="a", id="k0", text="from a, later", count=2)
    assert "another tab" in reply["note"]
    draft = read_drafts("drafts.jsonl")["k0", "Ann"]
    assert draft.text == "from a, later"
    assert draft.others == ["from a and c"]

    # A tab in which nothing was typed since changes nothing, and a save keeps what it did not see.
    service.call("alive", tab="c", id="k0")
    service.call("skip", tab="c", id="k0", text="from a and c")
    draft = read_drafts("drafts.jsonl")["k0", "Ann"]
    assert (draft.text, draft.others) == ("from a, later", ["from a and c"])
    service.call("save", tab="c", id="k0", version=0, text="from a and c")
    draft = read_drafts("drafts.jsonl")["k0", "Ann"]
    assert draft.others == ["from a and c", "from a, later"]
    service.call("undo", tab="c")
    service.call("draft", tab="a", id="k0", text="from a, at last", count=3)

    # A draft that comes late does not undo a newer one.
    service.call("draft", tab="a", id="k0", text="older", count=1)
    assert read_drafts("drafts.jsonl")["k0", "Ann"].text == "from a, at last"


def test_a_page_that_closes_leaves_its_text_and_its_row(service):
    service.call("hello", tab="a")
    service.call("leave", tab="a", id="k0", text="last words", count=5)
    row = service.call("hello", tab="b")["row"]
    assert (row["id"], row["text"]) == ("k0", "last words")


def test_after_a_crash_of_the_browser_one_key_leads_to_the_text(service):
    """Its tab counts as open for a while, so the new one gets another row, and a note"""
    service.call("hello", tab="a")
    service.call("draft", tab="a", id="k0", text="typed", count=1)
    reply = service.call("hello", tab="b")
    assert reply["row"]["id"] == "k1"
    assert reply["note"].startswith("Row 1 has text of yours that is not saved.")
    reply = service.call("back", tab="b", id="k1", text=reply["row"]["text"])
    assert (reply["row"]["id"], reply["row"]["text"]) == ("k0", "typed")

    # A row that somebody else has open is not taken from them.
    reply = service.call("hello", tab="c", who="Bob")
    assert (reply["row"]["id"], reply["note"]) == ("k1", "")
    assert service.call("hello", tab="d", who="Carl", id="k0")["row"]["id"] == "k2"


def test_text_that_only_the_browser_had(service):
    """It becomes the draft of its row, but not if the server has newer text"""
    service.call("hello", tab="a")
    service.call("draft", tab="a", id="k0", text="server", count=10)
    service.call("recover", tab="b", id="k0", text="older", count=9)
    assert service.drafts.get("k0", "Ann").text == "server"
    service.call("recover", tab="b", id="k0", text="newer", count=11)
    assert service.drafts.get("k0", "Ann").text == "newer"
    assert read_drafts("drafts.jsonl")["k0", "Ann"].others == ["server"]

    # Of a done row it is only the other text: it may be older than the save.
    service.call("save", tab="a", id="k1", version=0, text="saved")
    service.call("recover", tab="b", id="k1", text="typed", count=12)
    draft = read_drafts("drafts.jsonl")["k1", "Ann"]
    assert (draft.text, draft.others) == (None, ["typed"])
    with pytest.raises(urllib.error.HTTPError):
        service.call("recover", tab="b", id="a row of another file", text="typed", count=1)
    assert "a row of another file" not in Path("drafts.jsonl").read_text()


def test_drafts_on_disk(tmp_path):
    """A torn line, half a character, many lines, and a full disk"""
    path = tmp_path / "d.jsonl"
    drafts = Drafts(path)
    for text in ("half \ud83d", "a\u2028b\r\n\x00"):
        drafts.get("k", "Ann").text = text
        drafts.write("k", "Ann")
        assert read_drafts(path)["k", "Ann"].text == text
    with open(path, "ab") as file:
        file.write(b'{"id": "k", "who": "Ann", "te')
    drafts = Drafts(path)
    assert drafts.get("k", "Ann").text == "a\u2028b\r\n\x00"

    drafts.limit = 5000
    for i in range(200):
        drafts.get("k", "Ann").text = f"{i} " * 50
        drafts.limit = min(drafts.limit, 5000)
        drafts.write("k", "Ann")
    assert path.stat().st_size < 6000
    assert read_drafts(path)["k", "Ann"].text == "199 " * 50

    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, hard))  # half a line
    try:
        drafts.get("k", "Bob").text = "no room"
        with pytest.raises(OSError, match="No space left"):
            drafts.write("k", "Bob")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == size

    drafts.drafts = {("k", "Ann"): Draft(others=["kept"]), ("j", "Ann"): Draft(text="typed")}
    for key in ("k", "j"):
        drafts.close()
        assert path.exists()
        drafts = Drafts(path)
        drafts.drafts[key, "Ann"] = Draft(skipped=1)
    drafts.close()
    assert not path.exists()


# ---------------------------------------------------------------- saves


def test_a_slip_is_asked_about(service):
    """An untouched, an emptied and a discarded answer; the row is only done with a yes"""
    row = service.call("hello")["row"]
    untouched = row["text"]
    assert save(service, row, untouched) == {"ask": "unchanged"}
    assert save(service, row, " \n") == {"ask": "empty"}
    assert save(service, row, "changed", nothing=True) == {"ask": "discard"}
    assert save(service, row, "", sure="unchanged") == {"ask": "empty"}  # a yes to something else
    assert service.done == {}

    row = save(service, row, untouched, sure="unchanged")["row"]
    assert service.done["k0"]["edited"] == service.rows["k0"]["original"]
    assert service.done["k0"]["unchanged"] is True
    row = save(service, row, row["text"], nothing=True)["row"]
    assert service.done["k1"]["unchanged"] is True
    row = save(service, row, "", sure="empty")["row"]
    assert service.done["k2"]["edited"] == ""
    assert service.done["k2"]["unchanged"] is False
    row = save(service, row, "changed", nothing=True, sure="discard")["row"]
    assert service.done["k3"]["edited"] == service.rows["k3"]["original"]
    row = save(service, row, "an edit")["row"]
    assert (service.done["k4"]["edited"], service.done["k4"]["unchanged"]) == ("an edit", False)
    reply = save(service, row, "the last one")
    assert reply["row"] is None
    assert reply["all"] == "All rows are done. There was nothing to change in 3 of them."


def test_who_seconds_and_order(service):
    """The time of a person at work: pauses are cut, time in the background does not count"""
    row = service.call("hello")["row"]
    service.clock.now += 10
    service.call("alive", id="k0")
    service.clock.now += 10
    service.call("draft", id="k0", text="a", count=1)
    service.clock.now += 3600                           # lunch: half a minute of it counts
    service.call("draft", id="k0", text="ab", count=2)
    service.clock.now += 50
    service.call("alive", id="k0", active=False, hidden=True)
    service.clock.now += 5
    second = service.call("skip", id="k0", text="ab")["row"]
    service.clock.now += 7
    third = save(service, second, "k1, edited")["row"]
    service.clock.now += 1
    row = service.call("back", id=third["id"], text=third["text"])["row"]
    row = service.call("back", id=row["id"], text=row["text"])["row"]
    assert row["id"] == "k0"
    service.clock.now += 2
    save(service, row, "abc")
    one, two = service.done["k1"], service.done["k0"]
    assert (one["who"], one["seconds"], one["order"]) == ("Ann", 7.0, 1)
    assert (two["who"], two["seconds"], two["order"]) == ("Ann", 10 + 10 + 30 + 5 + 2, 2)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", two["saved_at"])

    # A second save of the same row adds its time, and its order is new; a restart counts on.
    service.stop()
    service.start()
    row = service.call("back", tab="b")["row"]
    assert row["id"] == "k0"
    service.clock.now += 4
    service.call("save", tab="b", id="k0", version=row["version"], text="abcd")
    assert (service.done["k0"]["seconds"], service.done["k0"]["order"]) == (61.0, 3)


def test_take_back(service):
    """The row is open again, with its text in the field; also after a restart"""
    row = service.call("hello")["row"]
    row = save(service, row, "first")["row"]
    row = save(service, row, "second")["row"]
    reply = service.call("undo", id=row["id"], text="third, begun")
    assert (reply["row"]["id"], reply["row"]["text"], reply["done"]) == ("k1", "second", 1)
    assert service.done["k1"]["edited"] is None
    assert service.done["k1"]["error"] == "taken back by the editor"
    assert service.call("back", id="k1", text="second")["row"]["text"] == "third, begun"

    service.stop()
    service.start()
    reply = service.call("undo", tab="b")
    assert (reply["row"]["id"], reply["row"]["text"], reply["done"]) == ("k0", "first", 0)
    reply = service.call("undo", tab="b", id="k0", text="first")
    assert reply["note"] == "You have saved nothing yet."


def test_a_save_that_was_not_seen_is_shown_first(service):
    for tab in "ab":
        service.call("hello", tab=tab)
    row = service.call("hello", tab="a")["row"]
    save(service, row, "mine")
    reply = service.call("save", tab="b", id="k0", version=row["version"], text="theirs")
    assert (reply["conflict"], reply["by"]) == ("mine", "Ann")
    assert service.done["k0"]["edited"] == "mine"
    assert service.drafts.get("k0", "Ann").text == "theirs"
    service.call("save", tab="b", id="k0", version=reply["version"], text="theirs")
    assert service.done["k0"]["edited"] == "theirs"

    # Somebody else's edit is replaced, but kept in the row.
    reply = service.call("save", tab="c", who="Bob", id="k0", version=0, text="Bob's")
    assert (reply["conflict"], reply["by"]) == ("theirs", "Ann")
    service.call("save", tab="c", who="Bob", id="k0", version=reply["version"], text="Bob's")
    assert service.done["k0"]["edited"] == "Bob's"
    assert [edit["edited"] for edit in service.done["k0"]["also"]] == ["theirs"]


def test_a_change_after_the_save_is_not_forgotten(service):
    """A done row with text that was not saved comes again at the end, and Finish names it"""
    row = service.call("hello")["row"]
    while row:
        row = save(service, row, "edited " + row["id"])["row"]
    row = service.call("back")["row"]
    assert row["is_done"]
    service.call("draft", id=row["id"], text="better", count=1)
    reply = service.call("finish", id=row["id"], text="better")
    assert reply == {"ask": "finish", "left": 0, "unsaved": 1}
    service.stop()
    service.start()
    reply = service.call("hello", tab="b")
    assert reply["row"]["text"] == "better"


# ---------------------------------------------------------------- line ends


@pytest.mark.parametrize(
    "original, typed, expected",
    [
        ("a\r\nb\n", "a\nb\n", "a\r\nb\n"),                    # untouched
        ("a\r\nb\n", "a\nX\n", "a\r\nX\n"),                    # a word
        ("a\nb\r\nc\rd", "a\nB\nc\nd!", "a\nB\r\nc\rd!"),      # all kinds
        ("a\r\nb\r\n", "a\nnew\nb\n", "a\r\nnew\r\nb\r\n"),    # one kind: new lines are of it
        ("a\nb\n", "a\nnew\nb\n", "a\nnew\nb\n"),
        ("ab\n", "a\nb\n", "a\nb\n"),
        ("no end", "no\nend", "no\nend"),
        ("a\r\nb\nc", "ab\nc", "ab\nc"),                       # the first one is deleted
        ("a\r\nb\nc", "a\nbc", "a\r\nbc"),                     # the second one
        ("a\r\nb\nc\n", "a\nb\nnew\nc\n", "a\r\nb\nnew\nc\n"),  # a new one, like the one before it
        ("a\r\nb\nc\n", "a\nnew\nb\nc\n", "a\r\nnew\r\nb\nc\n"),
        ("one\r\ntwo\nend", "x\ny\nend", "x\r\ny\nend"),       # a replaced block keeps its own
        ("code line with indent\n\tTabbed\r\n", "code line with indents\n\tTabbed\n",
         "code line with indents\n\tTabbed\r\n"),
        ("", "new\n", "new\n"),
        ("old\rMac\r", "old\nMacs\n", "old\rMacs\r"),
    ],
)
def test_line_ends_of_the_original(original, typed, expected):
    assert restore_line_ends(original, typed) == expected


def test_no_byte_changes_that_was_not_edited():
    """Random answers with mixed line ends, a part of each is replaced; what is before and behind it
    must be as it was"""
    rng = random.Random(0)
    for _ in range(300):
        words = [rng.choice(["a", "b", "the", " ", "\n", "\r\n", "\r", "\t", "é", "\u2028"])
                 for _ in range(rng.randrange(1, 40))]
        words = re.findall(r"\r\n|[\s\S]", "".join(words))
        start = rng.randrange(len(words))
        stop = rng.randrange(start, len(words) + 1)
        before, middle, after = words[:start], words[start:stop], words[stop:]
        before = "".join(before)
        after = "".join(after)
        typed = in_browser(before) + "NEW" + in_browser(after)
        assert restore_line_ends(before + "".join(middle) + after, typed) == before + "NEW" + after


def test_line_ends_of_a_long_answer_take_no_time():
    original = "".join(f"line {i} of it{end}" for i, end in enumerate(["\n", "\r\n", "\r"] * 700))
    typed = in_browser(original).replace("line", "row")
    start = time.monotonic()
    restored = restore_line_ends(original, typed)
    assert restored == original.replace("line", "row")
    restored = restore_line_ends(original, typed.upper() + "\n\nmore")
    assert restored == original.replace("line", "row").upper() + "\r\rmore"
    assert time.monotonic() - start < 20


# ---------------------------------------------------------------- two people


def test_two_people_do_no_row_twice(service):
    ann = service.call("hello", tab="a", who="Ann")["row"]
    bob = service.call("hello", tab="b", who="Bob")["row"]
    done = []
    while ann or bob:
        for tab, who, row in (("a", "Ann", ann), ("b", "Bob", bob)):
            if row:
                done.append(row["id"])
                row = service.call("save", tab=tab, who=who, id=row["id"], version=row["version"],
                                   text=f"by {who}")["row"]
            ann, bob = (row, bob) if who == "Ann" else (ann, row)
    assert sorted(done) == list(service.rows)
    assert {row["who"] for row in service.done.values()} == {"Ann", "Bob"}
    assert not any("also" in row for row in service.done.values())


def test_a_row_that_somebody_has_begun_comes_last(service):
    service.call("hello", tab="a", who="Ann")
    service.call("draft", tab="a", who="Ann", id="k0", text="begun", count=1)
    service.clock.now += desk_module.LEASE_HIDDEN + 1
    row = service.call("hello", tab="b", who="Bob")["row"]
    seen = []
    for _ in range(6):
        seen.append(row["id"])
        assert "begun" not in row["text"]
        row = service.call("save", tab="b", who="Bob", id=row["id"], version=0, text="Bob's")["row"]
    assert seen == ["k1", "k2", "k3", "k4", "k5", "k0"]


def test_text_in_a_row_that_somebody_else_saved(service):
    """It comes up at the end, and the other's edit is shown before it is replaced"""
    cfg = edit.Config(out="e.jsonl")
    service.call("hello", tab="a", who="Ann")
    service.call("skip", tab="a", who="Ann", id="k0", text="Ann's")
    service.call("leave", tab="a", who="Ann")
    row = service.call("hello", tab="b", who="Bob")["row"]
    while row:
        row = service.call("save", tab="b", who="Bob", id=row["id"], version=0, text="Bob's")["row"]

    reply = service.call("hello", tab="a", who="Ann")
    assert (reply["row"]["id"], reply["row"]["text"]) == ("k0", "Ann's")
    assert reply["note"].startswith("Somebody else has saved this row.")
    again = service.call("skip", tab="a", who="Ann", id="k0", text="Ann's")
    assert (again["row"]["id"], again["note"]) == ("k0", reply["note"])
    reply = service.call("save", tab="a", who="Ann", id="k0", version=reply["row"]["version"],
                         text="Ann's")
    assert (reply["conflict"], reply["by"]) == ("Bob's", "Bob")

    # She may leave it at that: her text stays on the disk, and the run can end without her.
    assert service.call("finish", tab="a", who="Ann", id="k0", text="Ann's")["unsaved"] == 1
    os.rename("drafts.jsonl", "e.jsonl.drafts.jsonl")
    assert read_drafts(page.drafts_path(cfg))["k0", "Ann"].text == "Ann's"
    assert page.todo(cfg, service.rows, service.done) == {}
    os.rename("e.jsonl.drafts.jsonl", "drafts.jsonl")

    # Or give it up, and the row is Bob's.
    row = service.call("reset", tab="a", who="Ann", id="k0", text="Ann's")["row"]
    assert "conflict" in service.call("save", tab="a", who="Ann", id="k0", nothing=True,
                                      version=row["version"], text=row["text"])
    assert service.call("skip", tab="a", who="Ann", id="k0", text=row["text"])["row"] is None
    assert service.done["k0"]["edited"] == "Bob's"

    # Bob's own change of a saved row is work that is left.
    service.call("draft", tab="b", who="Bob", id="k1", text="better", count=1)
    os.rename("drafts.jsonl", "e.jsonl.drafts.jsonl")
    assert list(page.todo(cfg, service.rows, service.done)) == ["k1"]


def test_shared_rows_are_edited_by_both(make_service):
    """Neither sees the other's edit; the row keeps both"""
    service = make_service(20, annotators=2, share=0.25)
    shared = shared_rows(list(service.rows), 2, 0.25)
    assert len(shared) == 5
    assert service.desk.counts() == {"done": 0, "total": 25}

    seen = {"Ann": [], "Bob": []}
    for who, most in (("Ann", 12), ("Bob", 99), ("Ann", 99)):
        reply = service.call("hello", tab=who, who=who)
        while reply["row"] and most:
            row = reply["row"]
            assert row["text"] == in_browser(row["original"])
            seen[who].append(row["id"])
            reply = service.call("save", tab=who, who=who, id=row["id"], version=row["version"],
                                 text=f"{who}'s {row['id']}")
            most -= 1
        service.call("leave", tab=who, who=who)
    assert set(seen["Ann"]) & set(seen["Bob"]) == shared
    assert sorted({*seen["Ann"], *seen["Bob"]}) == sorted(service.rows)
    assert len(seen["Ann"]) + len(seen["Bob"]) == 25
    for key, row in service.done.items():
        assert sorted(edit["who"] for edit in edits_of(row)) == (
            ["Ann", "Bob"] if key in shared else [row["who"]])

    # Ann takes one of hers back: Bob's becomes the row's own.
    both = next(key for key in seen["Ann"] if key in shared)
    page_of_ann = service.desk.tabs["Ann"]
    page_of_ann.saved = [both]
    service.call("undo", tab="Ann", who="Ann")
    assert service.done[both]["edited"] == f"Bob's {both}"
    assert service.desk.counts()["done"] == 24


def test_names(make_service):
    """A name is asked for once; the same in other letters is the same person"""
    service = make_service(annotators=2, share=0.5)
    assert service.call("hello", who="  ") == {"names": [], "note": ""}
    assert service.call("hello", who="  Ann   Lee ")["who"] == "Ann Lee"
    assert service.call("hello", who="ann lee")["who"] == "Ann Lee"
    assert service.call("hello", tab="b", who="Bob")["who"] == "Bob"
    reply = service.call("hello", tab="c", who="Carl")
    assert reply["names"] == ["Ann Lee", "Bob"]
    assert "for 2 people: Ann Lee, Bob" in reply["note"]
    assert "at most 60" in make_service().call("hello", who="x" * 61)["note"]


def test_finish_is_possible_at_any_time(make_service):
    service = make_service(guide="Fix the facts.")
    assert service.call("hello", tab="a")["guide"] == "Fix the facts."
    service.call("hello", tab="b", who="Bob")
    reply = service.call("finish", tab="a", id="k0", text="begun")
    assert reply == {"ask": "finish", "left": 6, "unsaved": 1}
    reply = service.call("finish", tab="a", id="k0", text="begun", sure="finish")
    assert reply["finished"] == "You are done. The run continues for Bob."
    assert not service.desk.finished.is_set()
    assert read_drafts("drafts.jsonl")["k0", "Ann"].text == "begun"

    # Her other tab keeps nobody waiting, unless she goes on there.
    service.call("alive", tab="a2", id="k2")
    service.call("draft", tab="a2", id="k2", text="more", count=1)
    reply = service.call("finish", tab="b", who="Bob", id="k1", text="", sure="finish")
    assert reply["finished"] == "You are done. The run continues for Ann."
    service.call("finish", tab="a2", id="k2", text="more", sure="finish")
    assert service.desk.finished.wait(5)


def test_the_other_tab_of_a_person_who_finished(service):
    service.call("hello", tab="a")
    service.call("hello", tab="b", who="Bob")
    service.call("finish", tab="a", id="k0", text="begun", sure="finish")
    service.call("alive", tab="a2", id="k2")
    service.call("leave", tab="a2", id="k2", text="", count=1)
    service.call("finish", tab="b", who="Bob", id="k1", text="", sure="finish")
    assert service.desk.finished.wait(5)


# ---------------------------------------------------------------- stats and diff.py


def human(number, original, first, second=None, unchanged=False):
    row = {"id": str(number), "instruction": f"i{number}", "input": "", "original": original,
           "edited": first, "editor": "human", "who": "Ann", "unchanged": unchanged,
           "seconds": 10.0 + number, "order": number}
    if second is not None:
        row["also"] = [{"who": "Bob", "edited": second, "unchanged": second == original,
                        "seconds": 4.0, "order": 100 + number, "saved_at": ""}]
    return row


def test_stats_of_two_people(capsys):
    """Checked by hand: of 10 words (8 and 2 ends) both changed 2, Ann alone 1, Bob alone 1"""
    rows = [
        human(0, "a b c d", "a x y d", "a x c z"),      # Ann: b c; Bob: b d
        human(1, "a b c d", "a x c d", "a x c d"),      # both: b
        human(2, "e f", "e f", unchanged=True),
        human(3, "e f", "e g"),
    ]
    Path("e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stats.main(["e.jsonl", "--n=0"])
    text = capsys.readouterr().out
    assert "Ann: 4 rows, nothing to change in 1, median 12 s a row" in text
    assert "Bob: 2 rows, nothing to change in 0, median 4 s a row" in text
    assert "4 rows: 3 edits pass the gate, 1 identical, 0 failed" in text

    # Without row 0 the overlap is 1, without row 1 it is 1/3: the jackknife's error is 1/3.
    kappa = (0.8 - (0.3 * 0.3 + 0.7 * 0.7)) / (1 - (0.3 * 0.3 + 0.7 * 0.7))
    assert "Ann and Bob, 2 rows edited by both: of the words that either changed, both changed " \
        f"0.50 ± 0.33; kappa {kappa:.2f} ± " in text
    assert text.count("the same text in 1") == 1


def test_agreement_without_changes(capsys):
    """What is not defined is not a number; an insertion counts at the word after it"""
    limits = dict(max_tokens=512, max_changed=1.0)
    stats.show_agreement([human(0, "a b", "a b", "a b")], None, limits)
    assert "both changed not defined; kappa not defined; the same text in 1" in (
        capsys.readouterr().out)
    stats.show_agreement([human(0, "a b", "a new b", "a new b")], None, limits)
    assert "both changed 1.00 ± ?; kappa 1.00 ± ?" in capsys.readouterr().out


def test_a_row_without_change_is_dropped_by_diff():
    assert diff.gate([1, 2], [1, 2], [0, 0], [0, 0]) == "identical"


# ---------------------------------------------------------------- the address


def test_page_is_for_this_machine_and_token_only(service):
    with urllib.request.urlopen(service.url) as answer:
        text = answer.read().decode()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.findall(r"(?:src|href)\s*=|https?://|@import", text)  # nothing from outside
    assert "innerHTML" not in text  # no markup
    assert '<meta name="viewport" content="width=device-width' in text
    for path, host in (
        ("", "evil.example"),
        ("hello", "evil.example:80"),
        ("wrong", None),
        ("wrong/hello", None),
        ("nothing", None),
        ("enter", None),
    ):
        address = service.url + path
        if path.startswith("wrong"):
            address = service.url.replace("secret/", path)
        body = b'{"tab": "a", "who": "Ann"}' if path else None
        request = urllib.request.Request(address, body, {"Host": host} if host else {})
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request)
        assert error.value.code == 404, path
    for body in ('{"id": "nobody", "version": 0, "text": ""}', "[]", "no JSON", '{"id": 7}'):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(service.url + "save", body.encode())
        assert error.value.code == 400


def test_a_full_disk_is_told(service, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(service.drafts, "write", full)
    service.call("hello")
    with pytest.raises(urllib.error.HTTPError) as error:
        service.call("draft", id="k0", text="typed", count=1)
    assert error.value.code == 500
    assert error.value.read() == b"not saved: No space left on device"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--port=99999"], "--port must be"),
        (["--port={busy}"], "is in use or not allowed here; choose another"),
        (["--guide=none.txt"], "--guide=none.txt: No such file or directory"),
        (["--guide=latin.txt"], "--guide=latin.txt is not UTF-8 text"),
        (["--annotators=0"], "--annotators must be"),
        (["--shared=1.5"], "--shared must be"),
    ],
)
def test_what_cannot_be_served_is_one_line(service, capsys, flags, words):
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    Path("in.jsonl").write_text('{"instruction": "i", "input": "", "original": "o"}\n')
    busy = str(service.server.server_port)
    flags = [flag.replace("{busy}", busy) for flag in flags]
    argv = ["in.jsonl", "--out=e.jsonl", "--editor=human", *flags]
    with pytest.raises(SystemExit) as stop:
        edit.main(edit.load_config(edit.Config, "edit", argv))
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in said and said.count("\n") == 1
    assert not list(Path().glob("e.jsonl*"))


# ---------------------------------------------------------------- colours


def colours(scheme):
    """The variables of style.css in the light or the dark scheme"""
    css = re.sub(r"/\*.*?\*/", "", page.STYLE, flags=re.S)
    dark = "".join(re.findall(r"prefers-color-scheme: dark\) \{(.*?\})\s*\}", css, re.S))
    light = re.sub(r"@media \(prefers-color-scheme: dark\) \{.*?\}\s*\}", "", css, flags=re.S)
    found = dict(re.findall(r"(--[\w-]+):\s*([^;}]+?)\s*[;}]", light))
    if scheme == "dark":
        assert len(dark) > 100
        found |= dict(re.findall(r"(--[\w-]+):\s*([^;}]+?)\s*[;}]", dark))
    return found


def rgb(text):
    if text.startswith("#"):
        return [int(text[i:i + 2], 16) for i in (1, 3, 5)]
    return [int(part) for part in text.split()]


def over(front, back, share):
    return [share * f + (1 - share) * b for f, b in zip(front, back)]


def luminance(colour):
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_as_defined():
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast(rgb("#777777"), [255, 255, 255]) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_the_page(scheme):
    """WCAG's 4.5:1 for each text of the page; removed and added text has a tint behind it"""
    named = {name: rgb(value) for name, value in colours(scheme).items()
             if re.fullmatch(r"#[0-9a-f]{6}|\d+ \d+ \d+", value)}
    ink, quiet, soft, ground = (named[f"--{name}"] for name in ("ink", "quiet", "soft", "page"))
    tint = {tag: float(re.search(rf"{tag} {{ background: rgb\(var\(--{tone}\) / (\.\d+)\)",
                                 page.STYLE)[1]) for tag, tone in (("del", "bad"), ("ins", "good"))}
    pairs = {
        "text": (ink, ground),
        "text on grey, buttons": (ink, soft),
        "headings": (quiet, ground),
        "disabled buttons": (quiet, soft),
        "removed": (ink, over(named["--bad"], soft, tint["del"])),
        "added": (ink, over(named["--good"], soft, tint["ins"])),
        "main button": (named["--on-button"], named["--button"]),
        "note": (named["--alert"], ground),
    }
    for name, (text, behind) in pairs.items():
        assert contrast(text, behind) >= 4.5, (scheme, name, contrast(text, behind))
    assert contrast(named["--button"], ground) >= 3, "the ring of the focus"


# ---------------------------------------------------------------- a run with kills


class Annotator:
    """A scripted person in two tabs of one browser. It types as people do, looks at what the page
    shows, and knows what each row must be in the end."""

    def __init__(self, rows, seed):
        self.rng = random.Random(seed)
        self.originals = {row["instruction"]: row["original"] for row in rows}
        self.tabs = {"one": None, "two": None}  # tab -> the row that it shows
        self.expected = {}   # instruction -> what must be saved
        self.texts = {}      # instruction -> what was typed last, and not saved
        self.count = 0
        self.actions = set()
        self.tabs_of = {}    # instruction -> the tabs that showed it

    def url_call(self, action, tab, **arguments):
        body = json.dumps({"tab": tab, "who": "Ann", **arguments}).encode()
        with urllib.request.urlopen(self.url + action, body, timeout=20) as reply:
            return json.load(reply)

    def look(self, tab, state):
        """The row that a tab shows has the text that was typed into it last. (With two tabs, that
        one of them may be older is all right; no text is lost.)"""
        row = state["row"]
        self.tabs[tab] = row
        if row:
            name = row["instruction"]
            assert row["original"] == self.originals[name]
            saved = self.expected.get(name, self.originals[name])
            self.tabs_of.setdefault(name, set()).add(tab)
            if len(self.tabs_of[name]) > 1:
                return
            assert row["text"] == self.texts.get(name, in_browser(saved)), name

    def open(self, tab):
        row = self.tabs[tab]
        self.look(tab, self.url_call("hello", tab, id=row and row["id"]))

    def typed(self, row):
        """Replace one word somewhere, or put one in; each draft goes to the server"""
        text = row["text"]
        place = self.rng.choice([found.start() for found in re.finditer(r"teh|is|\Z", text)])
        end = place + len(re.match(r"teh|is|", text[place:])[0])
        return text[:place], self.rng.choice(["the", "was", "NEW", "ü"]), text[end:]

    def edited(self, name, parts):
        """What typed() makes of the original's own bytes, for an answer that is edited once"""
        original = self.originals[name]
        before, word, after = parts
        start = next(i for i in range(len(original) + 1) if in_browser(original[:i]) == before
                     and original[i - 1:i + 1] != "\r\n")
        stop = next(i for i in range(start, len(original) + 1)
                    if in_browser(original[i:]) == after and original[i - 1:i + 1] != "\r\n")
        return original[:start] + word + original[stop:]

    def act(self, tab):
        """One action of a tab. -> False if there is nothing left for it"""
        row = self.tabs[tab]
        if row is None:
            return False
        name = row["instruction"]
        here = {"id": row["id"], "text": row["text"]}
        is_fresh = row["text"] == in_browser(row["original"])
        action = self.rng.choice(["type"] * 5 + ["nothing", "skip", "back", "undo", "reload",
                                                 "reset", "empty"])
        self.actions.add(action)
        if action in ("skip", "back"):
            self.look(tab, self.url_call(action, tab, **here))
        elif action == "reload":
            self.url_call("leave", tab, **here, count=self.next())
            self.open(tab)
        elif action == "undo":
            before = {key: value for key, value in self.expected.items()}
            state = self.url_call("undo", tab, **here)
            taken = state["row"]["instruction"]
            if taken in before and not state["row"]["is_done"]:
                text = in_browser(self.expected.pop(taken))
                self.texts.setdefault(taken, text)
                if self.texts[taken] == in_browser(self.originals[taken]):
                    del self.texts[taken]
            self.look(tab, state)
        elif action == "reset":
            state = self.url_call("reset", tab, **here)
            self.texts[name] = state["row"]["text"]
            self.tabs[tab] = state["row"]
        elif not is_fresh:
            if not row["text"].strip():
                return self.save(tab, "", sure="empty", bytes_=row["text"])
            self.save(tab, row["text"], bytes_=restore_line_ends(row["original"], row["text"]))
        elif action == "nothing":
            self.save(tab, row["text"], nothing=True, bytes_=row["original"])
        elif action == "empty":
            assert self.url_call("save", tab, id=row["id"], version=row["version"],
                                 text="") == {"ask": "empty"}
            self.texts[name] = ""
            row["text"] = ""
            self.save(tab, "", sure="empty", bytes_="")
        else:
            parts = self.typed(row)
            for end in range(1, len(parts[1]) + 1):
                text = parts[0] + parts[1][:end] + parts[2]
                self.texts[name] = text
                self.url_call("draft", tab, id=row["id"], text=text, count=self.next())
            row["text"] = text
            if self.rng.random() < 0.8:
                self.save(tab, text, bytes_=self.edited(name, parts))
        return True

    def save(self, tab, text, *, bytes_, **more):
        row = self.tabs[tab]
        name = row["instruction"]
        state = {}
        while "row" not in state:
            state = self.url_call("save", tab, id=row["id"], version=row["version"], text=text,
                                  **more)
            if "conflict" in state:  # seen in the other tab: save again
                assert state["conflict"] == self.expected.get(name)
                self.actions.add("conflict")
                row["version"] = state["version"]
            elif "ask" in state:  # what was typed is what was there
                assert state == {"ask": "unchanged"}
                more = {"sure": "unchanged"}
        self.expected[name] = bytes_
        self.texts.pop(name, None)
        self.look(tab, state)
        return True

    def next(self):
        self.count += 1
        return self.count


def answers(n):
    ends = ["\n", "\r\n", "\r"]
    rng = random.Random(1)
    rows = []
    for i in range(n):
        text = f"teh answer {i}{rng.choice(ends)} is\twrong{rng.choice(ends)}{rng.choice(ends)}"
        text += f"<b>teh</b> \u2028 end  {rng.choice(['', ' ', chr(10)])}"
        rows.append({"instruction": f"Question {i}?", "input": "", "original": text, "mark": i})
    return rows


def start_run(words):
    env = {**os.environ, "DISPLAY": "", "WAYLAND_DISPLAY": "", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "edit.py"), *words]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("(Ctrl-C"):
            address = re.search(r"http://\S+", "".join(said))[0]
            return process, address, "".join(said)
    raise AssertionError("".join(said))


def test_200_rows_with_every_key_two_tabs_reloads_and_kills():
    """No row lost, none doubled, each byte that was not edited unchanged"""
    rows = answers(200)
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["in.jsonl", "--out=e.jsonl", "--editor=human"]
    person = Annotator(rows, seed=2)
    process, person.url, said = start_run(words)
    port = re.search(r"127.0.0.1:(\d+)/", said)[1]
    assert f"ssh -N -L {port}:127.0.0.1:{port} " in said
    first_address = person.url

    for tab in person.tabs:
        person.open(tab)
    steps = 0
    while any(person.tabs.values()):
        steps += 1
        tab = person.rng.choice([tab for tab, row in person.tabs.items() if row])
        person.act(tab)
        if steps in (60, 150):  # the server is killed: the same address continues
            process.kill()
            process.wait()
            process, person.url, _ = start_run(words)
            assert person.url == first_address
            for tab in person.tabs:
                person.open(tab)
        if steps == 100:  # the browser is killed: new tabs, and nobody says goodbye
            person.tabs = {"three": None, "four": None}
            person.tabs_of = {}
            time.sleep(0.1)
            for tab in person.tabs:
                person.open(tab)
        if steps % 40 == 0:  # a tab that was closed for a while
            for tab in person.tabs:
                person.open(tab)
        if not any(person.tabs.values()):
            for tab in person.tabs:
                person.open(tab)
        assert steps < 3000

    assert person.actions >= {"type", "nothing", "skip", "back", "undo", "reload", "reset", "empty"}
    # Rows that only the killed browser's tabs held are free as soon as these count as closed.
    deadline = time.monotonic() + 60
    while len(person.expected) < len(rows) and time.monotonic() < deadline:
        for tab in person.tabs:
            person.open(tab)
            while person.act(tab):
                pass
        time.sleep(0.5)

    state = person.url_call("finish", "three", id=None, text="", sure="finish")
    assert state["finished"] == "Finished. This page can be closed."
    assert process.wait(30) == 0
    lines = Path("e.jsonl").read_text().split("\n")  # not at U+2028
    saved = [json.loads(line) for line in lines if line]
    assert [row["instruction"] for row in saved] == [row["instruction"] for row in rows]
    assert len({row["id"] for row in saved}) == 200
    for row in saved:
        assert row["original"] == person.originals[row["instruction"]]
        assert row["edited"] == person.expected[row["instruction"]]
        assert row["unchanged"] == (row["edited"] == row["original"])
        assert row["who"] == "Ann" and row["seconds"] >= 0
    assert len({row["order"] for row in saved}) == 200
    assert not Path("e.jsonl.page.json").exists()
