"""Incremental parser of an answer: its text and its tool calls."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llama_jax.text.tools.calls import Attempt, Begin
from llama_jax.text.tools.deltas import Arguments, Call, Delta, Reasoning, Text


@dataclass(frozen=True)
class Mark:
    """Text at which a call may begin.

    Attributes:
      begin: makes the attempt to read it; None for a mark that is merely dropped from the answer.
      kept: whether the mark itself is the first text of the call.
      behind: whether it counts only directly after another call, with at most spaces between.
    """

    text: str
    begin: Begin | None = None
    kept: bool = False
    behind: bool = False


class ToolParser:
    """Reads one answer. Its output does not depend on how the text is split into pieces.

    Text that turns out not to be a call of an existing tool is kept unchanged. Spaces around calls are dropped.
    """

    def __init__(self, marks: Sequence[Mark], names: Collection[str]):
        """Begin at the start of an answer.

        Args:
          marks: no two of which share a beginning; names: of the tools.
        """
        self._marks, self._names = marks, frozenset(names)
        anywhere = [mark.text for mark in marks if not mark.behind]
        self._anywhere = re.compile("|".join(map(re.escape, anywhere)))
        self._begun = re.compile(f"({'|'.join(_beginning(text) for text in anywhere)})\\Z")
        self._pending = self._spaces = self._raw = ""
        self._attempt: Attempt | None = None
        self._behind = False

    def feed(self, text: str) -> list[Delta]:
        """Take more of the text; return what is certain now."""
        self._pending += text
        deltas: list[Delta] = []
        while self._step(deltas):
            pass
        return joined(deltas)

    def finish(self) -> list[Delta]:
        """Return the remaining deltas at the end of the text. An incomplete call stays so; a closing mark that was cut
        off behind one is dropped, as a whole one would be."""
        deltas: list[Delta] = []
        if self._behind and any(not mark.begin and mark.text.startswith(self._pending) for mark in self._marks):
            self._pending = ""
        if self._attempt is not None:
            deltas += self._attempt.finish()
            if not deltas and not self._attempt.committed:
                self._say(self._raw, deltas)
        self._say(self._pending, deltas)
        if self._spaces:
            deltas.append(Text(self._spaces))
        self._pending = self._spaces = ""
        self._attempt = None
        return joined(deltas)

    def _step(self, deltas: list[Delta]) -> bool:
        """Processes what can be decided; returns whether there may be more."""
        if self._attempt is not None:
            return self._read_on(self._attempt, deltas)
        return self._behind_call() if self._behind else self._in_text(deltas)

    def _read_on(self, attempt: Attempt, deltas: list[Delta]) -> bool:
        before = attempt.committed
        count, new = attempt.feed(self._pending)
        if not before:
            self._raw += self._pending[:count]
        self._pending = self._pending[count:]
        if attempt.committed:
            self._spaces = ""
        deltas += new
        if attempt.state == "open":
            return False
        self._attempt = None
        if attempt.committed:
            self._behind = True
        else:
            self._say(self._raw, deltas)
        return bool(self._pending)

    def _behind_call(self) -> bool:
        self._pending = self._pending.lstrip()
        if not self._pending:
            return False
        for mark in self._marks:
            if self._pending.startswith(mark.text):
                self._begin(mark, 0)
                return True
        if any(mark.text.startswith(self._pending) for mark in self._marks):
            return False
        self._behind = False
        return True

    def _in_text(self, deltas: list[Delta]) -> bool:
        found = self._anywhere.search(self._pending)
        if found is None:
            begun = self._begun.search(self._pending)
            held = len(self._pending) if begun is None else begun.start()
            self._say(self._pending[:held], deltas)
            self._pending = self._pending[held:]
            return False
        self._say(self._pending[: found.start()], deltas)
        self._begin(next(mark for mark in self._marks if mark.text == found[0]), found.start())
        return True

    def _begin(self, mark: Mark, at: int) -> None:
        """Ends the text before a mark."""
        rest = self._pending[at:]
        self._pending = rest if mark.kept else rest[len(mark.text) :]
        if mark.begin is not None:
            self._raw = "" if mark.kept else mark.text
            self._attempt, self._behind = mark.begin(self._names), False

    def _say(self, text: str, deltas: list[Delta]) -> None:
        """Emits text except for trailing spaces, which a call may follow."""
        text = self._spaces + text
        said = text.rstrip()
        self._spaces = text[len(said) :]
        if said:
            deltas.append(Text(said))


def _beginning(text: str) -> str:
    """A pattern of the nonempty prefixes of a text: a(b(c)?)? for "abc"."""
    pattern = ""
    for char in reversed(text):
        pattern = re.escape(char) + (f"(?:{pattern})?" if pattern else "")
    return pattern


def joined(deltas: Sequence[Delta]) -> list[Delta]:
    """Return deltas with neighbours of the same kind merged."""
    made: list[Delta] = []
    for delta in deltas:
        last = made[-1] if made else None
        if isinstance(delta, Text) and isinstance(last, Text):
            made[-1] = Text(last.text + delta.text)
        elif isinstance(delta, Arguments) and isinstance(last, Arguments):
            made[-1] = Arguments(last.text + delta.text)
        elif isinstance(delta, Reasoning) and isinstance(last, Reasoning):
            made[-1] = Reasoning(last.text + delta.text)
        elif isinstance(delta, Call) or delta.text:
            made.append(delta)
    return made
