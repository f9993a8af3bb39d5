"""Buckets, prefill and the decode loop on token ids, against `forward` over the whole text at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Golden, load_golden, random_params, run, tiny_config
from hypothesis import assume, given
from hypothesis import strategies as st

from llama_jax.config import LayerSpec, RopeSpec
from llama_jax.decode import buckets, loop
from llama_jax.decode import prefill as prefill_module
from llama_jax.sampling import SamplingParams, make_sampler

SIZES = st.integers(1, 1 << 20)


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden("llama2-mha")


# Buckets.


@pytest.mark.parametrize(
    ("bucket", "waste", "values"),
    [
        # 16, 24, 32, 48, ...: two sizes an octave; whole chunks from 2048 on
        (buckets.prompt_bucket, 1.5, {1: 16, 16: 16, 17: 24, 25: 32, 33: 48, 1537: 2048, 2048: 2048, 2049: 4096}),
        (buckets.cache_bucket, 1.25, {1: 64, 65: 80, 81: 96, 128: 128, 129: 160, 1025: 1280}),
        (buckets.batch_bucket, 2.0, {1: 1, 2: 2, 3: 4, 5: 8, 8: 8, 9: 16}),
    ],
)
def test_bucket_values(bucket: Any, waste: float, values: dict[int, int]) -> None:
    assert {n: bucket(n) for n in values} == values
    floor = bucket(1)
    sizes = [bucket(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes)
    for n, size in enumerate(sizes, 1):
        assert n <= size <= max(floor, waste * n, n + 2047 if n > 2048 else 0), n
        assert bucket(size) == size  # a bucket fits into itself
    limit = 2048 if bucket is buckets.prompt_bucket else 4096
    assert len({s for s in sizes if s <= limit}) <= 30


@given(n=SIZES, more=SIZES, minimum=st.sampled_from([1, 16, 64]), per_octave=st.sampled_from([1, 2, 4, 8]))
def test_buckets_hold_grow_and_waste_little(n: int, more: int, minimum: int, per_octave: int) -> None:
    size = buckets.bucket(n, minimum, per_octave)
    assert size >= max(n, minimum)
    assert buckets.bucket(n + more, minimum, per_octave) >= size
    assert buckets.bucket(size, minimum, per_octave) == size
    assert size - n <= max(n / per_octave, 1, minimum - n)


@given(n=st.integers(1, 200_000))
def test_prompt_buckets_are_whole_chunks(n: int) -> None:
    size = buckets.prompt_bucket(n)
    assert n <= size
    assert size <= buckets.MAX_CHUNK or size % buckets.MAX_CHUNK == 0
    assert size - n < buckets.MAX_CHUNK


@given(
    length=st.integers(1, 20_000),
    batch=st.sampled_from([1, 2, 8, 64]),
    room=st.integers(1, 5000),
    heads=st.integers(1, 128),
)
def test_chunks_divide_the_prompt_and_bound_the_memory(length: int, batch: int, room: int, heads: int) -> None:
    config = tiny_config(num_heads=heads, num_kv_heads=heads)
    prompt = buckets.prompt_bucket(length)
    capacity = buckets.cache_bucket(prompt + room)
    chunk = buckets.chunk_length(config, batch, prompt, capacity)
    assert 1 <= chunk <= min(prompt, buckets.MAX_CHUNK)
    assert prompt % chunk == 0
    if chunk > 128:
        assert 4 * batch * heads * chunk * capacity <= buckets.ATTENTION_BYTES


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(0, 3))
def test_prompts_are_padded_on_the_left(prompts: list[list[int]], dummies: int) -> None:
    rows = len(prompts) + dummies
    tokens, positions = prefill_module.pad_prompts(prompts, rows, 16)
    assert tokens.shape == positions.shape == (rows, 16)
    for row, prompt in enumerate(prompts):
        assert tokens[row][positions[row] >= 0].tolist() == prompt
        assert positions[row][-len(prompt) :].tolist() == list(range(len(prompt)))
        assert (positions[row][: -len(prompt)] == -1).all()
    assert ((positions[len(prompts) :] >= 0).sum(axis=1) == 1).all()  # something to attend to


# Prefill.


def prompts_of(golden: Golden, lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, golden.config.vocab_size, n).tolist() for n in lengths]


def prefill(golden: Golden, prompts: list[list[int]], **fields: Any) -> Any:
    length = buckets.prompt_bucket(max(map(len, prompts)))
    fields = {"rows": len(prompts), "capacity": length + 16, "dtype": jnp.float32, **fields}
    return prefill_module.prefill(golden.params, golden.config, prompts, **fields)


@pytest.mark.parametrize(
    ("case", "chunk"),
    [
        ("llama2-mha", 16),
        ("mistral-short-window", 16),
        ("llama-rope-dynamic", None),
        ("llama4-text", 16),
        ("smollm3-nope", 16),
    ],
)
def test_prefill_equals_forward(case: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unlike lengths, some of them empty in the first chunks, whole and in chunks of 16."""
    golden = load_golden(case)
    prompts = prompts_of(golden, [3, 41, 64])
    if chunk:
        monkeypatch.setattr(buckets, "chunk_length", lambda *_: chunk)
    logits, cache, _ = prefill(golden, prompts, rows=4, capacity=80)
    assert logits.shape == (4, golden.config.vocab_size)
    assert int(cache.length) == 64
    for row, prompt in enumerate(prompts):
        want, _ = run(golden.params, golden.config, jnp.asarray([prompt]))
        np.testing.assert_allclose(logits[row], want[0, -1], atol=2e-5 * float(jnp.abs(want).max()))
    assert np.isfinite(np.asarray(logits)).all()


