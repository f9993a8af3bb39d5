"""generate, stream_generate and batch_generate: one meaning, three ways to call it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, random_params, run, tiny_config
from tiny_chat_model import write_chat_model

from llama_jax.decode import buckets
from llama_jax.errors import RequestError
from llama_jax.generation import batch_generate, generate, stream_generate
from llama_jax.generation.outputs import RequestOutput
from llama_jax.generation.request import encode_prompt
from llama_jax.loading import load
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

Loaded = tuple[Model, Tokenizer]
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
PROMPTS = [
    "The",
    "a quick brown",
    "日本 and é",
    "x = [1, 2, 3]  # list of ints",
    "\n\n",
    "one two three four five",
    "z",
    "ok?",
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A tiny model with a tokenizer of 3008 tokens."""
    return load(write_chat_model(tmp_path_factory.mktemp("generate") / "tiny"))


@pytest.fixture(scope="module")
def golden() -> Model:
    """A tiny model of three layers, without a tokenizer."""
    case = load_golden("llama2-mha")
    return Model(case.params, case.config)


def tiny(context: int = 64, **changes: Any) -> Model:
    """A model of one layer, without a tokenizer."""
    config = tiny_config(max_position_embeddings=context, **changes)
    return Model(random_params(config), config)


def ids_of(output: RequestOutput) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in output.outputs]


def random_prompts(model: Model, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths]


# One meaning.

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"seed": 5},
    "truncated": {"seed": 6, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "logprobs": {"seed": 7, "logprobs": 3},
    "min_tokens": {"seed": 8, "min_tokens": 10, "stop_token_ids": list(range(0, 3008, 3)), "logit_bias": {5: 2.0}},
    "stop_ids": {"seed": 9, "stop_token_ids": list(range(0, 3008, 7))},
    "stop": {"seed": 10, "stop": ["e", "日", "\n"]},
    "one_token": {"seed": 11, "max_tokens": 1},
}


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize("setting", SETTINGS)
def test_stream_and_batch_and_generate_agree(chat: Loaded, setting: str) -> None:
    model, tokenizer = chat
    params = SamplingParams(**{"max_tokens": 24, **SETTINGS[setting]})
    batch = batch_generate(model, tokenizer, PROMPTS[:3], params)
    for prompt, output in zip(PROMPTS, batch, strict=False):
        steps = list(stream_generate(model, tokenizer, prompt, params))
        (completion,) = output.outputs
        assert output.text == completion.text == generate(model, tokenizer, prompt, params)
        assert "".join(step.text for step in steps) == completion.text
        assert tuple(step.token for step in steps) == completion.token_ids
        assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
        assert steps[-1].finish_reason == completion.finish_reason
        assert [step.generation_tokens for step in steps] == list(range(1, len(steps) + 1))
        assert {step.prompt_tokens for step in steps} == {len(output.prompt_token_ids)}
        if params.logprobs is None:
            assert completion.logprobs is None
            assert {step.logprobs for step in steps} == {None}
            continue
        assert completion.logprobs is not None
        for step, entry in zip(steps, completion.logprobs, strict=True):
            assert step.logprobs is not None
            assert step.logprobs.token_id == entry.token_id == step.token
            assert step.logprobs.top == pytest.approx(entry.top, abs=1e-4)


@pytest.mark.slow
def test_settings_of_rows_do_not_mix(chat: Loaded) -> None:
    """Every setting in one batch gives what it gives alone."""
    model, tokenizer = chat
    params = [SamplingParams(**{"max_tokens": 12, **fields}) for fields in SETTINGS.values()]
    outputs = batch_generate(model, tokenizer, ["The"] * len(params), params)
    for name, p, output in zip(SETTINGS, params, outputs, strict=True):
        alone = batch_generate(model, tokenizer, ["The"], p)[0]
        assert (ids_of(alone), alone.text) == (ids_of(output), output.text), name
        assert alone.outputs[0].finish_reason == output.outputs[0].finish_reason
        assert (output.outputs[0].logprobs is None) == (p.logprobs is None)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {}], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_batch(chat: Loaded, fields: dict[str, Any]) -> None:
    """The same row alone, in batches of 2, 3, 5, 7 and 8, and permuted."""
    model, tokenizer = chat
    params = [SamplingParams(seed=100 + i, max_tokens=12, **fields) for i in range(8)]
    alone = [ids_of(batch_generate(model, tokenizer, [p], s)[0]) for p, s in zip(PROMPTS, params, strict=True)]
    rng = np.random.default_rng(0)
    for size in (2, 3, 5, 7, 8, 8):
        rows = rng.permutation(8)[:size].tolist()
        outputs = batch_generate(model, tokenizer, [PROMPTS[i] for i in rows], [params[i] for i in rows])
        assert [ids_of(o) for o in outputs] == [alone[i] for i in rows], rows


