"""Connections: deadlines for clients that send or read too slowly, which uvicorn lacks, and a short way for streams."""

from __future__ import annotations

import asyncio
import socket
import struct
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_jax.server.settings import Limits

PIECE = "piece"
"""Name in a scope's state of a function that writes a piece of a streamed answer, past every layer that has a say only
when an answer begins; they take as long as all the rest of a token. It returns False, and has written nothing, where
`send` must be called: for an answer without chunks, or that has not begun, and to wait for a client that does not
read."""

_NO_LINGER = struct.pack("ii", 1, 0)
_MOST_INCOMPLETE = 64 << 10
"""Bytes of incomplete headers, unless uvicorn is told otherwise."""


class _Connection(h11.Connection):
    """Knows whether the current answer is sent in chunks."""

    chunked = False

    def send(self, event: Any) -> Any:
        """Returns the bytes to write; see h11."""
        data = super().send(event)
        if isinstance(event, h11.Response):
            self.chunked = b"transfer-encoding: chunked" in (data or b"").lower()
        return data


def protocol(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's h11 protocol, with deadlines for headers and for readers, and with `PIECE`."""

    class Impatient(H11Protocol):
        """Closes connections whose headers do not arrive, or that read too slowly.

        Deadlines also pass while the process is stopped (SIGSTOP). Hence a second look, once what has arrived meanwhile
        is read.
        """

        _headers: asyncio.TimerHandle | None = None
        _reader: asyncio.TimerHandle | None = None
        _left: int = 0

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.conn: _Connection = _Connection(
                h11.SERVER, self.config.h11_max_incomplete_event_size or _MOST_INCOMPLETE
            )

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # to learn of every byte that the client does not read
            self.app_state = {**self.app_state, PIECE: self._piece}
            self._await_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._await_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.app_state = {}  # which refers to the connection
            self._forget_headers()
            self._forget_reader()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._await_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._forget_reader()

        def _piece(self, data: bytes) -> bool:
            """Writes a piece of an answer that has begun; returns whether it could: see `PIECE`."""
            if self.flow.write_paused or not (self.conn.chunked and self.cycle.response_started and data):
                return False
            if not self.transport.is_closing():
                self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            return True

        def _await_reader(self) -> None:
            """In each of these periods the client must read everything, or at least `reader_rate`."""
            self._left = self.transport.get_write_buffer_size()
            self._reader = self.loop.call_later(limits.stalled_s, self._check_reader)

        def _check_reader(self, *, again: bool = False) -> None:
            if not again:
                self._reader = self.loop.call_later(0, partial(self._check_reader, again=True))
                return
            taken = self._left - self.transport.get_write_buffer_size()
            if taken < limits.reader_rate * limits.stalled_s:
                # Otherwise the kernel keeps megabytes of unsent data for as long as the client is connected.
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                self.transport.abort()
            else:
                self._await_reader()

        @property
        def _incomplete(self) -> bool:
            """Whether the next step is the client's, and no application waits for it."""
            return self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE

        def _await_headers(self) -> None:
            """The time runs from the first byte of a request until its headers are complete, or from the first byte of
            a body that comes after its answer until that is."""
            if not self._incomplete:
                self._forget_headers()
            elif self._headers is None:
                seconds = limits.header_s if self.conn.their_state is h11.IDLE else limits.body_s
                self._headers = self.loop.call_later(seconds, self._close_idle)

        def _forget_headers(self) -> None:
            if self._headers is not None:
                self._headers.cancel()
                self._headers = None

        def _forget_reader(self) -> None:
            if self._reader is not None:
                self._reader.cancel()
                self._reader = None

        def _close_idle(self, *, again: bool = False) -> None:
            self._headers = None if again else self.loop.call_later(0, partial(self._close_idle, again=True))
            if again and self._incomplete:
                self.transport.close()

    return Impatient
