"""The command line: what goes where, exit codes, and what happens when something is wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import gguf
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants as hub_constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_chat_model import TEMPLATE, write_chat_model
from tiny_models import LLAMA, write_gguf, write_hf

import llama_jax
from llama_jax import cli as cli_module
from llama_jax.checkpoint import open_checkpoint
from llama_jax.cli import COMMANDS, cli
from llama_jax.cli.errors import report
from llama_jax.cli.generate import NO_NEXT_TOKEN
from llama_jax.cli.progress import Reporter
from llama_jax.cli.terminal import installing, printable, size_text
from llama_jax.convert import convert
from llama_jax.errors import CheckpointError, NoDevice, RequestError

LLAMA_JAX = [sys.executable, "-m", "llama_jax.cli"]


def run(*args: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], input=stdin)


def error_of(result: Result) -> dict:
    return json.loads(result.stdout)["error"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny converted model with tokenizer and chat template; its context is 256."""
    folder = tmp_path_factory.mktemp("model")
    return convert(write_chat_model(folder / "hf"), folder / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of models, and an empty one of the hub."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


# --- Help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(args: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 0
    for name in cli.list_commands(click.Context(cli)):
        assert name in result.stdout
        assert COMMANDS[name] in result.stdout
    assert "130  interrupted" in result.stdout


@pytest.mark.parametrize("name", cli.list_commands(click.Context(cli)))
def test_every_command_has_json_and_examples(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert "--json" in [flag for p in command.params for flag in p.opts]
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"  llama-jax {name}" in result.stdout.partition("Examples:")[2]


def test_version() -> None:
    assert run("--version").stdout == f"llama-jax {llama_jax.__version__}\n"


def test_module_can_be_run() -> None:
    done = subprocess.run([*LLAMA_JAX, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"llama-jax {llama_jax.__version__}\n"


# --- generate ---------------------------------------------------------------------------------------------------------

FIELDS = [
    "text",
    "token_ids",
    "prompt_token_ids",
    "finish_reason",
    "ttft_ms",
    "prompt_tps",
    "generation_tps",
    "device",
    "model",
    "dtype",
]


def test_generate_json_is_what_the_library_gives(model: Path) -> None:
    result = run("generate", "hello", "-m", model, "--max-tokens", 12, "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    answer = json.loads(line)
    assert list(answer) == FIELDS
    loaded, tokenizer = llama_jax.load(model)
    (want,) = llama_jax.batch_generate(loaded, tokenizer, ["hello"], max_tokens=12)
    assert answer["token_ids"] == list(want.outputs[0].token_ids)
    assert answer["text"] == want.text
    assert answer["prompt_token_ids"] == tokenizer.encode("hello")
    assert answer["finish_reason"] == want.outputs[0].finish_reason
    assert answer["ttft_ms"] > 0
    assert answer["prompt_tps"] > 0
    assert answer["model"] == str(model)
    assert answer["dtype"] == ("float32" if "cpu" in answer["device"] else "bfloat16")


def test_generate_streams_the_same_text(model: Path) -> None:
    text = json.loads(run("generate", "hello", "-m", model, "--max-tokens", 12, "--json").stdout)["text"]
    result = run("generate", "hello", "-m", model, "--max-tokens", 12)
    assert result.exit_code == 0
    assert result.stdout.removesuffix("\n") == text.removesuffix("\n")
    assert f"{model} on " in result.stderr
    assert "float32" in result.stderr
    assert "tokens/s" in result.stderr
    quiet = run("generate", "hello", "-m", model, "--max-tokens", 12, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


@pytest.mark.slow
def test_generate_fails_where_there_is_no_next_token(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    broken = convert(folder, tmp_path / "tiny", allow_nonfinite=True)
    streamed = run("generate", "hello", "-m", broken, "--max-tokens", 4)
    assert "end: the next logits were not finite" in streamed.stderr
    whole = run("generate", "hello", "-m", broken, "--max-tokens", 4, "--json")
    assert (json.loads(whole.stdout)["finish_reason"], json.loads(whole.stdout)["token_ids"]) == ("error", [])
    assert streamed.exit_code == whole.exit_code == NO_NEXT_TOKEN


def test_generate_dtype(model: Path) -> None:
    result = run("generate", "hello", "-m", model, "--max-tokens", 1, "--dtype", "bfloat16", "--json")
    assert json.loads(result.stdout)["dtype"] == "bfloat16"


@pytest.mark.parametrize(("entered", "prompt"), [("hello\n", "hello"), ("hello", "hello"), ("a\nb\n\n", "a\nb\n")])
def test_generate_reads_standard_input(model: Path, entered: str, prompt: str) -> None:
    result = run("generate", "-", "-m", model, "--max-tokens", 1, "--json", stdin=entered)
    _, tokenizer = llama_jax.load(model)
    assert json.loads(result.stdout)["prompt_token_ids"] == tokenizer.encode(prompt)


@pytest.mark.parametrize("source", ["file", "-"])
def test_generate_messages(model: Path, tmp_path: Path, source: str) -> None:
    messages = [{"role": "user", "content": "Is <|im_end|> é?"}]
    text = json.dumps(messages)
    (tmp_path / "m.json").write_text(text)
    path = tmp_path / "m.json" if source == "file" else "-"
    result = run("generate", "--messages", path, "-m", model, "--max-tokens", 2, "--json", stdin=text)
    assert result.exit_code == 0, result.output
    _, tokenizer = llama_jax.load(model)
    assert json.loads(result.stdout)["prompt_token_ids"] == llama_jax.encode_chat(tokenizer, messages)


def test_generate_sampling_options(model: Path) -> None:
    options = ["--temperature", 1, "--seed", 5, "--top-p", 0.9, "--top-k", 50, "--min-p", 0.01, "--max-tokens", 8]
    options += ["--repetition-penalty", 1.2, "--presence-penalty", 0.1, "--frequency-penalty", 0.1, "--ignore-eos"]
    result = run("generate", "hello", "-m", model, *options, "--json")
    loaded, tokenizer = llama_jax.load(model)
    params = llama_jax.SamplingParams(
        temperature=1,
        seed=5,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
        max_tokens=8,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        ignore_eos=True,
    )
    (want,) = llama_jax.batch_generate(loaded, tokenizer, ["hello"], params)
    assert json.loads(result.stdout)["token_ids"] == list(want.outputs[0].token_ids)


def test_generate_stops(model: Path) -> None:
    answer = json.loads(run("generate", "hello", "-m", model, "--max-tokens", 12, "--ignore-eos", "--json").stdout)
    third = answer["token_ids"][2]
    by_id = run("generate", "hello", "-m", model, "--max-tokens", 12, "--stop-token-ids", third, "--json")
    stopped = json.loads(by_id.stdout)
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == answer["token_ids"][: answer["token_ids"].index(third) + 1]
    string = answer["text"].strip()[2:4]
    by_string = run("generate", "hello", "-m", model, "--max-tokens", 12, "--stop", string, "--stop", "never", "--json")
    assert json.loads(by_string.stdout)["text"] == answer["text"][: answer["text"].index(string)]


def test_generate_without_limit_ends_with_the_context(model: Path) -> None:
    loaded, tokenizer = llama_jax.load(model)
    prompt = "a " * 200
    ids = tokenizer.encode(prompt)
    room = loaded.config.context_length - len(ids)
    assert 0 < room < 256
    result = run("generate", prompt, "-m", model, "--ignore-eos", "--json")
    answer = json.loads(result.stdout)
    assert len(answer["token_ids"]) == room
    assert answer["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("args", "param"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-p", "1.1"], "top_p"),
        (["--top-k", "-2"], "top_k"),
        (["--min-p", "2"], "min_p"),
        (["--presence-penalty", "3"], "presence_penalty"),
        (["--frequency-penalty", "-3"], "frequency_penalty"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(2**64)], "seed"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--max-tokens", str(2**63)], "max_tokens"),
        (["--max-tokens", "300"], "max_tokens"),
        (["--min-tokens", "-1"], "min_tokens"),
        (["--min-tokens", "300"], "min_tokens"),
        (["--stop", ""], "stop"),
        (["--stop-token-ids", "-1"], "stop_token_ids"),
        (["--stop-token-ids", "99999"], "stop_token_ids"),
    ],
)
def test_generate_refuses_values_by_name(model: Path, args: list[str], param: str) -> None:
    result = run("generate", "hello", "-m", model, *args, "--json")
    assert result.exit_code == 2
    assert error_of(result)["param"] == param
    assert error_of(result)["hint"]


@pytest.mark.parametrize("args", [["--temperature", "abc"], ["--top-k", "2.5"], ["--dtype", "int8"], ["--frob"]])
def test_generate_refuses_wrong_usage(args: list[str]) -> None:
    result = run("generate", "hello", *args, "--json")
    assert result.exit_code == 2
    assert error_of(result)["type"] == "UsageError"


def test_generate_wants_one_source() -> None:
    for args in ([], ["hello", "--messages", "m.json"]):
        result = run("generate", *args)
        assert result.exit_code == 2
        assert "either a PROMPT or --messages" in result.stderr
        assert not result.stdout


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "list of messages"),
        (b'{"role": "user"}', "list of messages"),
        (b'["hello"]', "no role"),
        (b'[{"content": "x"}]', "no role"),
        (
            b'[{"role": "user", "content": "x"}, {"role": "alien", "content": "x"}]',
            "message 1 has the unknown role 'alien'",
        ),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_generate_refuses_messages(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    result = run("generate", "--messages", path, "--json")
    assert result.exit_code == 2
    assert error_of(result)["param"] == "messages"
    assert says in error_of(result)["message"]


def test_generate_refuses_messages_without_an_answer(tmp_path: Path) -> None:
    """Before any model is looked for."""
    path = tmp_path / "m.json"
    path.write_text('[{"role": "user", "content": "x"}]')
    result = run("generate", "--messages", path, "--max-tokens", 0, "-m", tmp_path / "none", "--json")
    assert result.exit_code == 2
    assert error_of(result)["param"] == "max_tokens"


def test_generate_refuses_unreadable_input(tmp_path: Path) -> None:
    assert "No such file" in error_of(run("generate", "--messages", tmp_path / "none", "--json"))["message"]
    assert "directory" in error_of(run("generate", "--messages", tmp_path, "--json"))["message"]
    assert error_of(run("generate", "-", "--json", stdin=b"\xff"))["message"] == "standard input is not UTF-8 (byte 0)"
    done = subprocess.run([*LLAMA_JAX, "generate", b"\xff", "--json"], capture_output=True, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["message"] == "the prompt is not UTF-8"


def test_generate_needs_a_template_for_messages(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "hf", template=None)
    (tmp_path / "m.json").write_text('[{"role": "user", "content": "x"}]')
    result = run("generate", "--messages", tmp_path / "m.json", "-m", folder)
    assert result.exit_code == 4
    assert "no chat template" in result.stderr


def test_generate_unknown_model() -> None:
    result = run("generate", "hello", "-m", "../../x", "--json")
    assert result.exit_code == 3
    assert error_of(result)["type"] == "ModelNotFound"


# --- convert, show, list ----------------------------------------------------------------------------------------------


def test_convert(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA)
    result = run("convert", tmp_path / "hf", tmp_path / "out", "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert answer.pop("seconds") >= 0
    assert answer == {
        "path": str(tmp_path / "out"),
        "source": "hf",
        "dtype": "bfloat16",
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
    }
    again = run("convert", tmp_path / "hf", tmp_path / "out")
    assert again.exit_code == 73
    assert "--overwrite" in again.stderr
    replaced = run("convert", tmp_path / "hf", tmp_path / "out", "--overwrite")
    assert replaced.stdout == f"{tmp_path / 'out'}\n"
    assert open_checkpoint(tmp_path / "out").dtype == "float32"
    assert run("convert", tmp_path / "out", tmp_path / "two").exit_code == 3


def test_convert_unknown_source(tmp_path: Path) -> None:
    for source in (tmp_path / "none", "none", "../../x"):
        result = run("convert", source, tmp_path / "out")
        assert result.exit_code == 3
        assert not (tmp_path / "out").exists()


def test_convert_hub_name_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    result = run("convert", "some-org/some-model@main", tmp_path / "out")
    assert result.exit_code == 7
    assert "some-org/some-model" in result.stderr


def test_convert_refuses_nonfinite_weights_unless_told(tmp_path: Path) -> None:
    import numpy as np
    from tiny_models import hf_tensors, random_leaves

    from llama_jax.config import config_from_hf

    config = config_from_hf(LLAMA)
    leaves = random_leaves(config)
    leaves["final_norm.weight"][3] = np.nan
    write_hf(tmp_path / "hf", LLAMA, tensors=hf_tensors(config, leaves))
    result = run("convert", tmp_path / "hf", tmp_path / "out")
    assert result.exit_code == 4
    assert "final_norm.weight" in result.stderr
    assert run("convert", tmp_path / "hf", tmp_path / "out", "--allow-nonfinite").exit_code == 0


FACTS = [
    "model",
    "format",
    "path",
    "source",
    "revision",
    "licence",
    "quantization",
    "architecture",
    "parameters",
    "active_parameters",
    "context",
    "vocabulary",
    "layers",
    "hidden_size",
    "mlp_size",
    "experts",
    "heads",
    "kv_heads",
    "head_dim",
    "attention",
    "layer_kinds",
    "rope",
    "tied_embeddings",
    "weights",
    "dtype",
    "bytes",
    "memory_bytes",
    "kv_cache_bytes_per_token",
    "tokenizer",
    "chat_template",
    "files",
]


def test_show_checkpoint(model: Path) -> None:
    facts = json.loads(run("show", model, "--json").stdout)
    assert list(facts) == FACTS
    checkpoint = open_checkpoint(model)
    size = sum(math.prod(t.shape) for t in checkpoint.tensors.values())
    assert facts["parameters"] == facts["active_parameters"] == size
    assert facts["memory_bytes"] == {"float32": 4 * size, "bfloat16": 2 * size}
    assert facts["kv_cache_bytes_per_token"] == {
        "float32": 2 * 2 * 8 * 4,
        "bfloat16": 2 * 2 * 8 * 2,
        "int8": 2 * 2 * (8 + 2),
        "k8v4": 2 * (8 + 2 + 4 + 2),
        "int4": 2 * 2 * (4 + 2),
        "fp8": 2 * 2 * (8 + 2),
    }
    assert (facts["layers"], facts["heads"], facts["kv_heads"], facts["context"]) == (1, 4, 2, 256)
    assert (facts["dtype"], facts["chat_template"], facts["source"]) == ("float32", TEMPLATE, "huggingface hf")
    assert facts["tokenizer"] == "byte-level BPE, 3,008 tokens"
    assert facts["layer_kinds"] == ["1x full, mlp 24"]
    assert facts["files"] == checkpoint.file_digests
    text = run("show", model).stdout
    assert "licence:                  unknown" in text
    assert f"chat template:            {len(TEMPLATE.splitlines())} lines" in text
    assert checkpoint.file_digests["tokenizer.json"] in text
    assert "final_norm.weight" not in text
    assert run("show", model, "--template").stdout == TEMPLATE + "\n"


def test_show_tensors(model: Path) -> None:
    info = open_checkpoint(model).tensors["final_norm.weight"]
    tensors = json.loads(run("show", model, "--tensors", "--json").stdout)["tensors"]
    assert tensors["final_norm.weight"] == {"shape": [16], "dtype": "float32", "digest": info.digest}
    assert list(tensors) == list(open_checkpoint(model).tensors)
    assert info.digest in run("show", model, "--tensors").stdout


def test_show_does_not_convert(tmp_path: Path, cache: Path) -> None:
    converted = open_checkpoint(convert(write_chat_model(tmp_path / "hf"), tmp_path / "c"))
    of_folder = json.loads(run("show", tmp_path / "hf", "--json", "--tensors").stdout)
    of_checkpoint = json.loads(run("show", converted.path, "--json", "--tensors").stdout)
    assert list(of_folder) == list(of_checkpoint)
    assert {name: t["shape"] for name, t in of_folder["tensors"].items()} == {
        name: t["shape"] for name, t in of_checkpoint["tensors"].items()
    }
    own = {"model", "format", "path", "source", "files", "tensors", "quantization"}
    assert {k: v for k, v in of_folder.items() if k not in own} == {
        k: v for k, v in of_checkpoint.items() if k not in own
    }
    assert not cache.exists()


def test_show_gguf_without_tokenizer(tmp_path: Path, cache: Path) -> None:
    """It cannot be used, but it can be looked at."""
    write_gguf(tmp_path / "m.gguf", LLAMA)
    facts = json.loads(run("show", tmp_path / "m.gguf", "--json").stdout)
    assert list(facts) == FACTS
    assert (facts["licence"], facts["chat_template"], facts["layers"]) == ("apache-2.0", None, 2)
    assert facts["quantization"] == ""
    assert "chat template:            unknown" in run("show", tmp_path).stdout
    assert "quantization:             none" in run("show", tmp_path).stdout
    assert not cache.exists()


def test_show_quantised_sources(tmp_path: Path) -> None:
    wide = LLAMA | {"hidden_size": 32, "intermediate_size": 64}
    write_gguf(tmp_path / "m.gguf", wide, quantisation=gguf.GGMLQuantizationType.Q8_0)
    facts = json.loads(run("show", tmp_path / "m.gguf", "--json").stdout)
    assert facts["quantization"] == "GGUF Q8_0"
    write_hf(tmp_path / "hf", LLAMA)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    template = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    facts = json.loads(run("show", tmp_path / "hf", "--json").stdout)
    assert (facts["quantization"], facts["chat_template"], facts["tokenizer"]) == ("", "d", "damaged")
    assert "rope:                     default, theta 10000" in run("show", tmp_path / "hf").stdout
    assert config == LLAMA


def test_show_mixture_of_experts(data: Path) -> None:
    facts = json.loads(run("show", data / "goldens" / "mixtral-window-3of8", "--json").stdout)
    assert facts["experts"] == ["3 of 8"]
    assert "sliding" in facts["attention"][0]
    per_expert = 3 * 32 * 16  # gate, up and down of an expert
    assert facts["parameters"] - facts["active_parameters"] == 2 * 5 * per_expert
    assert facts["layer_kinds"] == ["2x sliding 6, 3 of 8 experts of 16"]
    assert facts["tokenizer"] == ""
    assert "tokenizer:                none" in run("show", data / "goldens" / "mixtral-window-3of8").stdout


def test_show_what_is_not_here(cache: Path) -> None:
    result = run("show", "org/name")
    assert result.exit_code == 3
    assert "llama-jax pull org/name" in result.stderr
    assert run("show", "nothing").exit_code == 3


def test_list(tmp_path: Path, cache: Path) -> None:
    assert [m["name"] for m in json.loads(run("list", "--json").stdout)["models"]] == [llama_jax.library.DEFAULT_MODEL]
    assert "not converted yet" in run("list").stdout
    write_hf(tmp_path / "hf", LLAMA)
    assert run("verify", tmp_path / "hf").exit_code == 0
    listed = json.loads(run("list", "--json").stdout)
    assert listed["cache"] == str(cache)
    (_, ours) = listed["models"]
    assert list(ours) == [
        *("name", "path", "source", "dtype", "bytes", "disk_bytes", "licence", "revision", "converted", "error")
    ]
    assert listed["disk_bytes"] == ours["disk_bytes"] > ours["bytes"]
    assert "1 converted" in run("list").stdout
    assert ours["source"] == "huggingface hf"
    assert ours["bytes"] > 0
    assert ours["name"] in run("list").stdout
    assert json.loads(run("show", ours["name"], "--json").stdout)["path"] == ours["path"]
    Path(ours["path"], "config.json").write_text("{")
    assert "unusable" in run("list").stdout


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_error_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(CheckpointError("bad \x1b[31m", hint="again"), as_json=False) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: bad ␛[31m\nhint: again\n"


def test_error_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(RequestError("no", param="top_p", hint="h"), as_json=True) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    want = {"error": {"type": "RequestError", "message": "no", "hint": "h", "param": "top_p"}}
    assert json.loads(captured.out) == want


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (NoDevice("x"), 5, "NoDevice"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (click.Abort(), 130, "Interrupted"),
        (click.UsageError("x"), 2, "UsageError"),
        (MemoryError(), 6, "DoesNotFit"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes\nmore"), 6, "DoesNotFit"),
        (RuntimeError("Unable to initialize backend 'rocm': no"), 5, "NoDevice"),
        (ZeroDivisionError("division by zero"), 70, "ZeroDivisionError"),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, kind: str) -> None:
    assert report(error, as_json=True) == code
    assert json.loads(capsys.readouterr().out)["error"]["type"] == kind


def test_unexpected_error_is_one_line_unless_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr("llama_jax.library.list_models", fail)
    result = run("list")
    assert result.exit_code == 70
    assert result.stderr.splitlines()[0] == "error: ZeroDivisionError: first"
    assert "please report" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("LLAMA_JAX_DEBUG", "1")
    assert "Traceback" in run("list").stderr


def test_a_command_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_jax.cli.rm", None)
    result = run("rm", "x", "--json")
    assert (result.exit_code, error_of(result)["type"]) == (70, "ModuleNotFoundError")


def test_unknown_command() -> None:
    result = run("frobnicate", "--json")
    assert result.exit_code == 2
    assert "frobnicate" in error_of(result)["message"]


@pytest.mark.parametrize(
    "platforms", ["cuda", *(pytest.param(p, marks=pytest.mark.slow) for p in ("rocm", "nonsense"))]
)
def test_device_that_is_not_there(model: Path, platforms: str) -> None:
    env = os.environ | {"JAX_PLATFORMS": platforms}
    command = [*LLAMA_JAX, "generate", "x", "-m", str(model), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 5, done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "NoDevice"
    assert platforms in done.stdout


# --- Terminals and pipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a␛[2Jb"),
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("over\rwrite\x08", "overwrite␈"),
        ("\x9b31m", "\ufffd31m"),
        ("\u202eevil", "\ufffdevil"),
        ("a\tb\nc", "a\tb\nc"),
        ("שלום 👩‍👩‍👧 é 中", "שלום 👩‍👩‍👧 é 中"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_printable_leaves_no_control_character(text: str) -> None:
    assert not [c for c in printable(text) if (ord(c) < 32 or 127 <= ord(c) < 160) and c not in "\n\t"]


def test_terminal_gets_no_escapes_and_a_pipe_gets_the_text() -> None:
    code = "from llama_jax.cli.terminal import write_text; write_text('x\\x1b[31my\\n')"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert piped.stdout == b"x\x1b[31my\n"
    master, slave = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=slave, check=True)
    os.close(slave)
    assert os.read(master, 100).decode() == "x␛[31my\r\n"
    os.close(master)


def test_output_that_the_locale_cannot_show() -> None:
    code = "from llama_jax.cli.terminal import write_text; write_text('é中\\n')"
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, check=True)
    assert done.stdout == b"\xe9\\u4e2d\n"


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (94_700, "94.7 kB"), (538_060_032, "538 MB"), (10**13, "10 TB")]
)
def test_size_text(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


def test_closed_pipe_is_quiet(model: Path) -> None:
    command = [*LLAMA_JAX, "generate", "hello", "-m", str(model), "--max-tokens", "200", "--ignore-eos", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(1)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(60) == 141


@pytest.mark.slow
def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    """The text so far has been written, and the exit code is that of an interrupted program."""
    folder = write_chat_model(tmp_path / "hf", context=1_000_000)
    command = [*LLAMA_JAX, "generate", "hello", "-m", str(folder), "--max-tokens", "900000", "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        first = os.read(child.stdout.fileno(), 1)
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert len(first + out) > 1
    assert b"end: interrupted" in err
    assert b"Traceback" not in err


# --- Progress ---------------------------------------------------------------------------------------------------------


def test_progress_in_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("llama_jax.cli.progress.time.monotonic", lambda: now)
    with Reporter() as reporter:
        reporter.notify("Converting a to b (once)")
        for i in range(1, 11):
            now += 1.0
            reporter.progress(i * 100, 1000, f"t{i}")
        for i in range(1, 11):
            now += 1.0
            reporter.progress(i * 50, 500, f"t{i}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Converting a to b (once)"
    assert lines[1] == "Converting: 400 B of 1 kB (40%), 100 B/s, 6 s left, t4"
    assert [line.split(":")[0] for line in lines[1:]] == ["Converting"] * 3 + ["Loading"] * 3


def test_progress_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_jax.cli.progress.LINE_EVERY_S", -1)
    with Reporter(quiet=True) as reporter:
        reporter.notify("Converting a")
        reporter.progress(1, 2, "t")
        monkeypatch.setattr("llama_jax.targets.hardware.unused_gpu_warning", lambda: "warning: x")
        reporter.warn_of_unused_gpu()
    assert capsys.readouterr().err == ""
    Reporter().warn_of_unused_gpu()
    assert capsys.readouterr().err == "warning: x\n"


def test_progress_bar_in_a_terminal() -> None:
    code = """
from llama_jax.cli.progress import Reporter
with Reporter() as reporter:
    reporter.notify("Converting a")
    reporter.progress(300, 1000, "t")
    reporter._bar.refresh()
    reporter.progress(1000, 1000, "t")
"""
    for term, has_bar in (("xterm", True), ("dumb", False)):
        master, slave = pty.openpty()
        env = os.environ | {"TERM": term}
        subprocess.run(
            [sys.executable, "-c", code if has_bar else code.replace("reporter._bar.refresh()", "")],
            stderr=slave,
            env=env,
            check=True,
        )
        os.close(slave)
        shown = os.read(master, 100_000).decode()
        os.close(master)
        assert "Converting a" in shown
        assert ("30%" in shown) == has_bar
        assert ("/s" in shown) == has_bar


# --- Start-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", ["--help", "list", "generate --help", "batch --help", "doctor --help"])
def test_light_commands_import_nothing_heavy(args: str) -> None:
    code = f"""
import sys
from llama_jax.cli import cli
try:
    cli.main({args.split()!r})
except SystemExit as e:
    assert not e.code, e.code
print("loaded:", *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.rpartition("loaded:")[2].split()
    assert not {"jax", "numpy", "orbax", "tokenizers", "rich"} & set(loaded)


def test_commands_are_in_the_table() -> None:
    folder = Path(cli_module.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if "\ndef command(" in path.read_text()}
    context = click.Context(cli)
    commands = cli.list_commands(context)
    groups = {name: cli.get_command(context, name) for name in commands}
    parts = {
        f"{name}_{part}" for name, group in groups.items() if isinstance(group, click.Group) for part in group.commands
    }
    assert modules == {name.replace("-", "_") for name in (*commands, *parts)}


# --- Limits of the process -------------------------------------------------------------------------------------------

UNDER_LIMIT = """
import resource, sys
resource.setrlimit(getattr(resource, sys.argv[1]), 2 * (int(sys.argv[2]),))
from llama_jax.cli import main
sys.argv[1:] = sys.argv[3:]
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited by Linux's ways")
@pytest.mark.parametrize(
    ("limit", "value", "code", "says"),
    [("RLIMIT_NOFILE", 64, 0, ""), ("RLIMIT_AS", 256 << 20, 6, "ulimit -v")],
)
def test_limits_of_the_process(model: Path, limit: str, value: int, code: int, says: str) -> None:
    """Few files are enough; too little address space is one clear error."""
    command = [sys.executable, "-c", UNDER_LIMIT, limit, str(value)]
    command += ["generate", "-m", str(model), "a", "--max-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not code or done.stderr.startswith("error: out of memory")


@pytest.mark.parametrize(("pip", "command"), [(None, "uv pip install x"), (object(), "pip install x")])
def test_hints_install_into_this_environment(monkeypatch: pytest.MonkeyPatch, pip: object, command: str) -> None:
    """In one that uv made, the shell's pip is that of another Python."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pip)
    assert installing("missing; pip install x") == f"missing; {command}"
    assert installing("uv pip install x") == "uv pip install x"
