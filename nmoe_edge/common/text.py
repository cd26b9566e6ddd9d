"""Text from outside, made safe for one line of a terminal, a log or a message."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with a space for every character that could move a cursor or start a new line."""
    return "".join(character if character.isprintable() else " " for character in text)


def one_line(text: str, longest: int = 500) -> str:
    """`text` as one printable line of at most `longest` characters; `…` marks what was cut."""
    clean = printable(text)
    return clean if len(clean) <= longest else clean[: longest - 1] + "…"


def counted(number: int, noun: str) -> str:
    """A count and its noun: 1 bundle, 2 bundles."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