def test_same_seed_same_tokens_other_seed_others(chat: Loaded) -> None:
    model, tokenizer = chat
    params = [SamplingParams(seed=s) for s in (1, 1, 2, 2**64 - 1)]
    runs = [ids_of(batch_generate(model, tokenizer, ["a"], p)[0])[0] for p in params]
    assert runs[0] == runs[1]
    assert len(set(runs)) == 3


@pytest.mark.slow
def test_without_a_seed_every_call_differs(chat: Loaded) -> None:
    model, tokenizer = chat
    texts = {ids_of(batch_generate(model, tokenizer, ["a"], SamplingParams())[0])[0] for _ in range(4)}
    assert len(texts) == 4
    (output,) = batch_generate(model, tokenizer, ["a"], SamplingParams(n=4))
    assert len(set(ids_of(output))) == 4


def test_without_params_decoding_is_greedy(chat: Loaded) -> None:
    model, tokenizer = chat
    want = generate(model, tokenizer, "a", SamplingParams(temperature=0.0, max_tokens=9))
    assert generate(model, tokenizer, "a", max_tokens=9) == want
    changed = SamplingParams(seed=3, max_tokens=2)
    assert generate(model, tokenizer, "a", changed, temperature=0.0, max_tokens=9) == want
    per_prompt = batch_generate(model, tokenizer, ["a", "b"], [changed, changed], temperature=0.0, max_tokens=9)
    assert per_prompt[0].text == want


def test_no_prompts_no_outputs(chat: Loaded) -> None:
    assert batch_generate(*chat, []) == []


def test_prompt_forms(chat: Loaded) -> None:
    model, tokenizer = chat
    ids = tokenizer.encode("a quick")
    want = batch_generate(model, tokenizer, ["a quick"])[0]
    assert want.prompt_token_ids == tuple(ids)
    for form in (ids, tuple(ids), np.asarray(ids), [np.int32(i) for i in ids]):
        assert ids_of(batch_generate(model, tokenizer, [form])[0]) == ids_of(want)
    without = batch_generate(model, None, [ids])[0]
    assert (ids_of(without), without.text) == (ids_of(want), "")


def test_an_empty_text_starts_with_bos(chat: Loaded) -> None:
    model, tokenizer = chat
    output = batch_generate(model, tokenizer, [""])[0]
    assert output.prompt_token_ids == (tokenizer.bos_token_id,)


# Several continuations.


def test_n_is_as_many_calls_with_seeds_that_follow(chat: Loaded) -> None:
    model, tokenizer = chat
    params = SamplingParams(n=3, seed=40, max_tokens=8, logprobs=1)
    (output,) = batch_generate(model, tokenizer, ["The"], params)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    for i, completion in enumerate(output.outputs):
        single = dataclasses.replace(params, n=1, seed=40 + i)
        want = batch_generate(model, tokenizer, ["The"], single)[0].outputs[0]
        assert (completion.token_ids, completion.text) == (want.token_ids, want.text)
        assert completion.logprobs is not None
        assert [e.token_id for e in completion.logprobs] == list(completion.token_ids)
    wrapped = batch_generate(model, tokenizer, ["The"], dataclasses.replace(params, seed=2**64 - 1))[0]
    first = batch_generate(model, tokenizer, ["The"], dataclasses.replace(params, n=1, seed=0))[0]
    assert wrapped.outputs[1].token_ids == first.outputs[0].token_ids


