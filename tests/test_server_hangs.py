"""Engines that hang, hold the interpreter or take their process down: clients are told, and a supervisor learns it."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from faulty_server import program
from raw_client import Raw, asked, metrics, request, unused
from server_process import KEY, serving
from tiny_chat_model import write_chat_model

HEADERS = {"authorization": f"Bearer {KEY}"}
BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 150, "ignore_eos": True}
HUNG_S = 4.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("hangs") / "tiny")


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [("hang", 70, "device hangs"), ("hold", 1, None), ("segfault", -signal.SIGSEGV, None), ("exit", 3, None)],
)
def test_the_process_ends(folder: Path, tmp_path: Path, fault: str, code: int, told: str | None) -> None:
    """With a code that no server ends with by itself, and soon; where its loop still runs, clients get an error."""
    file = tmp_path / "fault"
    with serving(folder, "--hung-s", str(HUNG_S), program=program(file)) as (process, said):
        with httpx2.Client(base_url=said["url"], headers=HEADERS, timeout=60) as client:
            assert client.post("/v1/chat/completions", json=BODY | {"max_tokens": 2}).status_code == 200
            assert client.get("/health/ready").status_code == 200
            began = time.monotonic()
            file.write_text(fault)
            try:
                answer: Any = client.post("/v1/chat/completions", json=BODY)
            except httpx2.TransportError:
                answer = None
        assert process.wait(30) == code
        assert time.monotonic() - began < 5 * HUNG_S + 10
        assert process.stderr is not None
        log = process.stderr.read()
    if told is None:
        assert answer is None
    else:
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded_error")
        assert told in answer.text
        assert "the device has worked at one step" in log
    assert (fault == "hold") == ("Timeout (0:00:04)!" in log)


def answer_of(answer: Any) -> Any:
    status, _, data = answer
    assert status == 200, data
    return json.loads(data)["choices"]


def test_a_process_that_is_stopped_goes_on(folder: Path, tmp_path: Path) -> None:
    """SIGSTOP for longer than every deadline of a client: streams go on after SIGCONT, requests that came meanwhile
    are answered, and what clients left meanwhile is cancelled."""
    chat, stopped_s = "/v1/chat/completions", 3.0
    limits = {"header_s": 1.0, "body_s": 1.0, "stalled_s": 1.0, "idle_s": 60.0}

    async def run(process: Any, url: str) -> None:
        whole = await asked(url, chat, BODY | {"temperature": 0})
        before = await unused(url)
        streams = [await Raw.open(url) for _ in range(2)]
        for one in streams:
            one.send(request(url, chat, BODY | {"temperature": 0, "stream": True}))
            assert await one.status() == 200
        half, leaver = await Raw.open(url), await Raw.open(url)
        sent = request(url, chat, BODY | {"max_tokens": 2})
        half.send(sent[: len(sent) // 2])
        leaver.send(request(url, chat, BODY))
        async with asyncio.timeout(30):
            while (await metrics(url))["requests_waiting"] < 1:
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asked(url, "/health/ready"), 0.5)
        leaver.leave()
        half.send(sent[len(sent) // 2 :])
        late = await Raw.open(url)
        late.send(sent)
        await asyncio.sleep(stopped_s)
        process.send_signal(signal.SIGCONT)
        assert [await late.status(), await half.status()] == [200, 200]
        for one in streams:
            data = await asyncio.wait_for(one.reader.read(1 << 20), 30)
            while b"[DONE]" not in data:
                data += await asyncio.wait_for(one.reader.read(1 << 20), 30)
            assert b'"finish_reason":"length"' in data
        after = await unused(url)
        assert after["cancelled_total"] - before["cancelled_total"] == 1
        assert after["compiles_after_ready_total"] == 0
        assert (await asked(url, "/health/ready"))[0] == 200
        assert answer_of(await asked(url, chat, BODY | {"temperature": 0})) == answer_of(whole)
        for one in (*streams, half, late):
            one.leave()

    slow = tmp_path / "fault"
    with serving(folder, program=program(slow, **limits)) as (process, said):
        asyncio.run(run(process, said["url"]))
        assert process.poll() is None
