"""HTTP over raw sockets, for clients that behave badly; and what a server's process holds."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from server_process import KEY

RESET = 7
"""State of a connection that the other side has cut off; one that it has closed is in another (8)."""


@dataclass
class Raw:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, url: str, buffer: int | None = None) -> Self:
        """Connects; the kernel keeps `buffer` bytes that were not read."""
        host, _, port = url.removeprefix("http://").rpartition(":")
        made = socket.socket()
        if buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(made, (host, int(port)))
        except OSError:
            made.close()
            raise
        return cls(*await asyncio.open_connection(sock=made, limit=buffer or 1 << 20))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def status(self) -> int:
        """Status of the answer; 0 if the connection ended."""
        line = await asyncio.wait_for(self.reader.readline(), 120)
        return int(line.split()[1]) if line else 0

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """A whole answer that has a length or is in chunks."""
        status, headers = await self.status(), dict[str, str]()
        while line := (await self.reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        if "content-length" in headers:
            return status, headers, await self.reader.readexactly(int(headers["content-length"]))
        data = b""
        while size := int(await self.reader.readline(), 16):
            data += await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()
        return status, headers, data

    @property
    def state(self) -> int:
        """The connection's state according to the kernel (`TCP_INFO`)."""
        return int(self.writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0])

    def leave(self) -> None:
        """Resets the connection."""
        self.writer.transport.abort()


def request(url: str, path: str, body: Any = None, headers: str = "") -> bytes:
    """A request with the key, as it is on the wire."""
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: {url.removeprefix('http://')}\r\n"
    head += f"authorization: Bearer {KEY}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    return f"{head}{headers}\r\n".encode() + data


async def asked(url: str, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
    """The answer to one request on a connection of its own."""
    client = await Raw.open(url)
    client.send(request(url, path, body))
    try:
        return await client.answer()
    finally:
        client.leave()


async def metrics(url: str) -> dict[str, float]:
    """The metrics that have no label but the model's, by their names without the prefix."""
    _, _, data = await asked(url, "/metrics")
    lines = (line.rsplit(" ", 1) for line in data.decode().splitlines() if '{model_name="tiny"}' in line)
    return {name.removeprefix("llama_jax_").partition("{")[0]: float(value) for name, value in lines}


async def compiled(url: str) -> None:
    """Returns once no program is compiled in the background."""
    async with asyncio.timeout(120):
        while b'"programs_behind":0' not in (await asked(url, "/engines"))[2]:
            await asyncio.sleep(0.1)


async def unused(url: str) -> dict[str, float]:
    """The metrics once no request has a row, waits or holds a page."""
    async with asyncio.timeout(60):
        while True:
            found = await metrics(url)
            if found["requests_running"] == found["requests_waiting"] == found["pages_used"] == 0:
                return found
            await asyncio.sleep(0.05)


@dataclass(frozen=True)
class Held:
    """Resources of a process: bytes of memory, open files, threads."""

    memory: int
    files: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> Self:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(os.listdir(f"/proc/{pid}/fd"))
        return cls(1024 * int(status["VmRSS"].split()[0]), files, int(status["Threads"]))


async def until(true: Callable[[], bool]) -> None:
    """Waits for something that this process sees."""
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.02)
