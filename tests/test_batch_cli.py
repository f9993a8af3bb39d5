"""`llama-jax batch`: what is said before a model is loaded, streams, OpenAI's lines, and the exit code."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_chat_model import write_chat_model

import llama_jax as lj
from llama_jax.batch_file import run as run_file
from llama_jax.batch_file.lines import Refused, read_line
from llama_jax.batch_file.output import Stream
from llama_jax.batch_file.records import is_error
from llama_jax.cli import cli
from llama_jax.convert import convert
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

# Most are quick; together they take a while.
pytestmark = pytest.mark.slow

USER = [{"role": "user", "content": "hi"}]
SOME_FAILED = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("batch")
    return convert(write_chat_model(base / "hf"), base / "tiny")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Model, Tokenizer]:
    return lj.load(folder)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def batch(*args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["batch", *map(str, args)], input=stdin)


def chat_line(custom_id: str = "c", url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"messages": USER, **body}}


def completion_line(custom_id: str = "c", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", **body}}


# Before a model is loaded.


@pytest.mark.parametrize(
    ("lines", "options", "says"),
    [
        (None, [], "cannot read"),
        ([{"prompt": "a"}], ["--strict", "--out", "in.jsonl"], "same file"),
        ([{"prompt": "a"}], ["--out", "no/folder.jsonl"], "not a folder"),
        ([{"prompt": "a"}, {"prompt": 3}], ["--strict"], "line 2 of the input: prompt is int"),
        ([{"messages": [{"role": "alien", "content": "a"}]}], ["--strict"], "line 1 of the input: message 0 has the"),
        ([{"prompt": "a", "id": 7}, "", {"prompt": "b", "id": 7}], ["--strict"], "lines 1 and 3 have the same id 7"),
        ([chat_line("x"), chat_line("x")], ["--strict"], 'lines 1 and 2 have the same custom_id "x"'),
        ([{"prompt": "a"}], ["--temperature", "-1"], "temperature"),
    ],
)
def test_what_is_wrong_is_said_first(tmp_path: Path, lines: list[Any] | None, options: list[str], says: str) -> None:
    """The model does not exist, which would be said later."""
    source = tmp_path / "in.jsonl"
    if lines is not None:
        write(source, *lines)
    target = tmp_path / "out.jsonl"
    if "--out" in options:
        at = options.index("--out")
        target, options = tmp_path / options[at + 1], [*options[:at], *options[at + 2 :]]
    result = batch(source, target, "-m", tmp_path / "no-model", *options)
    assert result.exit_code in (2, 73), result.output
    assert says in result.stderr
    assert "no-model" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == (["in.jsonl"] if lines is not None else [])


def test_other_settings_are_refused_first(tmp_path: Path, folder: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", {"token_ids": [5]}), tmp_path / "out.jsonl"
    assert batch(source, target, "-m", folder, "--max-tokens", 2).exit_code == 0
    whole = target.read_bytes()
    missing = tmp_path / "no-model"
    for options, param in (
        (["--max-tokens", 3], "max_tokens"),
        (["--max-tokens", 2, "--seed", 1], "seed"),
        (["--max-tokens", 2, "--dtype", "bfloat16"], "dtype"),
    ):
        result = batch(source, target, "-m", missing, *options, "--json")
        assert json.loads(result.stdout)["error"]["param"] == param
        assert result.exit_code == 2
    write(source, {"token_ids": [6]})
    result = batch(source, target, "-m", missing, "--max-tokens", 2, "--json")
    assert json.loads(result.stdout)["error"]["param"] == "input"
    assert target.read_bytes() == whole
    # With the same settings it is the model that is looked for.
    write(source, {"token_ids": [5]})
    assert batch(source, target, "-m", missing, "--max-tokens", 2).exit_code == 3


def test_strict_asks_the_tokenizer_before_weights_are_read(tmp_path: Path, folder: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a"}, {"token_ids": [5] * 256})
    result = batch(source, tmp_path / "out.jsonl", "-m", folder, "--strict", "--json")
    error = json.loads(result.stdout)["error"]
    assert (result.exit_code, error["param"]) == (2, "prompt")
    assert "line 2 of the input: the prompt has 256 tokens" in error["message"]
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


# Results, and the exit code.


def test_bad_lines_are_told_and_counted(tmp_path: Path, folder: Path) -> None:
    lines = [
        {"prompt": "a", "id": "x"},
        {"messages": [{"role": "alien", "content": "a"}], "id": "y"},
        {"prompt": "b", "id": "x"},
        chat_line("x", model="gpt-4o"),
    ]
    source, target = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    result = batch(source, target, "-m", folder, "--max-tokens", 2, "--json")
    assert result.exit_code == SOME_FAILED
    said = result.stderr
    assert "1 of 4 lines cannot be generated; the first is line 2: message 0 has the unknown role 'alien'" in said
    assert 'warning: lines 1 and 3 have the same id "x"' in said
    assert f"lines name the model gpt-4o; {folder} answers them" in said
    summary = json.loads(result.stdout)
    assert (summary["lines"], summary["done"], summary["errors"]) == (4, 4, 1)
    records = read(target.read_text())
    assert records[1]["error"]["param"] == "messages"
    assert "assistant" in records[1]["error"]["hint"]
    assert set(records[0]) == {"index", "id", "prompt_tokens", "text", "token_ids", "finish_reason"}
    # Nothing is left to do, and the file still holds the error.
    again = batch(source, target, "-m", folder, "--max-tokens", 2)
    assert again.exit_code == SOME_FAILED
    assert "4 of them from before, 1 with an error" in again.stderr
    write(source, lines[0])
    assert batch(source, target, "-m", folder, "--max-tokens", 2, "--overwrite").exit_code == 0


def test_scores(tmp_path: Path, folder: Path, loaded: tuple[Model, Tokenizer]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, {"token_ids": [5, 6, 7]}, {"messages": USER}, {"token_ids": [5] * 256})
    result = batch(source, target, "-m", folder, "--max-tokens", 0, "--prompt-logprobs", 1)
    assert result.exit_code == SOME_FAILED, result.output
    scored, chat, full = read(target.read_text())
    assert (scored["token_ids"], scored["text"], scored["finish_reason"]) == ([], "", "length")
    model, _ = loaded
    logits, _ = lj.forward(model.params, model.config, np.asarray([[5, 6, 7]]))
    want = np.asarray(jax.nn.log_softmax(logits[0]))
    assert scored["prompt_logprobs"][0] is None
    for at, entry in enumerate(scored["prompt_logprobs"][1:], 1):
        assert entry["logprob"] == pytest.approx(want[at - 1, entry["token_id"]], abs=1e-4)
    assert chat["error"]["param"] == "max_tokens"
    assert len(full["prompt_logprobs"]) == 256


def test_batch_invariant_lines_are_the_same_in_any_order(tmp_path: Path, folder: Path) -> None:
    """In bfloat16, log-probabilities included; and the size of the engine belongs to the run."""
    lines = [{"token_ids": [3 + i] * (9 + 7 * i), "max_tokens": 2 + i % 3, "logprobs": 1, "id": i} for i in range(6)]
    options = ["-m", folder, "--batch-invariant", "--batch-size", 3, "--dtype", "bfloat16"]
    found = []
    for name, given in (("forth", lines), ("back", lines[::-1])):
        source, target = write(tmp_path / f"{name}.jsonl", *given), tmp_path / f"{name}-out.jsonl"
        assert batch(source, target, *options).exit_code == 0
        found.append({line["id"]: (line["token_ids"], line["logprobs"]) for line in read(target.read_text())})
    assert found[0] == found[1]
    options[options.index(3)] = 2
    refused = batch(source, target, *options)
    assert refused.exit_code == 2
    assert "batch_invariant" in refused.stderr


# Streams.


def test_from_standard_input_to_standard_output(tmp_path: Path, folder: Path) -> None:
    lines = [{"token_ids": [3 + i] * (20 - i), "max_tokens": 1 + i % 3, "id": i} for i in range(20)]
    lines[4] = {"prompt": 3, "id": 4}
    text = write(tmp_path / "in.jsonl", *lines).read_text()
    assert batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "-m", folder).exit_code == SOME_FAILED
    piped = batch("-", "-", "-m", folder, "--batch-size", 2, stdin=text)
    assert piped.exit_code == SOME_FAILED
    assert piped.stdout == (tmp_path / "out.jsonl").read_text()
    assert "20 of 20 lines in standard output" in piped.stderr
    # From standard input to a file: it can be resumed as well.
    assert batch("-", tmp_path / "piped.jsonl", "-m", folder, stdin=text).exit_code == SOME_FAILED
    assert (tmp_path / "piped.jsonl").read_text() == piped.stdout
    again = batch("-", tmp_path / "piped.jsonl", "-m", folder, stdin=text)
    assert "20 of them from before" in again.stderr
    refused = batch("-", "-", "-m", folder, "--json", stdin=text)
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["error"]["type"] == "UsageError"


def test_lines_come_out_in_order_and_as_soon_as_they_can() -> None:
    stream = io.BytesIO()
    with Stream(stream, [0, 2, 5, 6]) as output:
        output.append([{"index": 2}, {"index": 6, "error": {}}])
        assert stream.getvalue() == b""
        output.append([{"index": 0}])
        assert [r["index"] for r in read(stream.getvalue().decode())] == [0, 2]
        assert (output.done, output.errors) == ({0, 2, 6}, 1)
    # The end of an interrupted run: what is there comes out, though a line before it is missing.
    assert [r["index"] for r in read(stream.getvalue().decode())] == [0, 2, 6]


def test_a_reader_that_goes_away(tmp_path: Path, folder: Path) -> None:
    source = write(tmp_path / "in.jsonl", *({"token_ids": [5 + i], "max_tokens": 8} for i in range(400)))
    command = [sys.executable, "-m", "llama_jax.cli", "batch", str(source), "-", "-m", str(folder), "-q"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["index"] == 0
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_an_input_that_changes(tmp_path: Path, loaded: tuple[Model, Tokenizer]) -> None:
    source = write(tmp_path / "in.jsonl", {"token_ids": [5]}, {"token_ids": [6]})

    def change(_: object) -> None:
        time.sleep(0.01)
        os.utime(source)

    with pytest.raises(lj.LlamaJaxError, match="has changed"):
        run_file(*loaded, source, tmp_path / "out.jsonl", sampling=SamplingParams(), progress=change)


# OpenAI's lines.


def test_lines_that_ask_for_a_form(tmp_path: Path, folder: Path) -> None:
    """In both formats; a form that cannot be is an error of its line."""
    schema = {"enum": ["red", "blue", {"a": [1, True]}]}
    response_format = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}}
    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "uniqueItems": True}}}
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(
        source,
        {"prompt": "a", "response_format": response_format},
        {"prompt": "a", "response_format": bad},
        {"prompt": "a", "logits_processors": ["none such"]},
        {
            "prompt": "a",
            "response_format": {"type": "grammar", "syntax": "regex", "definition": "x{3}"},
            "bad_words": ["y"],
        },
        chat_line("f", response_format=response_format, temperature=1, seed=3),
        chat_line("g", response_format=bad),
        {
            "prompt": "a",
            "response_format": {"type": "grammar", "syntax": "regex", "definition": "x"},
            "allowed_token_ids": [9],
        },
    )
    result = batch(source, target, "-m", folder, "--max-tokens", 30)
    assert result.exit_code == SOME_FAILED, result.output
    one, two, three, four, five, six, seven = read(target.read_text())
    text = five["response"]["body"]["choices"][0]["message"]["content"]
    assert all(json.loads(found) in schema["enum"] for found in (one["text"], text))
    assert (four["text"], four["finish_reason"]) == ("xxx", "stop")
    assert (two["error"]["param"], three["error"]["param"]) == ("response_format", "logits_processors")
    assert six["response"]["body"]["error"]["param"] == "response_format"
    assert "uniqueItems" in six["response"]["body"]["error"]["message"]
    assert (seven["finish_reason"], seven["finish_error"]) == ("error", "the constraints allow no token")
    assert "7 of 7 lines" in result.stderr
    assert "4 with an error" in result.stderr
    assert "finish_error" not in four


def test_an_answer_without_a_next_token_is_an_error_of_its_line() -> None:
    ended, failed = {"finish_reason": "length"}, {"finish_reason": "error"}
    for choices, counts in (([ended], False), ([ended, failed], True)):
        assert is_error({"index": 3, "outputs": choices}) == counts
        assert is_error({"index": 3, **choices[-1]}) == counts
        response = {"status_code": 200, "body": {"choices": choices}}
        assert is_error({"id": "batch_req_3", "response": response}) == counts


def test_openai_chat(tmp_path: Path, folder: Path, loaded: tuple[Model, Tokenizer]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(
        source,
        chat_line("a", model="tiny", max_tokens=4, user="me", stream=False, response_format={"type": "text"}),
        chat_line("b", max_completion_tokens=3, n=2, temperature=1, seed=4, logprobs=True, top_logprobs=2, stop=None),
        chat_line("c", max_tokens=2, logprobs=True),
    )
    began = int(time.time())
    result = batch(source, target, "-m", folder)
    assert result.exit_code == 0, result.output
    records = read(target.read_text())
    model, tokenizer = loaded
    ids = lj.encode_chat(tokenizer, USER)
    for i, record in enumerate(records):
        assert list(record) == ["id", "custom_id", "response", "error"]
        assert (record["id"], record["custom_id"], record["error"]) == (f"batch_req_{i}", "abc"[i], None)
        assert (record["response"]["status_code"], record["response"]["request_id"]) == (200, f"req_{i}")
        body = record["response"]["body"]
        assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
        assert (body["object"], body["model"]) == ("chat.completion", str(folder))
        assert began <= body["created"] <= time.time()
        assert body["usage"]["prompt_tokens"] == len(ids)
        assert body["usage"]["total_tokens"] == len(ids) + body["usage"]["completion_tokens"]
    (want,) = lj.batch_generate(model, tokenizer, [ids], max_tokens=4)
    (choice,) = records[0]["response"]["body"]["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": want.text, "refusal": None},
        "logprobs": None,
        "finish_reason": want.outputs[0].finish_reason,
    }
    params = SamplingParams(n=2, temperature=1.0, seed=4, max_tokens=3, logprobs=2)
    (want,) = lj.batch_generate(model, tokenizer, [ids], params)
    choices = records[1]["response"]["body"]["choices"]
    assert [c["index"] for c in choices] == [0, 1]
    for choice, completion in zip(choices, want.outputs, strict=True):
        assert choice["message"]["content"] == completion.text
        assert completion.logprobs is not None
        for entry, of in zip(choice["logprobs"]["content"], completion.logprobs, strict=True):
            assert entry["logprob"] == pytest.approx(of.logprob, abs=1e-4)
            assert len(entry["top_logprobs"]) == 2
            assert bytes(entry["bytes"]) == tokenizer.bytes_of(of.token_id)
            best = entry["top_logprobs"][0]
            assert best["logprob"] == pytest.approx(max(of.top.values()), abs=1e-4)
            assert set(best) == {"token", "logprob", "bytes"}
    (choice,) = records[2]["response"]["body"]["choices"]
    assert [entry["top_logprobs"] for entry in choice["logprobs"]["content"]] == [[], []]


def test_openai_completions(tmp_path: Path, folder: Path, loaded: tuple[Model, Tokenizer]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    text = "日本 and é"
    write(
        source,
        completion_line("a", max_tokens=3, logprobs=2),
        completion_line("b", prompt=[text, "Once"], max_tokens=2, n=2),
        completion_line("c", prompt=[5, 6, 7], max_tokens=2, top_k=1),
        completion_line("d", prompt=text, max_tokens=0, echo=True, logprobs=1),
        completion_line("e", prompt=[[5, 6], [7]], max_tokens=2, echo=True, logprobs=0),
    )
    result = batch(source, target, "-m", folder)
    assert result.exit_code == 0, result.output
    model, tokenizer = loaded
    bodies = [record["response"]["body"] for record in read(target.read_text())]
    assert {(b["object"], b["id"].partition("-")[0]) for b in bodies} == {("text_completion", "cmpl")}

    def texts(prompt: Any, **fields: Any) -> list[str]:
        return [c.text for c in lj.batch_generate(model, tokenizer, [prompt], **fields)[0].outputs]

    a, b, c, d, e = bodies
    (choice,) = a["choices"]
    assert choice["text"] == texts("Once", max_tokens=3)[0]
    assert len(choice["logprobs"]["tokens"]) == a["usage"]["completion_tokens"] == 3
    assert choice["text"].startswith(choice["logprobs"]["tokens"][0])
    assert choice["logprobs"]["text_offset"][0] == 0
    assert all(len(top) in (2, 3) for top in choice["logprobs"]["top_logprobs"])
    assert [x["text"] for x in b["choices"]] == [*texts(text, max_tokens=2, n=2), *texts("Once", max_tokens=2, n=2)]
    assert [x["index"] for x in b["choices"]] == [0, 1, 2, 3]
    assert b["usage"]["prompt_tokens"] == len(tokenizer.encode(text)) + len(tokenizer.encode("Once"))
    assert [x["text"] for x in c["choices"]] == texts([5, 6, 7], max_tokens=2)

    # The scores of a text, as harnesses ask for them.
    (choice,) = d["choices"]
    ids = tokenizer.encode(text)
    scores = choice["logprobs"]
    (want,) = lj.batch_generate(model, tokenizer, [ids], max_tokens=0, prompt_logprobs=1)
    assert want.prompt_logprobs is not None
    assert (choice["text"], choice["finish_reason"], d["usage"]["completion_tokens"]) == (text, "length", 0)
    assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
    for value, entry in zip(scores["token_logprobs"][1:], want.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert value == pytest.approx(entry.logprob, abs=1e-4)
    assert b"".join(map(tokenizer.bytes_of, ids)).decode() == text
    whole = [t for t in scores["tokens"] if not t.startswith("bytes:")]
    assert len(whole) < len(ids)  # some tokens are parts of characters
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        assert token.startswith("bytes:") or text.startswith(token, offset)
    assert [len(x["logprobs"]["tokens"]) for x in e["choices"]] == [4, 3]
    assert e["choices"][0]["logprobs"]["top_logprobs"] is None


OPENAI_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no id": ({k: v for k, v in chat_line().items() if k != "custom_id"}, "custom_id"),
    "id type": (chat_line(custom_id=7), "custom_id"),  # type: ignore[arg-type]
    "no body": ({k: v for k, v in chat_line().items() if k != "body"}, "body"),
    "body type": (chat_line() | {"body": []}, "body"),
    "method": (chat_line() | {"method": "GET"}, "method"),
    "url": (chat_line(url="/v1/embeddings"), "url"),
    "url type": (chat_line() | {"url": 3}, "url"),
    "more": (chat_line() | {"prompt": "a"}, "prompt"),
    "stream": (chat_line(stream=True), "stream"),
    "format": (chat_line(response_format={"type": "xml"}), "response_format"),
    "tool choice": (chat_line(tool_choice="required"), "tool_choice"),
    "no messages": (chat_line(messages=None), "messages"),
    "role": (chat_line(messages=[{"role": "alien", "content": "a"}]), "messages"),
    "limits": (chat_line(max_tokens=3, max_completion_tokens=4), "max_completion_tokens"),
    "no answer": (chat_line(max_completion_tokens=0), "max_tokens"),
    "logprobs": (chat_line(logprobs=3), "logprobs"),
    "top": (chat_line(top_logprobs=3), "top_logprobs"),
    "too many": (chat_line(logprobs=True, top_logprobs=21), "logprobs"),
    "unknown": (chat_line(frequency=1), "frequency"),
    "range": (chat_line(temperature=-1), "temperature"),
    "bias": (chat_line(logit_bias={"x": 1}), "logit_bias"),
    "suffix": (completion_line(suffix="x"), "suffix"),
    "best of": (completion_line(best_of=2), "best_of"),
    "echo": (completion_line(echo=1), "echo"),
    "prompt": (completion_line(prompt={"a": 1}), "prompt"),
    "no prompts": (completion_line(prompt=[]), "prompt"),
    "mixed": (completion_line(prompt=[1, "a"]), "prompt"),
    "chat field": (completion_line(messages=USER), "messages"),
}


@pytest.mark.parametrize("name", OPENAI_BAD)
def test_openai_lines_that_are_bad(name: str) -> None:
    line, param = OPENAI_BAD[name]
    found = read_line(4, json.dumps(line).encode(), SamplingParams())
    assert isinstance(found, Refused)
    record = found.record
    assert (record["id"], record["custom_id"], record["error"]) == ("batch_req_4", line.get("custom_id"), None)
    assert record["response"]["status_code"] == 400
    error = record["response"]["body"]["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "hint: " in error["message"]


def test_openai_errors_need_the_model_too(tmp_path: Path, folder: Path) -> None:
    """Too long for the context: known once there is a tokenizer. A run of such lines resumes like any other."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [completion_line(str(i), prompt=[5 + i], max_tokens=1 + i) for i in range(12)]
    lines[3] = completion_line("3", prompt=[5] * 300)
    lines[7] = completion_line("7", prompt=[5000])
    write(source, *lines)
    args = (source, target, "-m", folder, "--batch-size", 4)
    assert batch(*args).exit_code == SOME_FAILED
    records = read(target.read_text())
    assert [r["custom_id"] for r in records] == [str(i) for i in range(12)]
    assert [r["response"]["status_code"] for r in records] == [200] * 3 + [400] + [200] * 3 + [400] + [200] * 4
    texts = [r["response"]["body"].get("choices") for r in records]
    target.write_text("".join(f"{line}\n" for line in target.read_text().splitlines()[::3]) + '{"id": "batch_')
    again = batch(*args)
    assert "4 of them from before, 2 with an error" in again.stderr
    assert "cut off an unfinished line" in again.stderr
    records = read(target.read_text())
    assert [r["custom_id"] for r in records] == [str(i) for i in range(12)]
    assert [r["response"]["body"].get("choices") for r in records] == texts