@pytest.mark.slow
def test_n_of_prompts_of_unlike_lengths() -> None:
    model = tiny(64)
    prompts = random_prompts(model, [3, 20, 1])
    params = [
        SamplingParams(n=2, seed=1, max_tokens=5, prompt_logprobs=1),
        SamplingParams(n=1, seed=2, max_tokens=9),
        SamplingParams(n=3, temperature=0.0, max_tokens=7, prompt_logprobs=0),
    ]
    outputs = batch_generate(model, None, prompts, params)
    for prompt, p, output in zip(prompts, params, outputs, strict=True):
        assert output.prompt_token_ids == tuple(prompt)
        assert len(output.outputs) == p.n
        for i, completion in enumerate(output.outputs):
            single = dataclasses.replace(p, n=1, seed=None if p.seed is None else p.seed + i, prompt_logprobs=None)
            assert completion.token_ids == ids_of(batch_generate(model, None, [prompt], single)[0])[0]
    assert len(set(ids_of(outputs[2]))) == 1  # greedy: all alike
    assert outputs[1].prompt_logprobs is None
    assert outputs[2].prompt_logprobs == (None,)
    assert outputs[0].prompt_logprobs is not None
    assert len(outputs[0].prompt_logprobs) == 3


# Log-probabilities.


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_equal_forward(golden: Model, temperature: float) -> None:
    """Of prompt and output, for rows of unlike lengths, against log_softmax of one pass over the whole text."""
    prompts = random_prompts(golden, [1, 5, 33])
    params = SamplingParams(
        temperature=temperature,
        top_k=5,
        repetition_penalty=1.2,
        logit_bias={7: 1.0},
        seed=3,
        max_tokens=9,
        logprobs=4,
        prompt_logprobs=2,
        ignore_eos=True,
    )
    for prompt, output in zip(prompts, batch_generate(golden, None, prompts, params), strict=True):
        (completion,) = output.outputs
        text = [*prompt, *completion.token_ids]
        want = np.asarray(jax.nn.log_softmax(run(golden.params, golden.config, jnp.asarray([text]))[0][0]))
        assert output.prompt_logprobs is not None
        assert completion.logprobs is not None
        assert output.prompt_logprobs[0] is None
        entries = [*output.prompt_logprobs, *completion.logprobs]
        assert len(entries) == len(text)
        for at, entry in enumerate(entries[1:], 1):
            assert entry is not None
            n = 2 if at < len(prompt) else 4
            expected = want[at - 1]
            assert entry.token_id == text[at]
            assert entry.logprob == pytest.approx(expected[text[at]], abs=2e-4)
            best = np.argsort(-expected)[:n].tolist()
            assert list(entry.top)[:n] == best
            assert set(entry.top) == {*best, text[at]}
            for token, value in entry.top.items():
                assert value == pytest.approx(expected[token], abs=2e-4)


@pytest.mark.slow
def test_logprobs_of_a_small_vocabulary() -> None:
    """There are at most as many of them as there are tokens."""
    model = tiny(vocab_size=7)
    (output,) = batch_generate(model, None, [[1, 2, 3]], max_tokens=3, logprobs=5, prompt_logprobs=20, ignore_eos=True)
    assert output.outputs[0].logprobs is not None
    for entry in output.outputs[0].logprobs:
        assert len(entry.top) in (5, 6)
    assert output.prompt_logprobs is not None
    for entry in output.prompt_logprobs[1:]:
        assert entry is not None
        assert sum(map(math.exp, entry.top.values())) == pytest.approx(1, abs=1e-5)


def test_logprobs_0_is_the_chosen_token_only(chat: Loaded) -> None:
    model, _ = chat
    (prompt,) = random_prompts(model, [4])
    output = batch_generate(model, None, [prompt], seed=1, logprobs=0, prompt_logprobs=0, max_tokens=3)[0]
    assert output.outputs[0].logprobs is not None
    assert output.prompt_logprobs is not None
    for entry in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs):
        assert entry is not None
        assert entry.top == {entry.token_id: entry.logprob}


