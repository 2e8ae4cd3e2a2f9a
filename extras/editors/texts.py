"""What a browser's text field does to an answer, and how it is undone.

A text field shows every line end as "\\n". The saved answer has the line ends of the original
again, so that an edit changes the bytes that the person changed, and no others."""
if __name__ == "__main__":
    raise SystemExit("texts.py is a part of: python edit.py --editor=human")

import re

import diff

MOST_CELLS = 2_000_000  # of the alignment: a larger one compares words instead of characters


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
    before, after = tokens_of(original, edited)
    original_changed, edited_changed = diff.align([in_browser(token) for token in before], after)

    # The line ends of the original in two queues: those that are still there, and those of the
    # text that was replaced, which new ones take over in their order.
    restored = []
    last = ends[0]
    i = 0
    replaced = []
    for token, is_new in zip(after, edited_changed):
        while i < len(before) and original_changed[i]:
            replaced.append(before[i])
            i += 1
        if not is_new:
            token = before[i]
            replaced = []
            i += 1
        elif token == "\n":
            old = [end for end in replaced if end in ends]
            token = old[0] if old else last
            if old:
                replaced.remove(old[0])
        if token in ends:
            last = token
        restored.append(token)
    return "".join(restored)


def tokens_of(original, edited):
    """Both texts as lists of characters, or of words if there is too much to compare"""
    for pattern in (r"\r\n|[\s\S]", r"\r\n|[\r\n]|\w+|[^\w\r\n]"):
        before = re.findall(pattern, original)
        after = re.findall(pattern, edited)
        common = diff.lcs_length([in_browser(token) for token in before], after)
        width = len(before) + len(after) - 2 * common
        if len(before) * (width + 1) <= MOST_CELLS:
            break
    return before, after
