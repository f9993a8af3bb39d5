"""Who is answered, and how much is taken from them. The engine is not running: what is turned away never reaches it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from asgi_client import Answer
from served_model import Server, tiny_model

from llama_jax.errors import RequestError
from llama_jax.server.guard import OPEN
from llama_jax.server.settings import Limits, ServerSettings

KEYS = ("first-key", "second-key")
LIMITS = Limits(body=2000, header_count=20, header_bytes=2000, body_s=0.05, n=4, stop_chars=10)
CHAT = "/v1/chat/completions"
BEARER = {"authorization": "Bearer first-key"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with asyncio.Runner() as runner:
        yield Server(*tiny_model(tmp_path_factory.mktemp("guard") / "tiny"), runner, keys=KEYS, limits=LIMITS)


def refused(answer: Answer, status: int, **expected: Any) -> dict[str, Any]:
    assert answer.status == status, answer.data
    error = answer.json["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert {name: error[name] for name in expected} == expected
    return error


def post(server: Server, body: Any, path: str = CHAT, **headers: str) -> Answer:
    return server.call("POST", path, body, headers={**BEARER, **headers})


def test_every_route_needs_the_key(server: Server) -> None:
    """The routes are those of the application, so that a new one is among them."""
    routes = server.app._app.routes  # type: ignore[attr-defined]
    assert len(routes) >= 10
    for route in routes:
        path = route.path.replace("{name:path}", "tiny")
        method = "POST" if "POST" in route.methods else "GET"
        answer = server.call(method, path, {} if method == "POST" else None)
        if path in OPEN:
            assert answer.status in (200, 503)
        else:
            refused(answer, 401, type="authentication_error", code="invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    refused(server.call("GET", "/none"), 401)
    refused(server.call("GET", "/none", headers=BEARER), 404, code="not_found")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("authorization", "Bearer first-key")], 200),
        ([("authorization", "bearer second-key")], 200),
        ([("x-api-key", "second-key")], 200),
        ([("authorization", "Bearer first-ke")], 401),
        ([("authorization", "Bearer ")], 401),
        ([("authorization", "Basic first-key")], 401),
        ([("authorization", "first-key")], 401),
        ([("authorization", "Bearer first-key"), ("authorization", "Bearer first-key")], 400),
        ([("authorization", "Bearer first-key"), ("x-api-key", "first-key")], 400),
        ([("authorization", "Bearer " + "k" * 3000)], 431),
        ([*BEARER.items(), *((f"x-{i}", "1") for i in range(20))], 431),
        ([*BEARER.items(), ("host", "evil.example")], 403),
        ([*BEARER.items(), ("host", "evil.example:8000")], 403),
        ([*BEARER.items(), ("host", "192.168.0.7:8000")], 403),
        ([*BEARER.items(), ("host", "")], 403),
        ([*BEARER.items(), ("host", "LOCALHOST:8000")], 200),
        ([*BEARER.items(), ("host", "[::1]:8000")], 200),
        ([*BEARER.items(), ("origin", "http://127.0.0.1:8000")], 200),
        ([*BEARER.items(), ("origin", "https://127.0.0.1:8000")], 200),
        ([*BEARER.items(), ("origin", "https://evil.example")], 403),
        ([*BEARER.items(), ("origin", "http://127.0.0.1:9000")], 403),
        ([*BEARER.items(), ("origin", "null")], 403),
    ],
)
def test_headers(server: Server, headers: list[tuple[str, str]], status: int) -> None:
    answer = server.call("GET", "/v1/models", headers=headers)
    assert answer.status == status, answer.data
    assert not any(name.startswith("access-control") for name in answer.headers)
    if status != 200:
        refused(answer, status)


def test_preflights_are_refused(server: Server) -> None:
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = server.call("OPTIONS", CHAT, headers=asked)
    refused(answer, 403, code="wrong_origin")
    refused(server.call("GET", CHAT, headers=BEARER), 405, code="method_not_allowed")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 400),
        ({"content-encoding": "gzip"}, 415),
        ({"content-length": "2001"}, 413),
        ({"content-length": "1e3"}, 400),
        ({"content-length": "10", "transfer-encoding": "chunked"}, 400),
    ],
)
def test_headers_of_bodies(server: Server, headers: Mapping[str, str], status: int) -> None:
    refused(post(server, b"{}", **headers), status)


def test_large_and_slow_bodies(server: Server) -> None:
    """Reading stops at the limit, whatever length was named, and when time is up."""
    chunks = [b"x" * 500] * 100
    answer = server.call("POST", CHAT, chunks=chunks, headers=BEARER)
    refused(answer, 413, code="body_too_large")
    refused(server.call("POST", CHAT, chunks=[b"{"], headers=BEARER), 408, code="body_too_slow")


def test_request_ids(server: Server) -> None:
    assert server.call("GET", "/health/live", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    made = [server.call("GET", "/health/live", headers={"x-request-id": x}) for x in ("a\nb", "x" * 200, "")]
    assert len({answer.headers["x-request-id"] for answer in made}) == 3
    assert all(len(answer.headers["x-request-id"]) == 32 for answer in made)


def test_the_log_has_no_prompt(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llama_jax.server")
    post(server, {"messages": [{"role": "user", "content": "a secret"}]}, path=CHAT + "\nx")
    post(server, {"prompt": "a secret"}, path="/v1/completions")  # the engine is not running
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name.endswith("access")]
    assert [line["status"] for line in lines] == [404, 503]
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert "secret" not in caplog.text
    assert "first-key" not in caplog.text


MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
DEEP = "[" * 400 + "]" * 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "body"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "body"),
        (b'{"messages": [], "temperature": NaN}', "body"),
        (b'{"messages": [], "temperature": 1e999}', "temperature"),
        (f'{{"messages": [{{"role": "user", "content": {DEEP}}}]}}'.encode(), "body"),
        (b'{"messages": [], "seed": ' + b"9" * 1500 + b"}", "seed"),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        (MESSAGES | {"unknown": 1}, "unknown"),
        (MESSAGES | {"temperature": -1}, "temperature"),
        (MESSAGES | {"temperature": "1"}, "temperature"),
        (MESSAGES | {"top_p": 0}, "top_p"),
        (MESSAGES | {"top_k": 2.5}, "top_k"),
        (MESSAGES | {"min_p": 2}, "min_p"),
        (MESSAGES | {"presence_penalty": 3}, "presence_penalty"),
        (MESSAGES | {"n": 0}, "n"),
        (MESSAGES | {"n": True}, "n"),
        (MESSAGES | {"n": 5}, "n"),
        (MESSAGES | {"seed": -1}, "seed"),
        (MESSAGES | {"seed": 2**64}, "seed"),
        (MESSAGES | {"max_tokens": 0}, "max_tokens"),
        (MESSAGES | {"max_tokens": 2**63}, "max_tokens"),
        (MESSAGES | {"max_tokens": 200}, "max_tokens"),
        (MESSAGES | {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        (MESSAGES | {"stop": ""}, "stop"),
        (MESSAGES | {"stop": ["a"] * 5}, "stop"),
        (MESSAGES | {"stop": "x" * 11}, "stop"),
        (MESSAGES | {"stop": [1]}, "stop[0]"),
        (MESSAGES | {"logprobs": 3}, "logprobs"),
        (MESSAGES | {"top_logprobs": 3}, "top_logprobs"),
        (MESSAGES | {"logprobs": True, "top_logprobs": 21}, "logprobs"),
        (MESSAGES | {"logit_bias": {"a": 1}}, "logit_bias"),
        (MESSAGES | {"logit_bias": {"-1": 1}}, "logit_bias"),
        (MESSAGES | {"logit_bias": {"5": 1e9}}, "logit_bias"),
        (MESSAGES | {"response_format": {"type": "xml"}}, "response_format"),
        (MESSAGES | {"stream_options": {"include_usage": True}}, "stream_options"),
        (MESSAGES | {"tools": [{"type": "function"}]}, "tools"),
        ({"messages": [{"role": "user", "content": "word " * 200}]}, "prompt"),
    ],
)
def test_bad_chats(server: Server, body: Any, param: str) -> None:
    refused(post(server, body), 400, type="invalid_request_error", param=param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": [5] * 128}, "prompt"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "echo"),
    ],
)
def test_bad_completions(server: Server, fields: Any, param: str) -> None:
    refused(post(server, fields, "/v1/completions"), 400, type="invalid_request_error", param=param)


def test_unknown_models(server: Server) -> None:
    for name in ("other", "../../x", "x" * 900):
        error = refused(post(server, MESSAGES | {"model": name}), 404, code="model_not_found", param="model")
        assert len(error["message"]) < 250
    refused(post(server, {"tokens": [10**6]}, "/detokenize"), 400)
    refused(post(server, {"tokens": [-1]}, "/detokenize"), 400)


def test_an_engine_that_does_not_run(server: Server) -> None:
    answer = post(server, MESSAGES)
    refused(answer, 503, type="overloaded_error", code="EngineFailed")
    assert answer.headers["retry-after"] == "1"
    assert server.call("GET", "/health/live").status == 200
    ready = server.call("GET", "/health/ready")
    assert (ready.status, ready.json["status"]) == (503, "failed")
    assert "not running" in ready.json["reason"]
    assert server.call("GET", "/health").status == 503
    assert b'llama_jax_engine_up{model_name="tiny"} 0.0' in server.call("GET", "/metrics", headers=BEARER).data


def test_other_addresses_need_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.7", "server.example"):
        with pytest.raises(RequestError, match="no key"):
            ServerSettings(host)
        assert ServerSettings(host, keys=("k",)).host == host
    with pytest.raises(RequestError, match="key"):
        ServerSettings(keys=("",))


@pytest.mark.parametrize(
    ("bound", "names", "served", "not_served"),
    [
        ("127.0.0.1", (), ["localhost", "127.0.0.1:1", "[::1]"], ["10.0.0.1", "x.example", "localhost.evil", "::1.x"]),
        ("0.0.0.0", (), ["10.0.0.1:80", "localhost", "[fe80::1]:80"], ["x.example", "10.0.0.1.x.example"]),
        ("10.0.0.1", ("x.example",), ["10.0.0.1", "X.example:443"], ["localhost", "10.0.0.2", "y.x.example"]),
    ],
)
def test_hosts(bound: str, names: tuple[str, ...], served: list[str], not_served: list[str]) -> None:
    settings = ServerSettings(bound, keys=("k",), hosts=names)
    assert [host for host in served if not settings.serves(host)] == []
    assert [host for host in not_served if settings.serves(host)] == []
