"""Adapters on the server and the command line: under names of their own, loaded and unloaded by clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from asgi_client import Answer
from click.testing import CliRunner
from served_model import NAME, Server, tiny_model
from tiny_chat_model import write_chat_model

import llama_jax as lj
from llama_jax.adapters import LoraConfig, new_adapter, save_adapter
from llama_jax.cli import cli
from llama_jax.cli.adapter_options import given_adapter
from llama_jax.convert import convert
from llama_jax.errors import RequestError
from llama_jax.generation.streams import Request
from llama_jax.loading import load
from llama_jax.server.settings import ServerSettings

KEY = {"authorization": "Bearer secret"}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}


def write_adapter(folder: Path, model: Any, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    fresh = new_adapter(model.params, model.config, LoraConfig(2, 8, target_modules="all-linear"), jax.random.key(seed))
    moved = jax.tree.map(lambda x: np.asarray(x + rng.standard_normal(x.shape), np.float32), fresh)
    return save_adapter(folder, moved, model.config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model beside a folder of adapters."""
    base = tmp_path_factory.mktemp("served")
    model, _ = tiny_model(base / "tiny")
    for seed, name in enumerate(("first", "second", "third"), 1):
        write_adapter(base / "adapters" / name, model, seed)
    return base


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    model, tokenizer = tiny_model(folder / "tiny")
    given = {"first": folder / "adapters" / "first"}
    with (
        asyncio.Runner() as runner,
        Server(
            *(model, tokenizer, runner),
            adapters=given,
            max_adapters=2,
            keys=("secret",),
            adapters_from=folder / "adapters",
        ) as made,
    ):
        yield made


def post(server: Server, path: str, body: Any) -> Answer:
    return server.call("POST", path, body, headers=KEY)


def said(server: Server, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], **GREEDY}
    answer = post(server, "/v1/chat/completions", body)
    assert answer.status == 200, answer.json
    assert answer.json["model"] == model
    streamed = post(server, "/v1/chat/completions", body | {"stream": True}).events
    assert {event["model"] for event in streamed} == {model}
    text = answer.json["choices"][0]["message"]["content"]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in streamed) == text
    return text


def listed(server: Server) -> dict[str, str | None]:
    data = server.call("GET", "/v1/models", headers=KEY).json["data"]
    return {one["id"]: one.get("parent") for one in data}


def test_an_adapter_that_has_just_gone_is_not_the_model(server: Server) -> None:
    served = server.served.by("gone")
    with pytest.raises(RequestError, match="there is no adapter 'gone'"):
        server.run(served.engine.generate(Request([5, 6], adapter=served.adapter)))


@pytest.mark.slow
def test_clients_name_load_and_unload_adapters(server: Server, folder: Path) -> None:
    assert listed(server) == {NAME: None, "first": NAME}
    base, first = said(server, NAME), said(server, "first")
    assert base != first
    answer = post(server, "/v1/load_lora_adapter", {"lora_name": "mine", "lora_path": "second"})
    assert (answer.status, answer.data) == (200, b"Success: LoRA adapter 'mine' added successfully.")
    assert listed(server) == {NAME: None, "first": NAME, "mine": NAME}
    assert server.call("GET", "/v1/models/mine", headers=KEY).json["root"] == NAME
    mine = said(server, "mine")
    assert mine not in (base, first)
    assert (said(server, NAME), said(server, "first")) == (base, first)
    for body, status, says in (
        ({"lora_name": "mine", "lora_path": "third"}, 400, "already"),
        ({"lora_name": NAME, "lora_path": "third"}, 400, "already"),
        ({"lora_name": "more", "lora_path": "third"}, 429, "all 2 slots"),
        ({"lora_name": "more", "lora_path": "../tiny"}, 400, "there is no adapter in '../tiny'"),
        ({"lora_name": "more", "lora_path": "/etc"}, 400, "there is no adapter in '/etc'"),
        ({"lora_name": "more", "lora_path": "a\0b"}, 400, "there is no adapter"),
        ({"lora_name": "more", "lora_path": "."}, 400, "adapter_config.json"),
    ):
        refused = post(server, "/v1/load_lora_adapter", body)
        assert (refused.status, says in refused.data.decode()) == (status, True), (body, refused.data)
    path = "/v1/unload_lora_adapter"
    assert post(server, path, {"lora_name": "first"}).status == 200
    assert post(server, path, {"lora_name": "first"}).status == 404
    assert post(server, path, {"lora_name": NAME}).status == 400
    body = {"model": "first", "prompt": "Hi", **GREEDY}
    assert post(server, "/v1/completions", body).status == 404
    absolute = str(folder / "adapters" / "third")
    assert post(server, "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": absolute}).status == 200
    assert said(server, "a") not in (base, first, mine)
    assert said(server, "mine") == mine
    assert server.call("POST", path, {"lora_name": "a"}).status == 401