# The end of a text.


def text_pieces(chat: Loaded, prompt: str, **fields: Any) -> list[str]:
    return [step.text for step in stream_generate(*chat, prompt, max_tokens=40, **fields)]


@pytest.mark.parametrize("first", [0, 1, 5, 17])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_stop_strings_end_the_text(chat: Loaded, first: int, length: int) -> None:
    """Stop strings cut out of what the model says: from the very first character on, within and across tokens."""
    params = SamplingParams(seed=4, max_tokens=40)
    whole = generate(*chat, "The", params)
    stop = whole[first : first + length]
    want = whole[: whole.find(stop)]
    pieces = [step.text for step in stream_generate(*chat, "The", params, stop=[stop, "never said"])]
    assert "".join(pieces) == want
    outputs = batch_generate(*chat, ["The", "z", "ok?"], params, stop=stop)
    assert outputs[0].text == want
    assert outputs[0].outputs[0].finish_reason == "stop"
    assert all(stop not in output.text for output in outputs)
    # The other rows go on as if nothing had happened.
    for prompt, output in zip(["z", "ok?"], outputs[1:], strict=True):
        assert output.text == generate(*chat, prompt, params, stop=stop)


def test_stop_string_that_never_comes_changes_nothing(chat: Loaded) -> None:
    params = SamplingParams(seed=4, max_tokens=40)
    whole = generate(*chat, "The", params)
    assert generate(*chat, "The", params, stop=[whole + "!", whole[-3:] + "~", "\0\0"]) == whole


@pytest.mark.slow
def test_stop_token_ids(golden: Model) -> None:
    (prompt,) = random_prompts(golden, [4])
    params = SamplingParams(seed=1, max_tokens=12, ignore_eos=True)
    tokens = ids_of(batch_generate(golden, None, [prompt], params)[0])[0]
    unused = next(t for t in range(golden.config.vocab_size) if t not in tokens)
    stop = tokens[6]
    (output,) = batch_generate(golden, None, [prompt], params, stop_token_ids=[unused, stop])[0].outputs
    assert (output.token_ids, output.finish_reason) == (tokens[: tokens.index(stop) + 1], "stop")
    (output,) = batch_generate(golden, None, [prompt], params, stop_token_ids=[unused])[0].outputs
    assert (output.token_ids, output.finish_reason) == (tokens, "length")


@pytest.mark.slow
def test_end_of_text_ids_and_ignore_eos(golden: Model) -> None:
    """The config's and the generation config's ids end a text; ignore_eos turns off both, but not stop_token_ids."""
    (prompt,) = random_prompts(golden, [4])
    free = batch_generate(golden, None, [prompt], max_tokens=12, ignore_eos=True)[0].outputs[0]
    assert (len(free.token_ids), free.finish_reason) == (12, "length")
    distinct = list(dict.fromkeys(free.token_ids))
    eos = distinct[min(3, len(distinct) - 1)]
    cut = free.token_ids[: free.token_ids.index(eos) + 1]
    config = golden.config.replace(eos_token_ids=(eos,))
    models = [
        Model(golden.params, config),
        Model(golden.params, golden.config, generation_config={"eos_token_id": eos}),
        Model(golden.params, golden.config, generation_config={"eos_token_id": [319, eos]}),
    ]
    for model in models:
        ended = batch_generate(model, None, [prompt], max_tokens=12)[0].outputs[0]
        assert (ended.token_ids, ended.finish_reason) == (cut, "stop")
        assert ids_of(batch_generate(model, None, [prompt], max_tokens=12, ignore_eos=True)[0])[0] == free.token_ids
        again = batch_generate(model, None, [prompt], max_tokens=12, ignore_eos=True, stop_token_ids=[eos])[0]
        assert ids_of(again)[0] == cut


