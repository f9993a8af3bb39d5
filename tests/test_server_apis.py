"""Anthropic's messages and OpenAI's responses: the same answers as of chats, in the shapes of these APIs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from asgi_client import Answer, opened
from served_model import NAME, Server, tiny_model
from test_server_tools import PARAMETERS, SIZES, WEATHER
from tiny_chat_model import TOOL_TEMPLATE

USER = [{"role": "user", "content": "Hi"}]
GREEDY = {"temperature": 0.0}
CLAUDE_TOOL = {"name": "get_weather", "description": "?", "input_schema": PARAMETERS}
FLAT_TOOL = {"type": "function", "name": "get_weather", "description": "?", "parameters": PARAMETERS}
TEXT = 'so\n</think>\n\nWell. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server") / "tiny"
    model = tiny_model(folder, template=TOOL_TEMPLATE, context=512)
    with asyncio.Runner() as runner, Server(*model, runner, sizes=SIZES, keys=("a-key",)) as made:
        yield made


def post(server: Server, path: str, **body: Any) -> Answer:
    return server.call("POST", path, body, headers={"x-api-key": "a-key"})


def messages(server: Server, **body: Any) -> Answer:
    return post(server, "/v1/messages", **{"model": NAME, "messages": USER, "max_tokens": 6} | body)


def responses(server: Server, **body: Any) -> Answer:
    return post(server, "/v1/responses", **{"model": NAME, "input": "Hi", "max_output_tokens": 6} | body)


def chat(server: Server, **body: Any) -> Any:
    return post(server, "/v1/chat/completions", **{"messages": USER, "max_tokens": 6} | body).json


def named(answer: Answer) -> list[Any]:
    """The events of a stream, each of which bears the name that its data has."""
    *events, rest = answer.data.decode().split("\n\n")
    assert rest == ""
    made = []
    for text in events:
        name, data = text.split("\n")
        made.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {made[-1]['type']}"
    return made


def hold(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Makes every answer the text: the engine is held to it, and everything behind it is as ever."""
    from llama_jax.sampling import Grammar
    from llama_jax.server import asking

    form = Grammar.lark(f"start: {json.dumps(text)}")
    monkeypatch.setattr(asking, "form_of", lambda _, __, ___, place: (form, place))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    hold(monkeypatch, TEXT)


# --- Anthropic


