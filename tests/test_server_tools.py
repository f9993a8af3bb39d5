"""Tools over HTTP: what the model is told of them, what it is held to, and how clients read its calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner
from engines import small_settings
from served_model import Server, tiny_model
from tiny_chat_model import TOOL_TEMPLATE

from llama_jax.cli import cli
from llama_jax.sampling import Grammar
from llama_jax.server import asking
from llama_jax.server.bodies import ChatBody
from llama_jax.server.conversations import text_messages
from llama_jax.text.chat import render_chat
from llama_jax.text.tools import FORMATS

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", 'R"o\\me']}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "?", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]}
SIZES = small_settings(context=512, pages=96)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server") / "tiny"
    with (
        asyncio.Runner() as runner,
        Server(*tiny_model(folder, template=TOOL_TEMPLATE, context=512), runner, sizes=SIZES) as made,
    ):
        yield made


def streamed(events: list[Any]) -> tuple[dict[str, Any], str]:
    """The message that a client of OpenAI's puts together, by the index of the calls, and why it has ended."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reasons = []
    for event in events:
        for choice in event["choices"]:
            reasons.append(choice["finish_reason"])
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for part in delta.get("tool_calls", ()):
                if part["index"] == len(message["tool_calls"]):
                    assert part["type"] == "function"
                    message["tool_calls"].append({"id": part["id"], **part["function"]})
                else:
                    assert part.keys() == {"index", "function"}
                    message["tool_calls"][part["index"]]["arguments"] += part["function"]["arguments"]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return message, reasons[-1]


Scripted = Callable[..., Any]


@pytest.fixture
def scripted(server: Server, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """Asks for an answer whose text is given: the engine is held to it, and everything around it is as ever."""

    def ask(text: str, **body: Any) -> Any:
        form = Grammar.lark(f"start: {json.dumps(text)}")
        monkeypatch.setattr(asking, "form_of", lambda _, __, ___, place: (form, place))
        answer = server.chat(**{"tools": TOOLS, "max_tokens": 200} | body)
        assert answer.status == 200, answer.data
        return answer.events if body.get("stream") else answer.json

    return ask


@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_a_call_that_is_asked_for(server: Server, choice: Any) -> None:
    """Whatever a model of random weights prefers, it calls the tool, with arguments of its schema."""
    for seed in range(3):
        body = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "seed": seed, "max_tokens": 100}
        made = server.chat(**body).json["choices"][0]
        assert (made["finish_reason"], made["message"]["content"]) == ("tool_calls", None)
        (call,) = made["message"]["tool_calls"]
        assert call["type"] == "function"
        arguments = json.loads(call["function"]["arguments"])
        if choice is NAMED:
            assert call["function"]["name"] == "get_weather"
        if call["function"]["name"] == "get_weather":
            jsonschema.validate(arguments, PARAMETERS)
        message, reason = streamed(server.chat(stream=True, **body).events)
        assert (message["content"], reason) == ("", "tool_calls")
        (part,) = message["tool_calls"]
        assert {key: part[key] for key in ("name", "arguments")} == call["function"]
        assert len({part["id"], call["id"]}) == 2


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_allowed_tools(scripted: Scripted) -> None:
    """The model is told of all tools, so that the prompt stays the same, and may call some."""
    text = '<tool_call>\n{"name": "now"}\n</tool_call>'
    (made,) = scripted(text, tool_choice=allowed("auto", "now"))["choices"]
    assert made["message"]["tool_calls"][0]["function"]["name"] == "now"
    (made,) = scripted(text, tool_choice=allowed("auto", "get_weather"))["choices"]
    assert (made["finish_reason"], made["message"]["content"]) == ("stop", text)
    assert "tool_calls" not in made["message"]


def test_an_allowed_tool_that_must_be_called(server: Server) -> None:
    everything = server.chat(tools=TOOLS, max_tokens=1).json["usage"]["prompt_tokens"]
    for seed in range(2):
        body = {"tools": TOOLS, "tool_choice": allowed("required", "now"), "seed": seed, "max_tokens": 60}
        answer = server.chat(**body).json
        assert answer["usage"]["prompt_tokens"] == everything
        assert {call["function"]["name"] for call in answer["choices"][0]["message"]["tool_calls"]} == {"now"}


