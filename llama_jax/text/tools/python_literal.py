"""Parser of Python and JSON literals, which models mix in the arguments of a call. Nothing is evaluated."""

from __future__ import annotations

import re
from typing import Any

_KEYWORD = re.compile(r"([^\s=,()\[\]{}\"']+)\s*=")
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|(?P<whole>\d{1,400}))(?![\w.])")
_NAME = re.compile(r"[A-Za-z]+")
_NAMES = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_STRING = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", re.DOTALL)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""} | {c: c for c in "\\'\"/"}
_DEPTH = 32


def keywords(text: str) -> dict[str, Any]:
    """Return the arguments between the parentheses of a call: names with literals, a=1, b="x".

    Raises:
      ValueError: it is not a list of these, a name comes twice, or JSON has no such value.
    """
    made: dict[str, Any] = {}
    at = _skip(text, 0)
    while at < len(text):
        found = _KEYWORD.match(text, at)
        if found is None or found[1] in made:
            raise ValueError(f"no name, or one that was there, at {at}")
        made[found[1]], at = _value(text, found.end(), _DEPTH)
        at = _separated(text, at, "")
    return made


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value after optional spaces, and its end."""
    at = _skip(text, at)
    char = text[at : at + 1]
    if depth == 0:
        raise ValueError("nested too deeply")
    if char in ("[", "("):
        return _items(text, at + 1, "])"["[(".index(char)], depth)
    if char == "{":
        return _pairs(text, at + 1, depth)
    if found := _STRING.match(text, at):
        return _unescaped(found[0][1:-1]), found.end()
    if found := _NUMBER.match(text, at):
        value = int(found[0]) if found["whole"] else float(found[0])
        if abs(value) == float("inf"):
            raise ValueError("a number beyond all floats")
        return value, found.end()
    if (found := _NAME.match(text, at)) and found[0] in _NAMES:
        return _NAMES[found[0]], found.end()
    raise ValueError(f"no literal begins at {at}")


def _items(text: str, at: int, end: str, depth: int) -> tuple[list[Any], int]:
    values: list[Any] = []
    at = _skip(text, at)
    while text[at : at + 1] != end:
        value, at = _value(text, at, depth - 1)
        values.append(value)
        at = _separated(text, at, end)
    return values, at + 1


def _pairs(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    made: dict[str, Any] = {}
    at = _skip(text, at)
    while text[at : at + 1] != "}":
        key, at = _value(text, at, 1)
        at = _skip(text, at)
        if not isinstance(key, str) or text[at : at + 1] != ":":
            raise ValueError(f"no key of an object before {at}")
        made[key], at = _value(text, at + 1, depth - 1)
        at = _separated(text, at, "}")
    return made, at + 1


def _separated(text: str, at: int, end: str) -> int:
    """Position of the next value, or of `end`."""
    at = _skip(text, at)
    if text[at : at + 1] == ",":
        return _skip(text, at + 1)
    if text[at : at + 1] != end:
        raise ValueError(f"neither a comma nor {end} at {at}")
    return at


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _unescaped(text: str) -> str:
    """A string's content. Escapes unknown to Python stay unchanged, and surrogate pairs become characters."""

    def meant(found: re.Match[str]) -> str:
        of = found[1]
        return chr(int(of[1:], 16)) if len(of) > 1 else _ESCAPES.get(of, found[0])

    return _ESCAPE.sub(meant, text).encode("utf-16", "surrogatepass").decode("utf-16")
