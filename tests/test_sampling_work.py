"""The full sampler, which all requests of an engine share: it draws what whole formulas draw, bit for bit, and a batch
pays only for what its rows ask for."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import requests

from llama_jax.cache.protocol import take_rows
from llama_jax.errors import RequestError
from llama_jax.sampling import (
    GREEDY_BELOW,
    SamplerProfile,
    SamplerState,
    SamplingParams,
    failed,
    make_sampler,
    sample,
    sampler,
    token_logprobs,
)
from llama_jax.sampling.truncation import truncate

VOCAB = 45  # whose last word of a mask is not full
FULL, EVERYTHING = SamplerProfile("full"), SamplerProfile("full", logprobs=True)
jitted_sample = jax.jit(sample, static_argnames="profile")


@jax.jit
def whole_formulas(logits: jax.Array, state: SamplerState, bias: jax.Array, allowed: jax.Array) -> jax.Array:
    """Every step for every row, needed or not; bias float32 [batch, vocab], allowed bool [batch, vocab]."""
    assert state.seen is not None
    rows = jnp.arange(len(logits))[:, None]
    early = (state.count < state.min_tokens)[:, None] & (state.stop_ids >= 0)
    logits = logits.at[rows, jnp.where(early, state.stop_ids, VOCAB)].set(-1e30, mode="drop") + bias
    generated = state.seen > 0
    factor = jnp.where(generated | state.in_prompt, state.repetition[:, None], 1.0)
    logits = jnp.clip(jnp.where(logits > 0, logits / factor, logits * factor), -1e30, 1e30)
    logits = logits - state.frequency[:, None] * state.seen - state.presence[:, None] * generated
    logits = jnp.where(allowed, logits, -jnp.inf)

    def gumbel(seed: jax.Array, count: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, count), (VOCAB,), jnp.float32)

    scaled = truncate(logits / jnp.maximum(state.temperature, GREEDY_BELOW)[:, None], state)
    drawn = jnp.argmax(scaled + jax.vmap(gumbel)(state.seed, state.count), axis=1)
    return jnp.where(state.temperature < GREEDY_BELOW, jnp.argmax(logits, axis=1), drawn)


@pytest.mark.slow
@settings(max_examples=40)
@given(batch=st.lists(requests(VOCAB), min_size=3, max_size=3), rng=st.integers(0, 2**32).map(np.random.default_rng))
def test_the_tokens_of_whole_formulas(batch: list[SamplingParams], rng: np.random.Generator) -> None:
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (1, 4, 0)]
    _, state = make_sampler(batch, prompts, VOCAB, [1], EVERYTHING)
    bias, allowed = np.zeros((3, VOCAB), np.float32), np.ones((3, VOCAB), bool)
    for row, p in enumerate(batch):
        bias[row, list(p.logit_bias)] = list(p.logit_bias.values())
        if p.allowed_token_ids is not None:
            allowed[row] = np.isin(np.arange(VOCAB), p.allowed_token_ids)
    for _ in range(4):
        logits = np.round(rng.standard_normal((3, VOCAB)) * 3, 1).astype(np.float32)  # with ties
        want = whole_formulas(logits, state, bias, allowed)
        tokens, state, _ = jitted_sample(logits, state, profile=EVERYTHING)
        assert tokens.tolist() == want.tolist()


# --- Work that is done without being asked for ------------------------------------------------------------------------


def unconditional(jaxpr: Any) -> Iterator[Any]:
    """The equations that run whatever the rows ask for: all but those within branches."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "jit":
            yield from unconditional(equation.params["jaxpr"].jaxpr)
        elif equation.primitive.name != "cond":
            yield equation


@pytest.mark.parametrize("kind", ["greedy", "sampling", "full"])
def test_nothing_as_wide_as_the_vocabulary_is_computed_unasked(kind: Any) -> None:
    """Beside the scatter that counts the new tokens, in place where the state is donated."""
    vocab, profile = 4096, SamplerProfile(kind)
    _, state = make_sampler([SamplingParams(temperature=0.0)] * 3, [[1]] * 3, vocab, profile=profile)
    jaxpr = jax.make_jaxpr(partial(sample, profile=profile))(jnp.zeros((3, vocab)), state)
    wide = [e.primitive.name for e in unconditional(jaxpr.jaxpr) if any(v.aval.size >= 3 * vocab for v in e.outvars)]
    assert wide == (["scatter-add"] if kind == "full" else [])


ASKS_FOR_ALL = SamplingParams(seed=1, logit_bias={1: 2.0}, repetition_penalty=1.5, logprobs=1)


