"""A light guard for readable prose and code.

The README has short sentences, no text has words that make a reader stumble, and no line of code must be read twice.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_WORDS = 30
AVOIDED = re.compile(
    r"\b(whoever|whomever|whose|somebody|nobody|everybody|strangers?|learnt|is\s+due|lets\s+go\s+of|at\s+home)\b",
    re.IGNORECASE,
)
TEXT_TOKENS = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}

DOCUMENTS = [path for part in ("", "nmoe_*/**/", "examples/**/", "calibration/") for path in ROOT.glob(f"{part}*.md")]
MODULES = [*ROOT.glob("nmoe_*/**/*.py"), *ROOT.glob("examples/**/*.py")]


def avoided(text, first_line=1):
    """(line, word) for every word to avoid in a text."""
    return [(first_line + text.count("\n", 0, found.start()), found[0]) for found in AVOIDED.finditer(text)]


def avoided_in(path):
    """(line, word) for every word to avoid in a document, or in the comments and strings of a module."""
    text = path.read_text()
    if path.suffix == ".md":
        return avoided(text)
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in TEXT_TOKENS:
            found += avoided(token.string, token.start[0])
    return found


def long_sentences(text):
    """(number of words, sentence) for every sentence over MAX_WORDS outside code, tables and headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)  # the target of a link is not read
    lines = [line for line in text.splitlines() if not line.startswith(("|", "#", "    "))]
    paragraphs = re.split(r"\n\s*\n|\n\s*(?=[-*] |\d+\. )", "\n".join(lines))
    sentences = [sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?:;])\s+", paragraph)]
    counted = [(len(sentence.split()), " ".join(sentence.split())) for sentence in sentences]
    return [(words, sentence) for words, sentence in counted if words > MAX_WORDS]


def dense(text):
    """(line, what must be read twice) for long tuple assignments and conditionals inside conditionals."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            unpacks = any(isinstance(target, ast.Tuple | ast.List) for target in node.targets)
            if unpacks and len(node.value.elts) > 2:
                found.append((node.lineno, "an assignment of more than two values"))
        if isinstance(node, ast.IfExp):
            nested = [inner for inner in ast.walk(node) if inner is not node and isinstance(inner, ast.IfExp)]
            if nested:
                found.append((node.lineno, "a conditional inside a conditional"))
    return found


@pytest.mark.parametrize("path", [*DOCUMENTS, *MODULES], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_uses_a_word_to_avoid(path):
    name = path.relative_to(ROOT)
    found = [f"{name}:{line}: say it without {word!r}" for line, word in avoided_in(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_of_code_must_be_read_twice(path):
    name = path.relative_to(ROOT)
    found = [f"{name}:{line}: {what}; write it as several lines" for line, what in dense(path.read_text())]
    assert not found, "\n".join(found)


def test_no_sentence_of_the_readme_is_too_long():
    readme = (ROOT / "README.md").read_text()
    found = [f"README.md: {words} words: {sentence}" for words, sentence in long_sentences(readme)]
    assert not found, "\n".join(found)


def test_the_guard_finds_words_long_sentences_and_dense_code():
    assert avoided("Nobody\nanswers at\nhome.") == [(1, "Nobody"), (2, "at\nhome")]
    assert avoided("a host, an at_home, a disclosed learning") == []
    assert long_sentences(f"Short. {'word ' * 31}end. Short.\n\n```sh\n{'code ' * 40}\n```\n")[0][0] == 32
    assert [line for line, _ in dense("a, b, c = 1, 2, 3\nx = a if b else (b if c else a)\n")] == [1, 2]
    assert not dense("a, b = 1, 2\na, b, c = f()\nd = 1, 2, 3\nx = a if b else c\n")
    assert not long_sentences("word " * 20 + "\n- " + "word " * 20)
