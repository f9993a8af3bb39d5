"""Single calls in JSON, in all variants that models write.

A call is read by an `Attempt`, which starts where a call may begin. The text read stays undecided until it is known to
be a call of one of the tools; then `Call` and parts of the arguments are emitted as they are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Literal, Protocol

from llama_jax.text.tools.deltas import Arguments, Call, Delta
from llama_jax.text.tools.json_object import JsonObject

State = Literal["open", "done", "broken"]
NAME = re.compile(r"[\w.-]{1,128}")
LONGEST_HEAD = 512
"""The most characters between a mark that begins a call and its arguments."""
_SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half of a pair that JSON escapes as two: no text, and no client could be sent it."""


class Attempt(Protocol):
    """A call that may have begun.

    Attributes:
      state: "open" while more may come; "broken" if the text is not, or no longer, a call.
      committed: whether a `Call` has been emitted, so that the text read is not plain text.
    """

    state: State
    committed: bool

    def feed(self, text: str) -> tuple[int, list[Delta]]:
        """Return the number of characters that belong to the call (all while the state is "open"), and their deltas."""
        ...

    def finish(self) -> list[Delta]:
        """Return the deltas at the end of the text. If the state is then "open", the call is incomplete."""
        ...


Begin = Callable[[Collection[str]], Attempt]
"""Makes an attempt from the names of the tools."""


class Reading:
    """Base of attempts."""

    state: State = "open"

    def __init__(self, names: Collection[str]):
        self.names, self.committed = names, False

    def finish(self) -> list[Delta]:
        return []


class ArgumentsObject(Reading):
    """A JSON object with the arguments of a tool named before it."""

    def __init__(self, names: Collection[str], name: str):
        super().__init__(names)
        self._object, self._name = JsonObject(), name
        self.state = "open" if name in names else "broken"

    def feed(self, text: str) -> tuple[int, list[Delta]]:
        at, sent = 0, len(self._object.text)
        while self.state == "open" and at < len(text):
            at += self._object.feed(text[at:])
            self.state = self._object.state
        new = self._object.text[sent:]
        if not new:
            return at, []
        begun: list[Delta] = [] if self.committed else [Call(self._name)]
        self.committed = True
        return at, [*begun, Arguments(new)]


class NamedObject(Reading):
    """A JSON object with the tool's name and its arguments, as in {"name": "f", "arguments": {"a": 1}}.

    The arguments may be called parameters, be missing, or be a string that contains the object.
    """

    _ARGUMENTS = frozenset({"arguments", "parameters"})
    _KEYS = _ARGUMENTS | {"name", "type", "id"}

    def __init__(self, names: Collection[str]):
        super().__init__(names)
        self._object, self._sent = JsonObject(), 0

    def feed(self, text: str) -> tuple[int, list[Delta]]:
        deltas: list[Delta] = []
        at = 0
        while self.state == "open" and at < len(text):
            at += self._object.feed(text[at:])
            self.state = self._object.state
            if not (self.committed or self._sound()):
                self.state = "broken"
            if self.committed or self.state != "broken":
                deltas += self._news()
        return at, deltas

    def _sound(self) -> bool:
        """Whether it can still be a call."""
        members = self._object.members
        if not members.keys() <= self._KEYS or members.keys() >= self._ARGUMENTS:
            return False
        if "name" in members and members["name"].end is not None and self._name not in self.names:
            return False
        return self.state != "done" or "name" in members

    @property
    def _name(self) -> str | None:
        member = self._object.members.get("name")
        value = None if member is None or member.end is None else json.loads(self._object.value("name") or "null")
        return value if isinstance(value, str) else None

    def _news(self) -> list[Delta]:
        if self._name is None:
            return []
        key = next((key for key in self._object.members if key in self._ARGUMENTS), "")
        given = self._object.value(key) or ("" if key or self.state == "open" else "{}")
        if not given.startswith("{"):
            if not key or self._object.members[key].end is None:
                return []
            given = _inner(given)
            if not given:
                self.state = "broken"
                return []
        begun: list[Delta] = [] if self.committed else [Call(self._name)]
        self.committed, sent, self._sent = True, self._sent, len(given)
        return [*begun, *([Arguments(given[sent:])] if given[sent:] else [])]


def _inner(value: str) -> str:
    """The object that a JSON value represents as arguments; "" if none."""
    if value == "null":
        return "{}"
    inner = json.loads(value) if value.startswith('"') else ""
    if _SURROGATE.search(inner):
        return ""
    scanned = JsonObject()
    while inner[len(scanned.text) :] and scanned.state == "open":
        scanned.feed(inner[len(scanned.text) :])
    return inner if scanned.state == "done" and not inner[len(scanned.text) :].strip() else ""


class Headed(Reading):
    """A JSON object after a mark, with a head between the two.

    `pattern` matches the whole head; its group "name" is the tool's; without the group the object contains the name.
    """

    def __init__(self, names: Collection[str], pattern: re.Pattern[str]):
        super().__init__(names)
        self._pattern, self._head = pattern, ""
        self._object: Attempt | None = None

    def feed(self, text: str) -> tuple[int, list[Delta]]:
        if self._object is not None:
            return self._of_object(text, 0)
        before, brace, _ = text.partition("{")
        room = LONGEST_HEAD - len(self._head)
        self._head += before[:room]
        if len(before) > room:
            self.state = "broken"
            return room, []
        if not brace:
            return len(text), []
        found = self._pattern.fullmatch(self._head)
        if found is None:
            self.state = "broken"
            return len(before), []
        name = found.groupdict().get("name")
        self._object = NamedObject(self.names) if name is None else ArgumentsObject(self.names, name)
        return self._of_object(text, len(before))

    def _of_object(self, text: str, at: int) -> tuple[int, list[Delta]]:
        assert self._object is not None
        count, deltas = self._object.feed(text[at:])
        self.state, self.committed = self._object.state, self._object.committed
        return at + count, deltas