@pytest.mark.parametrize("idle", ["ended", "padding"])
@pytest.mark.parametrize(("other", "computed"), [({}, []), ({"logit_bias": {3: 1.0}}, ["_change"])])
def test_rows_that_do_not_draw_ask_for_nothing(
    idle: str, other: Any, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose requests have ended, and those that fill up a program, whose numbers are all 0."""
    greedy = SamplingParams(temperature=0.0, **other)
    _, state = make_sampler([greedy, ASKS_FOR_ALL], [[], [2]], VOCAB, profile=EVERYTHING)
    done: list[str] = []
    for name in ("_change", "_penalize", "_noise"):
        run = getattr(sampler, name)
        monkeypatch.setattr(sampler, name, lambda *args, run=run, name=name: (done.append(name), run(*args))[1])
    rest = jax.tree.map(lambda x: take_rows(jnp.asarray(x), jnp.asarray([0, 2]), 0), state)
    logits = np.random.default_rng(0).standard_normal((2, VOCAB)).astype(np.float32)
    with jax.disable_jit():  # runs one branch of each `cond` alone
        tokens, _, logprobs = sample(
            logits, state if idle == "ended" else rest, EVERYTHING, drawing=jnp.asarray([True, False])
        )
        assert done == computed
        assert logprobs is not None
        assert not logprobs.token.any()
        done.clear()
        together, _, logprobs = sample(logits, state, EVERYTHING)
        assert done == ["_change", "_penalize", "_noise"]
        assert logprobs is not None
        assert logprobs.token.all()
    assert together[0] == tokens[0]


# --- Rows -------------------------------------------------------------------------------------------------------------

MANY = {i: float(i) for i in range(20)}


def test_rows_are_taken_out_and_put_back_by_tree_maps() -> None:
    """Rows of different needs, each with the arrays of all: an engine puts them into its slots."""
    params = [
        SamplingParams(seed=1, top_p=0.9),
        SamplingParams(seed=2, allowed_token_ids=[4, 44], min_tokens=2),
        SamplingParams(seed=3, temperature=0.0, logit_bias=MANY, repetition_penalty=1.5),
    ]
    widths: dict[str, Any] = {"profile": FULL, "stop_width": 8, "bias_width": 32}
    _, slots = make_sampler([SamplingParams(temperature=0.0)] * 4, [[]] * 4, VOCAB, **widths)
    _, together = make_sampler(params, [[1], [2, 3], [4]], VOCAB, **widths)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(together))
    for row, (p, prompt) in enumerate(zip(params, [[1], [2, 3], [4]], strict=True)):
        _, one = make_sampler([p], [prompt], VOCAB, **widths)
        jax.tree.map(lambda a, b, at=3 - row: operator.setitem(a, at, b[0]), slots, one)
    taken = jax.tree.map(lambda a: a[[3, 2, 1]], slots)
    jax.tree.map(np.testing.assert_array_equal, taken, together)
    logits = np.random.default_rng(0).standard_normal((4, VOCAB)).astype(np.float32)
    tokens, _, _ = jitted_sample(logits, slots, profile=FULL)
    want, _, _ = jitted_sample(logits[[3, 2, 1]], together, profile=FULL)
    assert tokens[::-1][:3].tolist() == want.tolist()


def test_as_many_biases_as_a_row_has_room_for() -> None:
    for n, width in ((0, 16), (16, 16), (17, 32)):
        p = SamplingParams(temperature=0.0, logit_bias={i: float(i + 1) for i in range(n)})
        _, state = make_sampler([p, SamplingParams()], [[], []], VOCAB, profile=FULL)
        assert state.bias_ids is not None
        assert state.bias_ids.shape == (2, width)
        tokens, _, _ = jitted_sample(jnp.zeros((2, VOCAB)), state, profile=FULL)
        assert int(tokens[0]) == max(n - 1, 0)


@pytest.mark.parametrize(("fields", "width"), [({"logit_bias": MANY}, "bias"), ({"stop_token_ids": [*MANY]}, "stop")])
def test_more_than_a_row_has_room_for(fields: dict[str, Any], width: str) -> None:
    make_sampler([SamplingParams(**fields)], [[]], VOCAB, **{f"{width}_width": 20})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="room for 19") as caught:
        make_sampler([SamplingParams(**fields)], [[]], VOCAB, **{f"{width}_width": 19})  # type: ignore[arg-type]
    assert caught.value.param == next(iter(fields))


# --- Masks, and rows without a next token -----------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40)
@given(
    vocab=st.sampled_from([1, 45, 64]),
    rng=st.integers(0, 2**32).map(np.random.default_rng),
    temperature=st.sampled_from([0.0, 1.0, 1e30]),
    top_p=st.sampled_from([1.0, 0.5]),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_masks_of_random_bits(
    vocab: int, rng: np.random.Generator, temperature: float, top_p: float, share: float
) -> None:
    """A token that is forbidden never comes while another is allowed, be that one impossible by its logit or the other
    as likely as can be; rows whose mask is not in use do not notice it. Bits behind the vocabulary mean nothing."""
    p = SamplingParams(seed=3, temperature=temperature, top_p=top_p, repetition_penalty=1.2)
    _, state = make_sampler([p] * 4, [[0]] * 4, vocab, profile=FULL)
    bits = rng.random((4, vocab)) < share
    padded = np.concatenate([bits, rng.random((4, -vocab % 32)) < 0.5], axis=1)
    words = np.packbits(padded, axis=1, bitorder="little").view("<u4")
    logits = np.where(rng.random((4, vocab)) < 0.3, -np.inf, rng.standard_normal((4, vocab)) * 50).astype(np.float32)
    logits[:, 0] = 3e38
    restricted = np.asarray([True, True, True, False])
    masked = dataclasses.replace(state, allowed=words, restricted=restricted)
    tokens, _, _ = jitted_sample(logits, masked, profile=FULL)
    free, _, _ = jitted_sample(logits, state, profile=FULL)
    for row in range(3):
        if bits[row].any():
            assert bits[row, int(tokens[row])]
    assert tokens[3] == free[3]
    assert jax.jit(failed)(logits, masked).tolist() == [*(~bits[:3].any(axis=1)).tolist(), False]


@pytest.mark.parametrize("profile", [SamplerProfile(), SamplerProfile("sampling"), FULL], ids=lambda p: p.kind)
def test_a_row_that_fails_fails_alone(profile: SamplerProfile) -> None:
    p = SamplingParams(seed=1, temperature=0.0 if profile.kind == "greedy" else 1.0, top_p=0.9)
    _, state = make_sampler([p] * 5, [[]] * 5, VOCAB, profile=profile)
    logits = np.random.default_rng(2).standard_normal((5, VOCAB)).astype(np.float32)
    logits[4, :-1] = -np.inf  # one token is enough
    want, _, _ = jitted_sample(logits, state, profile=profile)
    broken = logits.copy()
    broken[0, 7], broken[1], broken[2, 9] = np.nan, -np.inf, np.inf
    tokens, _, _ = jitted_sample(broken, state, profile=profile)
    assert jax.jit(failed)(broken, state).tolist() == [True, True, True, False, False]
    assert not jax.jit(failed)(logits, state).any()
    assert tokens[3:].tolist() == want[3:].tolist()
    assert ((tokens >= 0) & (tokens < VOCAB)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_allowed_token_comes_before_min_tokens(temperature: float) -> None:
    p = SamplingParams(seed=0, temperature=temperature, allowed_token_ids=[7], min_tokens=3, stop_token_ids=[7])
    profile, state = make_sampler([p], [[]], VOCAB)
    tokens, _, _ = jitted_sample(jnp.zeros((1, VOCAB)), state, profile=profile)
    assert tokens.tolist() == [7]


# --- Log-probabilities ------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    vocab=st.sampled_from([3, 64, 1281, 5000]),
    n=st.sampled_from([1, 20]),
    rng=st.integers(0, 2**32).map(np.random.default_rng),
    forbidden=st.sampled_from([0.0, 0.5, 0.999]),
    digits=st.integers(0, 2),
)
def test_the_most_likely_tokens_of_many(
    vocab: int, n: int, rng: np.random.Generator, forbidden: float, digits: int
) -> None:
    """Of equal ones the first, also where most are impossible: against a stable sort."""
    logits = np.round(rng.standard_normal((2, vocab)) * 2, digits).astype(np.float32) + np.float32(0)  # no -0.0
    logits[rng.random((2, vocab)) < forbidden] = -np.inf
    logits[:, -1] = 0
    got = jax.jit(token_logprobs, static_argnums=2)(logits, jnp.full(2, vocab - 1), n)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :n]
    wide = logits.astype(np.float64)
    want = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(got.top_ids, order)
    np.testing.assert_allclose(got.top, np.take_along_axis(want, order, axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.token, want[:, -1], rtol=1e-5, atol=1e-5)
