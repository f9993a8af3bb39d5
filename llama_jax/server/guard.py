"""Checks before every route, of who asks and how much, which neither uvicorn nor starlette makes.

Every route needs the key unless it is in `OPEN`, so that new routes are protected by default.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.server import page
from llama_jax.server.errors import RETRY_S, Failure, Refused
from llama_jax.server.responses import failure_response
from llama_jax.server.settings import Limits, ServerSettings
from llama_jax.server.state import ServerState

OPEN = frozenset({"/health", "/health/live", "/health/ready", *page.FILES})
"""Paths that need no key: they reveal nothing about requests, and answer while the server drains."""
WHILE_DRAINING = OPEN | {"/metrics"}

_ONCE = (b"host", b"origin", b"authorization", b"x-api-key", b"content-length", b"content-type", b"transfer-encoding")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

access_log = logging.getLogger("llama_jax.server.access")
error_log = logging.getLogger("llama_jax.server")


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, server: ServerState, paths: Mapping[Any, str]):
        """Wrap an application that puts the endpoint of a request into its scope.

        Args:
          paths: the path of each endpoint, as metrics name it.
        """
        self._app, self._server, self._paths = app, server, paths
        self._salt = secrets.token_bytes(16)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or pass it on. Other kinds of connections are not answered."""
        if scope["type"] != "http":
            return
        settings, life, began = self._server.settings, self._server.life, time.perf_counter()
        named = [value for name, value in scope["headers"] if name == b"x-request-id"]
        valid = len(named) == 1 and _REQUEST_ID.fullmatch(named[0])
        request_id = named[0] if valid else secrets.token_hex(16).encode()
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id), (b"x-content-type-options", b"nosniff")]
                if not any(name == b"cache-control" for name, _ in message["headers"]):
                    own.append((b"cache-control", b"no-store"))
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        async def refuse(error: BaseException) -> None:
            response = failure_response(Failure.of(error), scope["path"])
            response.headers["connection"] = "close"  # the body has not been read
            await response(scope, receive, sending)

        counted = scope["path"] not in WHILE_DRAINING
        life.active += counted
        try:
            key = check_headers(scope, settings)
            if life.draining and counted:
                raise Refused(503, "the server is about to end", code="draining", headers={"retry-after": str(RETRY_S)})
            scope.setdefault("state", {}).update(tenant=self._tenant(key), request_id=request_id.decode())
            await self._app(scope, limited(receive, settings.limits), sending)
        except Refused as error:
            await refuse(error)
        except Exception as error:
            # Logs neither the error's text nor its traceback: both may quote the prompt.
            error_log.error("request %s: %s at %s", request_id.decode(), type(error).__name__, _place(error))
            if status == 0:
                await refuse(error)
            # Otherwise the answer stays incomplete, and uvicorn closes the connection.
        finally:
            life.active -= counted
            self._log(scope, status, request_id, time.perf_counter() - began)

    def _tenant(self, key: str) -> str:
        """The tenant that a request shares prefixes with: all users of its key."""
        return hmac.digest(self._salt, key.encode(), "sha256").hex()[:16] if key else ""

    def _log(self, scope: Scope, status: int, request_id: bytes, seconds: float) -> None:
        model = scope.get("state", {}).get("model", "")
        self._server.metrics.answered(self._paths.get(scope.get("endpoint"), "none"), status, model)
        if access_log.isEnabledFor(logging.INFO):
            line = {
                "time": round(time.time(), 3),
                "request_id": request_id.decode(),
                "client": (scope.get("client") or ("",))[0],
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "ms": round(1e3 * seconds, 1),
            }
            access_log.info(json.dumps(line))


