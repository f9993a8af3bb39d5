"""Slow and stalled clients on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import AsyncIterator
from typing import Any

import h11
import pytest
import uvicorn

from llama_jax.server.connections import PIECE, protocol
from llama_jax.server.settings import Limits

LIMITS = Limits(header_s=0.3, stalled_s=0.3)
SOON_S = 10.0
"""Far more than the limits, far less than for ever."""
ESTABLISHED = 1
"""State of a connection that neither side has ended (`TCP_INFO`)."""
HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"


@contextlib.asynccontextmanager
async def listening(app: Any, limits: Limits = LIMITS) -> AsyncIterator[int]:
    """The port of a server."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        config = uvicorn.Config(app, http=protocol(limits), lifespan="off", log_config=None, timeout_keep_alive=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve(sockets=[made]))  # without its handlers of signals
        while not server.started:
            await asyncio.sleep(0.01)
        yield made.getsockname()[1]
        server.should_exit = True
        await task


async def short(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def test_headers_have_a_deadline() -> None:
    """Half of them, nothing at all, and half of the next request's on a connection that was in use."""

    async def run() -> None:
        async with listening(short) as port:
            for sent in (b"GET / HTTP/1.1\r\nhos", b"", HEAD + b"\r\n" + HEAD):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(sent)
                answer = await asyncio.wait_for(reader.read(), SOON_S)
                assert answer.count(b"200 OK") == sent.count(b"\r\n\r\n")
                writer.close()

    asyncio.run(run())


def test_a_body_behind_its_answer_has_a_deadline() -> None:
    """uvicorn reads the rest of a body that no route has read, and would wait for it for ever."""

    async def run() -> None:
        async with listening(short, dataclasses.replace(LIMITS, body_s=0.3)) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"ok"), SOON_S)
            writer.write(b"x")
            assert await asyncio.wait_for(reader.read(), SOON_S) == b""
            writer.close()

            reader, writer = await asyncio.open_connection("127.0.0.1", port)  # one that comes in time
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"ok"), SOON_S)
            for part in (b"1234", b"56789" + HEAD + b"\r\n"):
                writer.write(part)
                await asyncio.sleep(LIMITS.header_s / 4)
            assert (await asyncio.wait_for(reader.readuntil(b"ok"), SOON_S)).startswith(b"HTTP/1.1 200")
            writer.close()

    asyncio.run(run())


PIECES = [b"data: 1\n\n", b"", b"x" * 70_000, b"\r\n0\r\n\r\n"]


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_pieces_are_those_that_h11_reads(version: bytes) -> None:
    """In chunks, twice on a connection; a client of HTTP 1.0 gets no chunks, and the connection ends. Pieces take the
    short way once the answer has begun, except an empty one, which would end it."""
    short = list[bool]()

    async def pieces(scope: Any, receive: Any, send: Any) -> None:
        write = scope["state"][PIECE]
        short.append(write(b"too early"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in PIECES:
            short.append(write(piece))
            if not short[-1]:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def run() -> None:
        async with listening(pieces) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            ours = h11.Connection(h11.CLIENT)
            for turn in range(2 if version == b"1.1" else 1):
                if turn:
                    ours.start_next_cycle()
                asked = ours.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
                writer.write((asked or b"").replace(b"HTTP/1.1", b"HTTP/" + version))
                ours.send(h11.EndOfMessage())
                read, event = b"", None
                while not isinstance(event, h11.EndOfMessage):
                    event = ours.next_event()
                    if event is h11.NEED_DATA:
                        ours.receive_data(await asyncio.wait_for(reader.read(1 << 16), SOON_S))
                    elif isinstance(event, h11.Data):
                        read += event.data
                assert read == b"".join(PIECES)
                assert short == ([False, True, False, True] if version == b"1.1" else [False] * 4) + short[4:]
                short.clear()
            writer.close()

    asyncio.run(run())


def test_a_dripped_header_has_the_same_deadline() -> None:
    async def run() -> float:
        clock = asyncio.get_running_loop().time
        async with listening(short) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD)
            began = clock()
            with contextlib.suppress(ConnectionError):
                while clock() < began + SOON_S:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            return clock() - began

    assert asyncio.run(run()) < SOON_S


def test_a_request_may_take_longer_than_its_headers() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(3 * LIMITS.header_s)
        await short(scope, receive, send)

    async def run() -> bytes:
        async with listening(slow) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"connection: close\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), SOON_S)
            writer.close()
            return answer

    assert asyncio.run(run()).endswith(b"ok")


@pytest.mark.parametrize("few", [False, True])
def test_clients_that_read_nothing_are_cut_off(few: bool) -> None:
    """The application learns that they are gone, and others get their answers meanwhile, whether it sends all or only
    what `PIECE` does not write."""
    gone = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/short":
            return await short(scope, receive, send)

        async def write() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                if not (few and scope["state"][PIECE](b"x" * 65536)):
                    await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0)

        writing = asyncio.create_task(write())
        while (await receive())["type"] != "http.disconnect":
            pass
        writing.cancel()
        gone.append(scope["client"])

    async def run() -> None:
        async with listening(endless) as port:
            stalled = [await asyncio.open_connection("127.0.0.1", port, limit=1) for _ in range(20)]
            for _, writer in stalled:
                writer.write(HEAD + b"\r\n")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD.replace(b"/ ", b"/short ") + b"connection: close\r\n\r\n")
            assert (await asyncio.wait_for(reader.read(), SOON_S)).endswith(b"ok")
            async with asyncio.timeout(SOON_S):
                while len(gone) < len(stalled):
                    await asyncio.sleep(0.02)
            for _, one in (*stalled, (reader, writer)):
                one.transport.abort()

    asyncio.run(run())


@pytest.mark.parametrize(("chunk", "whole"), [(256 << 10, True), (16, False)])
def test_slow_readers(chunk: int, whole: bool) -> None:
    """Who takes an answer slowly gets all of it, even if that takes longer than the deadline; who takes next to nothing
    is cut off, also where the server has said all that there is to say."""
    size = 12 << 20
    most = dataclasses.replace(LIMITS, reader_rate=64 << 10)

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": b"x" * size})

    async def run() -> int:
        async with listening(large, most) as port:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 << 10)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, ("127.0.0.1", port))
                await loop.sock_sendall(client, HEAD + b"\r\n")
                found, began = 0, loop.time()
                while found < size and client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED:
                    assert loop.time() < began + SOON_S
                    found += len(await loop.sock_recv(client, chunk))
                    await asyncio.sleep(0.01)
                assert loop.time() - began > LIMITS.stalled_s
                return found

    assert (asyncio.run(run()) >= size) == whole
