"""Engines that hang, hold the interpreter or take their process down: clients are told, and a supervisor learns it."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from faulty_server import program
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
