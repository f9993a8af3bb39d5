"""The routes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from llama_jax import __version__
from llama_jax.errors import EngineFailed, LlamaJaxError, RequestError
from llama_jax.generation import encode_prompt
from llama_jax.server.answering import answer, chunks
from llama_jax.server.apis import DIALECTS, Dialect
from llama_jax.server.apis.anthropic import CountBody, chat_of
from llama_jax.server.asking import Asked, asked, chat_ids
from llama_jax.server.bodies import ChatBody, DetokenizeBody, TokenizeBody, decoded, given
from llama_jax.server.errors import Failure, Refused
from llama_jax.server.guard import Guard
from llama_jax.server.responses import EventStream, failure_response, json_response, until_gone
from llama_jax.server.served import Served
from llama_jax.server.tooling import offer_of

IGNORED_HEADER = "x-llama-jax-ignored"


def application(served: Served) -> ASGIApp:
    """Return the server as an ASGI application; its engine is running."""

    def generating(dialect: Dialect[Any]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await _generate(served, request, dialect)

        return endpoint

    async def models(request: Request) -> Response:
        return json_response({"object": "list", "data": [_model(served, name) for name in served.names]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        served.check_model(name)
        return json_response(_model(served, name))

    async def tokenize(request: Request) -> Response:
        body = await _read(served, request, TokenizeBody)
        ids = await asyncio.to_thread(_tokenized, served, body)
        return json_response({"tokens": ids, "count": len(ids), "max_model_len": served.capacity})

    async def count_tokens(request: Request) -> Response:
        body = await _read(served, request, CountBody)
        ids = await asyncio.to_thread(lambda: _chat_tokenized(served, chat_of(body)))
        return json_response({"input_tokens": len(ids)})

    async def detokenize(request: Request) -> Response:
        body = await _read(served, request, DetokenizeBody)
        text = await asyncio.to_thread(served.tokenizer.decode, body.tokens, skip_special_tokens=False)
        return json_response({"prompt": text})

    async def live(request: Request) -> Response:
        return json_response({"status": "live"})

    async def ready(request: Request) -> Response:
        status, reason = readiness(served)
        return json_response({"status": status} | ({"reason": reason} if reason else {}), 503 if reason else 200)

    async def version(request: Request) -> Response:
        return json_response({"version": __version__})

    async def metrics(request: Request) -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def failed(request: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):  # nobody reads it; the status is for the log
            return Response(status_code=499)
        if isinstance(error, HTTPException):
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
            error = Refused(error.status_code, error.detail, code=code, headers=error.headers)
        return failure_response(Failure.of(error), request.url.path)

    app = Starlette(
        routes=[
            *(Route(path, generating(dialect), methods=["POST"]) for path, dialect in DIALECTS.items()),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/version", version),
            Route("/metrics", metrics),
        ],
        exception_handlers={LlamaJaxError: failed, HTTPException: failed, ClientDisconnect: failed, Exception: failed},
    )
    app.router.redirect_slashes = False
    return Guard(app, served, {route.endpoint: route.path for route in app.routes if isinstance(route, Route)})


def readiness(served: Served) -> tuple[str, str]:
    """Return what the server is, and why it takes no requests: "" if it does."""
    if served.life.draining:
        return "draining", "the server is about to end"
    try:
        served.engine.snapshot()
    except EngineFailed as error:
        return "failed", str(error)
    if (age := served.engine.step_age_s) > served.settings.limits.step_s:
        return "stalled", f"the device has worked at one step for {age:.0f} s"
    return "ready", ""


async def _generate(served: Served, request: Request, dialect: Dialect[Any]) -> Response:
    body = await _read(served, request, dialect.body)
    wanted = await asyncio.to_thread(lambda: asked(served, dialect.asking(body)))
    headers = {IGNORED_HEADER: ", ".join(wanted.ignored)} if wanted.ignored else {}
    name, tenant = secrets.token_hex(12), request.state.tenant
    if wanted.streamed:
        events = _events(dialect, body, wanted, chunks(served, wanted, name, tenant))
        return EventStream(events, served.settings.limits.keep_alive_s, headers, dialect.failed)
    async with until_gone(request.receive):
        made = await answer(served, wanted, name, tenant)
    return json_response(dialect.whole(body, made), headers=headers)


async def _events(
    dialect: Dialect[Any], body: Any, wanted: Asked, source: AsyncGenerator[dict[str, Any]]
) -> AsyncGenerator[bytes]:
    """The events of a stream; closing it ends the request."""
    async with aclosing(source), aclosing(dialect.events(body, wanted, source)) as events:
        async for event in events:
            yield event


async def _read[T](served: Served, request: Request, kind: type[T]) -> T:
    return decoded(kind, await request.body(), served.settings.limits.depth)


def _model(served: Served, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "llama-jax",
        "root": served.names[0],
        "max_model_len": served.capacity,
    }


def _tokenized(served: Served, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give one of prompt and messages", param="prompt", hint='e.g. {"prompt": "Hello"}')
    if body.messages is not None:
        return _chat_tokenized(served, body, add_generation_prompt=body.add_generation_prompt)
    served.check_model(body.model)
    if body.prompt and body.add_special_tokens:
        return encode_prompt(served.tokenizer, body.prompt)
    return served.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)


def _chat_tokenized(served: Served, body: TokenizeBody | ChatBody, **options: Any) -> list[int]:
    served.check_model(body.model)
    fields = given(body)
    offer = offer_of(served, fields)
    return chat_ids(served, fields, offer, **options)
