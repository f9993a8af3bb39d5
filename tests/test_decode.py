"""Buckets, prefill and the decode loop on token ids, against `forward` over the whole text at once."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Golden, load_golden, random_params, run, tiny_config
from hypothesis import assume, given
from hypothesis import strategies as st

from llama_jax import batch_generate
from llama_jax.cache import NewCache
from llama_jax.config import LayerSpec, RopeSpec
from llama_jax.decode import buckets, chunks, loop
from llama_jax.decode import prefill as prefill_module
from llama_jax.errors import KernelError
from llama_jax.kernels.dispatch import using
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplerProfile, SamplingParams, make_sampler
from llama_jax.targets import find

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
    length=st.integers(1, 200_000),
    batch=st.sampled_from([1, 2, 8, 64]),
    room=st.integers(1, 5000),
    heads=st.integers(1, 128),
    target=st.sampled_from(["cpu", "h100", "mi300x"]),
)
def test_chunks_divide_the_prompt_and_bound_the_memory(
    length: int, batch: int, room: int, heads: int, target: str
) -> None:
    """The reference's intermediate results are bounded; kernels write nothing, so their chunks are as long as any."""
    config = tiny_config(num_heads=heads, num_kv_heads=heads, head_dim=64)
    prompt = buckets.prompt_bucket(length)
    shape = {"batch": batch, "prompt": prompt, "capacity": buckets.cache_bucket(prompt + room)}
    chunk = chunks.chunk_length(config, find(target), jnp.bfloat16, **shape)
    longest = min(prompt, buckets.MAX_CHUNK)
    assert 1 <= chunk <= longest
    assert prompt % chunk == 0
    if target != "cpu" and batch * heads * shape["capacity"] * 64 < 2**31:
        assert chunk == longest
    elif chunk > chunks.SHORTEST:
        assert (4 + 2) * batch * heads * chunk * shape["capacity"] <= chunks.ATTENTION_BYTES


def test_chunks_follow_from_what_runs() -> None:
    """A named backend, and a cache that the kernel does not take, are what the length follows from."""
    config, target = tiny_config(num_heads=32, num_kv_heads=8, head_dim=128), find("mi300x")

    def length(**given: Any) -> int:
        shape = {"batch": 1, "prompt": 32768, "capacity": 40960}
        return chunks.chunk_length(config, target, jnp.bfloat16, **shape, **given)

    assert length() == 2048
    with using(flash_attention="reference"):
        assert length() == 512
    assert length(cache_dtype=jnp.float32) == 512
    with using(flash_attention="cudnn"), pytest.raises(KernelError, match="cuDNN is for NVIDIA"):
        length()


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=4), st.integers(0, 3))
def test_prompts_are_padded_on_the_left(prompts: list[list[int]], dummies: int) -> None:
    rows = len(prompts) + dummies
    tokens, positions = prefill_module.pad_prompts(prompts, rows, 16)
    assert tokens.shape == positions.shape == (rows, 16)
    for row, prompt in enumerate(prompts):
        assert tokens[row][positions[row] >= 0].tolist() == prompt
        assert positions[row][-len(prompt) :].tolist() == list(range(len(prompt)))
        assert (positions[row][: -len(prompt)] == -1).all()
    assert (positions[len(prompts) :] == -1).all()


# Prefill.


def prompts_of(golden: Golden, lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, golden.config.vocab_size, n).tolist() for n in lengths]


def prefill(
    golden: Golden,
    prompts: list[list[int]],
    *,
    batch: int | None = None,
    room: int = 16,
) -> Any:
    """Logits and cache of prompts in a cache of `batch` rows with room for more tokens."""
    batch = batch or len(prompts)
    capacity = buckets.prompt_bucket(max(map(len, prompts))) + room
    cache = NewCache(batch, capacity, np.dtype(np.float32))
    return prefill_module.prefill(golden.params, golden.config, prompts, cache)


