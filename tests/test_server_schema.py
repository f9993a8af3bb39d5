"""/openapi.json: it describes every route, and the server does what it says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from served_model import NAME, Server, tiny_model
from server_process import KEY, serving
from tiny_chat_model import TOOL_TEMPLATE, write_chat_model

from llama_jax.server.app import OPERATIONS

USER = [{"role": "user", "content": "Hi"}]
CALL = {"name": "now", "arguments": '{"a": 1}'}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": USER, "max_tokens": 2, "logprobs": True},
        {"messages": USER, "n": 2, "max_tokens": 40, "tools": [{"type": "function", "function": {"name": "now"}}]}
        | {"tool_choice": "required", "parallel_tool_calls": False},
        {"messages": USER, "max_tokens": 2, "chat_template_kwargs": {"enable_thinking": True}},
    ],
    "/v1/completions": [{"prompt": "Once"}, {"prompt": ["a", "b"], "stop": "e", "logprobs": 1, "echo": True}],
    "/v1/messages": [{"model": NAME, "messages": USER, "max_tokens": 2}],
    "/v1/responses": [{"input": "Hi", "max_output_tokens": 2}],
    "/v1/messages/count_tokens": [{"model": NAME, "messages": USER}],
    "/tokenize": [{"prompt": "Hi"}, {"messages": USER}],
    "/detokenize": [{"tokens": [5, 6]}],
    "/apply-template": [{"messages": USER}],
    "/v1/load_lora_adapter": [{"lora_name": "a", "lora_path": "b"}],
    "/v1/unload_lora_adapter": [{"lora_name": "a"}],
}
CLOSED = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
"""Routes that this server refuses, since no folder of adapters is given; that of `test_adapters_server` has one."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server") / "tiny"
    with asyncio.Runner() as runner, Server(*tiny_model(folder, template=TOOL_TEMPLATE), runner) as made:
        yield made


def resolved(document: Any, part: Any) -> Any:
    """A schema with the components that it refers to, as validators look for them."""
    return part | {"components": document["components"]}


def test_every_operation_is_described_and_answers_as_it_is(server: Server) -> None:
    """Bodies meet the schema of their route, answers that of theirs, and errors that of all errors."""
    document = server.call("GET", "/openapi.json").json
    assert {
        (path.replace("{name}", "{name:path}"), method.upper())
        for path, of in document["paths"].items()
        for method in of
    } == {(operation.path, operation.method) for operation in OPERATIONS}
    for operation in OPERATIONS:
        described = document["paths"][operation.path.replace(":path}", "}")][operation.method.lower()]
        for body in BODIES[operation.path] if operation.body else [None]:
            if body is not None:
                sent = described["requestBody"]["content"]["application/json"]["schema"]
                jsonschema.validate(body, resolved(document, sent))
            answer = server.call(operation.method, operation.path.replace("{name:path}", NAME), body)
            assert answer.status == (403 if operation.path in CLOSED else 200), (operation.path, answer.data)
            if operation.answer is None:
                continue
            made = described["responses"]["200"]["content"]["application/json"]["schema"]
            jsonschema.validate(answer.json, resolved(document, made))
            msgspec.convert(answer.json, operation.answer)  # refuses fields that are not described
        if operation.body is not None:
            error = server.call(operation.method, operation.path, {"nothing": 1})
            wrong = described["responses"]["4XX"]["content"]["application/json"]["schema"]
            jsonschema.validate(error.json, resolved(document, wrong))
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({"nothing": 1}, resolved(document, sent))


def test_the_template_applied(server: Server) -> None:
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert server.post("/apply-template", messages=USER).json == {"prompt": expected}
    thinking = {"chat_template_kwargs": {"enable_thinking": True}, "add_generation_prompt": False}
    assert (
        server.post("/apply-template", messages=USER, **thinking).json["prompt"] == expected[: expected.rindex("<|im")]
    )
    for name in ("template", "special_tokens"):
        refused = server.post("/apply-template", messages=USER, chat_template_kwargs={name: "x"})
        assert (refused.status, refused.json["error"]["param"]) == (400, "chat_template_kwargs")
    ids = server.post("/tokenize", prompt=expected, add_special_tokens=False).json["tokens"]
    assert ids == server.post("/tokenize", messages=USER).json["tokens"]


def test_what_the_tokenizer_is(server: Server) -> None:
    info = server.call("GET", "/tokenizer_info").json
    assert (info["bos_token"], info["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert info["chat_template"] == info["chat_templates"]["default"] == TOOL_TEMPLATE
    assert (info["vocab_size"], info["model_max_length"]) == (server.tokenizer.vocab_size, 128)


@pytest.mark.slow
@pytest.mark.clients
def test_schemathesis(tmp_path: Path) -> None:
    """All of its checks, on requests that are right by the description and on those that are wrong by it. A right one
    may be refused for what no schema can say, such as the length of a prompt."""
    pytest.importorskip("schemathesis")
    (tmp_path / "schemathesis.toml").write_text(
        f'[auth.openapi.key]\nbearer = "{KEY}"\n'
        '[checks.positive_data_acceptance]\nexpected-statuses = ["2xx", "400", "403"]\n'
    )
    folder = write_chat_model(tmp_path / "tiny", template=TOOL_TEMPLATE)
    with serving(folder) as (process, said):
        asked = urllib.request.Request(f"{said['url']}/openapi.json", headers={"authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            (tmp_path / "openapi.json").write_bytes(answer.read())
        command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", said["url"]]
        options = ["--checks", "all", "--max-examples", "8", "--request-timeout", "60", "--seed", "1"]
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert f"Tested: {len(OPERATIONS)}" in done.stdout
        assert process.poll() is None
