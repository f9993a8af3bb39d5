"""A client that costs little, to load servers with: a general one takes more time for a request than a server does."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import h11

from llama_jax.errors import EngineFailed, NetworkError
from llama_jax.remote import CONNECT_S, READ_S, Remote, refusal

_READ = 1 << 16


@dataclass(eq=False)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    state: h11.Connection


class Caller:
    """Connections to a server with OpenAI's API, within `async with`; each is used again after a whole answer."""

    def __init__(self, remote: Remote):
        """Args: the server, and its key."""
        parts = urlsplit(remote.url)
        self._url, self._path, self._host = remote.url, parts.path, parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._secure = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"host": parts.netloc, "content-type": "application/json", **remote.headers}
        self._free: list[_Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for one in self._free:
            one.writer.close()

    async def events(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The events of a streamed answer, as they come; errors as for `Remote.events`."""
        data = json.dumps({**body, "stream": True}).encode()
        headers = [*self._headers.items(), ("content-length", str(len(data)))]
        connection = self._kept() or await self._opened()
        done = False
        try:
            state = connection.state
            head = state.send(h11.Request(method="POST", target=self._path + path, headers=headers)) or b""
            connection.writer.write(head + (state.send(h11.Data(data=data)) or b""))
            state.send(h11.EndOfMessage())
            status, text = 0, b""
            while not isinstance(event := await self._next(connection), h11.EndOfMessage | h11.ConnectionClosed):
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    text += event.data
                    if status == 200:
                        *lines, text = text.split(b"\n")
                        for line in lines:
                            if (found := _event(line)) is not None:
                                yield found
                            done = done or line.startswith(b"data: [DONE]")
            if status != 200:
                raise refusal(status, text.decode(errors="replace"))
        except ValueError as error:
            what = f"{self._url} answers with what is not JSON: {error}"
            raise NetworkError(what, hint="is it OpenAI's API?") from error
        except (OSError, h11.RemoteProtocolError) as error:
            what = f"{self._url} does not answer: {error or type(error).__name__}"
            raise NetworkError(what, hint="is the server running?") from error
        finally:
            if done and state.our_state is h11.DONE is state.their_state:
                state.start_next_cycle()
                self._free.append(connection)
            else:
                connection.writer.close()
        if not done:
            raise NetworkError(f"{self._url} ended an answer before its end", hint="look into the server's log")

    def _kept(self) -> _Connection | None:
        """A connection that can be used again, if there is one: the server may have ended some."""
        while self._free:
            connection = self._free.pop()
            if not connection.reader.at_eof():
                return connection
            connection.writer.close()
        return None

    async def _opened(self) -> _Connection:
        try:
            async with asyncio.timeout(CONNECT_S):
                made = await asyncio.open_connection(self._host, self._port, ssl=self._secure)
        except OSError as error:  # TimeoutError is one
            what = f"{self._url} does not answer: {error or type(error).__name__}"
            raise NetworkError(what, hint="is the server running, and the URL right?") from error
        return _Connection(*made, h11.Connection(h11.CLIENT))

    async def _next(self, connection: _Connection) -> Any:
        while (event := connection.state.next_event()) is h11.NEED_DATA:
            async with asyncio.timeout(READ_S):
                connection.state.receive_data(await connection.reader.read(_READ))
        return event


def _event(line: bytes) -> dict[str, Any] | None:
    """The event of a line, if it has one."""
    kind, _, data = line.partition(b":")
    if kind != b"data" or data.strip() == b"[DONE]":
        return None
    found: dict[str, Any] = json.loads(data)
    if "error" in found:
        raise EngineFailed(f"the server ended the answer: {found['error']}", hint="look into its log")
    return found
