"""The sampler of a vocabulary that is split over devices; `test_sampling.py` runs this in a process of its own, on
eight simulated devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llama_jax import sharding
from llama_jax.sampling import SamplingParams, failed, make_sampler, sample, token_logprobs

plain = jax.jit(sample, static_argnames="profile")


def rows_of(batch: int, vocab: int, spread: float, seed: int) -> jax.Array:
    """Logits with ties among them."""
    logits = np.random.default_rng(seed).standard_normal((batch, vocab)) * spread
    return jnp.asarray(np.round(logits, 2), jnp.float32)


SAMPLINGS: Mapping[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0, logprobs=5),
    "free": SamplingParams(seed=3),
    "top_k": SamplingParams(temperature=0.8, top_k=40, seed=4),
    "top_k of more than the candidates": SamplingParams(top_k=700, seed=5),
    "top_p": SamplingParams(top_p=0.9, seed=6),
    "top_p of a flat distribution": SamplingParams(temperature=50.0, top_p=0.95, seed=7),
    "min_p": SamplingParams(min_p=0.02, seed=8),
    "all": SamplingParams(
        temperature=1.2,
        top_k=60,
        top_p=0.8,
        min_p=0.001,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        repetition_penalty=1.3,
        logit_bias={3: 2.0, 900: -100.0},
        min_tokens=2,
        stop_token_ids=[7, 1000, 1023],
        logprobs=3,
        seed=9,
    ),
    "few allowed": SamplingParams(temperature=2.0, allowed_token_ids=[0, 31, 32, 255, 256, 700, 1023], seed=10),
    "few allowed, one likely": SamplingParams(
        temperature=0.0, allowed_token_ids=[5, 700], logit_bias={6: 100.0, 700: 100.0}, seed=11
    ),
}


@pytest.mark.parametrize("mesh", ["tensor=4", "data=2,tensor=4"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_same_tokens_from_a_split_vocabulary(name: str, mesh: str) -> None:
    """Token for token over three steps, with the state that each leaves; logits of four different spreads."""
    batch, vocab = 4, 1024
    params = [dataclasses.replace(SAMPLINGS[name], seed=(SAMPLINGS[name].seed or 0) + i) for i in range(batch)]
    profile, state = make_sampler(params, [[1, 2, 3, 900 + i] for i in range(batch)], vocab, [1000])
    other, here = state, state
    for step in range(3):
        logits = rows_of(batch, vocab, (1.0, 3.0, 8.0)[step], step)
        tokens, state, logprobs = plain(logits, state, profile=profile)
        with sharding.on(sharding.make_mesh(mesh)):
            split = jax.device_put(logits, PartitionSpec("data" if "data" in mesh else None, "tensor"))
            found, other, found_logprobs = plain(split, here, profile=profile)
        assert found.tolist() == tokens.tolist()
        jax.tree.map(np.testing.assert_array_equal, other, state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found_logprobs, logprobs)
        here = jax.tree.map(np.asarray, other)


def test_log_probabilities_of_a_split_vocabulary() -> None:
    logits, tokens = rows_of(6, 1024, 4.0, 0), jnp.asarray([0, 255, 256, 511, 512, 1023])
    want = token_logprobs(logits, tokens, 7)
    exact = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(want.token, exact[jnp.arange(6), tokens], rtol=1e-6)
    with sharding.on(sharding.make_mesh("data=2,tensor=4")):
        found = jax.jit(token_logprobs, static_argnums=2)(logits, tokens, 7)
    assert found.top_ids.tolist() == want.top_ids.tolist() == jax.lax.top_k(exact, 7)[1].tolist()
    np.testing.assert_allclose(found.token, want.token, rtol=1e-6)
    np.testing.assert_allclose(found.top, want.top, rtol=1e-6)


@pytest.mark.parametrize("vocab", [1000, 1024])
def test_parts_that_begin_within_a_word_of_the_mask(vocab: int) -> None:
    """Masks of random bits: 1000 columns in 8 parts of 125, and parts of whole words; rows over an axis or not."""
    rng = np.random.default_rng(vocab)
    kept = [np.flatnonzero(rng.random(vocab) < share).tolist() for share in (0.01, 0.5)]
    params = [SamplingParams(seed=i, temperature=9.0, allowed_token_ids=kept[i % 2]) for i in range(8)]
    profile, state = make_sampler(params, [[1]] * 8, vocab)
    logits = rows_of(8, vocab, 2.0, 0)
    tokens, _, _ = plain(logits, state, profile=profile)
    assert all(int(t) in kept[i % 2] for i, t in enumerate(tokens))
    for mesh in ("tensor=8", "data=2,tensor=4"):
        with sharding.on(sharding.make_mesh(mesh)):
            found, _, _ = plain(logits, state, profile=profile)
        assert found.tolist() == tokens.tolist(), mesh


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,tensor=4"])
def test_a_row_that_fails_fails_alone(mesh: str) -> None:
    """NaN in the part of one device, with and without limits; the other rows get what they get without it."""
    params = [SamplingParams(seed=i, temperature=float(i % 2), top_p=0.9, allowed_token_ids=[1, 900]) for i in range(4)]
    profile, state = make_sampler(params, [[]] * 4, 1024)
    state = dataclasses.replace(state, restricted=np.zeros(4, bool))
    logits = rows_of(4, 1024, 3.0, 1)
    tokens, _, _ = plain(logits, state, profile=profile)
    broken = logits.at[1, 700].set(jnp.nan).at[2].set(-jnp.inf)
    with sharding.on(sharding.make_mesh(mesh)):
        found, _, _ = plain(broken, state, profile=profile)
        assert jax.jit(failed)(broken, state).tolist() == [False, True, True, False]
    assert found[np.asarray([0, 3])].tolist() == tokens[np.asarray([0, 3])].tolist()
