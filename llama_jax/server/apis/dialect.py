"""The protocol of an API: translates its requests into OpenAI's chats and completions, and their answers back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from llama_jax.server.asking import Asked
from llama_jax.server.bodies import ChatBody, CompletionBody
from llama_jax.server.errors import Failure


class Events(Protocol):
    """The server-sent events of one answer."""

    def more(self, chunk: dict[str, Any]) -> Sequence[bytes]:
        """Return the events for a chunk of OpenAI's API; the last chunk has the token counts if requested."""
        ...

    def end(self) -> Sequence[bytes]:
        """Return the events after the last chunk."""
        ...


class Dialect[Body: msgspec.Struct](Protocol):
    """One API: its requests, its answers and its events.

    Attributes:
      summary: of what is asked for; body, answer: types of requests and answers.
    """

    summary: str
    body: type[Body]
    answer: type[msgspec.Struct]

    def asking(self, body: Body) -> ChatBody | CompletionBody:
        """Translate a body into OpenAI's API. Raises RequestError if it has no equivalent there."""
        ...

    def whole(self, body: Body, answer: dict[str, Any]) -> dict[str, Any]:
        """Translate an answer of OpenAI's API into this one."""
        ...

    def events(self, body: Body, asked: Asked) -> Events:
        """Return the maker of an answer's events."""
        ...

    def failed(self, failure: Failure, sent: int) -> bytes:
        """Return the events that end a stream with an error, after `sent` others."""
        ...
