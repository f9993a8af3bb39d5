"""Clients as people install them, against a server as a process. The model's weights are random: what is fixed of its
answers is their form."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from node_client import node_client
from server_process import KEY, serving
from tiny_chat_model import TOOL_TEMPLATE, write_chat_model

MODEL = "tiny"
USER: list[Any] = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather", "parameters": SCHEMA}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
FLAT: dict[str, Any] = {"type": "function", **FUNCTION}
CLAUDE: dict[str, Any] = {"name": "get_weather", "description": "The weather", "input_schema": SCHEMA}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),  # what clients warn of is theirs
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_chat_model(tmp_path_factory.mktemp("server") / MODEL, context=512, template=TOOL_TEMPLATE)
    with serving(folder) as (_, said):
        yield said["url"]


def checked(name: str, arguments: Any) -> None:
    """A call of the tool, as its schema has it."""
    assert name == "get_weather"
    assert (json.loads(arguments) if isinstance(arguments, str) else arguments)["city"] in ("Oslo", "Rome")


# --- openai


def test_openai_tools(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": USER, "tools": [TOOL], "tool_choice": "required"}
        asked["parallel_tool_calls"] = False
        message = client.chat.completions.create(**asked).choices[0].message
        checked(message.tool_calls[0].function.name, message.tool_calls[0].function.arguments)
        with client.chat.completions.stream(**asked) as stream:  # which puts deltas together
            kinds = [event.type for event in stream]
            done = stream.get_final_completion().choices[0]
        assert "tool_calls.function.arguments.delta" in kinds
        assert done.finish_reason == "tool_calls"
        checked(done.message.tool_calls[0].function.name, done.message.tool_calls[0].function.arguments)
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
        conversation = [*USER, message, result]
        after = client.chat.completions.create(model=MODEL, messages=conversation, tools=[TOOL], max_tokens=4)
        assert after.usage.completion_tokens == 4


def test_openai_responses(url: str) -> None:
    openai = pytest.importorskip("openai")
    pydantic = pytest.importorskip("pydantic")
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        whole = client.responses.create(model=MODEL, input="Hi", max_output_tokens=6, temperature=0)
        assert whole.output_text
        assert whole.incomplete_details.reason == "max_output_tokens"
        with client.responses.stream(model=MODEL, input="Hi", max_output_tokens=6, temperature=0) as stream:
            told = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert told == whole.output_text
        with client.responses.stream(
            model=MODEL, input="Hi", tools=[FLAT], tool_choice="required", parallel_tool_calls=False
        ) as stream:
            (call,) = stream.get_final_response().output
        checked(call.name, call.arguments)
        conversation = ["w?", call, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
        items = [{"role": "user", "content": conversation[0]}, *conversation[1:]]
        after = client.responses.create(model=MODEL, input=items, tools=[FLAT], max_output_tokens=3)
        assert after.usage.output_tokens == 3
        form = pydantic.create_model("Form", colour=(str, pydantic.Field(pattern="^(red|blue)$")))
        parsed = client.responses.parse(model=MODEL, input="Hi", text_format=form, max_output_tokens=60)
        assert parsed.output_parsed.colour in ("red", "blue")
        with pytest.raises(openai.BadRequestError, match="no response is kept"):
            client.responses.create(model=MODEL, input="Hi", previous_response_id=whole.id)


def test_openai_async(url: str) -> None:
    openai = pytest.importorskip("openai")

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:

            async def one() -> str:
                asked = {"model": MODEL, "messages": USER, "max_tokens": 6, "temperature": 0}
                stream = await client.chat.completions.create(**asked, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*[one() for _ in range(5)])

    assert len(set(asyncio.run(run()))) == 1


def test_openai_node_tools(url: str) -> None:
    called = node_client(url, MODEL, "tools")
    checked(called["name"], called["arguments"])
    assert called["deltas"] > 1
    assert called["after"] == 4


# --- curl


def test_curl_tools(url: str) -> None:
    """A call as it comes off the wire: id and name first, then the arguments in pieces."""
    asked = {"messages": USER, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "stream": True}
    command = [
        "curl",
        "-sS",
        "-N",
        "--max-time",
        "60",
        "-H",
        f"x-api-key: {KEY}",
        "-H",
        "content-type: application/json",
    ]
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    done = subprocess.run(
        [*command, "-d", json.dumps(asked), f"{url}/v1/chat/completions"], capture_output=True, text=True, check=True
    )
    events = [line.removeprefix("data: ") for line in done.stdout.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    assert calls[0]["id"]
    checked(calls[0]["function"]["name"], "".join(call["function"].get("arguments", "") for call in calls))
    assert choices[-1]["finish_reason"] == "tool_calls"


# --- anthropic


def test_anthropic(url: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 6, "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        whole = client.messages.create(**asked, system="Be kind.")
        assert whole.content[0].text
        assert (whole.stop_reason, whole.usage.output_tokens) == ("max_tokens", 6)
        with client.messages.stream(**asked, system="Be kind.") as stream:
            assert "".join(stream.text_stream) == whole.content[0].text
            done = stream.get_final_message()
        assert (done.stop_reason, done.usage.output_tokens) == ("max_tokens", 6)
        counted = client.messages.count_tokens(model=MODEL, messages=USER, system="Be kind.")
        assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
        with pytest.raises(anthropic.BadRequestError, match="temperature"):
            client.messages.create(**asked | {"extra_body": {"temperature": -1}})
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**asked | {"model": "other"})
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        client.messages.create(**asked)


def test_anthropic_tools(url: str) -> None:
    anthropic = pytest.importorskip("anthropic")
    choice = {"type": "any", "disable_parallel_tool_use": True}
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "tools": [CLAUDE], "max_tokens": 100}
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        with client.messages.stream(**asked, tool_choice=choice) as stream:
            done = stream.get_final_message()
        (block,) = done.content
        checked(block.name, block.input)
        assert done.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
        conversation = [*USER, {"role": "assistant", "content": done.content}, {"role": "user", "content": [result]}]
        after = client.messages.create(**asked | {"messages": conversation, "max_tokens": 3})
        assert after.usage.output_tokens == 3


# --- litellm


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_litellm(url: str, provider: str) -> None:
    litellm = pytest.importorskip("litellm")
    base = f"{url}/v1" if provider == "openai" else url
    to: dict[str, Any] = {"model": f"{provider}/{MODEL}", "api_base": base, "api_key": KEY, "messages": USER}
    whole = litellm.completion(**to, max_tokens=6, temperature=0)
    chunks = list(litellm.completion(**to, max_tokens=6, temperature=0, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 6
    choice: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    called = litellm.completion(**to, max_tokens=100, tools=[TOOL], stream=True, **choice)
    built = litellm.stream_chunk_builder(list(called), messages=USER)
    assert built.choices[0].finish_reason == "tool_calls"
    for call in built.choices[0].message.tool_calls:
        checked(call.function.name, call.function.arguments)


# --- langchain


@pytest.mark.parametrize("responses", [False, True])
def test_langchain(url: str, responses: bool) -> None:
    langchain = pytest.importorskip("langchain_openai")
    pydantic = pytest.importorskip("pydantic")
    to: dict[str, Any] = {"model": MODEL, "base_url": f"{url}/v1", "api_key": KEY, "use_responses_api": responses}
    brief = langchain.ChatOpenAI(**to, temperature=0, max_tokens=6)
    whole = brief.invoke("Hi")
    assert whole.text
    assert whole.usage_metadata["output_tokens"] == 6
    assert "".join(chunk.text for chunk in brief.stream("Hi")) == whole.text
    model = langchain.ChatOpenAI(**to, max_tokens=60)
    calls = model.bind_tools([TOOL], tool_choice="get_weather").invoke("Hi").tool_calls
    checked(calls[0]["name"], calls[0]["args"])
    form = pydantic.create_model("Form", colour=(str, pydantic.Field(pattern="^(red|blue)$")))
    assert model.with_structured_output(form, method="json_schema").invoke("Hi").colour in ("red", "blue")


# --- llm


def test_llm(url: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: here\n  model_name: {MODEL}\n  api_base: {url}/v1\n  api_key_name: here\n"
    )
    (tmp_path / "keys.json").write_text(json.dumps({"here": KEY}))
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    said = set()
    for stream in ([], ["--no-stream"]):
        command = [
            sys.executable,
            "-m",
            "llm",
            "-m",
            "here",
            "-o",
            "max_tokens",
            "6",
            "-o",
            "temperature",
            "0",
            *stream,
        ]
        done = subprocess.run([*command, "Hi"], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1
    assert said.pop().strip()


# --- lm-eval


def test_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and texts of local-completions, with the server's tokenizer; it sends no key to /tokenizer_info."""
    completions: Any = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with serving(write_chat_model(tmp_path / MODEL), key="") as (_, said):
        base = f"{said['url']}/v1/completions"
        options = {"tokenized_requests": True, "num_concurrent": 2, "max_retries": 1, "max_length": 128}
        lm = completions.LocalCompletionsAPI(model=MODEL, base_url=base, tokenizer_backend="remote", **options)
        pairs = [("Hello you", " and me"), ("One", " two three")]
        scores = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
        asked = Instance("generate_until", {}, ("Hello", {"until": ["\x00"], "max_gen_toks": 5}), 0)
        (text,) = lm.generate_until([asked])
        assert text
        openai = pytest.importorskip("openai")
        with openai.OpenAI(base_url=f"{said['url']}/v1", api_key="none", max_retries=0) as client:
            for (before, after), (score, _) in zip(pairs, scores, strict=True):
                ids = lm.tokenizer.encode(before + after)
                known = len(lm.tokenizer.encode(before))
                done = client.completions.create(model=MODEL, prompt=ids, echo=True, logprobs=1, max_tokens=0)
                assert score == pytest.approx(sum(done.choices[0].logprobs.token_logprobs[known:]), abs=1e-3)
