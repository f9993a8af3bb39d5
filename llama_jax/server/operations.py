"""Operations of the server: each is a route and its description at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from llama_jax.server.bodies import decoded
from llama_jax.server.errors import Refused
from llama_jax.server.served import Served

Handler = Callable[[Served, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Operation:
    """A route, by whose method and path clients ask.

    Attributes:
      path: as starlette writes it; summary: in a few words.
      handler: what answers.
      body, answer: types of both; no answer is one in plain text.
      streams: whether the answer may come as server-sent events.
    """

    method: Literal["GET", "POST"]
    path: str
    summary: str
    handler: Handler
    body: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    streams: bool = False


async def read[T](served: Served, request: Request, kind: type[T]) -> T:
    """Return the body of a request. A web page elsewhere cannot send what is called JSON without being asked about it.

    Raises:
      Refused: it is not called JSON.
      RequestError: it is none of that kind.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(
            415, "the body is not called JSON", code="unsupported_type", hint="send content-type: application/json"
        )
    return decoded(kind, await request.body(), served.settings.limits.depth)
