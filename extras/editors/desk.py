"""Which row a person edits, and what becomes of the text: the decisions of the person's page.

A row needs one person's edit. With --annotators=2, a share of the rows (--shared) needs one of each
person: the first is the row's own edit, the others are in its field `also`. While a tab shows a
row, nobody else gets it who would do the same work. Whatever is typed is a draft of this row and
this person until it is saved (extras/editors/drafts.py).

Each edit has who, unchanged (the person said that nothing is to be changed), seconds (with the row
in view and the person at work), order (1 for the first save of the file) and saved_at.
"""
if __name__ == "__main__":
    raise SystemExit("desk.py is a part of: python edit.py --editor=human")

import hashlib, threading, time
from dataclasses import dataclass, field

from extras.editors.texts import in_browser, restore_line_ends

# Seconds without a call after which a tab counts as closed. An open tab calls every 8 seconds; a
# hidden one is slowed down by the browser to one call a minute.
LEASE = 25
LEASE_HIDDEN = 150
PAUSE = 30  # seconds: of a longer time without any sign of the person, only these count as work
LONGEST_NAME = 60
FACTS = ("who", "unchanged", "seconds", "order", "saved_at")  # of an edit in edits.jsonl
TAKEN_BACK = "taken back by the editor"


# ---------------------------------------------------------------- rows and their edits

def shared_rows(keys, annotators, share):
    """The rows that each person edits: a share of all, by a hash, so always the same -> set"""
    if annotators == 1 or share == 0:
        return set()
    count = max(1, round(share * len(keys)))
    ranked = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())
    return set(ranked[:count])


def edits_of(row):
    """A row of edits.jsonl, or None -> its edits, one dict per person, the row's own first"""
    if row is None or row.get("edited") is None:
        return []
    own = {name: row.get(name) for name in ("edited", *FACTS)}
    return [own, *row.get("also", [])]


def open_rows(rows, done, annotators, share):
    """The rows that lack the edit of at least one person -> dict, as rows"""
    shared = shared_rows(list(rows), annotators, share)
    lacking = {}
    for key, row in rows.items():
        needed = annotators if key in shared else 1
        if len(edits_of(done.get(key))) < needed:
            lacking[key] = row
    return lacking


# ---------------------------------------------------------------- the desk

@dataclass
class Tab:
    """An open page"""
    who: str
    seen: float                 # when it called last
    key: str | None = None      # the row that it shows
    hidden: bool = False        # is it in the background?
    known: tuple = (None, "")   # the row and the text that the server and this tab both know
    count: int = 0              # of its last draft: one with a smaller number comes late
    came_from: list = field(default_factory=list)  # the rows that it showed before
    saved: list = field(default_factory=list)      # the rows that it saved


