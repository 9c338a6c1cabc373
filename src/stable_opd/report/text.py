"""Turning what a model or a user wrote into HTML that shows it and does nothing else."""

import html
import re
import reprlib
import unicodedata
from typing import Any

#: Characters that no text of a page needs, and that could hide or turn around what stands beside them.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})

#: Joiners, without which some scripts and composed emoji are written wrongly.
_NEEDED = frozenset("\n\t\u200c\u200d")


def visible(text: str) -> str:
    """Return a text whose unseen characters, such as those that turn its direction, are spelt out, as ⟨U+202E⟩."""
    text = text.replace("\r\n", "\n")
    return "".join(each if each.isascii() and each.isprintable() else _seen(each) for each in text)


def _seen(character: str) -> str:
    hidden = unicodedata.category(character) in _HIDDEN_CATEGORIES and character not in _NEEDED
    return f"⟨U+{ord(character):04X}⟩" if hidden else character


def one_line(text: str, longest: int = 120) -> str:
    """Return a text in one line, with its middle left out if it is too long."""
    text = re.sub(r"\s+", " ", visible(text)).strip()
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[head + 1 - longest :]}"


def escaped(value: Any) -> str:
    """Return a value as HTML text that may also stand in an attribute with quotes."""
    text = reprlib.repr(value) if isinstance(value, list | dict) else str(value)  # which may be deeply nested
    return html.escape(visible(text), quote=True)


def number(value: float, digits: int = 3) -> str:
    """Return a number for people; "-" where there is none."""
    if value != value:  # nan
        return "-"
    if abs(value) < 10**6 and value == int(value):
        return str(int(value))
    return f"{value:.{digits}g}"