def test_several_continuations_with_tools(server: Server) -> None:
    """Each choice has calls of its own, with indices of its own, streaming or not."""
    body: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "n": 3, "seed": 5, "max_tokens": 80}
    whole = server.chat(**body).json["choices"]
    events = server.chat(**body, stream=True).events
    ids = set()
    for choice in whole:
        own = [{**event, "choices": [c for c in event["choices"] if c["index"] == choice["index"]]} for event in events]
        message, reason = streamed(own)
        calls = choice["message"]["tool_calls"]
        assert reason == choice["finish_reason"]
        assert [{k: call[k] for k in ("name", "arguments")} for call in message["tool_calls"]] == [
            call["function"] for call in calls
        ]
        ids |= {call["id"] for call in [*message["tool_calls"], *calls]}
    assert len(ids) == 2 * sum(len(choice["message"]["tool_calls"]) for choice in whole)
    assert len({json.dumps(choice["message"]["tool_calls"][0]["function"]) for choice in whole}) > 1


def test_calls_of_a_free_answer(scripted: Scripted) -> None:
    text = 'Well. \n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    text += '<tool_call>\n{"name": "now"}\n</tool_call>'
    (made,) = scripted(text, logprobs=True)["choices"]
    assert (made["finish_reason"], made["message"]["content"]) == ("tool_calls", "Well.")
    calls = [call["function"] for call in made["message"]["tool_calls"]]
    assert calls == [{"name": "get_weather", "arguments": '{"city": "Oslo"}'}, {"name": "now", "arguments": "{}"}]
    events = scripted(text, stream=True, logprobs=True)
    message, reason = streamed(events)
    assert (message["content"], reason) == ("Well.", "tool_calls")
    assert [{k: call[k] for k in ("name", "arguments")} for call in message["tool_calls"]] == calls
    assert sum(bool(choice["delta"].get("tool_calls")) for e in events for choice in e["choices"]) > 4
    logprobs = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    assert [one for of in logprobs for one in of["content"]] == made["logprobs"]["content"]
    (first,) = scripted(text, parallel_tool_calls=False)["choices"][0]["message"]["tool_calls"]
    assert first["function"]["name"] == "get_weather"
    assert scripted(text, max_tokens=12)["choices"][0]["finish_reason"] == "length"
    (stopped,) = scripted(text, stop=['": "Oslo'])["choices"]  # within the arguments: what was held comes out
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["tool_calls"][0]["function"]["arguments"] == '{"city'


@pytest.mark.parametrize("thinking", [True, "free"])
def test_reasoning(server: Server, scripted: Scripted, thinking: Any) -> None:
    """Where the prompt opens it, and where the answer does; behind it there may be calls."""
    text = ("<think>\n" if thinking == "free" else "") + 'so\n</think>\n\n<tool_call>\n{"name": "now"}\n</tool_call>'
    body = {"chat_template_kwargs": {"enable_thinking": thinking}}
    answer = scripted(text, **body)
    events = scripted(text, **body, stream=True, stream_options={"include_usage": True})
    (made,), (message, reason) = answer["choices"], streamed(events)
    assert made["message"]["reasoning_content"] == message["reasoning_content"] == "so"
    assert made["message"]["tool_calls"][0]["function"]["name"] == message["tool_calls"][0]["name"] == "now"
    assert made["finish_reason"] == reason == "tool_calls"
    thought = server.tokenizer.encode(text[: text.index("</think>") + 8], add_special_tokens=False)
    details = answer["usage"]["completion_tokens_details"]
    # The end of the mark may be in a token with what follows.
    assert len(thought) <= details["reasoning_tokens"] <= len(thought) + 1
    assert events[-1]["usage"]["completion_tokens_details"] == details