@pytest.mark.slow
@pytest.mark.parametrize("min_tokens", [1, 5, 12])
def test_min_tokens(golden: Model, min_tokens: int) -> None:
    (prompt,) = random_prompts(golden, [4])
    every = list(range(1, golden.config.vocab_size))  # all but one id end the text
    output = batch_generate(
        golden, None, [prompt], max_tokens=12, stop_token_ids=every, min_tokens=min_tokens, temperature=1.0, seed=2
    )[0].outputs[0]
    assert output.token_ids[:min_tokens] == (0,) * min_tokens
    assert len(output.token_ids) >= min_tokens
    assert output.finish_reason == ("length" if min_tokens == 12 else "stop")


def test_max_tokens_1() -> None:
    model = tiny(64)
    prompts = random_prompts(model, [4, 7])
    for output in batch_generate(model, None, prompts, max_tokens=1, ignore_eos=True):
        assert (len(ids_of(output)[0]), output.outputs[0].finish_reason) == (1, "length")
    assert len(list(stream_generate(model, None, prompts[0], max_tokens=1))) == 1


# The context, and a cache that grows.


@pytest.mark.parametrize("length", [1, 5, 40, 63])
def test_without_max_tokens_the_context_is_the_limit(length: int) -> None:
    model = tiny(64)
    (prompt,) = random_prompts(model, [length])
    output = batch_generate(model, None, [prompt], max_tokens=None)[0].outputs[0]
    assert (length + len(output.token_ids), output.finish_reason) == (64, "length")
    exact = batch_generate(model, None, [prompt], max_tokens=64 - length)[0].outputs[0]
    assert exact.token_ids == output.token_ids


# Streams.


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_closing_a_stream_early(chat: Loaded, steps: int) -> None:
    model, tokenizer = chat
    params = SamplingParams(seed=4, max_tokens=12)
    want = generate(model, tokenizer, "The", params)
    stream: Any = stream_generate(model, tokenizer, "The", params)
    assert len(list(itertools.islice(stream, steps))) == steps
    stream.close()
    assert list(stream) == []
    assert generate(model, tokenizer, "The", params) == want


def test_two_streams_at_once(chat: Loaded) -> None:
    model, tokenizer = chat
    params = [SamplingParams(seed=s, max_tokens=10) for s in (1, 2)]
    want = [ids_of(batch_generate(model, tokenizer, ["The"], p)[0])[0] for p in params]
    streams = [stream_generate(model, tokenizer, "The", p) for p in params]
    got = list(zip(*[[s.token for s in pair] for pair in zip(*streams, strict=True)], strict=True))
    assert got == want


def test_timing(chat: Loaded) -> None:
    steps = list(stream_generate(*chat, "The", max_tokens=5, ignore_eos=True))
    assert all(step.ttft_s > 0 and step.prompt_tps > 0 for step in steps)
    assert steps[-1].generation_tps > 0
    assert len({step.ttft_s for step in steps}) == 1
    timing = batch_generate(*chat, ["The"], max_tokens=5, ignore_eos=True)[0].timing
    assert min(timing.ttft_s, timing.prompt_tps, timing.generation_tps) > 0


# What is refused.


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        (np.zeros(0, np.int32), "empty"),
        ([3, 40], "40"),
        ([3, -1], "-1"),
        ([2**40], str(2**40)),
        ([1.5], "1.5"),
        ([1.0], "1.0"),
        (np.ones(2), "1.0"),
        ([True], "True"),
        (["3"], "'3'"),
        ([[1, 2]], r"\[1, 2\]"),
        (b"abc", "bytes"),
        (None, "NoneType"),
        (5, "int"),
        ("text", "without a tokenizer"),
        ([1] * 64, "64.*64"),
        ([1] * 6400, "6400.*64"),
    ],
)
def test_bad_prompts(prompt: Any, message: str) -> None:
    model = tiny(64)
    for call in (generate, stream_generate):
        with pytest.raises(RequestError, match=message) as caught:
            call(model, None, prompt, max_tokens=1)
        assert caught.value.param == "prompt"
        assert caught.value.hint
    with pytest.raises(RequestError, match=message):
        batch_generate(model, None, [[1], prompt], max_tokens=1)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": 60}, "max_tokens", "5.*60.*64.*59"),
        ({"stop": "x"}, "stop", "tokenizer"),
        ({"logit_bias": {40: 1.0}}, "logit_bias", "40"),
        ({"stop_token_ids": [41]}, "stop_token_ids", "41"),
        ({"temperature": -1}, "temperature", "-1"),
    ],
)
def test_bad_requests_are_refused_at_once(fields: dict[str, Any], param: str, message: str) -> None:
    """A stream too refuses them when it is made, and not at its first token."""
    model = tiny(64)
    for call in (generate, stream_generate):
        with pytest.raises(RequestError, match=message) as caught:
            call(model, None, [1, 2, 3, 4, 5], **fields)
        assert caught.value.param == param


