"""Text that is safe for a terminal, and tokens painted by their reward."""
import os, sys, unicodedata

def in_colour():
    """May stdout show colours? A terminal, unless the user has set NO_COLOR (no-color.org)"""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")

def plain(text):
    """Text that cannot control a terminal: control characters but the newline are made visible"""
    return "".join(map(visible, text))

def visible(c):
    """A harmless character (also a newline, soft hyphen, joiner) -> itself; others -> a picture"""
    if c in "\n\u00ad\u200c\u200d" or c.isprintable() or unicodedata.category(c) == "Zs":
        return c
    return chr(0x2400 + ord(c)) if ord(c) < 32 else "\N{REPLACEMENT CHARACTER}"

def paint(texts, rewards, scale):
    """Tokens on red to green, deepest at |r_t| = scale; not on a terminal: strong r_t as numbers"""
    words = []
    for text, r in zip(texts, rewards):
        text = plain(text)
        if in_colour():
            begin, end = f"\033[30;48;5;{colour(r, scale)}m", "\033[0m"
            text = begin + text.replace("\n", f"{end}\n{begin}") + end
        elif abs(r) > 0.3 * scale:
            text += f"({r:+.1f})"
        words.append(text)
    return "".join(words)

def colour(r, scale):
    """The number of a reward's colour in the terminal's 6 x 6 x 6 colour cube"""
    pale = 5 - min(5, round(abs(r) / scale * 5))
    red, green = 5 if r < 0 else pale, 5 if r > 0 else pale
    return 16 + 36 * red + 6 * green + pale
