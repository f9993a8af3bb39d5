"""The server as an ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from llama_jax.errors import LlamaJaxError
from llama_jax.server import adapting, extra, generating, page, status, tokenizing
from llama_jax.server.answers import OpenApiAnswer
from llama_jax.server.errors import Failure, Refused
from llama_jax.server.guard import Guard
from llama_jax.server.openapi import document
from llama_jax.server.operations import Operation
from llama_jax.server.responses import failure_response, json_response
from llama_jax.server.state import ServerState


async def _openapi(server: ServerState, request: Request) -> Response:
    return json_response(document(operations(), server.models.names, keys=bool(server.settings.keys)))


OPERATIONS = (
    *generating.OPERATIONS,
    *tokenizing.OPERATIONS,
    *adapting.OPERATIONS,
    *status.OPERATIONS,
    Operation("GET", "/openapi.json", "This description", _openapi, answer=OpenApiAnswer),
)


def operations() -> tuple[Operation, ...]:
    """Return the operations of this server, followed by those of other packages."""
    return (*OPERATIONS, *extra.operations())


def application(server: ServerState) -> ASGIApp:
    """Return the server as an ASGI application; its engines must be running."""

    def route(operation: Operation) -> Route:
        return Route(operation.path, _endpoint(server, operation), methods=[operation.method])

    app = Starlette(
        routes=[*map(route, OPERATIONS), *page.routes(), *map(route, extra.operations())],
        exception_handlers=dict.fromkeys((LlamaJaxError, HTTPException, ClientDisconnect, Exception), _failed),
    )
    app.router.redirect_slashes = False
    return Guard(app, server, {route.endpoint: route.path for route in app.routes if isinstance(route, Route)})


def _endpoint(server: ServerState, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await operation.handler(server, request)

    return endpoint


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):  # nobody reads it; the status is for the log
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        error = Refused(error.status_code, error.detail, code=code, headers=error.headers)
    return failure_response(Failure.of(error), request.url.path)
