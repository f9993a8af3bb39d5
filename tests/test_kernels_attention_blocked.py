"""Attention over pages, a block of slots at a time: it is the reference's, and looks no further than texts reach."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.kernels.attention import KeysValues, Places, Rule, Visibility, attention_reference, blocked
from llama_jax.kernels.attention.decode import decode_attention
from llama_jax.kernels.attention.flash import flash_attention
from llama_jax.kernels.dispatch import choose
from llama_jax.targets import find

Call = tuple[jax.Array, KeysValues, Places]


def random_call(lengths: list[int], queries: int, *, page_size: int = 16, per_row: int = 40, seed: int = 0) -> Call:
    """The last `queries` tokens of texts in pages in any order; padding in front where a text is shorter."""
    rng = np.random.default_rng(seed)
    batch, slots = len(lengths), per_row * page_size
    pages = batch * per_row
    k, v = (rng.standard_normal((pages, 2, page_size, 8)).astype(np.float32) for _ in "kv")
    q = rng.standard_normal((batch, queries, 6, 8)).astype(np.float32)
    table = rng.permutation(pages).reshape(batch, per_row).astype(np.int32)
    slot, length = np.arange(slots)[None], np.asarray(lengths)[:, None]
    kv_positions = np.where(slot < length, slot, -1).astype(np.int32)
    q_positions = np.maximum(length - queries + np.arange(queries)[None], -1).astype(np.int32)
    return jnp.asarray(q), KeysValues(k, v, table), Places(q_positions, kv_positions)


@pytest.mark.slow
@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 640), min_size=2, max_size=2),
    queries=st.sampled_from([1, 40]),
    visibility=st.sampled_from([Visibility(), Visibility("sliding", 90), Visibility("chunked", 100)]),
    soft_cap=st.sampled_from([None, 3.0]),
    with_sinks=st.booleans(),
)
def test_like_the_reference(
    lengths: list[int], queries: int, visibility: Visibility, soft_cap: float | None, with_sinks: bool
) -> None:
    q, kv, places = random_call(lengths, queries)
    rule = Rule(visibility, 0.3, soft_cap)
    sinks = jnp.linspace(-1, 1, 6) if with_sinks else None
    expected = attention_reference(q, kv, places, rule, sinks=sinks)
    real = places.q_positions >= 0
    out = blocked.run(q, kv, places, rule, sinks=sinks)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[real], expected[real], rtol=1e-5, atol=2e-6)


def test_what_lies_behind_the_texts_is_not_read() -> None:
    """Not even multiplied by zero: those pages hold NaN."""
    q, kv, places = random_call([200, 90], 1)
    spoilt = KeysValues(np.full_like(kv.k, np.nan), np.full_like(kv.v, np.nan), kv.page_table)
    for row, length in enumerate((200, 90)):
        for slot in range(length):
            at = kv.page_table[row, slot // 16], slice(None), slot % 16
            spoilt.k[at], spoilt.v[at] = kv.k[at], kv.v[at]
    rule = Rule(Visibility(), 0.3)
    for f in (blocked.run, attention_reference):
        np.testing.assert_array_equal(f(q, spoilt, places, rule), f(q, kv, places, rule))


def test_gradients() -> None:
    q, kv, places = random_call([50, 30], 4, per_row=4)
    rule = Rule(Visibility(), 0.3)

    def loss(f: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(f(q, KeysValues(k, v, kv.page_table), places, rule) ** 2)

    grads = [
        jax.grad(partial(loss, f), argnums=(0, 1, 2))(q, jnp.asarray(kv.k), jnp.asarray(kv.v))
        for f in (blocked.run, attention_reference)
    ]
    for ours, theirs in zip(*grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", [decode_attention, flash_attention])
def test_a_cpu_takes_it_for_pages(op: Any) -> None:
    q, kv, places = random_call([50, 30], 4)
    rule = Rule(Visibility(), 0.3)
    assert choose(op, find("cpu"), "auto", q, kv, places, rule).backend == "blocked"
    rows = KeysValues(jnp.zeros((2, 2, 640, 8)), jnp.zeros((2, 2, 640, 8)))
    assert choose(op, find("cpu"), "auto", q, rows, places, rule).backend == "reference"
    assert "pages" in (blocked.unsupported(find("cpu"), q, rows, places, rule) or "")
