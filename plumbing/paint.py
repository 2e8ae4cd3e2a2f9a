"""Text that is safe for a terminal, and tokens painted by their reward."""
import sys
import unicodedata

INVISIBLE = "\u00ad\u200c\u200d"  # soft hyphens, and the joiners of emoji and scripts: harmless


def plain(text):
    """Text that cannot control a terminal: control characters except the newline are made visible"""
    return "".join(map(visible, text))


def visible(c):
    """A character that is safe to print -> itself; a control character -> a picture of it"""
    if c == "\n" or c.isprintable() or unicodedata.category(c) == "Zs" or c in INVISIBLE:
        return c
    if ord(c) < 32:
        return chr(0x2400 + ord(c))
    return "\N{REPLACEMENT CHARACTER}"


def paint(texts, rewards, scale):
    """Tokens on red (bad) to green (good) for a terminal with 256 colours. Not a terminal: strong r_t in brackets.

    texts: one string per token; rewards: r_t of each; scale: the |r_t| with the deepest colour."""
    if sys.stdout.isatty():
        return "".join(f"\033[30;48;5;{colour(r, scale)}m{plain(text)}\033[0m" for text, r in zip(texts, rewards))

    words = []
    for text, r in zip(texts, rewards):
        words.append(plain(text))
        if abs(r) > 0.3 * scale:
            words.append(f"({r:+.1f})")
    return "".join(words)


def colour(r, scale):
    """The number of a reward's colour in the terminal's 6 x 6 x 6 colour cube"""
    pale = 5 - min(5, round(abs(r) / scale * 5))
    red = 5 if r < 0 else pale
    green = 5 if r > 0 else pale
    return 16 + 36 * red + 6 * green + pale
