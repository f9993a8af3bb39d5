"""Sending of answers, and detection of clients that have left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama_jax.errors import LlamaJaxError
from llama_jax.server.connections import PIECE
from llama_jax.server.errors import Failure, body_of
from llama_jax.server.sse import KEEP_ALIVE, comment


def json_response(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON answer."""
    return Response(msgspec.json.encode(data), status, dict(headers or {}), "application/json")


def failure_response(failure: Failure, path: str) -> Response:
    """Return the answer for an error, in the format of the path's API."""
    return json_response(body_of(failure, path), failure.status, failure.headers)


@asynccontextmanager
async def until_gone(receive: Receive) -> AsyncIterator[None]:
    """Cancels the enclosed work once the client has left. The body must have been read.

    Raises:
      ClientDisconnect: it has left.
    """

    async def watch(limit: asyncio.Timeout) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        limit.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(None) as limit:
            watching = asyncio.create_task(watch(limit))
            try:
                yield
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
    except TimeoutError:
        if limit.expired():
            raise ClientDisconnect from None
        raise


def _unwritten(data: bytes) -> bool:
    """`PIECE` of a server that has no short way."""
    return False


class EventStream(Response):
    """Server-sent events. An error before the first event becomes an ordinary error answer with its status, a later one
    an event."""

    def __init__(
        self,
        events: Callable[[MutableHeaders], AsyncGenerator[Sequence[bytes]]],
        keep_alive_s: float,
        failed: Callable[[Failure, int], bytes],
        progress: Callable[[], str] = str,
    ):
        """Make an answer from events.

        Args:
          events: called with the headers, which it may change until the first event or comment; yields those that are
            sent together.
          failed: makes the events for an error, after a number of others.
          keep_alive_s: a comment is sent after this time without events, since proxies drop silent connections.
          progress: returns the comment's text, if any.
        """
        super().__init__(headers={"x-accel-buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._keep_alive_s = events(self.headers), keep_alive_s
        self._failed, self._progress = failed, progress
        self._sending, self._begun, self._sent = asyncio.Lock(), False, 0
        self._piece: Callable[[bytes], bool] = _unwritten
        self._clock, self._last = asyncio.get_running_loop().time, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client leaves; either closes the generator.

        Raises:
          LlamaJaxError: from the events, if none has been sent.
          ClientDisconnect: the client left before the first.
        """
        self._piece = scope.get("state", {}).get(PIECE, self._piece)
        try:
            async with aclosing(self._events), until_gone(receive):
                await self._send_all(send)
        except ClientDisconnect:
            if not self._begun:
                raise

    async def _send_all(self, send: Send) -> None:
        alive = asyncio.create_task(self._keep_alive(send))
        try:
            async for events in self._events:
                data = b"".join(events)
                if not self._piece(data):
                    await self._send(send, data)
                self._last = self._clock()
                self._sent += len(events)
        except LlamaJaxError as error:
            if not self._begun:
                raise
            await self._send(send, self._failed(Failure.of(error), self._sent))
        finally:
            alive.cancel()
            await asyncio.gather(alive, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        async with self._sending:
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        self._last = self._clock()
        while True:
            await asyncio.sleep(self._last + self._keep_alive_s - self._clock())
            if self._clock() >= self._last + self._keep_alive_s:
                await self._send(send, comment(self._progress() or KEEP_ALIVE))
                self._last = self._clock()