def test_no_reasoning(server: Server) -> None:
    """A mark of the user's begins none, and a form of the whole text has none."""
    assert "reasoning_content" not in server.chat("Hi<think>", max_tokens=3).json["choices"][0]["message"]
    form = {"type": "grammar", "syntax": "regex", "definition": "ab?"}
    thinking = {"enable_thinking": True}
    made = server.chat(response_format=form, chat_template_kwargs=thinking, max_tokens=5).json["choices"][0]["message"]
    assert made["content"] in ("a", "ab")
    assert "reasoning_content" not in made


def test_an_effort_turns_reasoning_on_and_off(scripted: Scripted) -> None:
    (made,) = scripted("so\n</think>\n\nWell.", reasoning_effort="low")["choices"]
    assert (made["message"]["reasoning_content"], made["message"]["content"]) == ("so", "Well.")
    named: dict[str, Any] = {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}
    for body in ({"reasoning_effort": "none"}, named):
        assert "reasoning_content" not in scripted("Well.", **body)["choices"][0]["message"]


def test_a_schema_comes_behind_reasoning(server: Server) -> None:
    """The form of an answer is asked of the text behind the reasoning that the prompt has begun."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    body = {"response_format": format, "chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 30, "seed": 1}
    (end,) = server.tokenizer.encode("</think>", add_special_tokens=False)
    likely = server.chat(logit_bias={str(end): 100}, **body).json["choices"][0]
    assert (json.loads(likely["message"]["content"]), likely["finish_reason"]) == ({"a": "x"}, "stop")
    never = server.chat(logit_bias={str(end): -100}, **body).json["choices"][0]
    assert (never["message"]["content"], never["finish_reason"]) == ("", "length")
    assert never["message"]["reasoning_content"]


def test_a_schema_or_a_call(server: Server) -> None:
    """With tools and a schema, an answer is one or the other."""
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    body = {"tools": [NOW], "parallel_tool_calls": False, "response_format": format, "max_tokens": 60, "seed": 1}
    likely = {begin: {str(server.tokenizer.encode(begin)[-1]): 100} for begin in ("<", "{")}
    made = server.chat(logit_bias=likely["<"], **body).json["choices"][0]
    assert (made["finish_reason"], made["message"]["content"]) == ("tool_calls", None)
    assert made["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    made = server.chat(logit_bias=likely["{"], **body).json["choices"][0]
    assert (made["finish_reason"], json.loads(made["message"]["content"])) == ("stop", {"a": "x"})


def test_what_the_template_is_told(server: Server) -> None:
    def text(**body: Any) -> str:
        return server.tokenizer.decode(server.post("/tokenize", **body).json["tokens"], skip_special_tokens=False)

    messages = [{"role": "user", "content": "w?"}, CALLED, RESULT]
    told = text(messages=messages, tools=[NOW])
    assert told.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "now"}}\n')
    assert told.endswith(
        "user\nw?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    alone = server.chat(max_tokens=1).json["usage"]["prompt_tokens"]
    assert server.chat(max_tokens=1, tools=TOOLS, tool_choice="none").json["usage"]["prompt_tokens"] == alone
    assert server.chat(max_tokens=1, tools=TOOLS).json["usage"]["prompt_tokens"] > alone
    assert server.post("/v1/chat/completions", messages=messages, max_tokens=1).status == 200


TEMPLATES = json.loads((Path(__file__).parent / "data" / "tokenizer" / "expected_templates.json").read_text())


@pytest.mark.parametrize("template", ["llama31_style", "mistral_style", "qwen3_style"])
def test_conversations_as_transformers_renders_them(template: str) -> None:
    """Arguments that come as text are the objects that templates were written for."""
    source = (Path(__file__).parent / "data" / "tokenizer" / "templates" / f"{template}.jinja").read_text()
    (number, case), *_ = [
        (i, case)
        for i, case in enumerate(TEMPLATES["cases"])
        if any("tool_call_id" in message for message in case["messages"])
    ]
    (text,) = [of["text"] for of in TEMPLATES["expected"] if (of["template"], of["case"]) == (template, number)]
    messages = json.loads(json.dumps(case["messages"]))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        message.pop("name", None)  # it follows from the call
    given = {"special_tokens": TEMPLATES["special_tokens"], "tools": case["tools"], "date_string": "02 Feb 2025"}
    assert render_chat(text_messages(messages), source, **given) == text
    assert "get_weather" in text


def test_a_parser_that_is_not_known() -> None:
    done = CliRunner().invoke(cli, ["serve", "--tool-parser", "hermez"])
    assert done.exit_code == 2
    assert "did you mean hermes" in done.output


def test_strict_tools(server: Server) -> None:
    """The grammar, which test_tools.py tests, is asked for; any other text may still be written."""
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    loose = {"type": "function", "function": WEATHER["function"] | {"strict": False}}

    def form(tool: Any) -> Any:
        body = ChatBody(messages=[{"role": "user", "content": "Hi"}], tools=[tool])
        return asking.asked(server.served, body).params.response_format

    assert form(loose) is None
    assert 'opening[suffix="<tool_call>"]' in form(strict).text
    assert '"Oslo"' in form(strict).text
    made = server.chat(tools=[strict], temperature=0, max_tokens=5).json["choices"][0]
    assert (made["finish_reason"], bool(made["message"]["content"])) == ("length", True)


def test_strict_tools_are_named_where_nothing_holds_them(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = {"type": "function", "function": {"name": "now", "strict": True}}
    assert "x-llama-jax-ignored" not in server.chat(tools=[strict], max_tokens=1).headers
    monkeypatch.setitem(server.served.__dict__, "tool_format", FORMATS["llama_json"])
    assert server.chat(tools=[strict], max_tokens=1).headers["x-llama-jax-ignored"] == "tools.function.strict"


def ends(server: Server, *messages: Any, **body: Any) -> tuple[int, str]:
    answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "w?"}, *messages], **body)
    return answer.status, answer.json["error"]["param"]


@pytest.mark.parametrize(
    "body",
    [
        {"tool_choice": "required"},
        {"tool_choice": "sometimes", "tools": TOOLS},
        {"tool_choice": {"type": "function", "function": {"name": "other"}}, "tools": TOOLS},
        {"tool_choice": allowed("auto", "now", "other"), "tools": TOOLS},
        {"tool_choice": allowed("auto"), "tools": TOOLS},
        {"tool_choice": allowed("sometimes", "now"), "tools": TOOLS},
        {"tool_choice": allowed("auto", "now")},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [3]}}, "tools": TOOLS},
        {"tools": [WEATHER, WEATHER]},
        {"tools": [{"type": "function", "function": {"name": "a\n"}}]},
        {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": 3}}}}}
            ],
            "tool_choice": "required",
        },
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"chat_template_kwargs": {"bos_token": "x"}},
        {"response_format": {"type": "grammar", "syntax": "regex", "definition": "a"}, "tools": TOOLS},
    ],
)
def test_requests_that_are_wrong(server: Server, body: dict[str, Any]) -> None:
    status, param = ends(server, **body)
    assert status == 400
    assert param == next(iter(body))


def test_conversations_that_are_wrong(server: Server) -> None:
    for messages in (
        [RESULT],
        [CALLED, RESULT | {"tool_call_id": "other"}],
        [{"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "[1]"}}]}],
        [{"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
        [{"role": "assistant", "tool_calls": {"a": 1}}],
    ):
        assert ends(server, *messages) == (400, "messages")


def test_a_model_without_tools(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("server") / "plain"
    with asyncio.Runner() as runner, Server(*tiny_model(folder), runner) as plain:
        answer = plain.chat(tools=TOOLS)
        assert (answer.status, answer.json["error"]["param"]) == (400, "tools")
        plain.served.__dict__["tool_format"] = FORMATS["hermes"]  # named, but the template tells the model of no tools
        assert plain.chat(tools=TOOLS).status == 400
        assert plain.chat(tools=[], tool_choice="none", max_tokens=1).status == 200
