"""OpenAI's chats and completions, which all other APIs are translated into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from llama_jax.server.asking import Asked
from llama_jax.server.bodies import ChatBody, CompletionBody
from llama_jax.server.errors import Failure
from llama_jax.server.sse import DONE, event


class _Events:
    def more(self, chunk: dict[str, Any]) -> Sequence[bytes]:
        return (event(chunk),)

    def end(self) -> Sequence[bytes]:
        return (DONE,)


class OpenAI[Body: (ChatBody, CompletionBody)]:
    """/v1/chat/completions or /v1/completions."""

    def __init__(self, body: type[Body], answer: type[msgspec.Struct], summary: str):
        """Make the API of one kind of bodies and answers."""
        self.body: type[Body] = body
        self.answer, self.summary = answer, summary

    def asking(self, body: Body) -> Body:
        """See `Dialect`."""
        return body

    def whole(self, body: Body, answer: dict[str, Any]) -> dict[str, Any]:
        """See `Dialect`."""
        return answer

    def events(self, body: Body, asked: Asked) -> _Events:
        """See `Dialect`."""
        return _Events()

    def failed(self, failure: Failure, sent: int) -> bytes:
        """See `Dialect`."""
        return event(failure.body) + DONE