def test_routes_that_are_off(folder: Path) -> None:
    with pytest.raises(RequestError, match="only with a key"):
        ServerSettings(adapters_from=folder)


@pytest.mark.slow
def test_without_a_folder_of_adapters_clients_load_none(folder: Path) -> None:
    model, tokenizer = tiny_model(folder / "tiny")
    with asyncio.Runner() as runner, Server(model, tokenizer, runner, keys=("secret",)) as server:
        for path, body in (
            ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "first"}),
            ("/v1/unload_lora_adapter", {"lora_name": "a"}),
        ):
            answer = post(server, path, body)
            assert (answer.status, answer.json["error"]["code"]) == (403, "adapters_are_fixed")


# --- The command line


def test_values_of_the_option(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert given_adapter(()) is None
    assert given_adapter(("folder",)) == given_adapter(("folder",), named=True) == "folder"
    assert given_adapter((str(tmp_path / "a=b"),)) == str(tmp_path / "a=b")
    assert given_adapter(("a=x", "b=y"), named=True) == {"a": "x", "b": "y"}
    for values, named in ((("a=x",), False), (("x", "y"), True), (("a=x", "a=y"), True), (("a=x", "y"), True)):
        with pytest.raises(Exception, match="adapter"):
            given_adapter(values, named=named)


def command(*args: object) -> Any:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_merged_and_attached_say_the_same(tmp_path: Path, folder: Path) -> None:
    """generate with --adapter, the merged checkpoint without; of a quantised base after decoding it."""
    adapter, tiny = folder / "adapters" / "first", folder / "tiny"
    options = ("--max-tokens", 8, "--ignore-eos", "--json", "--dtype", "float32", "--no-convert")

    def generated(model: Path, *more: object) -> list[int]:
        return json.loads(command("generate", "Hi", "-m", model, *options, *more))["token_ids"]

    attached = generated(tiny, "--adapter", adapter)
    assert attached != generated(tiny)
    command("merge-lora", tiny, adapter, tmp_path / "merged")
    assert generated(tmp_path / "merged") == attached
    command("quantize", tiny, tmp_path / "int8", "--weights", "int8")
    refused = CliRunner().invoke(cli, ["merge-lora", str(tmp_path / "int8"), str(adapter), str(tmp_path / "no")])
    assert refused.exit_code == 2
    assert "--dequantize" in refused.output
    command("merge-lora", tmp_path / "int8", adapter, tmp_path / "decoded", "--dequantize")
    assert generated(tmp_path / "decoded") == generated(tmp_path / "int8", "--adapter", adapter)


@pytest.mark.slow
def test_lines_of_a_batch_name_adapters(tmp_path: Path, folder: Path) -> None:
    made = convert(write_chat_model(tmp_path / "hf"), tmp_path / "tiny")
    model, tokenizer = load(made, dtype="float32")
    source, target, prompt = tmp_path / "in.jsonl", tmp_path / "out.jsonl", "Hi"
    body = {"prompt": prompt, "max_tokens": 8}
    lines = [
        {"prompt": prompt, "max_tokens": 8},
        {"prompt": prompt, "max_tokens": 8, "model": "first"},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": body | {"model": "second"}},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = [f"--adapter={name}={folder / 'adapters' / name}" for name in ("first", "second")]
    args = ("batch", source, target, "-m", made, "--dtype", "float32", "--ignore-eos")
    command(*args, *named)
    plain, first, openai = [json.loads(line) for line in target.read_text().splitlines()]
    texts = [plain["text"], first["text"], openai["response"]["body"]["choices"][0]["text"]]
    assert openai["response"]["body"]["model"] == "second"
    for name, text in zip((None, "first", "second"), texts, strict=True):
        loaded = model if name is None else load(made, dtype="float32", adapter=folder / "adapters" / name)[0]
        assert lj.generate(loaded, tokenizer, prompt, max_tokens=8, ignore_eos=True) == text
    other = CliRunner().invoke(cli, [str(arg) for arg in (*args, *named[:1])])
    assert other.exit_code != 0  # the output belongs to a run with both