def test_messages(server: Server) -> None:
    expected = chat(server, **GREEDY)
    answer = messages(server, **GREEDY)
    assert answer.status == 200
    made = answer.json
    assert made["id"].startswith("msg_")
    assert (made["type"], made["role"], made["model"]) == ("message", "assistant", NAME)
    assert made["content"] == [{"type": "text", "text": expected["choices"][0]["message"]["content"]}]
    assert (made["stop_reason"], made["stop_sequence"]) == ("max_tokens", None)
    usage = made["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected["usage"]["prompt_tokens"]
    assert usage["output_tokens"] == 6


def test_messages_stop_at_a_sequence(server: Server) -> None:
    text = messages(server, **GREEDY).json["content"][0]["text"]
    made = messages(server, stop_sequences=["\x00", text[2:4]], **GREEDY).json
    assert (made["stop_reason"], made["stop_sequence"]) == ("stop_sequence", text[2:4])
    assert made["content"] == [{"type": "text", "text": text[: text.index(text[2:4])]}]
    *_, ending, _ = named(messages(server, stop_sequences=[text[2:4]], stream=True, **GREEDY))
    assert ending["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": text[2:4]}


def folded(events: list[Any]) -> dict[str, Any]:
    """The message that Anthropic's clients put together of a stream's events."""
    start, *middle, delta, stop = events
    assert (start["type"], delta["type"], stop["type"]) == ("message_start", "message_delta", "message_stop")
    message, opened = start["message"], -1
    for event in middle:
        match event["type"]:
            case "content_block_start":
                opened += 1
                message["content"].append(event["content_block"] | {"json": ""})
            case "content_block_delta":
                block, delta_of = message["content"][opened], event["delta"]
                key = {"text_delta": "text", "thinking_delta": "thinking"}.get(delta_of["type"], "json")
                block[key] += delta_of.get(key) or delta_of["partial_json"]
            case "content_block_stop":
                block = message["content"][opened]
                block |= {"input": json.loads(block["json"])} if block["type"] == "tool_use" else {}
                del block["json"]
        assert event["index"] == opened
    return message | delta["delta"] | {"usage": message["usage"] | delta["usage"]}


@pytest.mark.usefixtures("scripted")
def test_messages_with_thinking_and_tools(server: Server) -> None:
    body: dict[str, Any] = {
        "tools": [CLAUDE_TOOL],
        "max_tokens": 100,
        "thinking": {"type": "enabled", "budget_tokens": 5},
    }
    made = messages(server, **body).json
    thinking, text, call = made["content"]
    assert thinking == {"type": "thinking", "thinking": "so", "signature": ""}
    assert text == {"type": "text", "text": "Well."}
    assert call == {"type": "tool_use", "id": call["id"], "name": "get_weather", "input": {"city": "Oslo"}}
    assert (made["stop_reason"], made["stop_sequence"]) == ("tool_use", None)
    again = folded(named(messages(server, stream=True, **body)))
    assert again["content"] == [thinking, text, call | {"id": again["content"][2]["id"]}]
    assert again["stop_reason"] == "tool_use"
    assert again["usage"]["output_tokens"] == made["usage"]["output_tokens"]
    assert messages(server, **body | {"max_tokens": 24}).json["stop_reason"] == "max_tokens"


def test_messages_and_chats_have_the_same_prompt(server: Server) -> None:
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "w", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "so", "signature": ""},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "x", "name": "get_weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    call = {"id": "x", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    same = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "w"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call], "reasoning_content": "so"},
        {"role": "tool", "tool_call_id": "x", "content": "sunny"},
        {"role": "user", "content": "and?"},
    ]
    body: dict[str, Any] = {"system": [{"type": "text", "text": "Be kind."}], "tools": [CLAUDE_TOOL]}
    told = post(server, "/tokenize", messages=same, tools=[WEATHER]).json
    counted = post(server, "/v1/messages/count_tokens", model=NAME, messages=conversation, **body)
    assert counted.json == {"input_tokens": told["count"]}
    usage = messages(server, messages=conversation, **body).json["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == told["count"]
    items = [
        {"role": "user", "content": "w"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "x", "name": "get_weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "x", "output": "sunny"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "and?"}]},
    ]
    again = responses(server, input=items, instructions="Be kind.", tools=[FLAT_TOOL]).json
    assert again["usage"]["input_tokens"] == told["count"]


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}]
)
def test_messages_that_must_call(server: Server, choice: dict[str, Any]) -> None:
    made = messages(server, tools=[CLAUDE_TOOL], tool_choice=choice, max_tokens=100, temperature=1.0).json
    (block,) = made["content"]
    assert (block["type"], block["name"], made["stop_reason"]) == ("tool_use", "get_weather", "tool_use")
    assert block["input"]["city"] in PARAMETERS["properties"]["city"]["enum"]


def test_messages_of_a_schema(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    made = messages(server, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=40).json
    assert json.loads(made["content"][0]["text"]) == {"a": "x"}
    text = {"format": {"type": "json_schema", "name": "s", "schema": schema}}
    again = responses(server, text=text, max_output_tokens=40).json
    assert json.loads(again["output"][0]["content"][0]["text"]) == {"a": "x"}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"messages": [*USER, {"role": "assistant", "content": "I"}]}, "the last message"),
        ({"messages": [{"role": "system", "content": "x"}]}, "role 'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "not text"),
        ({"messages": [{"role": "user", "content": 3}]}, "no content"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "'x'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tool 0"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"output_config": {"format": {"type": "xml"}}}, "schema"),
    ],
)
def test_messages_that_are_wrong(server: Server, body: dict[str, Any], word: str) -> None:
    answer = messages(server, **body)
    assert (answer.status, answer.json["type"], answer.json["error"]["type"]) == (400, "error", "invalid_request_error")
    assert word in answer.json["error"]["message"]


