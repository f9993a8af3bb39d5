"""Operations that generate text."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

from llama_jax.generation.streams import Request as EngineRequest
from llama_jax.generation.threads import BRIEF, run_away
from llama_jax.server.answering import answer, chunks, requests_of
from llama_jax.server.apis import DIALECTS, Dialect
from llama_jax.server.asking import Asked, asked
from llama_jax.server.operations import Handler, Operation, asked_model, read
from llama_jax.server.responses import EventStream, json_response
from llama_jax.server.served import Served
from llama_jax.server.slots import Slot
from llama_jax.server.state import ServerState

IGNORED_HEADER = "x-llama-jax-ignored"
_GRAMMARS = ("response_format", "tools", "output_config", "text")
"""Fields of bodies that grammars are compiled for."""
_BRIEF_BODY = 4 * BRIEF
"""Bytes of a body that is translated at once; token ids take several each."""


def _handler(dialect: Dialect[Any]) -> Handler:
    async def generate(server: ServerState, request: Request) -> Response:
        body, tenant = await read(server, request, dialect.body), request.state.tenant
        size = len(await request.body())
        if body.stream:
            slot, requests = server.models.find(body.model), list[EngineRequest]()
            request.state.model = slot.names[0]

            def events(headers: MutableHeaders) -> AsyncGenerator[Sequence[bytes]]:
                return _events(server, dialect, body, size, tenant, headers, requests)

            seconds = server.settings.limits.keep_alive_s
            return EventStream(events, seconds, dialect.failed, lambda: _progress(slot, requests))
        async with asked_model(server, request, body.model) as served:
            wanted = await _asked(served, dialect, body, size)
            made = await answer(served, wanted, secrets.token_hex(12), requests_of(served, wanted, tenant))
        return json_response(dialect.whole(body, made), headers=_told(wanted))

    return generate


def _progress(slot: Slot, requests: Sequence[EngineRequest]) -> str:
    """Progress of a stream that has no events yet: loading of its model, or reading of its prompts."""
    if slot.served is None:
        return slot.progress
    found = [one for request in requests if (one := slot.served.engine.progress(request))]
    done, whole = (sum(numbers) for numbers in zip(*found, strict=True)) if found else (0, 0)
    return f"{done} of {whole} tokens of the prompt" if done < whole else ""


async def _events(
    server: ServerState,
    dialect: Dialect[Any],
    body: Any,
    size: int,
    tenant: str,
    headers: MutableHeaders,
    requests: list[EngineRequest],
) -> AsyncGenerator[Sequence[bytes]]:
    """Yields the events of a stream, those made at once together; closing it cancels the request. `headers` and
    `requests` are filled in."""
    async with server.models.use(body.model) as served:
        wanted = await _asked(served, dialect, body, size)
        headers.update(_told(wanted))
        requests += requests_of(served, wanted, tenant)
        events = dialect.events(body, wanted)
        async with aclosing(chunks(served, wanted, secrets.token_hex(12), requests)) as source:
            async for made in source:
                if told := [event for chunk in made for event in events.more(chunk)]:
                    yield told
        yield events.end()


async def _asked(served: Served, dialect: Dialect[Any], body: Any, size: int) -> Asked:
    """The translation of a body of `size` bytes."""

    def translated() -> Asked:
        return asked(served, dialect.asking(body))

    grammar = any(getattr(body, name, None) for name in _GRAMMARS)
    return await run_away(translated, brief=size <= _BRIEF_BODY and not grammar)


def _told(wanted: Asked) -> dict[str, str]:
    """The header that names ignored fields."""
    return {IGNORED_HEADER: ", ".join(wanted.ignored)} if wanted.ignored else {}


OPERATIONS = tuple(
    Operation("POST", path, dialect.summary, _handler(dialect), dialect.body, dialect.answer, streams=True)
    for path, dialect in DIALECTS.items()
)
