"""Operations of the server: each is a route and its description at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llama_jax.server.bodies import decoded
from llama_jax.server.errors import Refused
from llama_jax.server.responses import until_gone
from llama_jax.server.served import Served
from llama_jax.server.state import ServerState

Handler = Callable[[ServerState, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Operation:
    """A route with its method and path.

    Attributes:
      path: in starlette's syntax; summary: in a few words.
      handler: function that answers.
      body, answer: types of both; no answer type means plain text.
      streams: whether the answer may come as server-sent events.
    """

    method: Literal["GET", "POST"]
    path: str
    summary: str
    handler: Handler
    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    streams: bool = False


async def read[T](server: ServerState, request: Request, kind: type[T]) -> T:
    """Return the body of a request. A cross-origin web page cannot send the JSON content type without a preflight.

    Raises:
      Refused: its content type is not JSON.
      RequestError: it is not a valid body of this type.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(
            415, "the body is not called JSON", code="unsupported_type", hint="send content-type: application/json"
        )
    return decoded(kind, await request.body(), server.settings.limits.depth)


@asynccontextmanager
async def asked_model(server: ServerState, request: Request, name: str | None) -> AsyncIterator[Served]:
    """Keep the model that a request names loaded while its client waits. The body must have been read.

    Raises:
      Refused: as `Models.use`.
      ClientDisconnect: the client has left.
    """
    request.state.model = server.models.find(name).names[0]
    async with until_gone(request.receive), server.models.use(name) as served:
        yield served