class Desk:
    """The methods in ACTIONS are called by the page. tab: a name that the page gives itself; who:
    the person; id: the row in the page; text: what is in its text field. Each returns its JSON
    reply: a state (see show), a question ("ask"), a conflict, or only a note for the person."""

    ACTIONS = ("hello", "recover", "draft", "save", "skip", "back", "undo", "reset", "alive",
               "leave", "finish")

    def __init__(self, rows, done, save, drafts, *, annotators=1, share=0.0, guide="",
                 clock=time.monotonic):
        self.rows = rows        # key -> row
        self.done = done        # key -> row of edits.jsonl
        self.save_row = save    # (key, edited, error, facts): writes a row and puts it into done
        self.drafts = drafts
        self.annotators = annotators
        self.shared = shared_rows(list(rows), annotators, share)
        self.guide = guide
        self.clock = clock
        self.keys = list(rows)
        self.numbers = {key: place + 1 for place, key in enumerate(self.keys)}
        self.tabs = {}          # name -> Tab
        self.lock = threading.Lock()
        self.ended = set()      # people who have pressed Finish and done nothing since
        self.is_over = False    # has everybody finished?
        self.finished = threading.Event()  # set when they know it
        orders = [edit["order"] or 0 for row in done.values() for edit in edits_of(row)]
        self.order = max(orders, default=0)

    # ------------------------------------------------------------ people and tabs

    def names(self):
        """The people of this file: those with edits or drafts, and those with an open tab"""
        found = {tab.who for tab in self.live_tabs()}
        for key in self.keys:
            found.update(edit["who"] for edit in self.edits(key))
        for (_, who), draft in self.drafts.items():
            if not draft.is_empty():
                found.add(who)
        return sorted(found - {None})

    def admit(self, who):
        """-> the name as this file knows it, ""; or None, why it is refused"""
        name = " ".join(who.split())
        known = self.names()
        for other in known:
            if other.casefold() == name.casefold():
                return other, ""
        if not name:
            return None, ""
        if len(name) > LONGEST_NAME:
            return None, f"Please choose a name of at most {LONGEST_NAME} characters."
        if 1 < self.annotators <= len(known):
            return None, (f"This file is for {self.annotators} people: {', '.join(known)}. "
                          "Which of them are you?")
        return name, ""

    def live_tabs(self):
        now = self.clock()
        return [tab for tab in self.tabs.values() if tab.who not in self.ended
                and now - tab.seen <= (LEASE_HIDDEN if tab.hidden else LEASE)]

    def enter(self, tab, who, id, *, active=True):
        """What each call begins with: count the person's time, note which row the page shows"""
        if not who:
            raise ValueError("nobody's name")
        now = self.clock()
        page = self.tabs.setdefault(tab, Tab(who, now))  # an open page, after a restart
        if active and id is not None and page.key == id:
            self.drafts.get(id, who).seconds += min(PAUSE, now - page.seen)
        page.who = who
        page.key = id
        page.seen = now
        page.hidden = False
        return page

    def holders(self, tab):
        """Rows on which others are at work: key -> the people who have it open, in other tabs, and
        have not edited it yet"""
        found = {}
        for other in self.live_tabs():
            is_here = other is self.tabs.get(tab)
            if not is_here and other.key is not None and not self.edit_by(other.key, other.who):
                found.setdefault(other.key, set()).add(other.who)
        return found

    # ------------------------------------------------------------ rows

    def edits(self, key):
        return edits_of(self.done.get(key))

    def edit_by(self, key, who):
        """This person's edit of a row, or None"""
        return next((edit for edit in self.edits(key) if edit["who"] == who), None)

    def needed(self, key):
        return self.annotators if key in self.shared else 1

    def is_free(self, key, who, holders):
        """Is this row open for this person, and is nobody else doing the same work?"""
        busy = holders.get(key, set())
        if self.edit_by(key, who) or who in busy:
            return False
        return len(self.edits(key)) + len(busy) < self.needed(key)

    def may_show(self, key, tab):
        """A row that this tab's person has edited or may edit, in another tab of theirs, too"""
        who = self.tabs[tab].who
        if self.edit_by(key, who):
            return True
        busy = self.holders(tab).get(key, set()) - {who}
        return len(self.edits(key)) + len(busy) < self.needed(key)

    def version(self, key, who):
        """It changes with each save that this person must see before replacing it"""
        edit = self.edit_by(key, who)
        if edit is None and key not in self.shared and self.edits(key):
            edit = self.edits(key)[0]
        return edit["order"] if edit else 0

    def saved_text(self, key, who):
        """What this person has saved, or the original, as a text field shows it"""
        edit = self.edit_by(key, who)
        return in_browser(edit["edited"] if edit else self.rows[key]["original"])

    def next_key(self, tab, *, resume=False):
        """The next row for this tab's person: an open one, then those that the person skipped, then
        those that somebody else has begun, then done ones with text of theirs that was not saved.

        resume: first of all the open row in which the person typed last. None: nothing is left."""
        who = self.tabs[tab].who
        holders = self.holders(tab)
        free = [key for key in self.keys if self.is_free(key, who, holders)]
        mine = {}
        begun = set()
        for (key, name), draft in self.drafts.items():
            if name == who:
                mine[key] = draft
            elif draft.text is not None and key not in self.shared:
                begun.add(key)

        typed = [key for key, draft in mine.items() if draft.text is not None]
        if resume:
            resumable = set(free)
            for key in reversed(typed):
                if key in resumable and not mine[key].skipped:
                    return key

        def skips(key):
            return mine[key].skipped if key in mine else 0

        if free:
            return min(free, key=lambda key: (key in begun, skips(key)))  # of equals, the first
        unsaved = [key for key in typed if key in self.rows
                   and (self.edit_by(key, who) or key not in holders)]
        return min(unsaved, key=skips, default=None)

    # ------------------------------------------------------------ what the page shows

    def counts(self):
        """How many edits there are, and how many are needed"""
        done = 0
        total = 0
        for key in self.keys:
            needed = self.needed(key)
            done += min(len(self.edits(key)), needed)
            total += needed
        return {"done": done, "total": total}

    def show(self, key, tab, note=""):
        """The state that makes a tab show a row; key None: there is no row for it"""
        who = self.tabs[tab].who
        self.ended.discard(who)
        self.enter(tab, who, key, active=False)
        state = {**self.counts(), "row": None, "note": note}
        if key is None:
            return state | {"all": self.why_none(who)}

        draft = self.drafts.get(key, who)
        edit = self.edit_by(key, who)
        if edit and not draft.seconds:
            draft.seconds = edit["seconds"] or 0.0
        draft.tab = tab  # it now knows this text
        row = {name: self.rows[key][name] for name in ("id", "instruction", "input", "original")}
        row["text"] = self.saved_text(key, who) if draft.text is None else draft.text
        self.tabs[tab].known = (key, row["text"])
        row["others"] = len(draft.others)
        row["is_done"] = edit is not None
        row["version"] = edit["order"] if edit else 0
        row["number"] = self.numbers[key]
        if edit is None and len(self.edits(key)) >= self.needed(key):
            state["note"] = ("Somebody else has saved this row. This is your text, which is not "
                             "saved.")
        return state | {"row": row}

    def why_none(self, who):
        """Why there is no row for this person, in words"""
        left = [key for key in self.keys if len(self.edits(key)) < self.needed(key)]
        mine = [key for key in left if not self.edit_by(key, who)]
        if mine:
            return (f"Rows left: {len(mine)}. They are open in other tabs; load this page again to "
                    "see whether one is free.")
        if left:
            return f"You are done. Rows that wait for somebody else's edit, too: {len(left)}."
        edits = [edit for key in self.keys for edit in self.edits(key)]
        unchanged = sum(bool(edit["unchanged"]) for edit in edits)
        return f"All rows are done. There was nothing to change in {unchanged} of them."

    def move(self, key, tab, note=""):
        """Show another row; Back leads to the one that is here"""
        page = self.tabs[tab]
        if page.key is not None and page.key != key:
            page.came_from.append(page.key)
        return self.show(key, tab, note)

    def move_on(self, tab):
        """Show the next row"""
        key = self.next_key(tab)
        who = self.tabs[tab].who
        note = ""
        if key is not None and self.edit_by(key, who):
            note = "You saved this row, and then changed the text without saving it."
        elif key is not None and self.drafts.get(key, who).skipped:
            note = "Only rows that you skipped are left."
        return self.move(key, tab, note)

    # ------------------------------------------------------------ text

    def keep(self, tab, who, id, text, count=0):
        """What is in the text field is the draft of this row and this person, on the disk. Text of
        another tab, which this one has not seen, goes to the other texts."""
        if id is None:
            return
        draft = self.drafts.get(id, who)
        page = self.tabs[tab]
        if page.known == (id, text) and draft.tab != tab:
            return  # nothing was typed here, and another tab may have newer text
        page.known = (id, text)
        before = (draft.text, list(draft.others))
        if draft.text not in (None, text) and draft.tab != tab:
            draft.others.append(draft.text)
        draft.text = None if text == self.saved_text(id, who) else text
        draft.tab = tab
        draft.count = max(draft.count, count)
        if before != (draft.text, draft.others):
            self.drafts.write(id, who)

    def write(self, key, edits):
        """Write a row with these edits: one dict per person, the row's own first"""
        if not edits:
            return self.save_row(key, None, TAKEN_BACK, {})
        own, *also = edits
        facts = {name: own[name] for name in FACTS}
        if also:
            facts["also"] = also
        self.save_row(key, own["edited"], None, facts)

    # ------------------------------------------------------------ the calls of the page

    def hello(self, tab, who, id=None):
        """A page opens, or is loaded again with the row `id` -> a state with the guide; without a
        valid name, the names to choose from"""
        name, why = self.admit(who)
        if name is None:
            return {"names": self.names(), "note": why}
        page = self.tabs.setdefault(tab, Tab(name, self.clock()))
        page.who = name
        page.count = 0
        note = ""
        if id not in self.rows or not self.may_show(id, tab):
            id = self.next_key(tab, resume=True)
            note = self.point_to_text(tab, id)
        return {**self.show(id, tab, note), "who": name, "guide": self.guide}

    def point_to_text(self, tab, shown):
        """After a browser was killed, its tabs count as open for a while. If one has this person's
        unsaved text, Back leads there -> a note"""
        page = self.tabs[tab]
        for key, draft in reversed(self.drafts.of(page.who).items()):
            is_elsewhere = page.who in self.holders(tab).get(key, set())
            if draft.text is not None and key != shown and is_elsewhere:
                page.came_from.append(key)
                return (f"Row {self.numbers[key]} has text of yours that is not saved. It is open "
                        "in another tab; if that tab is gone, Back leads there.")
        return ""

    def recover(self, tab, who, id, text, count):
        """Text that an earlier page of this browser kept while it could not reach the server. If
        the server has got newer text since, nothing is to be done."""
        saved = self.saved_text(id, who)  # a KeyError if the row is not of this file
        draft = self.drafts.get(id, who)
        if count > draft.count and text not in (saved, draft.text):
            if draft.text is not None:
                draft.others.append(draft.text)
            draft.text = text
            draft.tab = tab
            draft.count = count
            if self.edit_by(id, who):  # it may be older than the save
                draft.text = None
                draft.others.append(text)
            self.drafts.write(id, who)
        return {}

    def draft(self, tab, who, id, text, count):
        """The person has typed. count: grows with each draft of a browser"""
        page = self.enter(tab, who, id)
        self.ended.discard(who)
        if count > page.count:
            page.count = count
            self.keep(tab, who, id, text, count)
        is_elsewhere = id in self.holders(tab) and id not in self.shared
        return {"note": "This row is open in another tab, too." if is_elsewhere else ""}

    def save(self, tab, who, id, version, text, nothing=False, sure=""):
        """Save, and show the next row. nothing: the person says that nothing is to be changed.
        sure: the question that the person has answered with yes."""
        page = self.enter(tab, who, id)
        self.keep(tab, who, id, text)
        if version != self.version(id, who):
            edit = self.edit_by(id, who)
            if edit is None and id not in self.shared:
                edit = next(iter(self.edits(id)), None)
            reply = {"version": self.version(id, who), "conflict": None, "by": None}
            if edit:
                reply |= {"conflict": edit["edited"], "by": edit["who"]}
            return reply

        # What could be a slip is asked first.
        original = self.rows[id]["original"]
        edited = restore_line_ends(original, text)
        question = ""
        if nothing and edited != original:
            question = "discard"
        elif not nothing and edited == original:
            question = "unchanged"
        elif not nothing and not edited.strip():
            question = "empty"
        if question and sure != question:
            return {"ask": question}
        if nothing:
            edited = original

        # The edit takes the place of this person's earlier one. A new one is the last of a shared
        # row; otherwise it becomes the row's own, and an edit by somebody else stays in `also`.
        draft = self.drafts.get(id, who)
        self.order += 1
        edit = dict(edited=edited, who=who, unchanged=edited == original,
                    seconds=round(draft.seconds, 1), order=self.order,
                    saved_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        edits = self.edits(id)
        earlier = self.edit_by(id, who)
        if earlier:
            edits[edits.index(earlier)] = edit
        elif id in self.shared:
            edits.append(edit)
        else:
            edits.insert(0, edit)
        self.write(id, edits)

        # It is safe now: the draft can go, unless another tab has typed something else.
        if draft.text not in (None, text):
            draft.others.append(draft.text)
        draft.text = None
        draft.skipped = 0
        draft.seconds = 0.0
        self.drafts.write(id, who)
        page.saved.append(id)
        return self.move_on(tab)

    def skip(self, tab, who, id=None, text=""):
        """Leave the row for later; what was typed stays"""
        self.enter(tab, who, id)
        self.keep(tab, who, id, text)
        if id is not None:
            skips = [draft.skipped for draft in self.drafts.of(who).values()]
            self.drafts.get(id, who).skipped = max(skips, default=0) + 1
            self.drafts.write(id, who)
        return self.move_on(tab)

    def back(self, tab, who, id=None, text=""):
        """The row from which this tab came; further back, the row that the person saved before"""
        page = self.enter(tab, who, id)
        self.keep(tab, who, id, text)
        while page.came_from:
            key = page.came_from.pop()
            if key != id and self.may_show(key, tab):
                return self.show(key, tab)
        key = self.last_saved(who, before=id)
        note = "" if key else "There is no row before this one."
        return self.show(key or id, tab, note)

    def last_saved(self, who, before=None):
        """The row that this person saved last, or last before the row `before`, or None"""
        orders = {}
        for key in self.keys:
            edit = self.edit_by(key, who)
            if edit:
                orders[key] = edit["order"] or 0
        limit = orders.get(before, self.order + 1)
        earlier = [key for key in orders if orders[key] < limit]
        return max(earlier, key=orders.get, default=None)

    def undo(self, tab, who, id=None, text=""):
        """Take the last save back: the row is open again, with its text in the field"""
        page = self.enter(tab, who, id)
        self.keep(tab, who, id, text)
        page.saved = [key for key in page.saved if self.edit_by(key, who)]
        key = page.saved.pop() if page.saved else self.last_saved(who)
        if key is None:
            return self.show(id, tab, "You have saved nothing yet.")

        # The text is a draft first, so that it is on the disk all the time.
        edit = self.edit_by(key, who)
        draft = self.drafts.get(key, who)
        text = in_browser(edit["edited"])
        if draft.text is None and text != in_browser(self.rows[key]["original"]):
            draft.text = text
        elif draft.text not in (None, text):
            draft.others.append(text)
        draft.seconds = draft.seconds or edit["seconds"] or 0.0
        self.drafts.write(key, who)
        self.write(key, [other for other in self.edits(key) if other != edit])
        return self.move(key, tab)

    def reset(self, tab, who, id, text):
        """The original text; where it is there already, the person's own text again"""
        self.enter(tab, who, id)
        self.keep(tab, who, id, text)
        draft = self.drafts.get(id, who)
        original = in_browser(self.rows[id]["original"])
        if text != original:
            draft.others.append(text)
            new = original
        else:
            new = draft.others.pop(0) if draft.others else original
        draft.text = None if new == self.saved_text(id, who) else new
        self.drafts.write(id, who)
        return self.show(id, tab)

    def alive(self, tab, who, id=None, active=True, hidden=False):
        """The tab is still open. active: the person has done something lately"""
        page = self.tabs.get(tab)
        if page and page.key != id:  # it comes late: the page has moved on
            return self.counts()
        self.enter(tab, who, id, active=active).hidden = hidden
        return self.counts()

    def leave(self, tab, who, id=None, text="", count=0):
        """The page is closed or loaded again: nobody needs to wait for its row"""
        page = self.enter(tab, who, id)
        if count > page.count:
            self.keep(tab, who, id, text, count)
        page.key = None
        return {}

    def finish(self, tab, who, id=None, text="", sure=""):
        """The person ends. The run ends when nobody else is at work."""
        self.enter(tab, who, id)
        self.keep(tab, who, id, text)
        counts = self.counts()
        unsaved = [key for key, draft in self.drafts.of(who).items() if draft.text is not None]
        if sure != "finish" and (counts["done"] < counts["total"] or unsaved):
            return {"ask": "finish", "left": counts["total"] - counts["done"],
                    "unsaved": len(unsaved)}
        self.ended.add(who)
        others = sorted({page.who for page in self.live_tabs()})
        if others:
            return {"finished": f"You are done. The run continues for {', '.join(others)}."}
        self.is_over = True
        return {"finished": "Finished. This page can be closed."}
