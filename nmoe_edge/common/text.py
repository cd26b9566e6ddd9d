"""Formats text for one line of a terminal, a log or a message; text from outside is made safe for it."""

from __future__ import annotations


def printable(text: str) -> str:
    """Replace every unprintable character, such as newlines and terminal escapes, with a space."""
    return "".join(character if character.isprintable() else " " for character in text)


def one_line(text: str, longest: int = 500) -> str:
    """Shorten `text` to one printable line of at most `longest` characters; `…` marks a cut."""
    clean = printable(text)
    return clean if len(clean) <= longest else clean[: longest - 1] + "…"


def counted(number: int, noun: str) -> str:
    """Format a count: "1 bundle", "2 bundles"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