@pytest.mark.slow
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
        monkeypatch.setattr(chunks, "chunk_length", lambda *_, **__: chunk)
    logits, cache = prefill(golden, prompts, batch=4)
    assert logits.shape == (4, golden.config.vocab_size)
    assert int(cache.length) == 64
    for row, prompt in enumerate(prompts):
        at = np.arange(64, dtype=np.int32)  # one length for all
        tokens, positions = np.resize(np.asarray(prompt, np.int32), 64), np.where(at < len(prompt), at, -1)
        want = run(golden.params, golden.config, tokens[None], positions[None])[0][0, : len(prompt)]
        np.testing.assert_allclose(logits[row], want[-1], atol=2e-5 * float(jnp.abs(want).max()))
    assert np.isfinite(np.asarray(logits)).all()


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "value"), [(buckets, "MAX_CHUNK", 16), (chunks, "ATTENTION_BYTES", 1)])
def test_long_prompts_run_in_chunks(
    golden: Golden, module: ModuleType, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(golden, [200, 150])
    whole, _ = prefill(golden, prompts)
    calls = []
    original = prefill_module.prefill_chunk

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2].shape[1])
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(prefill_module, "prefill_chunk", counted)
    chunked, _ = prefill(golden, prompts)
    assert len(calls) > 1
    assert max(calls) <= 128
    np.testing.assert_allclose(chunked, whole, atol=1e-4)


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
    golden = Golden(config, random_params(config), *[np.zeros(0)] * 5)
    prompt = np.random.default_rng(0).integers(0, 40, 48).tolist()
    whole, _ = prefill(golden, [prompt])
    monkeypatch.setattr(chunks, "chunk_length", lambda *_, **__: 16)
    chunked, _ = prefill(golden, [prompt])
    np.testing.assert_allclose(chunked, whole, atol=1e-4)


# The loop.


def start(
    golden: Golden, prompts: list[list[int]], params: list[SamplingParams], limits: list[int], **fields: Any
) -> Any:
    """State, progress and profile after the first tokens."""
    profile, sampler = make_sampler(params, prompts, golden.config.vocab_size, golden.config.eos_token_ids)
    logits, cache = prefill(golden, prompts, **fields)
    lengths, adapters = np.asarray([len(p) for p in prompts], np.int32), np.zeros(len(prompts), np.int32)
    limit = np.asarray(limits, np.int32)
    state, progress = loop.begin(logits, cache, sampler, lengths, limit, adapters, profile=profile)
    return state, progress, profile


class Rows:
    """The tokens and log-probabilities of each row, from one dispatch after the other."""

    def __init__(self, rows: int):
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(rows)]

    def add(self, progress: loop.Progress) -> None:
        host = jax.device_get(progress)
        for row in range(len(self.tokens)):
            self.tokens[row] += host.tokens[row, : host.new[row]].tolist()
            if host.logprobs is not None:
                self.logprobs[row] += host.logprobs.token[row, : host.new[row]].tolist()


def advance(golden: Golden, state: loop.DecodeState, steps: int, profile: SamplerProfile, stride: int = 16) -> Any:
    return loop.advance(golden.params, state, np.int32(steps), config=golden.config, profile=profile, stride=stride)


def finished(
    golden: Golden, prompts: list[list[int]], params: list[SamplingParams], limits: list[int], **fields: Any
) -> Rows:
    """Everything in one dispatch."""
    state, progress, profile = start(golden, prompts, params, limits, **fields)
    rows = Rows(len(prompts))
    rows.add(progress)
    rows.add(advance(golden, state, 64, profile, 64)[1])
    return rows


def test_greedy_tokens_equal_transformers(golden: Golden) -> None:
    prompts = [golden.tokens[row][golden.mask[row]].tolist() for row in range(len(golden.tokens))]
    n = golden.greedy.shape[1]
    params = [SamplingParams(temperature=0.0, ignore_eos=True)] * len(prompts)
    rows = finished(golden, prompts, params, [n] * len(prompts), room=n)
    np.testing.assert_array_equal(rows.tokens, golden.greedy)