@pytest.mark.parametrize(("name", "value"), [("MAX_CHUNK", 16), ("ATTENTION_BYTES", 1)])
def test_long_prompts_run_in_chunks(golden: Golden, name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(golden, [200, 150])
    whole, _, whole_logprobs = prefill(golden, prompts, prompt_logprobs=3)
    calls = []
    original = prefill_module.prefill_chunk

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2].shape[1])
        return original(*args, **kwargs)

    monkeypatch.setattr(buckets, name, value)
    monkeypatch.setattr(prefill_module, "prefill_chunk", counted)
    chunked, _, _ = prefill(golden, prompts)
    _, _, logprobs = prefill(golden, prompts, prompt_logprobs=3)
    assert len(calls) > 2
    assert max(calls) <= 128
    np.testing.assert_allclose(chunked, whole, atol=1e-4)
    for row, prompt in enumerate(prompts):
        own = np.arange(-(len(prompt) - 1), 0)
        np.testing.assert_allclose(logprobs.token[row][own], whole_logprobs.token[row][own], atol=1e-4)
        np.testing.assert_array_equal(logprobs.top_ids[row][own], whole_logprobs.top_ids[row][own])


@pytest.mark.parametrize(
    ("rows", "length", "ways", "expected"),
    [(64, 512, 2, 2), (16, 512, 8, 2), (1, 8192, 2, 2), (8, 512, 2, 1), (64, 512, 1, 1), (9, 1023, 2, 1), (1, 1, 8, 1)],
)
def test_pieces(rows: int, length: int, ways: int, expected: int) -> None:
    """Two where devices add up, and each piece has enough tokens for products at full speed."""
    assert buckets.pieces(rows, length, ways) == expected


