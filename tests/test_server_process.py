"""The server as a process, behind a socket: OpenAI's own client, slow clients, signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_process import KEY, serving
from tiny_chat_model import write_chat_model

MESSAGES = [{"role": "user", "content": "Hi"}]
LONG = {"model": "tiny", "messages": MESSAGES, "max_tokens": 150, "extra_body": {"ignore_eos": True}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("server") / "tiny")


def client(said: dict[str, Any], **options: Any) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{said['url']}/v1", **{"api_key": KEY, "max_retries": 0, "timeout": 60} | options)


@pytest.fixture(scope="module")
def said(folder: Path) -> Iterator[dict[str, Any]]:
    with serving(folder) as (_, said):
        yield said


def connected(said: dict[str, Any]) -> socket.socket:
    host, port = said["url"].removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def status_of(said: dict[str, Any], request: bytes) -> bytes:
    with connected(said) as made:
        made.sendall(request)
        return made.makefile("rb").readline()


def test_openai_python(said: dict[str, Any]) -> None:
    import openai

    with client(said) as ours:
        assert [model.id for model in ours.models.list()] == ["tiny"]
        fields = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        whole = ours.chat.completions.create(**fields, logprobs=True, top_logprobs=2, n=2)
        assert whole.usage.completion_tokens == 16
        assert [len(choice.logprobs.content) for choice in whole.choices] == [8, 8]
        chunks = list(ours.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == 8
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 0  # shorter than a page
        done = ours.completions.create(model="tiny", prompt=["Once", [5, 6]], max_tokens=3, echo=True, logprobs=1)
        assert [choice.index for choice in done.choices] == [0, 1]
        assert done.choices[0].text.startswith("Once")
        with pytest.raises(openai.BadRequestError, match="temperature") as bad:
            ours.chat.completions.create(**fields | {"temperature": -1})
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            ours.chat.completions.create(**fields | {"model": "other"})
    with client(said, api_key="wrong") as theirs, pytest.raises(openai.AuthenticationError):
        theirs.models.list()


def test_chat(said: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "llama_jax.cli", "chat", "--url", said["url"], "--max-tokens", "5", "--json"]
    options = {"capture_output": True, "text": True, "env": os.environ | {"LLAMA_JAX_API_KEY": KEY}}
    done = subprocess.run(command, input="Hi\nAnd?\n", **options)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert 0 < first["prompt_tokens"] < second["prompt_tokens"]
    assert first["finish_reason"] in ("stop", "length")


def test_bench_serve(said: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "llama_jax.cli", "bench", "serve", "--url", said["url"], "--vocab", "60"]
    command += ["--mix", "mixed", "--scale", "0.3", "--requests", "12", "--rate", "50", "--rounds", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LLAMA_JAX_API_KEY": KEY})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["completed"], found["failed"]) == (12, 0)
    assert found["total_output_tokens"] == found["workload"]["total_output_tokens"]
    assert 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"] < found["p99_e2el_ms"]
    assert len(found["rounds"]) == 2


def test_structured_output(said: dict[str, Any]) -> None:
    pydantic = pytest.importorskip("pydantic")
    form = pydantic.create_model("Form", colour=(str, pydantic.Field(pattern="^(red|blue)$")))
    with client(said) as ours:
        parsed = ours.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=form, max_tokens=100)
        assert parsed.choices[0].message.parsed.colour in ("red", "blue")


def test_clients_that_leave(said: dict[str, Any]) -> None:
    """The rows are free again: a request that comes behind many that were left is answered at once."""
    with client(said) as ours:
        for _ in range(8):
            stream = ours.chat.completions.create(**LONG, stream=True)
            next(iter(stream))
            stream.close()
        assert ours.chat.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2
        asked = urllib.request.Request(f"{said['url']}/metrics", headers={"authorization": f"Bearer {KEY}"})
        for _ in range(100):
            with urllib.request.urlopen(asked, timeout=60) as answer:
                metrics = answer.read().decode()
            if 'llama_jax_requests_running{model_name="tiny"} 0.0' in metrics:
                break
            time.sleep(0.05)
        assert 'llama_jax_pages_used{model_name="tiny"} 0.0' in metrics
        assert 'llama_jax_compiles_after_ready_total{model_name="tiny"} 0.0' in metrics


def test_what_the_socket_takes(said: dict[str, Any]) -> None:
    host = said["url"].removeprefix("http://").encode()
    head = b"GET /v1/models HTTP/1.1\r\nhost: " + host + b"\r\n"
    key = b"authorization: Bearer " + KEY.encode() + b"\r\n"
    assert b" 200 " in status_of(said, head + key + b"\r\n")
    assert b" 401 " in status_of(said, head + b"\r\n")
    assert b" 403 " in status_of(said, head.replace(host, b"evil.example") + key + b"\r\n")
    assert b" 400 " in status_of(said, b"GET /v1/models HTTP/1.1\r\n" + key + b"\r\n")
    assert b" 431 " in status_of(said, head + key + b"x: 1\r\n" * 200 + b"\r\n")
    assert b" 400 " in status_of(said, head + b"x: " + b"1" * 200_000 + b"\r\n\r\n")
    post = head.replace(b"GET /v1/models", b"POST /v1/completions") + key + b"content-type: application/json\r\n"
    assert b" 413 " in status_of(said, post + b"content-length: 99999999\r\n\r\n")


def test_no_address_no_key_and_a_port_in_use(folder: Path, said: dict[str, Any]) -> None:
    def failed(*options: str) -> str:
        command = [sys.executable, "-m", "llama_jax.cli", "serve", str(folder), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "no key" in failed("--host", "0.0.0.0")
    assert "cannot listen" in failed("--port", said["url"].rpartition(":")[2])


def answers(said: dict[str, Any], count: int, found: list[Any], **fields: Any) -> list[threading.Thread]:
    """Threads that each read a stream to its end and put down how it ended; returns once one has begun."""
    import openai

    begun = threading.Event()

    def read() -> None:
        with client(said) as ours:
            try:
                ending = None
                for chunk in ours.chat.completions.create(**LONG | fields, stream=True):
                    begun.set()
                    ending = chunk.choices[0].finish_reason
                found.append(ending)
            except openai.OpenAIError as error:
                found.append(error)

    threads = [threading.Thread(target=read) for _ in range(count)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    return threads


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_what_is_under_way_has(folder: Path, number: signal.Signals) -> None:
    with serving(folder) as (process, said):
        found: list[Any] = []
        threads = answers(said, 24, found)
        process.send_signal(number)
        for thread in threads:
            thread.join(60)
        assert process.wait(60) == 0
        under_way = re.search(r"ending: (\d+) requests are under way", process.stderr.read())  # type: ignore[union-attr]
        assert found.count("length") >= int(under_way[1]) > 0  # type: ignore[index]
        others = [error for error in found if error != "length"]
        assert all(getattr(error, "code", None) == "draining" for error in others), others


def test_it_does_not_wait_for_ever(folder: Path) -> None:
    """Whoever is not done by the deadline is told so."""
    with serving(folder, "--drain-s", "0") as (process, said):
        found: list[Any] = []
        threads = answers(said, 12, found)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        for thread in threads:
            thread.join(60)
        assert len(found) == 12
        assert any("closed" in str(error) or "about to end" in str(error) for error in found)
