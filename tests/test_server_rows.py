"""Bad and odd requests at an engine that runs, by rows: each is answered as it should be, and behind each the next
request is answered, no page is in use and nothing was compiled.

| | What | Held by |
| --- | --- | --- |
| H1 | no JSON, another type | `BAD`; test_server_guard: bad_chats, headers_of_bodies |
| H2 | bodies too large, lengths that lie | test_server_guard: large_and_slow_bodies; test_server_storms |
| H3 | headers too many, large, slow | test_server_guard: headers; test_server_connections, test_server_process |
| H4 | nesting, long numbers, NaN, keys twice | `BAD`, a_key_twice |
| H5 | surrogates, no UTF-8, NUL | `BAD`, `GOOD` |
| H6 | fields unknown or without effect | `BAD`; test_server: fields_without_effect |
| H7 | models unknown | models; test_server_guard: unknown_models |
| H8 | methods, paths, line ends in headers | methods; test_server_guard: request_ids, the_log |
| S1-S7 | sampling | `BAD`, sampling_at_its_bounds, stop_strings |
| P1-P3 | prompts empty, long, of wrong ids | `BAD`, `GOOD`, prompts_at_the_context |
| P4 | control tokens in text | test_server: content_in_parts |
| P5 | roles, thousands of messages | `BAD`, `GOOD`, roles |
| P6 | any Unicode | any_text; test_chat_cli and the browser's tests for what is shown |
| T1, T2 | templates and their variables from clients | `BAD` |
| T3, T4 | hostile and missing templates | test_chat, no_template |
| G1-G3 | grammars that are bad, beside good ones, cut | `BAD_SCHEMAS`, grammars_beside_each_other, a_text_that_is_cut |
| G4 | names and schemas of tools | `BAD_TOOLS`; test_server_tools |
| A1-A4 | keys, routes, hosts, prefixes of others | test_server_guard; test_server_faults: keys_share_no_prefixes |
| F17 | plugins that fail | a_parser_that_fails; test_plugins |
| C1 | options | test_server_process: no_address; test_cli |
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
from asgi_client import call
from served_model import Server, tiny_model
from tiny_chat_model import TOOL_TEMPLATE

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
CONTEXT = 128


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = tiny_model(tmp_path_factory.mktemp("rows") / "tiny", template=TOOL_TEMPLATE)
    with asyncio.Runner() as runner, Server(*model, runner, ahead=True) as made:
        made.chat(max_tokens=1)  # what the first request imports
        yield made


@pytest.fixture(autouse=True)
def _well(server: Server) -> Iterator[None]:
    yield
    assert server.chat(max_tokens=1).status == 200
    server.run(server.until(lambda: server.unused))
    assert server.engine.snapshot().late_compilations == 0


def refused(answer: Any, param: str | None, status: int = 400) -> str:
    assert answer.status == status, answer.data[:500]
    error = answer.json["error"]
    assert error["param"] == param, error
    return str(error["message"])


def bad(name: str, param: str | None, path: str = CHAT, /, **fields: Any) -> Any:
    given = {"messages": USER} if path == CHAT else {"prompt": "Hi"}
    return pytest.param(path, given | fields, param, id=name)


def raw(name: str, data: bytes, param: str = "body") -> Any:
    return pytest.param(CHAT, data, param, id=name)


BAD = [
    raw("H1 a string", b'"x"'),
    raw("H1 cut", b'{"messages": [{"role": "us'),
    raw("H4 100,000 deep", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "messages[0]"),
    raw("H4 100,000 objects deep", b'{"metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"),
    raw("H4 5000 digits", b'{"messages": [], "max_tokens": ' + b"9" * 5000 + b"}", "max_tokens"),
    raw("H4 Infinity", b'{"messages": [], "temperature": Infinity}'),
    raw("H5 surrogate in a key", b'{"\\ud800": 1}'),
    bad("H5 NUL in a tool's name", "tools", tools=[{"type": "function", "function": {"name": "a\0b"}}]),
    bad("H6 audio", "audio", audio={"voice": "x"}),
    bad("H6 effort", "reasoning_effort", reasoning_effort="much"),
    bad("H6 bias of no token", "logit_bias", logit_bias={"99999999": 1}),
    bad("S1 temperature 3", "temperature", temperature=3),
    bad("S1 top_p 1.1", "top_p", top_p=1.1),
    bad("S1 top_k -2", "top_k", top_k=-2),
    bad("S1 repetition_penalty 0", "repetition_penalty", repetition_penalty=0),
    bad("S1 frequency_penalty -3", "frequency_penalty", frequency_penalty=-3),
    bad("S2 n -1", "n", n=-1),
    bad("S2 n 10^9", "n", n=10**9),
    bad("S2 best_of below n", "best_of", COMPLETIONS, n=3, best_of=2),
    bad("S3 max_tokens -1", "max_tokens", max_tokens=-1),
    bad("S4 10 KB", "stop", stop="x" * 10_000),
    bad("S5 400,000 biases", "logit_bias", logit_bias={str(i): 1 for i in range(400_000)}),
    bad("S5 nothing allowed", "allowed_token_ids", allowed_token_ids=[]),
    bad("S6 a float", "seed", seed=1.5),
    bad("S6 a string", "seed", seed="1"),
    bad("S7 logprobs -1", "logprobs", COMPLETIONS, logprobs=-1),
    bad("P1 no text in a picture's place", "messages", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    bad("P2 100 times the context", "prompt", COMPLETIONS, prompt="a word " * 50 * CONTEXT),
    bad("P3 negative", "prompt", COMPLETIONS, prompt=[-1]),
    bad("P3 beyond the vocabulary", "prompt", COMPLETIONS, prompt=[99_999_999]),
    bad("P3 2^40", "prompt", COMPLETIONS, prompt=[1 << 40]),
    bad("P3 2^70", "prompt", COMPLETIONS, prompt=[1 << 70]),
    bad("P5 10,000 messages", "prompt", messages=USER * 10_000),
    bad("T1 a template", "chat_template", chat_template="{{ 1 }}"),
    *(
        bad(f"T2 {name}", param, chat_template_kwargs={name: False})
        for name, param in (
            *((name, "chat_template_kwargs") for name in ("messages", "add_generation_prompt", "tools")),
            *((name, name) for name in ("tokenize", "raise_exception", "namespace", "range")),
        )
    ),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
def test_what_is_refused(server: Server, path: str, body: Any, param: str) -> None:
    message = refused(server.call("POST", path, body), param)
    assert len(message) < 1000
    assert "Traceback" not in message


GOOD = [
    bad("H5 NUL in a text", None, messages=[{"role": "user", "content": "a\0b"}]),
    bad("S1 top_k 10^9", None, top_k=10**9),
    bad("S4 a control token", None, stop="<|im_end|>"),
    bad("P1 empty content", None, messages=[{"role": "user", "content": ""}]),
    bad("P1 only a system's message", None, messages=[{"role": "system", "content": "x"}]),
    bad("P5 two systems' messages", None, messages=[{"role": "system", "content": "x"}] * 2 + USER),
]


@pytest.mark.parametrize(("path", "body", "param"), GOOD)
def test_what_is_answered(server: Server, path: str, body: Any, param: None) -> None:
    assert server.call("POST", path, body | {"max_tokens": 2}).status == 200


def test_a_key_twice(server: Server) -> None:
    answer = server.call("POST", COMPLETIONS, b'{"prompt": "Hi", "max_tokens": 5, "max_tokens": 2, "ignore_eos": true}')
    assert answer.json["usage"]["completion_tokens"] == 2


def test_models(server: Server) -> None:
    for name in ("a\0b", "x" * 10_000, "", "tiny/../tiny"):
        assert len(refused(server.chat(model=name), "model", 404)) < 250


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", CHAT, 405),
        ("OPTIONS", CHAT, 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/chat/completions/", 404),
        ("GET", "/v1/../etc/passwd", 404),
        ("GET", "/%2e%2e/etc/passwd", 404),
        ("GET", "/a\r\nset-cookie: x", 404),
    ],
)
def test_methods(server: Server, method: str, path: str, status: int) -> None:
    answer = server.call(method, path, b"{}" if method in ("PUT", "POST") else None)
    assert answer.status == status
    assert not any("\r" in name + value or "\n" in name + value for name, value in answer.headers.items())


def test_sampling_at_its_bounds(server: Server) -> None:
    """A temperature next to 0 is greedy, and a bound that lets everything pass changes nothing."""

    def text(**fields: Any) -> str:
        return str(server.post(COMPLETIONS, prompt="Hi", **GREEDY | fields).json["choices"][0]["text"])

    assert text() == text(temperature=1e-9) == text(temperature=1, top_k=1, seed=5)
    assert text(temperature=1, seed=5) == text(temperature=1, seed=5, top_k=10**9, top_p=1, min_p=0)
    assert text(allowed_token_ids=[300], logit_bias={"300": -100}) == server.tokenizer.decode([300] * 8)


def test_stop_strings(server: Server) -> None:
    """Wherever a text is cut, within tokens or across them, a stream leaks nothing of the stop string. What was held
    back for a string that did not come is there in the end."""

    def streamed(**fields: Any) -> str:
        answer = server.post(COMPLETIONS, prompt="Hi", stream=True, **GREEDY | fields)
        return "".join(choice["text"] for event in answer.events for choice in event["choices"])

    whole = streamed()
    assert len(whole) > 12
    for begin, end in itertools.product(range(0, len(whole), 3), (1, 2, 5, 40)):
        stop = whole[begin : begin + end]
        assert streamed(stop=[stop]) == whole[: whole.index(stop)], stop
    assert streamed(stop=[whole[-2:] + "!", whole[-1] * 2 + "?"]) == whole


def test_prompts_at_the_context(server: Server) -> None:
    ids = [5] * CONTEXT
    assert server.post(COMPLETIONS, prompt=ids[:-2], **GREEDY | {"max_tokens": 2}).status == 200
    message = refused(server.post(COMPLETIONS, prompt=ids[:-2], **GREEDY | {"max_tokens": 3}), "max_tokens")
    assert all(number in message for number in ("126", "3", "128"))
    began = time.monotonic()
    text = "a" * (4 << 20)
    for message in (
        refused(server.post(COMPLETIONS, prompt=["Hi", text]), "prompt"),
        refused(server.chat(text), "prompt"),
    ):
        assert "128" in message
    assert time.monotonic() - began < 2


def test_roles(server: Server) -> None:
    """A conversation that ends with an answer, and a result of a call that nobody made, are for the template to say."""
    for last in ({"role": "assistant", "content": "Yes"}, {"role": "tool", "content": "1", "tool_call_id": "x"}):
        assert server.post(CHAT, messages=[*USER, last], max_tokens=1).status in (200, 400)


@pytest.mark.parametrize(
    "text",
    [
        "שלום",
        "👩‍👩‍👧‍👦",
        "e\u0301\u0323",
        "\ufeffBOM",
        "\ufffd",
        "\x1b[31mred\x1b]0;t\x07",
        "\u202eevil",
        "\U0010ffff",
        "\x00\x01",
    ],
)
def test_any_text(server: Server, text: str) -> None:
    ids = server.post("/tokenize", prompt=text, add_special_tokens=False).json["tokens"]
    assert server.post("/detokenize", tokens=ids).json["prompt"] == text
    assert server.chat(text, max_tokens=1).status == 200


def test_no_template(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.tokenizer, "chat_templates", {})
    assert "template" in server.chat().json["error"]["message"]
    assert server.post(COMPLETIONS, prompt="Hi", max_tokens=1).status == 200
    monkeypatch.undo()


DEEP: Any = {"type": "string"}
for _ in range(100):
    DEEP = {"type": "array", "items": DEEP}
BAD_SCHEMAS: dict[str, Any] = {
    "look-ahead": {"type": "string", "pattern": "(?=a)b"},
    "a remote reference": {"$ref": "https://example.com/x.json"},
    "a loop": {"$ref": "#"},
    "no value": {"type": "string", "minLength": 5, "maxLength": 2},
    "false": False,
    "a list": [],
    "a text": "",
    "no type": {"type": "thing"},
    "deep": DEEP,
}


@pytest.mark.parametrize("schema", BAD_SCHEMAS.values(), ids=BAD_SCHEMAS)
def test_bad_schemas(server: Server, schema: Any) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    began = time.monotonic()
    answer = server.chat(response_format=format)
    assert answer.status == 400, answer.data[:300]
    assert answer.json["error"]["param"] in ("response_format", "body")
    assert time.monotonic() - began < 10


def test_large_schemas(server: Server) -> None:
    """Bounds that no text reaches, and a hundred thousand values: a text, or a refusal, and soon."""
    many = {"enum": [f"v{i}" for i in range(100_000)]}
    huge = {"type": "string", "maxLength": 10**9}
    for schema in (many, huge):
        format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        began = time.monotonic()
        assert server.chat(response_format=format, max_tokens=4).status in (200, 400)
        assert time.monotonic() - began < 20


def test_grammars_beside_each_other(server: Server) -> None:
    """Of different kinds at once, with bad ones among them: each has its own."""
    formats: list[Any] = [
        {"type": "grammar", "syntax": "regex", "definition": "[ab]{4}"},
        {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["x", "yy"]}}},
        {"type": "grammar", "syntax": "regex", "definition": "(("},
    ]
    matches = [lambda text: set(text) <= {*"ab"} and len(text) == 4, lambda text: text in ('"x"', '"yy"'), None]

    async def run() -> list[Any]:
        bodies = [{"messages": USER, "max_tokens": 20, "response_format": formats[i % 3]} for i in range(12)]
        return await asyncio.gather(*(call(server.app, "POST", CHAT, body) for body in bodies))

    for i, answer in enumerate(server.run(run())):
        if (match := matches[i % 3]) is None:
            refused(answer, "response_format")
        else:
            assert match(answer.json["choices"][0]["message"]["content"]), answer.data


def test_a_text_that_is_cut(server: Server) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "string", "minLength": 50}}}
    choice = server.chat(response_format=format, max_tokens=3).json["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith('"')


BAD_TOOLS: dict[str, Any] = {
    "a quote": [{"name": 'a"b'}],
    "a line end": [{"name": "a\nb"}],
    "an empty name": [{"name": ""}],
    "a name twice": [{"name": "now"}, {"name": "now"}],
    "a thousand": [{"name": f"f{i}"} for i in range(1000)],
    "a list of parameters": [{"name": "now", "parameters": []}],
    "parameters that are no object": [{"name": "now", "parameters": {"type": "string"}, "strict": True}],
}


@pytest.mark.parametrize("tools", BAD_TOOLS.values(), ids=BAD_TOOLS)
def test_bad_tools(server: Server, tools: list[Any]) -> None:
    given = [{"type": "function", "function": tool} for tool in tools]
    refused(server.chat(tools=given, tool_choice="required", max_tokens=5), "tools")


def test_a_tool_with_a_name_of_python(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "__proto__", "parameters": {"type": "object"}}}]
    answer = server.chat(tools=tools, max_tokens=2)
    assert answer.status in (200, 400)


class Broken:
    """A parser that does not keep its protocol."""

    def __init__(self, *_: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError("a secret")


@pytest.mark.parametrize("streamed", [True, False])
def test_a_parser_that_fails(server: Server, monkeypatch: pytest.MonkeyPatch, streamed: bool, caplog: Any) -> None:
    """F17: a plugin's fault costs its own request, and nobody is told what it was about."""
    assert server.served.tool_format is not None
    broken = dataclasses.replace(server.served.tool_format, parser=Broken)
    monkeypatch.setitem(server.served.__dict__, "tool_format", broken)
    tools = [{"type": "function", "function": {"name": "now"}}]
    answer = server.chat(tools=tools, max_tokens=4, stream=streamed)
    assert (answer.status, answer.json["error"]["type"]) == (500, "server_error")
    assert "ZeroDivisionError at test_server_rows" in caplog.text
    assert "secret" not in caplog.text + answer.data.decode()
