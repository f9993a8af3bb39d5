"""`llama-jax serve` with several models as a process, and what watches it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from server_process import KEY, serving
from terminal_screen import show_top
from tiny_chat_model import write_chat_model

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {"LLAMA_JAX_API_KEY": KEY}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("several")
    first, second = write_chat_model(folder / "one"), write_chat_model(folder / "two", layers=2)
    gone = write_chat_model(folder / "gone")
    options = ["--model", f"two={second}", "--model", f"gone={gone}", "--metrics-names", "vllm"]
    with serving(first, *options) as (process, said):
        (gone / "model.safetensors").unlink()
        yield said
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def asked(said: dict[str, Any], path: str, body: Any = None) -> bytes:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(said["url"] + path, data, headers), timeout=100) as answer:
        return bytes(answer.read())


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llama_jax.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=ENVIRONMENT, **options)


def test_both_answer_and_one_that_is_gone_does_not(said: dict[str, Any]) -> None:
    assert (said["model"], said["models"]) == ("one", ["one", "two", "gone"])
    body = {"prompt": "Once", "max_tokens": 3, "temperature": 0}
    texts = {}
    for name in ("one", "two", "one"):
        found = json.loads(asked(said, "/v1/completions", body | {"model": name}))
        assert found["model"] == name
        assert texts.setdefault(name, found["choices"][0]["text"]) == found["choices"][0]["text"]
    assert texts["one"] != texts["two"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(said, "/v1/completions", body | {"model": "gone"})
    with refused.value as error:
        assert (error.code, error.headers["retry-after"]) == (503, "1")
    states = {one["id"]: one["status"]["value"] for one in json.loads(asked(said, "/v1/models"))["data"]}
    assert states == {"one": "loaded", "two": "loaded", "gone": "failed"}
    metrics = asked(said, "/metrics").decode()
    assert 'vllm:num_requests_running{engine="0",model_name="two"} 0.0' in metrics
    assert 'vllm:generation_tokens_total{engine="0",model_name="one"} 6.0' in metrics


def test_a_chat_changes_the_model(said: dict[str, Any]) -> None:
    done = run("chat", "--url", said["url"], "--max-tokens", "3", input="Hi\n/model two\nAnd?\n/model three\n")
    assert "two" in done.stdout + done.stderr
    assert "did you mean two" not in done.stderr
    assert "three" in done.stderr + done.stdout


def test_top(said: dict[str, Any]) -> None:
    done = run("top", "--url", said["url"], "--once", "--json")
    assert done.returncode == 0, done.stderr
    engines = {engine["model"]: engine for engine in json.loads(done.stdout)["engines"]}
    assert engines["one"]["rows"] == 2
    shown = run("top", "--url", f"{said['url']}/v1", "--once")
    assert shown.stdout.startswith("one  cpu")
    wrong = run("top", "--url", said["url"], "--api-key", "wrong")
    assert (wrong.returncode, "401" in wrong.stderr) == (2, True)
    none = run("top", "--url", "http://127.0.0.1:9")
    assert (none.returncode, "does not answer" in none.stderr) == (7, True)


def test_top_in_a_terminal(said: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "llama_jax.cli", "top", "--url", said["url"], "--interval", "0.2"]
    show_top(command, b"q", ENVIRONMENT)