def test_errors_are_anthropics(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the guard, of the model's name, and those that come when an answer has begun."""
    refused = server.call("POST", "/v1/messages", {})
    assert (refused.status, refused.json["error"]["type"]) == (401, "authentication_error")
    assert messages(server, model="other").json["error"]["type"] == "not_found_error"
    large = server.call("POST", "/v1/messages", b" " * (9 << 20), headers={"x-api-key": "a-key"})
    assert (large.status, large.json["error"]["type"]) == (413, "request_too_large")
    for ask in (messages, responses):
        stream = server.engine.stream

        async def broken(request: Any, stream: Any = stream) -> Any:
            from llama_jax.errors import EngineFailed

            async for piece in stream(request):
                yield piece
                raise EngineFailed("gone", hint="again")

        monkeypatch.setattr(server.engine, "stream", broken)
        *_, last = named(ask(server, stream=True))
        monkeypatch.undo()
        assert last["type"] == "error"
        assert "gone" in (last.get("error") or last)["message"]


def test_two_calls(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a block, or an item, of its own, streaming or not."""
    cities = ["Oslo", "Rome"]
    calls = [json.dumps({"name": "get_weather", "arguments": {"city": city}}) for city in cities]
    hold(monkeypatch, "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls))
    body: dict[str, Any] = {"tools": [CLAUDE_TOOL], "max_tokens": 100}
    for made in (messages(server, **body).json, folded(named(messages(server, **body, stream=True)))):
        assert [block["input"]["city"] for block in made["content"]] == cities
        assert len({block["id"] for block in made["content"]}) == 2
    body = {"tools": [FLAT_TOOL], "max_output_tokens": 100}
    *_, last = named(responses(server, **body, stream=True))
    for made in (responses(server, **body).json, last["response"]):
        assert [json.loads(item["arguments"])["city"] for item in made["output"]] == cities
        assert len({item["id"] for item in made["output"]} | {item["call_id"] for item in made["output"]}) == 4


# --- Responses


def parsed(data: Any) -> Any:
    """A response, checked by OpenAI's own types."""
    types = pytest.importorskip("openai.types.responses")
    return types.Response.model_validate(data)


def test_responses(server: Server) -> None:
    expected = chat(server, **GREEDY)
    made = parsed(responses(server, metadata={"a": "b"}, **GREEDY).json)
    assert made.output_text == expected["choices"][0]["message"]["content"]
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (made.usage.input_tokens, made.usage.output_tokens) == (expected["usage"]["prompt_tokens"], 6)
    assert (made.metadata, made.temperature) == ({"a": "b"}, 0.0)


ALLOWED = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}


def test_responses_with_allowed_tools(server: Server) -> None:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    other = {"type": "function", "name": "now", "parameters": nothing}
    body = {"tools": [other, FLAT_TOOL], "tool_choice": ALLOWED, "parallel_tool_calls": False}
    made = parsed(responses(server, **body, max_output_tokens=100).json)
    assert [(item.name, item.arguments) for item in made.output] == [("now", "{}")]
    assert made.tool_choice.mode == "required"


@pytest.mark.usefixtures("scripted")
def test_responses_with_reasoning_and_tools(server: Server) -> None:
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    body: dict[str, Any] = {"tools": [FLAT_TOOL], "max_output_tokens": 100, "reasoning": {"effort": "low"}}
    made = parsed(responses(server, **body).json)
    thinking, text, call = made.output
    assert thinking.content[0].text == "so"
    assert text.content[0].text == "Well."
    assert (call.name, call.arguments, made.status) == ("get_weather", '{"city": "Oslo"}', "completed")
    events = named(responses(server, stream=True, **body))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    types: Any = TypeAdapter(ResponseStreamEvent)
    for event in events:
        assert types.validate_python(event).type == event["type"]
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    output: list[Any] = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
    for number, item in enumerate(output):
        mine = [event for event in events if event.get("output_index") == number]
        assert {event["item_id"] for event in mine if "item_id" in event} == {item["id"]}
        assert mine[0]["type"] == "response.output_item.added"
        assert mine[-1] == mine[-1] | {"type": "response.output_item.done", "item": item}
        told = "".join(event["delta"] for event in mine if "delta" in event)
        assert told == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
    again = parsed(events[-1]["response"])
    assert again.usage.total_tokens == made.usage.total_tokens
    assert again.usage.input_tokens_details.cached_tokens > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tools": [FLAT_TOOL], "tool_choice": ALLOWED | {"mode": "sometimes"}}, "tool_choice"),
        ({"tools": [FLAT_TOOL], "tool_choice": ALLOWED | {"tools": [{"name": "other"}]}}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": None}]}]}, "input"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input"),
        ({"input": []}, "messages"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"background": True}, "background"),
        ({"stream_options": {}}, "stream_options"),
        ({"max_output_tokens": 0}, "max_tokens"),
    ],
)
def test_responses_that_are_wrong(server: Server, body: dict[str, Any], param: str) -> None:
    answer = responses(server, **body)
    assert (answer.status, answer.json["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_clients_that_leave(server: Server, path: str) -> None:
    """Nothing is left of a stream whose client has gone."""
    body = {"/v1/messages": {"messages": USER, "max_tokens": 400}, "/v1/responses": {"input": "Hi"}}[path]
    asked = {"model": NAME, "stream": True, **body}

    async def run() -> None:
        async with opened(server.app, "POST", path, asked, headers={"x-api-key": "a-key"}) as call:
            await asyncio.wait_for(call.begun.wait(), 30)
        await server.until(lambda: server.unused)

    server.run(run())
