"""Operations that generate text."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama_jax.server.answering import answer, chunks
from llama_jax.server.apis import DIALECTS, Dialect
from llama_jax.server.asking import Asked, asked
from llama_jax.server.operations import Handler, Operation, read
from llama_jax.server.responses import EventStream, json_response, until_gone
from llama_jax.server.served import Served

IGNORED_HEADER = "x-llama-jax-ignored"


def _handler(dialect: Dialect[Any]) -> Handler:
    async def generate(served: Served, request: Request) -> Response:
        body = await read(served, request, dialect.body)
        wanted = await asyncio.to_thread(lambda: asked(served, dialect.asking(body)))
        headers = {IGNORED_HEADER: ", ".join(wanted.ignored)} if wanted.ignored else {}
        name, tenant = secrets.token_hex(12), request.state.tenant
        if wanted.streamed:
            events = _events(dialect, body, wanted, chunks(served, wanted, name, tenant))
            return EventStream(events, served.settings.limits.keep_alive_s, headers, dialect.failed)
        async with until_gone(request.receive):
            made = await answer(served, wanted, name, tenant)
        return json_response(dialect.whole(body, made), headers=headers)

    return generate


async def _events(
    dialect: Dialect[Any], body: Any, wanted: Asked, source: AsyncGenerator[dict[str, Any]]
) -> AsyncGenerator[bytes]:
    """The events of a stream; closing it ends the request."""
    async with aclosing(source), aclosing(dialect.events(body, wanted, source)) as events:
        async for event in events:
            yield event


OPERATIONS = tuple(
    Operation("POST", path, dialect.summary, _handler(dialect), dialect.body, dialect.answer, streams=True)
    for path, dialect in DIALECTS.items()
)
