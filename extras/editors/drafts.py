"""What people have typed and not saved yet: edits.jsonl.drafts.jsonl, next to edits.jsonl.

Every change is appended before the browser gets its reply, so a kill of the server or of the
browser loses nothing. The last line of a row and a person is the valid one."""
import errno, json, os
from dataclasses import asdict, dataclass, field
from pathlib import Path

COMPACT = 4_000_000  # bytes: from here on, the file is written again with its valid lines only


@dataclass
class Draft:
    """One person's unsaved work on one row"""
    text: str | None = None   # what is in the text field, as the browser has it; None: as saved
    others: list = field(default_factory=list)  # texts that it replaced; Alt+R brings them back
    seconds: float = 0.0      # spent in the row so far
    skipped: int = 0          # the number of the skip; 0: not skipped
    tab: str = ""             # which tab has written `text`
    count: int = 0            # the browser's number of that text; it grows, over reloads, too

    def is_empty(self):
        return self.text is None and not self.others and not self.skipped


def read_drafts(path):
    """(key, who) -> Draft, in the order of the last changes. A torn last line is left out."""
    drafts = {}
    if not Path(path).exists():
        return drafts
    complete = Path(path).read_bytes().rpartition(b"\n")[0]
    for line in complete.splitlines():
        fields = json.loads(line)
        place = (fields.pop("id"), fields.pop("who"))
        drafts.pop(place, None)
        drafts[place] = Draft(**fields)
    return drafts


class Drafts:
    """The drafts of a run, in memory and on the disk. (key, who) -> Draft"""

    def __init__(self, path):
        self.path = Path(path)
        self.drafts = read_drafts(path)
        self.compact()

    def get(self, key, who):
        return self.drafts.setdefault((key, who), Draft())

    def items(self):
        return self.drafts.items()

    def of(self, who):
        """key -> Draft of one person; only those that hold something"""
        return {key: draft for (key, name), draft in self.drafts.items()
                if name == who and not draft.is_empty()}

    def line(self, key, who):
        fields = {"id": key, "who": who, **asdict(self.drafts[key, who])}
        return json.dumps(fields).encode() + b"\n"  # ASCII: half a character survives, too

    def write(self, key, who):
        """Append one draft. A full disk is an OSError, and leaves no torn line."""
        self.drafts[key, who] = self.drafts.pop((key, who))
        line = self.line(key, who)
        written = self.file.write(line)
        if written < len(line):
            self.file.truncate(self.file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        if self.file.tell() > self.limit:
            self.compact()

    def compact(self):
        """Write the valid lines to a new file, and go on there"""
        temporary = Path(f"{self.path}.tmp")
        places = [place for place, draft in self.drafts.items() if not draft.is_empty()]
        with open(temporary, "wb") as file:
            for place in places:
                file.write(self.line(*place))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self.file = open(self.path, "ab", buffering=0)
        self.limit = max(COMPACT, 2 * self.file.tell())

    def close(self):
        """The end of the run. A file without any text is removed."""
        self.compact()
        self.file.close()
        texts = [draft for draft in self.drafts.values() if draft.text is not None or draft.others]
        if not texts:
            self.path.unlink()
