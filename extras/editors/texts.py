"""What a browser's text field does to an answer, and how it is undone.

A text field shows every line end as "\\n". The saved answer has the line ends of the original
again, so that an edit changes the bytes that the person changed, and no others."""
if __name__ == "__main__":
    raise SystemExit("texts.py is a part of: python edit.py --editor=human")

import re

import diff

CHARACTERS = r"\r\n|[\s\S]"
WORDS = r"\r\n|[\r\n]|\w+|[^\w\r\n]"
LINES = r"\r\n|[\r\n]|[^\r\n]+"
MOST_CELLS = 2_000_000  # of the alignment: a larger one compares words, then lines


def in_browser(text):
    """The text as a text field shows it"""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def restore_line_ends(original, edited):
    """edited, as a text field returns it -> the same text with the line ends of the original.

    A line end that was not edited is the original's own. A new one is like the line end before it,
    or like the first one of the original."""
    ends = re.findall(r"\r\n|\r|\n", original)
    if edited == in_browser(original):
        return original
    if not ends or set(ends) == {"\n"}:
        return edited
    if len(set(ends)) == 1:
        return edited.replace("\n", ends[0])

    # Mixed line ends: align both texts, with each line end as one token.
    for pattern in (CHARACTERS, WORDS, LINES):
        before = re.findall(pattern, original)
        after = re.findall(pattern, edited)
        shown = [in_browser(token) for token in before]
        width = len(before) + len(after) - 2 * diff.lcs_length(shown, after)
        if len(before) * (width + 1) <= MOST_CELLS:
            return with_ends(before, after, *diff.align(shown, after))

    # Too much has changed for that: the first line end is the first one of the original, and so on.
    lines = edited.split("\n")
    restored = lines[0]
    for k, line in enumerate(lines[1:]):
        restored += ends[min(k, len(ends) - 1)] + line
    return restored


def with_ends(before, after, original_changed, edited_changed):
    """The tokens `after`, with their line ends from `before`; the masks are diff.align's -> text"""
    ends = ("\r\n", "\r", "\n")
    last = next(token for token in before if token in ends)
    replaced = []  # line ends of the text that was replaced here: new ones take them over, in order
    restored = []
    i = 0
    for token, is_new in zip(after, edited_changed):
        while i < len(before) and original_changed[i]:
            if before[i] in ends:
                replaced.append(before[i])
            i += 1
        if not is_new:
            token = before[i]
            i += 1
            replaced = []
        elif token == "\n":
            token = replaced.pop(0) if replaced else last
        if token in ends:
            last = token
        restored.append(token)
    return "".join(restored)
