"""The protocol of an API: how its requests become those of OpenAI's chats and completions, and the answers its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

import msgspec

from llama_jax.server.asking import Asked
from llama_jax.server.bodies import ChatBody, CompletionBody
from llama_jax.server.errors import Failure


class Dialect[Body: msgspec.Struct](Protocol):
    """One API: its requests, its answers and its events.

    Attributes:
      summary: of what is asked for; body, answer: types of requests and answers.
    """

    summary: str
    body: type[Body]
    answer: type[msgspec.Struct]

    def asking(self, body: Body) -> ChatBody | CompletionBody:
        """Return what a body means to OpenAI's API. Raises RequestError where it means nothing there."""
        ...

    def whole(self, body: Body, answer: dict[str, Any]) -> dict[str, Any]:
        """Return an answer of OpenAI's API as this one has it."""
        ...

    def events(self, body: Body, asked: Asked, chunks: AsyncIterator[dict[str, Any]]) -> AsyncGenerator[bytes]:
        """Return the server-sent events for the chunks of an answer, whose last one has the counts of tokens if they
        were asked for."""
        ...

    def failed(self, failure: Failure, sent: int) -> bytes:
        """Return the events that end a stream by an error, after `sent` others."""
        ...
