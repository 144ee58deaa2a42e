"""The error messages on docs/troubleshooting.md are those of the code; … stands for what is filled in, in both."""

import ast
import functools
import re
from typing import NamedTuple

import pytest
from pages import DOCS, ROOT

pytestmark = pytest.mark.source


class Spoken(NamedTuple):
    """What the source can say."""

    strings: list[str]
    mistakes: list[tuple[str, str]]
    """(field, rule) of each UserError."""


def words(node: ast.expr) -> str:
    """A string of the source, … for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(words, parts))
    return "…"


@functools.cache
def spoken() -> Spoken:
    strings, mistakes = set(), []
    files = [file for name in ("zigzag_jax", "models", "train") for file in (ROOT / name).rglob("*.py")]
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            strings.add(words(node))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and len(node.args) == 3:
            mistakes.append((words(node.args[0]), words(node.args[1])))
    return Spoken(sorted(strings), mistakes)


def covers(pattern: str, text: str) -> bool:
    """Whether `text` is `pattern` with something in the place of each …"""
    first, *parts = pattern.split("…")
    if not parts:
        return pattern == text
    if not text.startswith(first):
        return False
    at = len(first)
    for part in parts[:-1]:
        if (found := text.find(part, at)) < 0:
            return False
        at = found + len(part)
    return text.endswith(parts[-1]) and at + len(parts[-1]) <= len(text)


def fits(quoted: str, said: str) -> bool:
    """Whether `quoted` can be what the code's `said` becomes; a string that is nearly all … proves nothing."""
    literal = lambda text: len(text.replace("…", "").strip())
    return covers(quoted, said) or (literal(said) >= 0.5 * literal(quoted) and covers(said, quoted))


def is_said(message: str) -> bool:
    """Whether the code can say it: any string of its own, or `error: FIELD: RULE, got VALUE` of a UserError."""
    found = re.fullmatch(r"error: ([^\s:]+): (.*?), got .*", message)
    if found is None:
        return any(fits(message, text) for text in spoken().strings)
    field, rule = found.groups()
    named = field == "…" or field in spoken().strings  # where a variable holds the field
    rules = [r for f, r in spoken().mistakes if (f == "…" and named) or (f != "…" and fits(field, f))]
    # where a variable or a function holds the rule, it is a string elsewhere
    return any(r != "…" and fits(rule, r) for r in rules) or (
        "…" in rules and any(fits(rule, text) for text in spoken().strings)
    )


def test_every_message_of_the_page_is_one_of_the_code():
    page = (DOCS / "troubleshooting.md").read_text().split("## What has no message of ours")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(messages) > 50
    assert [message for message in messages if not is_said(message)] == []


@pytest.mark.parametrize(
    "message",
    [
        "sequence length must be divisible by … (3 * cp with zigzag), got …: pad it",
        "error: data: must be UTF-16 text, got …",
        "error: nothing: must be a file or a folder that exists, got …",
    ],
)
def test_a_message_that_the_code_does_not_say_is_noticed(message):
    assert not is_said(message)