@pytest.mark.slow
@pytest.mark.parametrize("strides", [[1] * 12, [3, 5, 4], [12]])
def test_any_division_into_dispatches_gives_the_same_tokens(golden: Golden, strides: list[int]) -> None:
    prompts = prompts_of(golden, [5, 9])
    params = [
        SamplingParams(seed=1, ignore_eos=True, logprobs=2),
        SamplingParams(seed=2, ignore_eos=True, frequency_penalty=1.0),
    ]
    state, progress, profile = start(golden, prompts, params, [13, 7])
    assert progress.new.tolist() == [1, 1]
    rows = Rows(2)
    rows.add(progress)
    for steps in strides:
        state, progress = advance(golden, state, steps, profile)
        rows.add(progress)
    assert progress.done.tolist() == [True, True]
    assert progress.finished_by_stop.tolist() == [False, False]
    assert state.sampler.count.tolist() == [13, 7]
    want = finished(golden, prompts, params, [13, 7])
    assert rows.tokens == want.tokens
    assert [len(t) for t in rows.tokens] == [13, 7]
    for ours, theirs in zip(rows.logprobs, want.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_loop_ends_when_every_row_has(golden: Golden) -> None:
    prompts = prompts_of(golden, [5, 9])
    params = [SamplingParams(temperature=0.0, ignore_eos=True)] * 2
    state, _, profile = start(golden, prompts, params, [3, 5])
    state, progress = advance(golden, state, 16, profile)
    assert progress.new.tolist() == [2, 4]
    assert int(state.cache.length) == 16 + 4
    state, progress = advance(golden, state, 16, profile)
    assert progress.new.tolist() == [0, 0]
    assert int(state.cache.length) == 16 + 4


def test_stop_ids_end_a_row(golden: Golden) -> None:
    prompts = prompts_of(golden, [5])
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    (tokens,) = finished(golden, prompts, [greedy], [8]).tokens
    stop = tokens[4]
    params = dataclasses.replace(greedy, stop_token_ids=[stop, 0])
    state, _, profile = start(golden, prompts, [params], [8])
    _, progress = advance(golden, state, 8, profile)
    assert progress.new.tolist() == [tokens.index(stop)]
    assert progress.finished_by_stop.tolist() == [True]


@pytest.mark.slow
def test_growing_keeps_everything(golden: Golden) -> None:
    prompts = prompts_of(golden, [5, 9])
    params = [SamplingParams(seed=7, ignore_eos=True, logprobs=1)] * 2
    want = finished(golden, prompts, params, [20, 20], room=20)

    state, progress, profile = start(golden, prompts, params, [20, 20], room=8)
    rows = Rows(2)
    rows.add(progress)
    state, progress = advance(golden, state, 7, profile)
    rows.add(progress)
    state = loop.grow(state, capacity=48)
    rows.add(advance(golden, state, 16, profile)[1])
    assert rows.tokens == want.tokens
    np.testing.assert_allclose(rows.logprobs, want.logprobs, atol=1e-5)


# Rows that end.


def test_a_dense_row_that_has_ended_stores_nothing_visible(golden: Golden) -> None:
    prompts = prompts_of(golden, [5, 9])
    params = [SamplingParams(temperature=0.0, ignore_eos=True)] * 2
    state, _, profile = start(golden, prompts, params, [3, 12])
    state, _ = advance(golden, state, 16, profile)
    assert (state.cache.positions >= 0).sum(axis=1).tolist() == [5 + 2, 9 + 11]


@pytest.mark.slow
def test_a_new_mix_of_settings_compiles_nothing(golden: Golden) -> None:
    """Once each profile has run, twenty mixes of settings find their programs compiled."""
    rng = np.random.default_rng(0)
    model = Model(golden.params, golden.config)
    prompts = prompts_of(golden, [5, 9])
    fields = {"max_tokens": 3, "ignore_eos": True}
    for kind in ({"temperature": 0.0}, {"seed": 1}, {"seed": 1, "presence_penalty": 0.5}):
        for logprobs in (None, 1):
            batch_generate(model, None, prompts, SamplingParams(**kind, **fields, logprobs=logprobs))  # type: ignore[arg-type]

    def mix() -> SamplingParams:
        return SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_p=rng.choice([1.0, 0.9, 0.3]),
            top_k=int(rng.choice([0, 1, 7])),
            min_p=rng.choice([0.0, 0.1]),
            presence_penalty=rng.choice([0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.2]),
            logit_bias={} if rng.random() < 0.5 else {3: 1.0},
            min_tokens=int(rng.integers(0, 3)),
            stop_token_ids=rng.integers(0, 40, rng.integers(0, 9)).tolist(),
            logprobs=rng.choice([None, 0, 1, 5, 20]),
            seed=int(rng.integers(100)),
            **fields,
        )

    compiled: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(20):
            batch_generate(model, None, prompts, [mix(), mix()])
        assert compiled == []
        jax.jit(lambda x: x * 41 + 7)(np.float32(1)).block_until_ready()
        assert compiled  # compilation would have been heard
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
@given(length=st.integers(1, 60), seed=st.integers(0, 2**16))
def test_cached_decoding_equals_forward_over_the_whole_text(length: int, seed: int) -> None:
    """Teacher forcing: greedy with the cache, then the likeliest tokens of one forward pass over all of it."""
    config = tiny_config(LayerSpec(mlp=24), LayerSpec("sliding", 7, mlp=24))
    golden = Golden(config, random_params(config), *[np.zeros(0)] * 5)
    prompt = prompts_of(golden, [length], seed)
    (tokens,) = finished(golden, prompt, [SamplingParams(temperature=0.0)], [5]).tokens
    text = np.zeros((1, 80), np.int32)
    text[0, : length + 5] = [*prompt[0], *tokens]
    logits = np.asarray(run(golden.params, config, text)[0][0, length - 1 : length + 4])
    best_two = np.sort(logits, axis=-1)[:, -2:]
    assume((best_two[:, 1] - best_two[:, 0]).min() > 1e-4)
    assert logits.argmax(-1).tolist() == tokens
