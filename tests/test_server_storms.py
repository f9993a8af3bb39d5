"""Crowds of clients at a server process that read nothing, leave at every moment, or are far too many: the others get
their answers, and nothing is left over.

Environment variables:
  LLAMA_JAX_SOAK: how many short requests the soak has; 1500 by default.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import program
from raw_client import RESET, Held, Raw, asked, compiled, metrics, request, until, unused
from server_process import serving
from tiny_chat_model import write_chat_model

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
SOON_S = 30.0
SOAK = int(os.environ.get("LLAMA_JAX_SOAK", "1500"))

pytestmark = pytest.mark.slow

Process = tuple[subprocess.Popen[str], str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("storms")
    made = write_chat_model(folder / "tiny", context=2048)
    options = ("--rows", "8", "--waiting", "32")
    with serving(made, *options, program=program(folder / "none", stalled_s=2.0, idle_s=2.0)) as (process, said):
        asyncio.run(compiled(said["url"]))  # which takes memory
        yield process, said["url"]


async def well(server: Process) -> None:
    """The server is as it was: nothing is in use, nothing was compiled, and a request is answered."""
    process, url = server
    assert process.poll() is None
    status, _, data = await asked(url, CHAT, BODY | {"max_tokens": 2})
    assert status == 200, data
    assert (await unused(url))["compiles_after_ready_total"] == 0


def test_clients_that_never_read(server: Process) -> None:
    """200 of them ask for more than fits between them and the server. Their requests end, they are cut off, and what
    is read by others comes meanwhile."""
    process, url = server

    async def run() -> None:
        await well(server)
        before = Held.by(process.pid)
        # Log-probabilities make the answers long: 160 kB.
        body = BODY | {"max_tokens": 90, "stream": True, "logprobs": True, "top_logprobs": 20}
        drawn = (await metrics(url))["generation_tokens_total"]
        stalled, statuses = list[Raw](), list[int]()
        for _ in range(10):
            for _ in range(20):
                stalled.append(await Raw.open(url, 4096))
                stalled[-1].writer.transport.pause_reading()
                stalled[-1].send(request(url, CHAT, body))
            statuses.append((await asked(url, CHAT, BODY | {"max_tokens": 8}))[0])
            while (await metrics(url))["requests_waiting"] > 10:
                await asyncio.sleep(0.05)
        assert statuses == [200] * 10
        assert (await unused(url))["generation_tokens_total"] - drawn == 200 * 90 + 10 * 8
        async with asyncio.timeout(2 * SOON_S):
            while Held.by(process.pid).files > before.files + 2 or any(one.state != RESET for one in stalled):
                await asyncio.sleep(0.1)
        for one in stalled:
            one.leave()
        await well(server)
        after = Held.by(process.pid)
        print("never reading:", before, after)
        assert after.memory < before.memory + (64 << 20)

    asyncio.run(run())


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    "phase",
    ["connected", "half the headers", "headers", "half the body", "queued", "prompt", "stream", "half-closed", "kept"],
)
def test_leaving(server: Process, phase: str, streamed: bool) -> None:
    """A client that has gone has nothing; each that was asked for counts as cancelled once, and none that has ended."""
    process, url = server
    long = BODY | {"max_tokens": 1500, "stream": streamed}
    if phase == "prompt":
        long |= {"messages": [{"role": "user", "content": "a word " * 250}]}
    whole = request(url, CHAT, long | ({"max_tokens": 2} if phase == "kept" else {}))
    head = whole.index(b"\r\n\r\n") + 4
    sent = {"connected": 0, "half the headers": head // 2, "headers": head, "half the body": head + 20}.get(phase)

    async def run() -> None:
        await well(server)
        before, files = await metrics(url), Held.by(process.pid).files
        others = []
        if phase == "queued":
            others = [await Raw.open(url) for _ in range(8)]
            for one in others:
                one.send(request(url, CHAT, BODY | {"max_tokens": 1500}))
            await running(url, 8)
        clients = [await Raw.open(url) for _ in range(6)]
        for one in clients:
            one.send(whole[:sent])
            await one.writer.drain()
        if phase == "kept":
            for one in clients:
                assert (await one.answer())[0] == 200
        elif phase == "queued":
            await running(url, 6, "waiting")
        elif sent is None:
            await running(url, 1 if phase == "prompt" else 6)
        if phase == "stream" and streamed:
            for one in clients:
                assert await one.status() == 200
        for one in clients:
            one.writer.write_eof() if phase == "half-closed" else one.leave()
        for one in others:
            one.leave()
        began = time.monotonic()
        after = await unused(url)
        assert time.monotonic() - began < SOON_S
        under_way = 0 if phase == "kept" or sent is not None else 6
        assert after["cancelled_total"] - before["cancelled_total"] == under_way + len(others)
        # Without the clients that have left, 1500 tokens each would have been drawn.
        assert after["generation_tokens_total"] - before["generation_tokens_total"] < 1500 * (under_way + 1)
        await until(lambda: Held.by(process.pid).files <= files)
        for one in clients:
            one.leave()
        await well(server)

    asyncio.run(run())


async def running(url: str, count: int, what: str = "running") -> None:
    async with asyncio.timeout(60):
        while (await metrics(url))[f"requests_{what}"] < count:
            await asyncio.sleep(0.01)


def test_overload(server: Process) -> None:
    """Ten times as many as there is room for, with one long prompt among them: each is answered or told to come back,
    nothing grows, and so it is the second time."""
    process, url = server

    async def storm() -> list[tuple[int, dict[str, str], bytes]]:
        bodies = [BODY | {"max_tokens": 20, "stream": i % 2 == 0} for i in range(400)]
        bodies[20] = bodies[20] | {"messages": [{"role": "user", "content": "a word " * 250}]}
        return await asyncio.gather(*(asked(url, CHAT, body) for body in bodies))

    async def run() -> None:
        held = []
        for _ in range(3):
            answers = await storm()
            statuses = [status for status, _, _ in answers]
            assert set(statuses) == {200, 429}
            assert statuses.count(200) >= 32
            assert all(headers["retry-after"] for status, headers, _ in answers if status == 429)
            await well(server)
            await asyncio.sleep(0.5)
            held.append(Held.by(process.pid))
        print("overload:", statuses.count(200), "answered;", held)
        assert held[-1].memory < held[0].memory + (32 << 20)
        assert held[-1].files <= held[0].files + 1
        assert held[-1].threads == held[0].threads

    asyncio.run(run())


def test_soak(server: Process) -> None:
    """Short requests of which every third is left at random: memory, files, threads and pages stay."""
    process, url = server
    dice = random.Random(0)

    async def one(number: int, free: asyncio.Semaphore) -> None:
        body = BODY | {"max_tokens": dice.randint(1, 30), "stream": dice.random() < 0.5, "seed": number}
        async with free:
            client = await Raw.open(url)
            client.send(request(url, CHAT, body))
            if dice.random() < 1 / 3:
                await asyncio.sleep(dice.random() * 0.05)
            else:
                assert (await client.answer())[0] == 200
            client.leave()

    async def run() -> None:
        free, held = asyncio.Semaphore(24), list[Held]()
        for part in range(5):
            await asyncio.gather(*(one(part * SOAK // 5 + i, free) for i in range(SOAK // 5)))
            await well(server)
            held.append(Held.by(process.pid))
        print(f"soak of {SOAK}:", held)
        assert held[-1].memory < held[1].memory + (24 << 20)
        assert held[-1].files <= held[1].files + 1
        assert held[-1].threads <= held[1].threads

    asyncio.run(run())


def test_lengths_that_lie(server: Process) -> None:
    """A body is read to its limit if it names none, to the length that it names if it is longer, and no further."""
    _, url = server
    head = request(url, CHAT, {}).partition(b"content-length")[0]
    good = request(url, CHAT, BODY | {"max_tokens": 1})

    async def run() -> None:
        client = await Raw.open(url)
        client.send(head + b"transfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(200):  # 20 MB; it is told at 8
                client.send(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
                await client.writer.drain()
        assert await client.status() in (413, 0)
        client.leave()
        client = await Raw.open(url)
        client.send(good + b"and more\r\n\r\n")  # which is no request
        assert (await client.answer())[0] == 200
        assert await client.status() == 400
        assert await asyncio.wait_for(client.reader.read(), SOON_S) is not None
        client.leave()
        for wrong in (b"content-length: -1", b"content-length: 5\r\ncontent-length: 6", b"transfer-encoding: gzip"):
            client = await Raw.open(url)
            client.send(head + wrong + b"\r\n\r\n{}")
            assert 400 <= await client.status() <= 501
            client.leave()
        await well(server)

    asyncio.run(run())


def test_idle_connections(server: Process) -> None:
    """A hundred that ask nothing take no time of the processor, and hardly any memory."""
    process, url = server

    def seconds() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def over(time_s: float) -> float:
        began = seconds()
        await asyncio.sleep(time_s)
        return seconds() - began

    async def run() -> None:
        await well(server)
        before, alone = Held.by(process.pid), await over(3)
        idle = [await Raw.open(url) for _ in range(100)]
        await asyncio.sleep(0.2)
        held, beside = Held.by(process.pid), await over(3)
        for one in idle:
            one.leave()
        print(f"idle: {alone:.2f} s of 3, with 100 connections {beside:.2f};", before, held)
        assert held.files >= before.files + 95
        assert held.memory < before.memory + (8 << 20)
        assert beside < alone + 0.05
        await well(server)

    asyncio.run(run())


def test_it_ends_under_load(tmp_path: Path) -> None:
    """SIGHUP drains as SIGTERM does; a second signal does not wait for those under way, who are told."""
    folder = write_chat_model(tmp_path / "tiny", context=2048)

    async def run(process: subprocess.Popen[str], url: str) -> None:
        clients = [await Raw.open(url) for _ in range(12)]
        for one in clients:
            one.send(request(url, CHAT, BODY | {"max_tokens": 2000, "stream": True}))
        for one in clients[:2]:
            assert await one.status() == 200
        process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(SOON_S):
            while (await asked(url, "/health/ready"))[0] != 503:
                await asyncio.sleep(0.01)
        status, headers, data = await asked(url, CHAT, BODY)
        assert (status, headers["retry-after"]) == (503, "1")
        assert b"about to end" in data
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        rest = await asyncio.gather(*(asyncio.wait_for(one.reader.read(), SOON_S) for one in clients))
        assert all(b"the engine was closed" in data or b"length" in data for data in rest)
        assert sum(b"the engine was closed" in data for data in rest) >= 8
        assert await asyncio.to_thread(process.wait, SOON_S) == 0
        assert time.monotonic() - began < 15
        for one in clients:
            one.leave()

    with serving(folder, "--drain-s", "600") as (process, said):
        asyncio.run(run(process, said["url"]))


def test_nothing_outlives_a_process_that_is_killed(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "tiny")
    with serving(folder) as (process, said):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
        assert [child for child in children if Path(f"/proc/{child}").exists()] == []
        with pytest.raises(ConnectionRefusedError):
            asyncio.run(Raw.open(said["url"]))
