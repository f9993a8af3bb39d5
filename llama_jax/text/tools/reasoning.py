"""Reasoning before an answer, for model families that mark it."""

from __future__ import annotations

from typing import Literal

from llama_jax.text.tools.deltas import Delta, Reasoning, Text

MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Marks around reasoning: Qwen3, SmolLM3, DeepSeek's distillations; Magistral."""


Place = Literal["before", "inside", "behind"]
"""Place of an answer's start: reasoning may follow, it has begun, or there is none."""


def reasoning_of(template: str) -> tuple[str, str] | None:
    """Return the marks around the reasoning of a model with this chat template; None if it has none."""
    return next((marks for marks in MARKS if marks[1] in template), None)


def place_of(marks: tuple[str, str] | None, prompt: str) -> Place:
    """Return where in its reasoning an answer begins.

    Args:
      marks: around reasoning, if the model has any; prompt: the text before the answer, or its end.
    """
    prompt = prompt.rstrip()
    if marks is None or prompt.endswith(marks[1]):
        return "behind"
    return "inside" if prompt.endswith(marks[0]) else "before"


class ReasoningParser:
    """Separates the reasoning from the answer after it. Its output does not depend on how the text is split.

    Reasoning is at the start of an answer, or nowhere. Spaces around both of its marks are dropped.
    """

    def __init__(self, marks: tuple[str, str], *, inside: bool = False):
        """Begin at the start of an answer, or `inside` the reasoning if the template has begun it."""
        self._begin, self._end = marks
        self._state = "inside" if inside else "start"
        self._pending, self._thought = "", False

    @property
    def began(self) -> bool:
        """Whether there is reasoning."""
        return self._state in ("inside", "behind") or self._thought

    @property
    def ended(self) -> bool:
        """Whether no more reasoning can come."""
        return self._state in ("behind", "outside")

    def feed(self, text: str) -> list[Delta]:
        """Take more of the text; return what is certain now."""
        self._pending += text
        deltas: list[Delta] = []
        if self._state == "start":
            stripped = self._pending.lstrip()
            if stripped.startswith(self._begin):
                self._state, self._pending = "inside", stripped[len(self._begin) :]
            elif not self._begin.startswith(stripped):
                self._state = "outside"
        if self._state == "inside":
            deltas += self._inside()
        if self._state == "behind" and (stripped := self._pending.lstrip()):
            self._state, self._pending = "outside", stripped
        if self._state == "outside" and self._pending:
            deltas.append(Text(self._pending))
            self._pending = ""
        return deltas

    def finish(self) -> list[Delta]:
        """Return the remaining deltas at the end of the text."""
        left, self._pending = self._pending, ""
        if self._state == "inside":
            return [Reasoning(left)] if left.strip() else []
        return [Text(left)] if left and self._state == "start" else []

    def _inside(self) -> list[Delta]:
        if not self._thought:
            self._pending = self._pending.lstrip()
        thought, mark, rest = self._pending.partition(self._end)
        if mark:
            self._state, self._pending = "behind", rest
            thought = thought.rstrip()
        else:
            longest = min(len(self._end) - 1, len(thought))
            held = next((n for n in range(longest, 0, -1) if self._end.startswith(thought[-n:])), 0)
            thought = thought[: len(thought) - held].rstrip()
            self._pending = self._pending[len(thought) :]
        self._thought = self._thought or bool(thought)
        return [Reasoning(thought)] if thought else []
