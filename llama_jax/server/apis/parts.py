"""Answers as a sequence of parts (reasoning, text, tool calls), as in APIs other than OpenAI's chats."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_jax.errors import RequestError
from llama_jax.server.reading import REASONING


@dataclass
class Part:
    """One part, possibly incomplete.

    Attributes:
      text: for a call its arguments; call_id, name: of a call.
    """

    kind: Literal["reasoning", "text", "call"]
    text: str = ""
    call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Change:
    """Change of a part: it begins, has more text, or ends."""

    kind: Literal["begin", "more", "end"]
    part: Part
    text: str = ""


@dataclass
class End:
    """The end of an answer, filled in once it is known."""

    finish_reason: str = ""
    stop_reason: Any = None
    usage: dict[str, Any] = field(default_factory=dict)


def text_of(content: Any, kinds: Container[str], where: str, param: str) -> str:
    """Return the text of a request's content: a string, or a list of blocks of text.

    Args:
      kinds: types of text blocks.
      where: what has this content; param: the field of the request; both for the error.

    Raises:
      RequestError: it contains something else.
    """
    if isinstance(content, str):
        return content
    made = ""
    for block in content if isinstance(content, list) else [None]:
        match block:
            case {"type": str(kind), "text": str(text)} if kind in kinds:
                made += text
            case _:
                raise RequestError(
                    f"{where} has content that is not text", param=param, hint="this model reads text only"
                )
    return made


def parts_of(message: dict[str, Any]) -> list[Part]:
    """Return the parts of a whole message."""
    made = [Part("reasoning", message[REASONING])] if message.get(REASONING) else []
    made += [Part("text", message["content"])] if message["content"] else []
    calls = message.get("tool_calls", ())
    return made + [Part("call", c["function"]["arguments"], c["id"], c["function"]["name"]) for c in calls]


def end_of(answer: dict[str, Any]) -> End:
    """Return the end of a whole answer."""
    (choice,) = answer["choices"]
    return End(choice["finish_reason"], choice["stop_reason"], answer["usage"])


class Changes:
    """Reads the changes of parts in a stream's chunks, in order.

    Attributes:
      end: the end of the answer, filled in once it is known.
    """

    def __init__(self) -> None:
        """Begin before the first part."""
        self.end = End()
        self._part: Part | None = None

    def more(self, chunk: dict[str, Any]) -> Iterator[Change]:
        """Yield the changes in a chunk."""
        self.end.usage = chunk.get("usage") or self.end.usage
        for choice in chunk["choices"]:
            for kind, text, call in _of_delta(choice["delta"]):
                if self._part is None or self._part.kind != kind or call:
                    yield from self.last()
                    self._part = Part(kind, "", call.get("id", ""), call.get("function", {}).get("name", ""))
                    yield Change("begin", self._part)
                if text:
                    self._part.text += text
                    yield Change("more", self._part, text)
            if choice["finish_reason"]:
                self.end.finish_reason, self.end.stop_reason = choice["finish_reason"], choice["stop_reason"]

    def last(self) -> Iterator[Change]:
        """Yield the end of the part that has begun, if any."""
        if self._part is not None:
            yield Change("end", self._part)


def _of_delta(delta: dict[str, Any]) -> Iterator[tuple[Literal["reasoning", "text", "call"], str, dict[str, Any]]]:
    """Kind and text of a delta, and the call that begins with it."""
    if delta.get(REASONING):
        yield "reasoning", delta[REASONING], {}
    if delta.get("content"):
        yield "text", delta["content"], {}
    for call in delta.get("tool_calls", ()):
        yield "call", call["function"]["arguments"], call if "id" in call else {}