def check_headers(scope: Scope, settings: ServerSettings) -> str:
    """Check all of a request but its body; return its key, "" if it needs none.

    Raises:
      Refused: it is rejected.
    """
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    _check_sizes(headers, settings.limits)
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _ONCE and name in found:
            raise Refused(400, f"two headers {name.decode()}", code="bad_header", hint="send one")
        found[name] = value
    _check_names(found, settings)
    key = "" if scope["path"] in OPEN else check_key(found, settings.keys)
    if scope["method"] == "POST":
        _check_body(found, settings.limits)
    return key


def check_key(headers: dict[bytes, bytes], keys: Sequence[str]) -> str:
    """Check the key of a request and return it; "" if the server has none. Takes constant time, also for wrong keys.

    Raises:
      Refused: it is missing or wrong.
    """
    if not keys:
        return ""
    bearer = headers.get(b"authorization", b"")
    if bearer and b"x-api-key" in headers:
        raise Refused(400, "a key in authorization and one in x-api-key", code="bad_header", hint="send one")
    kind, _, given = bearer.partition(b" ")
    if kind.lower() != b"bearer":
        given = headers.get(b"x-api-key", b"")
    digest, right = hashlib.sha256(given.strip()).digest(), ""
    for key in keys:
        if hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()):
            right = key
    if not right:
        raise Refused(
            401,
            "no key, or a wrong one" if given else "this server needs a key",
            code="invalid_api_key",
            hint="send the header authorization: Bearer KEY",
            headers={"www-authenticate": "Bearer"},
        )
    return right


def _check_sizes(headers: Sequence[tuple[bytes, bytes]], limits: Limits) -> None:
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > limits.header_count or size > limits.header_bytes:
        raise Refused(
            431,
            f"{len(headers)} headers of {size} bytes; there may be {limits.header_count} of {limits.header_bytes}",
            code="headers_too_large",
        )


def _check_names(headers: dict[bytes, bytes], settings: ServerSettings) -> None:
    """Refuses requests sent by web pages of other sites. The origin's scheme is ignored, since a proxy may have
    terminated https."""
    host = headers.get(b"host", b"").decode("latin-1")
    if not settings.serves(host):
        raise Refused(403, "the Host header does not name this server", code="wrong_host", hint="see --allowed-host")
    origin = headers.get(b"origin", b"://" + headers.get(b"host", b""))
    if origin.partition(b"://")[2].lower() != headers[b"host"].lower():
        raise Refused(403, "requests of web pages elsewhere are not answered", code="wrong_origin")


def _check_body(headers: dict[bytes, bytes], limits: Limits) -> None:
    length = headers.get(b"content-length", b"0")
    if b"transfer-encoding" in headers and b"content-length" in headers:
        raise Refused(400, "a length and transfer-encoding", code="bad_header", hint="send one of them")
    if not length.isdigit() or len(length) > 15:
        raise Refused(400, "content-length is not a length", code="bad_header")
    if int(length) > limits.body:
        raise _too_large(limits.body)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refused(415, "an encoded body", code="unsupported_encoding", hint="send it without content-encoding")


def _too_large(most: int) -> Refused:
    return Refused(413, f"a body of more than {most} bytes", code="body_too_large", hint="see --max-body")


def limited(receive: Receive, limits: Limits) -> Receive:
    """Wrap `receive` to enforce the limits on a body's size and time.

    Raises:
      Refused: it exceeds them; raised by the returned function.
    """
    clock: Callable[[], float] = asyncio.get_running_loop().time
    deadline, size, complete = clock() + limits.body_s, 0, False

    async def receiving() -> Message:
        nonlocal size, complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message: dict[str, Any] = dict(await receive())
        except TimeoutError:
            raise Refused(
                408, f"the body has not come within {limits.body_s:g} s", code="body_too_slow", hint="send it faster"
            ) from None
        if message["type"] == "http.request":
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
        if size > limits.body:
            raise _too_large(limits.body)
        return message

    return receiving


def _place(error: BaseException) -> str:
    """The place of an error's innermost line, without the line's text."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return "?" if at is None else f"{at.tb_frame.f_globals.get('__name__')}:{at.tb_lineno}"
