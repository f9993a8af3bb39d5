"""Incremental parser of one JSON object, which checks it and splits it into members."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
_WORD = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzE")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
"""Literal characters of strings."""
_SPACE = frozenset(" \t\n\r")
_ESCAPED = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSES = {"}": "{", "]": "["}

LONGEST_NUMBER = 400
"""The most characters of a number: more than any double has, less than Python's limit for integers."""


@dataclass
class Member:
    """The value of one key, from `start` of the object's text to before `end`, once that is known."""

    start: int
    end: int | None = None


class JsonObject:
    """A JSON object (RFC 8259), read incrementally.

    Attributes:
      text: the text read so far.
      members: of the object itself, by key.
      state: "open" until its last brace; "broken" if the next text cannot belong to it, or a key came twice.
    """

    def __init__(self, depth: int = 64):
        """Begin before its first brace.

        Args:
          depth: the most levels of nested objects and arrays.
        """
        self.text = ""
        self.members: dict[str, Member] = {}
        self.state: Literal["open", "done", "broken"] = "open"
        self._depth, self._open = depth, [""]
        self._wants: Literal["object", "key", "key or end", "colon", "value", "value or end", "comma or end"] = "object"
        self._word = ""
        self._string = ""  # "", "text", "escape", or the missing hexadecimal digits: "xxxx"
        self._key = False
        self._began = 0
        self._member: Member | None = None  # has a key but no value yet
        self._events = 0

    def feed(self, text: str) -> int:
        """Consume part of a text and return the number of characters: up to the next beginning or end of a member, the
        object's end, or an error."""
        start = len(self.text)
        self.text += text
        before, n = self._events, 0
        while n < len(text):
            if self._string == "text" and (plain := _PLAIN.match(text, n)):
                n = plain.end()
                continue
            if not self._accepts(text[n], start + n):
                self.state = "broken"
                return self._keep(start, n)
            n += 1
            if len(self._open) == 1:
                self.state = "done"
            if self._events != before:
                return self._keep(start, n)
        return n

    def value(self, key: str) -> str | None:
        """The text of a member's value so far; None without such a member."""
        member = self.members.get(key)
        return None if member is None else self.text[member.start : member.end]

    def _keep(self, start: int, count: int) -> int:
        self.text = self.text[: start + count]
        return count

    def _accepts(self, char: str, at: int) -> bool:
        if self._string:
            return self._in_string(char, at)
        if self._word:
            if char in _WORD:
                self._word += char
                return len(self._word) <= LONGEST_NUMBER
            if not _WHOLE.fullmatch(self._word):
                return False
            self._word = ""
            self._ended(at)
        if char in _SPACE:
            return self._wants != "object"
        match self._wants, char:
            case "object", "{":
                return self._opened(char)
            case (("key" | "key or end"), '"'):
                self._string, self._key, self._began = "text", True, at
                return True
            case "colon", ":":
                self._wants = "value"
                return True
            case (("value" | "value or end"), _) if char not in "]}":
                return self._value(char, at)
            case "comma or end", ",":
                self._wants = "key" if self._open[-1] == "{" else "value"
                return True
            case (("comma or end" | "key or end" | "value or end"), ("}" | "]")) if self._open[-1] == _CLOSES[char]:
                self._open.pop()
                self._ended(at + 1)
                return True
        return False

    def _value(self, char: str, at: int) -> bool:
        if len(self._open) == 2 and self._member is not None:
            self._member.start = at
            self._member = None
            self._events += 1
        if char == '"':
            self._string, self._key = "text", False
            return True
        if char in "{[":
            return self._opened(char)
        self._word = char
        return char in "-0123456789tfn"

    def _opened(self, char: str) -> bool:
        self._open.append(char)
        self._wants = "key or end" if char == "{" else "value or end"
        return len(self._open) - 1 <= self._depth

    def _ended(self, end: int) -> None:
        """Records that a value has ended before `end`."""
        self._wants = "comma or end"
        if len(self._open) <= 2:
            self._events += 1
            for member in self.members.values():
                member.end = end if member.end is None else member.end

    def _in_string(self, char: str, at: int) -> bool:
        if self._string == "text":
            if char == '"':
                self._string = ""
                if self._key:
                    return self._named(at)
                self._ended(at + 1)
                return True
            if char == "\\":
                self._string = "escape"
            return char >= " "
        if self._string == "escape":
            self._string = "xxxx" if char == "u" else "text"
            return char == "u" or char in _ESCAPED
        self._string = self._string[1:] or "text"
        return char in _HEX

    def _named(self, at: int) -> bool:
        """Records that a key has ended with the quote at `at`."""
        self._wants = "colon"
        if len(self._open) != 2:
            return True
        key = json.loads(self.text[self._began : at + 1])
        if key in self.members:
            return False
        self._member = self.members[key] = Member(at)
        self._events += 1
        return True
