"""Calls in Python's syntax, and Llama 3's calls of its built-in tools."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Literal

from llama_jax.text.tools.calls import Attempt, NamedObject, Reading
from llama_jax.text.tools.deltas import Arguments, Call, Delta
from llama_jax.text.tools.python_literal import keywords


class PythonCall(Reading):
    """A call in Python's syntax, f(a=1, b="x"), emitted once complete; the values are literals of Python or JSON.

    Names of tools and of arguments end at `(` and `=`.
    """

    def __init__(self, names: Collection[str], method: str = ""):
        """Begin before the name.

        Args:
          method: text between the name and the parenthesis, such as ".call".
        """
        super().__init__(names)
        self._method, self._name, self._text = method, "", ""
        self._inside, self._depth, self._quote, self._escaped = False, 0, "", False

    def feed(self, text: str) -> tuple[int, list[Delta]]:
        for n, char in enumerate(text):
            if not self._inside:
                if char == "(":
                    self._name = self._name.removesuffix(self._method).strip()
                    self._inside = True
                    if self._name not in self.names:
                        self.state = "broken"
                        return n, []
                else:
                    self._name += char
                    if not any((name + self._method).startswith(self._name.lstrip()) for name in self.names):
                        self.state = "broken"
                        return n, []
                continue
            if self._ended(char):
                return n + 1, self._complete()
            self._text += char
        return len(text), []

    def _ended(self, char: str) -> bool:
        """Whether the parenthesis closes here, outside of strings."""
        if self._escaped:
            self._escaped = False
        elif self._quote:
            self._escaped = char == "\\"
            self._quote = "" if char == self._quote else self._quote
        elif char in "\"'":
            self._quote = char
        elif char in "([{":
            self._depth += 1
        elif char in ")]}":
            self._depth -= 1
            return self._depth < 0
        return False

    def _complete(self) -> list[Delta]:
        try:
            arguments = keywords(self._text)
        except ValueError:
            self.state = "broken"
            return []
        self.state = "done"
        self.committed = True
        return [Call(self._name), Arguments(json.dumps(arguments, ensure_ascii=False))]


class PythonCalls(Reading):
    """Calls in a Python list, [f(a=1), g()], each emitted once complete."""

    def __init__(self, names: Collection[str]):
        super().__init__(names)
        self._one: Attempt | None = None
        self._wants: Literal["[", "call", ", or ]"] = "["

    def feed(self, text: str) -> tuple[int, list[Delta]]:
        deltas: list[Delta] = []
        at = 0
        while at < len(text) and self.state == "open":
            if self._one is not None:
                count, new = self._one.feed(text[at:])
                deltas, at = deltas + new, at + count
                self.committed = self.committed or self._one.committed
                if self._one.state != "open":
                    self.state = "broken" if self._one.state == "broken" else "open"
                    self._one, self._wants = None, ", or ]"
                continue
            char = text[at]
            if self._wants == "[" == char or (self._wants == ", or ]" and char == ","):
                self._wants = "call"
            elif self._wants == ", or ]" and char == "]":
                self.state = "done"
            elif self._wants == "call" and not char.isspace():
                self._one = PythonCall(self.names)
                continue
            elif not char.isspace():
                self.state = "broken"
                break
            at += 1
        return at, deltas


class LlamaTagged(Reading):
    """Text after Llama 3's <|python_tag|>: a JSON object; a call of a built-in tool, as in
    brave_search.call(query="x"); or, if there is a tool `code_interpreter`, a program, which is all that follows."""

    CODE = "code_interpreter"

    def __init__(self, names: Collection[str]):
        super().__init__(names)
        self._head = ""
        self._one: Attempt | None = None

    def feed(self, text: str) -> tuple[int, list[Delta]]:
        at, deltas = 0, list[Delta]()
        while at < len(text) and self.state == "open":
            if self._one is None:
                self._one = self._begun(text[at])
                at += self._one is None  # a space
                continue
            count, new = self._one.feed(text[at:])
            at, deltas = at + count, deltas + new
            self._head += text[at - count : at]
            self.state, self.committed = self._one.state, self._one.committed
            if self.state == "broken" and not self.committed and self.CODE in self.names:
                self._one, self.state = _Code(self.names), "open"
                deltas += self._one.feed(self._head)[1]
                self.committed = True
        return at, deltas

    def finish(self) -> list[Delta]:
        if self._one is None or (self._one.state == "open" and not self.committed):
            if not self._head or self.CODE not in self.names:
                return []
            self._one = _Code(self.names)
            return [*self._one.feed(self._head)[1], *self._one.finish()]
        return self._one.finish()

    def _begun(self, char: str) -> Attempt | None:
        if char.isspace():
            return None
        return NamedObject(self.names) if char == "{" else PythonCall(self.names, ".call")


class _Code(Reading):
    """A program, as the argument "code" of the tool that runs it."""

    def feed(self, text: str) -> tuple[int, list[Delta]]:
        begun: list[Delta] = [] if self.committed else [Call(LlamaTagged.CODE), Arguments('{"code": "')]
        self.committed = True
        return len(text), [*begun, Arguments(json.dumps(text, ensure_ascii=False)[1:-1])]

    def finish(self) -> list[Delta]:
        return [Arguments('"}')]
