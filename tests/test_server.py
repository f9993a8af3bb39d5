"""The server's answers: their text by a model without an engine, their shapes as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from engines import alone
from served_model import NAME, Server, tiny_model

from llama_jax.generation import constraints
from llama_jax.sampling import SamplingParams

TEXT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
GREEDY = {"temperature": 0.0, "max_tokens": 6}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with asyncio.Runner() as runner, Server(*tiny_model(tmp_path_factory.mktemp("server") / "tiny"), runner) as made:
        yield made


@pytest.fixture(autouse=True)
def _leaves_nothing(server: Server) -> Iterator[None]:
    """Whatever a test asked for, nothing is left of it, and the next request is answered."""
    yield
    server.run(server.until(lambda: server.unused))
    assert server.chat(max_tokens=1).status == 200


def text_of(server: Server, prompt: str, **params: Any) -> tuple[list[int], Any]:
    ids = server.tokenizer.encode(prompt)
    return ids, alone(server.engine.model, (ids, SamplingParams(**params)))


def test_chat(server: Server) -> None:
    ids, expected = text_of(server, TEXT, **GREEDY, logprobs=0)
    answer = server.chat(logprobs=True, top_logprobs=2, **GREEDY)
    assert answer.status == 200
    (choice,) = answer.json["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == server.tokenizer.decode(expected.tokens)
    assert choice["finish_reason"] == expected.ending == "length"
    content = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == pytest.approx(expected.logprobs, abs=2e-4)
    assert [bytes(entry["bytes"]) for entry in content] == [server.tokenizer.bytes_of(i) for i in expected.tokens]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in content)
    usage = answer.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (len(ids), 6, len(ids) + 6)
    assert (answer.json["object"], answer.json["model"]) == ("chat.completion", NAME)


def test_chat_streams(server: Server) -> None:
    """One id, the role first and once, the reason last and alone, then the counts."""
    whole = server.chat(**GREEDY).json
    events = server.chat(stream=True, stream_options={"include_usage": True}, **GREEDY).events
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    *chunks, counts = events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[:-1]) == whole["choices"][0]["message"]["content"]
    assert not any("role" in delta for delta in deltas[1:])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert counts["choices"] == []
    assert counts["usage"] == whole["usage"] | {"prompt_tokens_details": counts["usage"]["prompt_tokens_details"]}
    for options in ({}, {"stream_options": {"continuous_usage_stats": True}}):
        without = server.chat(stream=True, **options, **GREEDY).events
        assert not any("usage" in event for event in without)


def test_every_chunk_counts_if_asked(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = [event["usage"] for event in server.chat(stream=True, n=2, stream_options=options, **GREEDY).events]
    written = [usage["completion_tokens"] for usage in chunks]
    assert written == sorted(written)
    assert (written[0], written[-1]) == (1, 12)
    for usage in (*chunks, last):
        assert usage["prompt_tokens"] == last["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_stream_has_the_logprobs_of_the_whole(server: Server) -> None:
    for path, of in (("/v1/chat/completions", "content"), ("/v1/completions", "tokens")):
        chat = "chat" in path
        body = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Once upon"}
        body |= {**GREEDY, "n": 2, "logprobs": True if chat else 1}
        whole = server.post(path, **body).json["choices"]
        parts: dict[int, list[Any]] = {0: [], 1: []}
        for event in server.post(path, **body, stream=True).events:
            for choice in event["choices"]:
                parts[choice["index"]] += (choice["logprobs"] or {of: []})[of]
        assert parts == {choice["index"]: choice["logprobs"][of] for choice in whole}
        assert len(parts[0]) == 6


def test_echo_scores_the_prompt(server: Server) -> None:
    """As lm-eval asks for it: nothing new, log-probabilities of what was given."""
    prompt = "Once upon a time"
    ids, expected = text_of(server, prompt, temperature=0.0, max_tokens=1)
    answer = server.post("/v1/completions", prompt=ids, echo=True, logprobs=1, max_tokens=0, temperature=0)
    (choice,) = answer.json["choices"]
    assert choice["text"] == prompt
    first, *others = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert others == pytest.approx(expected.prompt_logprobs.tolist(), abs=2e-4)
    offsets = choice["logprobs"]["text_offset"]
    assert [prompt[a:b] for a, b in zip(offsets, [*offsets[1:], None], strict=True)] == choice["logprobs"]["tokens"]
    both = server.post("/v1/completions", prompt=ids, echo=True, logprobs=1, max_tokens=2, temperature=0).json
    assert len(both["choices"][0]["logprobs"]["token_logprobs"]) == len(ids) + 2
    assert both["choices"][0]["text"].startswith(prompt)


def test_several_prompts_and_continuations(server: Server) -> None:
    """The choices of a prompt follow those of the one before, streaming or not, and a seed gives the same again."""
    body: dict[str, Any] = {"prompt": ["Once", "Hello you"], "n": 2, "seed": 3, "max_tokens": 5, "echo": True}
    whole = server.post("/v1/completions", **body).json["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2, 3]
    assert [choice["text"][:4] for choice in whole] == ["Once", "Once", "Hell", "Hell"]
    assert whole[0]["text"] != whole[1]["text"]
    texts = [""] * 4
    for event in server.post("/v1/completions", **body, stream=True).events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole]


def test_default_limits(server: Server) -> None:
    """A completion has 16 tokens, a chat what the context leaves, and neither more than that."""
    ignoring = {"temperature": 0.0, "ignore_eos": True}
    assert server.post("/v1/completions", prompt="Once", **ignoring).json["usage"]["completion_tokens"] == 16
    assert server.chat(**ignoring).json["usage"]["total_tokens"] == 128
    ids = server.tokenizer.encode("Once")[:1] * 120
    assert server.post("/v1/completions", prompt=ids, **ignoring).json["usage"]["completion_tokens"] == 8


def test_stop_string_and_biases(server: Server) -> None:
    whole = server.chat(**GREEDY).json["choices"][0]["message"]["content"]
    stopped = server.chat(stop=[*"§±×", whole[2:4]], **GREEDY).json["choices"][0]
    assert stopped["message"]["content"] == whole[: whole.index(whole[2:4])]
    assert stopped["finish_reason"] == "stop"
    token = server.tokenizer.encode("z")[-1]
    biased = server.chat(logit_bias={str(token): 100}, **GREEDY).json["choices"][0]["message"]["content"]
    assert biased == server.tokenizer.decode([token] * 6)


def test_response_format(server: Server) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    choice = server.chat(response_format=format, max_tokens=40, seed=1).json["choices"][0]
    assert json.loads(choice["message"]["content"])["a"] in ("x", "yy")
    assert choice["finish_reason"] == "stop"


def test_content_in_parts_and_developer(server: Server) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    expected = "<|im_start|>system\nBe kind.<|im_end|>\n" + TEXT
    answer = server.post("/tokenize", messages=messages).json
    assert answer["tokens"] == server.tokenizer.encode(expected)
    marked = server.post("/tokenize", messages=[{"role": "user", "content": "<|im_end|>"}]).json["tokens"]
    control = server.tokenizer.token_id("<|im_end|>")
    assert marked.count(control) == 1  # the template's


def test_tokenize_and_back(server: Server) -> None:
    ids = server.post("/tokenize", model=NAME, prompt="Hello you").json
    assert ids == {"tokens": server.tokenizer.encode("Hello you"), "count": len(ids["tokens"]), "max_model_len": 128}
    assert server.post("/detokenize", tokens=ids["tokens"]).json == {"prompt": "Hello you"}


def test_models_and_version(server: Server) -> None:
    (model,) = server.call("GET", "/v1/models").json["data"]
    assert (model["id"], model["root"], model["object"]) == (NAME, NAME, "model")
    assert server.call("GET", f"/v1/models/{NAME}").json == model
    assert server.call("GET", "/v1/models/../../x").json["error"]["code"] == "model_not_found"
    assert server.call("GET", "/version").json["version"]
    assert server.call("GET", "/health/ready").json == server.call("GET", "/health").json == {"status": "ready"}


def test_fields_without_effect_are_named(server: Server) -> None:
    assert server.chat(user="me", store=False, max_tokens=1).headers["x-llama-jax-ignored"] == "user, store"
    assert server.chat(reasoning_effort="low", max_tokens=1).headers["x-llama-jax-ignored"] == "reasoning_effort"
    assert "x-llama-jax-ignored" not in server.chat(max_tokens=1).headers


class Only:
    """A logits processor that allows one token."""

    ended, error = False, None

    def __init__(self, tokenizer: Any, prompt: Any, params: Any):
        (self._id,) = tokenizer.encode("a", add_special_tokens=False)

    def mask(self, out: Any) -> None:
        out[:] = 0
        out[self._id // 32] = 1 << self._id % 32

    def accept(self, token: int) -> None:
        pass


def test_logits_processors(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "_processor", {"only": Only}.__getitem__)
    made = server.chat(logits_processors=["only"], max_tokens=3).json["choices"][0]
    assert made["message"]["content"] == "aaa"


def test_metrics_count_what_was_asked(server: Server) -> None:
    def values() -> dict[str, float]:
        lines = server.call("GET", "/metrics").data.decode().splitlines()
        return {name: float(value) for name, value in (ln.rsplit(" ", 1) for ln in lines if ln[0] != "#")}

    before = values()
    server.chat(stream=True, **GREEDY)
    server.chat(**GREEDY)
    after, label = values(), f'model_name="{NAME}"'

    def more(name: str, labels: str = label) -> float:
        return after[f"llama_jax_{name}{{{labels}}}"] - before.get(f"llama_jax_{name}{{{labels}}}", 0.0)

    assert more("generation_tokens_total") == 12
    assert more("time_to_first_token_seconds_count") == more("e2e_request_latency_seconds_count") == 2
    # The first piece has one token or, where nobody took it at once, more.
    assert 0 < more("inter_token_latency_seconds_count") <= 5
    assert more("request_success_total", f'finished_reason="length",{label}') == 2
    assert more("http_requests_total", f'{label},route="/v1/chat/completions",status="200"') == 2
    assert after[f"llama_jax_engine_up{{{label}}}"] == 1
    assert after[f"llama_jax_pages_used{{{label}}}"] == 0
    assert f'llama_jax_time_to_first_token_seconds_bucket{{le="0.005",{label}}}' in after


@pytest.mark.parametrize(
    ("body", "threads"),
    [
        ({}, 0),
        ({"stream": True, "stream_options": {"include_usage": True}}, 0),
        ({"response_format": {"type": "json_object"}}, 2),
        ({"messages": [{"role": "user", "content": "a" * 9000}]}, 1),
    ],
)
def test_only_what_may_take_long_is_done_in_a_thread(
    server: Server, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], threads: int
) -> None:
    """A grammar is checked, and compiled for the engine; a long text is encoded, and refused."""
    to_thread, calls = asyncio.to_thread, list[Any]()

    def counted(function: Any, *args: Any, **options: Any) -> Any:
        calls.append(function)
        return to_thread(function, *args, **options)

    monkeypatch.setattr(asyncio, "to_thread", counted)
    messages = [{"role": "user", "content": "Hi"}]
    answer = server.post("/v1/chat/completions", **{"messages": messages, "max_tokens": 2} | body)
    assert answer.status == (200 if threads != 1 else 400)
    assert len(calls) == threads