def test_bad_batches() -> None:
    model = tiny(64)
    with pytest.raises(RequestError, match="n must be 1") as caught:
        stream_generate(model, None, [1], n=2)
    assert caught.value.param == "n"
    with pytest.raises(RequestError, match="2 prompts but 1") as caught:
        batch_generate(model, None, [[1], [2]], [SamplingParams()])
    assert caught.value.param == "params"
    with pytest.raises(RequestError, match="list of prompts") as caught:
        batch_generate(model, None, "text")
    assert caught.value.param == "prompts"
    with pytest.raises(RequestError, match="prompt 1 holds token id 99"):
        batch_generate(model, None, [[1], [99]])
    with pytest.raises(RequestError, match="prompt 0 holds token id -1"):
        batch_generate(model, None, [[1, -1, 2]])


@pytest.mark.parametrize("prompt", [[1, True], [1, 2.0], [1, "2"], np.asarray([1.0]), np.asarray([True]), [[1]]])
def test_a_prompt_is_of_integers(prompt: Any) -> None:
    with pytest.raises(RequestError, match="which is not a token id"):
        encode_prompt(None, prompt)


@pytest.mark.parametrize("prompt", [[1, 2], (1, 2), range(1, 3), [1, np.int64(2)], np.asarray([1, 2], np.uint8)])
def test_token_ids_are_given_in_many_ways(prompt: Any) -> None:
    ids = encode_prompt(None, prompt)
    assert ids == [1, 2]
    assert {type(token) for token in ids} == {int}


USES = (
    pytest.param("import llama_jax as lj", marks=pytest.mark.slow),
    "import llama_jax.generation, llama_jax.convert, llama_jax.loading, llama_jax as lj",
    pytest.param(
        "from llama_jax import batch_generate, generate, load; import llama_jax as lj", marks=pytest.mark.slow
    ),
)


@pytest.mark.parametrize("code", USES)
def test_public_functions_are_not_hidden_by_modules_of_the_same_name(code: str) -> None:
    """A submodule that is imported becomes an attribute of the package: none may have the name of a public object,
    except `training`, which is one."""
    names = "[n for _ in range(2) for n in lj.__all__ if n != 'training']"
    check = f"raise SystemExit(any(type(getattr(lj, n)).__name__ == 'module' for n in {names}))"
    assert subprocess.run([sys.executable, "-c", f"{code}; {check}"]).returncode == 0


# Compilation.


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(tmp_path: Path) -> None:
    """One pass over the buckets, then 50 prompts of random lengths: not one compilation."""
    model = tiny(512, vocab_size=41)  # a shape that no other test has compiled
    params = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=8)
    compiled: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            compiled.append(seconds)

    def both(prompt: list[int], seed: int) -> None:
        p = dataclasses.replace(params, seed=seed)
        batch_generate(model, None, [prompt], p)
        list(stream_generate(model, None, prompt, p))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for size in sorted({buckets.prompt_bucket(n) for n in range(1, 49)}):
            both([1] * size, seed=0)
        assert compiled  # the listener hears
        compiled.clear()
        for seed, length in enumerate(np.random.default_rng(0).integers(1, 49, 50).tolist()):
            both(random_prompts(model, [length], seed)[0], seed)
        assert compiled == []
        batch_generate(model, None, [[1]], dataclasses.replace(params, logprobs=1))
        assert compiled == []
        batch_generate(model, None, [[1], [2]], params)
        assert compiled  # and still hears
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
