"""Parses an answer's text into a message: content, reasoning and tool calls, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from llama_jax.text.tools import Arguments, Call, Delta, Reasoning, ReasoningParser, Text
from llama_jax.text.tools.formats import Parser, openai_id

REASONING = "reasoning_content"


class ChatReader:
    """Reads one answer incrementally."""

    def __init__(
        self,
        reasoning: ReasoningParser | None = None,
        tools: Parser | None = None,
        call_id: Callable[[], str] = openai_id,
        *,
        several: bool = True,
    ):
        """Begin at the start of an answer.

        Args:
          reasoning, tools: their parsers, if the answer can have any.
          several: whether calls after the first count.
        """
        self._reasoning, self._tools, self._call_id, self._several = reasoning, tools, call_id, several
        self._calls, self._arguments = 0, ""

    def reasoning_tokens(self, texts: Iterable[str]) -> int:
        """Return the number of an answer's tokens that are reasoning, including its marks.

        Args:
          texts: the text that each token adds to the answer, which this reader must not have read.
        """
        parser, count = self._reasoning, 0
        if parser is None:
            return 0
        for text in texts:
            parser.feed(text)
            if parser.ended:
                return count + parser.began
            count += 1
        return count if parser.began else 0

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Take more of the text; return the deltas of the message."""
        if self._reasoning is None and self._tools is None:  # most answers, token by token
            return [{"content": text}] if text else []
        return self._messages(self._reasoning.feed(text) if self._reasoning else [Text(text)])

    def finish(self) -> list[dict[str, Any]]:
        """Return the remaining deltas at the end of the text."""
        made = self._messages(self._reasoning.finish()) if self._reasoning else []
        return [*made, *self._shaped(self._tools.finish())] if self._tools else made

    def reason(self, finish_reason: str | None) -> str | None:
        """Return the finish reason for the client: tool calls only if the last call is complete."""
        if finish_reason != "stop" or not self._calls:
            return finish_reason
        try:
            msgspec.json.decode(self._arguments)
        except msgspec.DecodeError:
            return finish_reason
        return "tool_calls"

    def _messages(self, deltas: Iterable[Delta]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for delta in deltas:
            inside = self._tools.feed(delta.text) if self._tools and isinstance(delta, Text) else [delta]
            made += self._shaped(inside)
        return made

    def _shaped(self, deltas: Iterable[Delta]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = []
        for delta in deltas:
            match delta:
                case Call(name):
                    self._calls, self._arguments = self._calls + 1, ""
                    call = {"id": self._call_id(), "type": "function", "function": {"name": name, "arguments": ""}}
                    shaped: dict[str, Any] = {"tool_calls": [{"index": self._calls - 1, **call}]}
                case Arguments(text):
                    self._arguments += text
                    shaped = {"tool_calls": [{"index": self._calls - 1, "function": {"arguments": text}}]}
                case Reasoning(text):
                    shaped = {REASONING: text}
                case Text(text):
                    shaped = {"content": text} if text else {}
            if shaped and ("tool_calls" not in shaped or self._calls == 1 or self._several):
                made.append(shaped)
        return made


def message_of(deltas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the whole message of an answer; it lacks content only if there are calls."""
    texts = {"content": "", REASONING: ""}
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for name in texts:
            texts[name] += delta.get(name, "")
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({key: part[key] for key in ("id", "type")} | {"function": dict(part["function"])})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": texts["content"], "refusal": None}
    if texts[REASONING]:
        message[REASONING] = texts[REASONING]
    if calls:
        message |= {"content": texts["content"] or None, "tool_calls": calls}
    return message
