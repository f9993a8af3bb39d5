"""The routes."""

from __future__ import annotations

import asyncio
import secrets
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
from llama_jax.server import page
from llama_jax.server.answering import answer, events
from llama_jax.server.asking import asked, text_messages
from llama_jax.server.bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, decoded
from llama_jax.server.errors import Failure, Refused
from llama_jax.server.guard import Guard
from llama_jax.server.responses import EventStream, failure_response, json_response, until_gone
from llama_jax.server.served import Served
from llama_jax.text.chat import encode_chat

IGNORED_HEADER = "x-llama-jax-ignored"


def application(served: Served) -> ASGIApp:
    """Return the server as an ASGI application; its engine is running."""

    async def chat_completions(request: Request) -> Response:
        return await _generate(served, request, ChatBody)

    async def completions(request: Request) -> Response:
        return await _generate(served, request, CompletionBody)

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
        return failure_response(Failure.of(error))

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/version", version),
            Route("/metrics", metrics),
            *page.routes(),
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


async def _generate(served: Served, request: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
    body = await _read(served, request, kind)
    wanted = await asyncio.to_thread(asked, served, body)
    headers = {IGNORED_HEADER: ", ".join(wanted.ignored)} if wanted.ignored else {}
    name, tenant = secrets.token_hex(12), request.state.tenant
    if wanted.streamed:
        stream = events(served, wanted, name, tenant)
        return EventStream(stream, served.settings.limits.keep_alive_s, headers)
    async with until_gone(request.receive):
        made = await answer(served, wanted, name, tenant)
    return json_response(made, headers=headers)


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
    served.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give one of prompt and messages", param="prompt", hint='e.g. {"prompt": "Hello"}')
    if body.messages is not None:
        messages = text_messages(body.messages)
        return encode_chat(served.tokenizer, messages, add_generation_prompt=body.add_generation_prompt)
    if body.prompt and body.add_special_tokens:
        return encode_prompt(served.tokenizer, body.prompt)
    return served.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