def test_dynamic_rope_knows_the_length_from_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its base depends on the length of the whole prompt, which exceeds the original context here."""
    config = tiny_config(rope=RopeSpec(kind="dynamic", factor=4.0, original_max_positions=16))
    params = random_params(config)
    prompt = np.random.default_rng(0).integers(0, 40, 48).tolist()
    fields: dict[str, Any] = {"rows": 1, "capacity": 64, "dtype": jnp.float32}
    whole, cache, _ = prefill_module.prefill(params, config, [prompt], **fields)
    monkeypatch.setattr(buckets, "chunk_length", lambda *_: 16)
    chunked, chunked_cache, _ = prefill_module.prefill(params, config, [prompt], **fields)
    np.testing.assert_allclose(chunked, whole, atol=1e-4)
    assert cache.rope_length.tolist() == chunked_cache.rope_length.tolist() == [48]


# The loop.


def start(golden: Golden, prompts: list[list[int]], params: list[SamplingParams], limits: list[int], room: int) -> Any:
    options, sampler = make_sampler(params, prompts, golden.config.vocab_size, golden.config.eos_token_ids)
    length = buckets.prompt_bucket(max(map(len, prompts)))
    logits, cache, _ = prefill(golden, prompts, capacity=length + room)
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    state, progress = loop.first_token(
        logits, cache, sampler, lengths, np.asarray(limits, np.int32), options=options, room=room
    )
    return state, progress, options


def test_greedy_tokens_equal_transformers(golden: Golden) -> None:
    prompts = [golden.tokens[row][golden.mask[row]].tolist() for row in range(len(golden.tokens))]
    n = golden.greedy.shape[1]
    params = [SamplingParams(temperature=0.0, ignore_eos=True)] * len(prompts)
    state, _, options = start(golden, prompts, params, [n] * len(prompts), n)
    _, progress = loop.advance(golden.params, state, np.int32(n), config=golden.config, options=options)
    np.testing.assert_array_equal(progress.output[:, :n], golden.greedy)


@pytest.mark.parametrize("strides", [[1] * 12, [3, 5, 4], [12]])
def test_any_division_into_dispatches_gives_the_same_tokens(golden: Golden, strides: list[int]) -> None:
    prompts = prompts_of(golden, [5, 9])
    params = [
        SamplingParams(seed=1, ignore_eos=True, logprobs=2),
        SamplingParams(seed=2, ignore_eos=True, frequency_penalty=1.0),
    ]
    state, progress, options = start(golden, prompts, params, [13, 7], 16)
    assert int(progress.step) == 1
    until = 1
    for stride in strides:
        until += stride
        state, progress = loop.advance(golden.params, state, np.int32(until), config=golden.config, options=options)
        assert int(progress.step) == until
    assert progress.done.tolist() == [True, True]
    assert progress.finished_by_stop.tolist() == [False, False]
    whole, _, options = start(golden, prompts, params, [13, 7], 16)
    _, want = loop.advance(golden.params, whole, np.int32(13), config=golden.config, options=options)
    assert progress.output[0, :13].tolist() == want.output[0, :13].tolist()
    assert progress.output[1, :7].tolist() == want.output[1, :7].tolist()
    jax.tree.map(np.testing.assert_array_equal, progress.logprobs, want.logprobs)


def test_the_loop_ends_when_every_row_has(golden: Golden) -> None:
    prompts = prompts_of(golden, [5, 9])
    params = [SamplingParams(temperature=0.0, ignore_eos=True)] * 2
    state, _, options = start(golden, prompts, params, [3, 5], 16)
    state, progress = loop.advance(golden.params, state, np.int32(16), config=golden.config, options=options)
    assert int(progress.step) == 5
    state, progress = loop.advance(golden.params, state, np.int32(16), config=golden.config, options=options)
    assert int(progress.step) == 5


def test_rows_that_the_host_ends(golden: Golden) -> None:
    prompts = prompts_of(golden, [5, 9])
    params = [SamplingParams(temperature=0.0, ignore_eos=True)] * 2
    state, _, options = start(golden, prompts, params, [16, 5], 16)
    state = loop.stop_rows(state, np.asarray([True, False]))
    _, progress = loop.advance(golden.params, state, np.int32(16), config=golden.config, options=options)
    assert int(progress.step) == 5


def test_stop_ids_end_a_row(golden: Golden) -> None:
    prompts = prompts_of(golden, [5])
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    state, _, options = start(golden, prompts, [greedy], [8], 8)
    _, progress = loop.advance(golden.params, state, np.int32(8), config=golden.config, options=options)
    tokens = progress.output[0].tolist()
    stop = tokens[4]
    params = dataclasses.replace(greedy, stop_token_ids=[stop, 0])
    state, _, options = start(golden, prompts, [params], [8], 8)
    _, progress = loop.advance(golden.params, state, np.int32(8), config=golden.config, options=options)
    assert int(progress.step) == tokens.index(stop) + 1
    assert progress.finished_by_stop.tolist() == [True]


def test_growing_keeps_everything(golden: Golden) -> None:
    prompts = prompts_of(golden, [5, 9])
    params = [SamplingParams(seed=7, ignore_eos=True, logprobs=1)] * 2
    state, _, options = start(golden, prompts, params, [20, 20], 20)
    _, want = loop.advance(golden.params, state, np.int32(20), config=golden.config, options=options)

    state, _, options = start(golden, prompts, params, [20, 20], 8)
    state, _ = loop.advance(golden.params, state, np.int32(8), config=golden.config, options=options)
    state = loop.grow(state, capacity=48, room=32)
    _, progress = loop.advance(golden.params, state, np.int32(20), config=golden.config, options=options)
    np.testing.assert_array_equal(progress.output[:, :20], want.output)
    np.testing.assert_allclose(progress.logprobs.token[:, :20], want.logprobs.token, atol=1e-5)


def test_rows_of_a_cache_can_be_repeated(golden: Golden) -> None:
    prompts = prompts_of(golden, [5, 9, 2])
    logits, cache, _ = prefill(golden, prompts)
    index = np.asarray([2, 2, 0], np.int32)
    picked, rows = prefill_module.take_rows(logits, cache, index)
    np.testing.assert_array_equal(picked, logits[index])
    np.testing.assert_array_equal(rows.positions, cache.positions[index])
    for ours, theirs in zip((*rows.k, *rows.v), (*cache.k, *cache.v), strict=True):
        np.testing.assert_array_equal(ours, theirs[index])


@given(length=st.integers(1, 60), seed=st.integers(0, 2**16))
def test_cached_decoding_equals_forward_over_the_whole_text(length: int, seed: int) -> None:
    """Teacher forcing: greedy with the cache, then the likeliest tokens of one forward pass over all of it."""
    config = tiny_config(LayerSpec(mlp=24), LayerSpec("sliding", 7, mlp=24))
    golden = Golden(config, random_params(config), *[np.zeros(0)] * 5)
    prompt = prompts_of(golden, [length], seed)
    state, _, options = start(golden, prompt, [SamplingParams(temperature=0.0)], [5], 8)
    _, progress = loop.advance(golden.params, state, np.int32(5), config=config, options=options)
    text = np.zeros((1, 80), np.int32)
    text[0, : length + 5] = [*prompt[0], *progress.output[0, :5].tolist()]
    logits = np.asarray(run(golden.params, config, text)[0][0, length - 1 : length + 4])
    best_two = np.sort(logits, axis=-1)[:, -2:]
    assume((best_two[:, 1] - best_two[:, 0]).min() > 1e-4)
    assert logits.argmax(-1).tolist() == progress.output[0, :5].tolist()
