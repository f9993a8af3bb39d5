"""A client of an ASGI application in the same process, which can leave at any moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """An answer as far as it has come."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def events(self) -> list[Any]:
        """Data of the server-sent events; the last must be the one that ends a stream."""
        *events, last, rest = self.data.decode().split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


@dataclass
class Call:
    """A request that is under way."""

    answer: Answer
    leave: Callable[[], None]
    begun: asyncio.Event
    task: asyncio.Task[None]


@asynccontextmanager
async def opened(
    app: Any,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    chunks: Sequence[bytes] | None = None,
) -> AsyncIterator[Call]:
    """Sends a request; leaves it when the block ends, unless it has been answered.

    Args:
      body: as JSON, bytes as they are; chunks: instead of it, the last of which does not end the body.
      headers: instead of the usual ones where they have their names.
    """
    given = list(headers.items() if isinstance(headers, Mapping) else headers)
    usual = {"host": "127.0.0.1:8000"} | ({"content-type": "application/json"} if method == "POST" else {})
    sent = [*((k, v) for k, v in usual.items() if k not in dict(given)), *given]
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    parts = [(data, False)] if chunks is None else [(chunk, True) for chunk in chunks]
    answer, gone, begun = Answer(), asyncio.Event(), asyncio.Event()
    path, _, query = path.partition("?")

    async def receive() -> dict[str, Any]:
        if parts:
            chunk, more = parts.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": more}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            answer.data += message.get("body", b"")
            if answer.data:
                begun.set()

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(k.lower().encode(), v.encode()) for k, v in sent],
        "client": ("127.0.0.1", 1234),
        "server": ("127.0.0.1", 8000),
    }
    task = asyncio.ensure_future(app(scope, receive, send))
    try:
        yield Call(answer, gone.set, begun, task)
    finally:
        gone.set()
        await asyncio.wait_for(task, 60)


async def call(app: Any, method: str, path: str, body: Any = None, **options: Any) -> Answer:
    """The whole answer to a request; arguments as of `opened`."""
    async with opened(app, method, path, body, **options) as under_way:
        await asyncio.wait_for(asyncio.shield(under_way.task), 60)
    return under_way.answer
