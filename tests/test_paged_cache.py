"""The paged cache against the dense one, transformers' outputs, and what a decode step does with its memory."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    GOLDEN_CASES,
    TOLERANCE,
    Golden,
    arange_positions,
    error,
    load_golden,
    random_params,
    random_tokens,
    run,
    tiny_config,
)

from llama_jax import batch_generate, generate, stream_generate
from llama_jax.cache import PAGE_SIZES, DenseCache, PagedCache, PagePool
from llama_jax.config import LayerSpec
from llama_jax.errors import DoesNotFit, RequestError
from llama_jax.kernels.dispatch import using
from llama_jax.model import forward
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams

# Cases that between them hold every kind of attention and cache; the others run where a test is marked slow.
REPRESENTATIVE = {"llama-mqa", "llama-rope-dynamic", "llama4-text", "mistral-short-window", "smollm3-window"}
EVERY_CASE = [
    pytest.param(case, marks=() if case in REPRESENTATIVE else pytest.mark.slow, id=case) for case in GOLDEN_CASES
]

CONFIG = tiny_config(LayerSpec(mlp=24), LayerSpec("sliding", 3, mlp=24))
PARAMS = random_params(CONFIG)


def step(cache: Any, tokens: Any, positions: Any) -> tuple[np.ndarray, Any]:
    """Logits and the cache after these tokens; padding behind them leaves few lengths to compile."""
    tokens, positions = np.asarray(tokens, np.int32), np.asarray(positions, np.int32)
    length = tokens.shape[1]
    pad = (0, 0), (0, next(size for size in (1, 4, 24) if size >= length) - length)
    logits, cache = run(PARAMS, CONFIG, np.pad(tokens, pad), np.pad(positions, pad, constant_values=-1), cache)
    return np.asarray(logits)[:, :length], cache


def prefilled(capacity: int = 32) -> tuple[np.ndarray, PagedCache]:
    """Three rows of 14 tokens."""
    cache = PagedCache.create(CONFIG, 3, capacity, jnp.float32, page_size=16)
    return step(cache, random_tokens(CONFIG, 3, 14), arange_positions(3, 14))


def stored(cache: PagedCache, row: int) -> np.ndarray:
    """Keys of layer 0 of a row's tokens, [length, kv_heads, head_dim]."""
    pages = np.asarray(cache.k[0])[np.clip(cache.page_table[row], 0, cache.pages - 1)]
    return np.concatenate(np.swapaxes(pages, 1, 2))[: int(cache.lengths[row])]


# ---- booking and storing


def test_create() -> None:
    cache = PagedCache.create(CONFIG, 3, 40, jnp.bfloat16, page_size=16)
    assert (cache.capacity, cache.page_size, cache.pages) == (48, 16, 9)
    assert len(cache.k) == len(cache.v) == CONFIG.num_layers
    assert {x.shape for x in cache.k + cache.v} == {(9, CONFIG.num_kv_heads, 16, CONFIG.head_dim)}
    assert {x.dtype for x in cache.k + cache.v} == {jnp.dtype(jnp.bfloat16)}
    assert len(np.unique(cache.page_table)) == 9
    assert PagedCache.create(CONFIG, 1, 1, "float32").page_size in PAGE_SIZES
    for size in (0, 8, 24, 512):
        with pytest.raises(RequestError, match="slots") as caught:
            PagedCache.create(CONFIG, 1, 64, jnp.float32, page_size=size)
        assert caught.value.param == "page_size"


def test_padding_is_not_stored() -> None:
    tokens = random_tokens(CONFIG, 3, 6)
    positions = np.array([[-1, -1, 0, 1, 2, 3], [0, 1, -1, -1, -1, -1], [-1] * 6])
    _, cache = step(PagedCache.create(CONFIG, 3, 32, jnp.float32, page_size=16), tokens, positions)
    np.testing.assert_array_equal(cache.lengths, [4, 2, 0])
    np.testing.assert_array_equal(cache.positions[:2, :5], [[0, 1, 2, 3, -1], [0, 1, -1, -1, -1]])
    for row in range(2):
        alone = np.asarray(tokens)[row, positions[row] >= 0][None]
        _, one = step(PagedCache.create(CONFIG, 1, 16, jnp.float32, page_size=16), alone, np.arange(alone.size)[None])
        np.testing.assert_allclose(stored(cache, row), stored(one, 0), atol=1e-6)
    assert np.count_nonzero(np.asarray(cache.k[0]).any(axis=(1, 3))) == 6  # and nothing was written elsewhere


@pytest.mark.slow
def test_tokens_without_a_slot() -> None:
    _, cache = prefilled(capacity=16)
    cache, _ = cache.extend(jnp.array([[14, 15], [14, -1], [-1, -1]]))  # fits exactly
    with pytest.raises(RequestError, match="1 tokens do not fit") as caught:
        cache.extend(jnp.array([[16], [15], [14]]))
    assert "larger capacity" in caught.value.hint
    unbooked = PagedCache.create(CONFIG, 2, 32, jnp.float32, page_size=16, pages=3)
    with pytest.raises(RequestError, match="2 tokens do not fit") as caught:
        unbooked.extend(jnp.array([[0, -1], [0, -1]]))
    assert "book pages" in caught.value.hint
    # Where it cannot be known, such tokens change nothing: neither other rows' pages nor what is seen.
    table = jnp.array([[2, -1], [99, 0]], jnp.int32)
    tokens = random_tokens(CONFIG, 2, 20)
    _, after = step(dataclasses.replace(unbooked, page_table=table), tokens, arange_positions(2, 20))
    np.testing.assert_array_equal((after.positions >= 0).sum(axis=1), [16, 4])
    written = np.asarray(after.k[0]).any(axis=(1, 3))
    np.testing.assert_array_equal(written.sum(axis=1), [4, 0, 16])


@pytest.mark.slow
@hypothesis.settings(max_examples=20)
@hypothesis.given(st.data())
def test_like_the_dense_cache(data: st.DataObject) -> None:
    """Chunks of three tokens a row, some of them padding, then single ones; pages in any order."""
    batch, capacity = 2, 32
    seed = data.draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    dense = DenseCache.create(CONFIG, batch, capacity, jnp.float32)
    paged = PagedCache.create(CONFIG, batch, capacity, jnp.float32, page_size=16)
    table = rng.permutation(paged.pages).reshape(paged.page_table.shape)
    paged = dataclasses.replace(paged, page_table=jnp.asarray(table, jnp.int32))
    lengths = np.zeros(batch, int)
    for length in (3, 3, 1, 1, 3, 1):
        mask = st.lists(st.booleans(), min_size=length, max_size=length)
        real = np.array(data.draw(st.lists(mask, min_size=batch, max_size=batch)))
        positions = np.where(real, lengths[:, None] + np.cumsum(real, axis=1) - 1, -1)
        lengths += real.sum(axis=1)
        tokens = rng.integers(0, CONFIG.vocab_size, (batch, length))
        want, dense = step(dense, tokens, positions)
        got, paged = step(paged, tokens, positions)
        np.testing.assert_allclose(got[real], want[real], atol=2e-5)
    np.testing.assert_array_equal(paged.lengths, lengths)


# ---- golden cases


def golden_cache(golden: Golden, extra: int) -> PagedCache:
    """Pages by need from a pool, in no order, and what the texts' lengths are."""
    batch, length = golden.tokens.shape
    per_row = -(-(length + extra) // 16)
    cache = PagedCache.create(golden.config, batch, length + extra, jnp.float32, page_size=16, pages=batch * per_row)
    table = np.full((batch, per_row), -1, np.int32)
    free = np.random.default_rng(0).permutation(cache.pages)
    for row, tokens in enumerate(golden.lengths):
        need = -(-(int(tokens) + extra) // 16)
        table[row, :need], free = free[:need], free[need:]
    return cache.book(np.arange(batch), jnp.asarray(table))


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY_CASE)
def test_golden(case: str) -> None:
    """Prompts in chunks of 16 (left padding included), then greedy decoding."""
    g = load_golden(case)
    length, steps = g.tokens.shape[1], g.greedy.shape[1]
    pad = -length % 16
    tokens = np.pad(g.tokens, ((0, 0), (pad, 0)))
    positions = np.pad(g.positions, ((0, 0), (pad, 0)), constant_values=-1)
    cache, parts = golden_cache(g, steps), []
    for start in range(0, length + pad, 16):
        part = slice(start, start + 16)
        out, cache = run(g.params, g.config, tokens[:, part], positions[:, part], cache, rope_lengths=g.lengths)
        parts.append(np.asarray(out))
    logits = np.concatenate(parts, axis=1)[:, pad:]
    assert error(logits, g.logits, g.mask) < TOLERANCE
    last, generated = logits[:, -1], []
    for i in range(steps):
        generated.append(np.argmax(last, axis=-1).astype(np.int32))
        at = (g.lengths + i)[:, None].astype(np.int32)
        out, cache = run(g.params, g.config, generated[-1][:, None], at, cache, rope_lengths=g.lengths)
        last = np.asarray(out)[:, 0]
    np.testing.assert_array_equal(np.stack(generated, axis=1), g.greedy)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama-mqa", "llama4-text", "mistral-short-window"])
def test_golden_through_the_kernels(case: str) -> None:
    """Greedy decoding, each step through the interpreted Pallas kernels."""
    g = load_golden(case)
    _, cache = run(g.params, g.config, g.tokens, g.positions, golden_cache(g, 3))
    last = g.logits[:, -1]
    with using(decode_attention="pallas_interpret"):
        for i in range(3):
            token = np.argmax(last, axis=-1).astype(np.int32)
            np.testing.assert_array_equal(token, g.greedy[:, i])
            at = (g.lengths + i)[:, None].astype(np.int32)
            out, cache = run(g.params, g.config, token[:, None], at, cache)
            last = np.asarray(out)[:, 0]


# ---- what else a cache can do


def test_truncate() -> None:
    """Four drafts of which rows keep one, none and all, then other tokens in their place."""
    _, cache = prefilled()
    drafts = random_tokens(CONFIG, 3, 4, seed=1)
    want, _ = step(cache, [[drafts[0, 0], 7], [8, 9], drafts[2, :2]], [[14, 15]] * 3)
    _, longer = step(cache, drafts, arange_positions(3, 4) + 14)
    back = longer.truncate(jnp.array([15, 14, 18]))
    np.testing.assert_array_equal(back.lengths, [15, 14, 18])
    np.testing.assert_array_equal((back.positions >= 0).sum(axis=1), [15, 14, 18])
    got, after = step(back, [[7, 0], [8, 9], [0, 0]], [[15, -1], [14, 15], [-1, -1]])
    np.testing.assert_allclose(got[0, 0], want[0, 1], atol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    np.testing.assert_array_equal(after.lengths, [16, 16, 18])
    # Longer than a row is: nothing happens. Empty rows forget everything.
    np.testing.assert_array_equal(after.truncate(jnp.array([99, 99, 99])).lengths, [16, 16, 18])
    emptied = after.truncate(jnp.array([0, 16, 18]))
    fresh, _ = step(emptied, [[3], [4], [0]], [[0], [16], [-1]])
    alone, _ = step(PagedCache.create(CONFIG, 1, 16, jnp.float32, page_size=16), [[3]], [[0]])
    np.testing.assert_allclose(fresh[0], alone[0], atol=1e-5)


BEYOND = 2**31 - 1


def test_select_and_put_copy_no_pages() -> None:
    """Rows prefilled apart and put back; numbers beyond the last row are padding."""
    _, cache = prefilled()
    every, after = step(cache, [[1], [2], [3]], [[14]] * 3)
    rows = jnp.array([2, 0, BEYOND])
    part = cache.select(rows)
    assert all(x is y for x, y in zip((*part.k, *part.v), (*cache.k, *cache.v), strict=True))
    some, part = step(part, [[3], [1], [0]], [[14], [14], [-1]])
    np.testing.assert_allclose(some[:2], every[[2, 0]], atol=1e-5)
    back = cache.put(rows, part)
    np.testing.assert_array_equal(back.lengths, [15, 14, 15])
    np.testing.assert_array_equal(back.page_table, cache.page_table)
    _, back = step(back, [[0], [2], [0]], [[-1], [14], [-1]])
    for row in range(3):
        np.testing.assert_allclose(stored(back, row), stored(after, row), atol=1e-6)


def test_grow() -> None:
    _, cache = prefilled(capacity=16)
    grown = cache.grow(33)
    assert (grown.capacity, grown.pages) == (48, 9)
    assert len(np.unique(grown.page_table)) == 9
    want = DenseCache.create(CONFIG, 1, 48, jnp.float32)
    _, want = step(want, random_tokens(CONFIG, 3, 14)[2:], [range(14)])
    for at in range(14, 36):  # across the old end, and the next page's
        expected, want = step(want, [[at]], [[at]])
        got, grown = step(grown, [[at]] * 3, [[at]] * 3)
        np.testing.assert_allclose(got[2], expected[0], atol=1e-5)
    with pytest.raises(RequestError) as caught:
        grown.grow(32)
    assert caught.value.param == "capacity"


@pytest.mark.slow
def test_forked_rows_diverge() -> None:
    """Full pages are shared, the partial last one is copied, and neither text touches the other's slots."""
    text = random_tokens(CONFIG, 1, 21)
    cache = PagedCache.create(CONFIG, 3, 48, jnp.float32, page_size=16)
    _, cache = step(cache, np.repeat(text, 3, axis=0), [range(21), [-1] * 21, [-1] * 21])
    forked = cache.fork(jnp.array([0, 0, BEYOND]), jnp.array([2, 1, BEYOND]))
    table = np.asarray(forked.page_table)
    assert table[0, 0] == table[1, 0] == table[2, 0]
    assert len({*table[:, 1]}) == 3
    np.testing.assert_array_equal(forked.shared, [16, 16, 16])
    before, at = forked, 21
    for tokens in ([[5], [6], [7]], [[8], [9], [8]]):
        got, forked = step(forked, tokens, [[at]] * 3)
        at += 1
    for row, more in enumerate(([5, 8], [6, 9], [7, 8])):
        whole, _ = step(None, np.concatenate([text, [more]], axis=1), arange_positions(1, 23))
        np.testing.assert_allclose(got[row], whole[0, -1:], atol=1e-5)
    shared = table[0, 0]
    for old, new in zip((*before.k, *before.v), (*forked.k, *forked.v), strict=True):
        np.testing.assert_array_equal(old[shared], new[shared])
    # A row that was cut within shared pages must not write there.
    with pytest.raises(RequestError, match="do not fit"):
        forked.truncate(jnp.array([10, 99, 99])).extend(jnp.array([[10], [-1], [-1]]))
    unbooked = PagedCache.create(CONFIG, 2, 32, jnp.float32, page_size=16, pages=2)
    unbooked = unbooked.book(jnp.array([0]), jnp.array([[0, 1]]))
    _, unbooked = step(unbooked, np.repeat(text[:, :4], 2, axis=0), [range(4), [-1] * 4])
    with pytest.raises(RequestError, match="no page"):
        unbooked.fork(jnp.array([0]), jnp.array([1]))


def test_released_rows_have_no_pages() -> None:
    _, cache = prefilled()
    released = cache.release(jnp.array([True, False, False]))
    np.testing.assert_array_equal(released.lengths, [0, 14, 14])
    with pytest.raises(RequestError, match="do not fit") as caught:
        released.extend(jnp.array([[0], [-1], [-1]]))
    assert "book pages" in caught.value.hint
    again = released.book(jnp.array([0, BEYOND]), cache.page_table[jnp.array([0, 1])])
    got, _ = step(again, [[3], [4], [0]], [[0], [14], [-1]])
    alone, _ = step(PagedCache.create(CONFIG, 1, 16, jnp.float32, page_size=16), [[3]], [[0]])
    np.testing.assert_allclose(got[0], alone[0], atol=1e-5)


def test_rows_with_a_common_beginning() -> None:
    """16 tokens stored once; each row continues in a page of its own."""
    cache = PagedCache.create(CONFIG, 3, 32, jnp.float32, page_size=16, pages=6)  # none of them booked
    cache = cache.book(jnp.array([0]), jnp.array([[1, 0]]))
    text = random_tokens(CONFIG, 1, 16)
    _, cache = step(cache, np.repeat(text, 3, axis=0), [range(16), [-1] * 16, [-1] * 16])
    cache = cache.book(jnp.array([1]), jnp.array([[1, 2]]), shared=jnp.array([16]))
    got, cache = step(cache, [[5], [6], [0]], [[16], [16], [-1]])
    got, cache = step(cache, [[7], [8], [0]], [[17], [17], [-1]])
    for row, more in enumerate(([5, 7], [6, 8])):
        whole, _ = step(None, np.concatenate([text, [more]], axis=1), arange_positions(1, 18))
        np.testing.assert_allclose(got[row], whole[0, -1:], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "llama2-mha",
        "mistral-short-window",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("llama4-text", "llama-rope-dynamic")),
    ],
)
def test_packed_tokens_are_separate_calls(case: str) -> None:
    """Rows with 37, 12 and 1 new tokens behind 5, 0 and 20 old ones, in one axis and in three calls."""
    g = load_golden(case)
    rng = np.random.default_rng(0)
    old, new = (5, 0, 20), (37, 12, 1)
    texts = [rng.integers(0, g.config.vocab_size, (1, a + b)) for a, b in zip(old, new, strict=True)]
    lengths = np.asarray([a + b for a, b in zip(old, new, strict=True)], np.int32)
    cache = PagedCache.create(g.config, 3, 48, jnp.float32, page_size=16)
    table = np.random.default_rng(1).permutation(cache.pages).reshape(3, -1)
    cache = cache.book(np.arange(3), jnp.asarray(table, jnp.int32))
    separate = []
    for row, (text, a) in enumerate(zip(texts, old, strict=True)):
        positions = np.full((3, text.size), -1)
        positions[row] = np.arange(text.size)
        tokens = np.repeat(text, 3, axis=0)
        # Padding behind them, so that rows share what is compiled.
        first, then = ((0, 0), (0, max(old) - a)), ((0, 0), (0, max(new) - (text.size - a)))
        if a:
            before = np.pad(tokens[:, :a], first), np.pad(positions[:, :a], first, constant_values=-1)
            _, cache = run(g.params, g.config, *before, cache, rope_lengths=lengths)
        one = cache.select(jnp.array([row]))
        after = np.pad(text[:, a:], then), np.pad(positions[row : row + 1, a:], then, constant_values=-1)
        want, one = run(g.params, g.config, *after, one, rope_lengths=lengths[row : row + 1])
        separate.append((np.asarray(want)[0, : text.size - a], one))
    # Interleaved, with padding between them: only the order within a row counts.
    rows = np.repeat(np.arange(3), new)
    order = np.argsort(rng.random(rows.size), kind="stable")
    order = np.concatenate([order, [0, 0]])
    rows, positions, tokens = rows[order], np.empty(order.size, int), np.empty(order.size, int)
    taken = list(old)
    for i, row in enumerate(rows):
        if i >= order.size - 2:
            positions[i], tokens[i] = -1, 0
            continue
        positions[i], tokens[i] = taken[row], texts[row][0, taken[row]]
        taken[row] += 1
    packed = tuple(np.asarray(x, np.int32)[None] for x in (tokens, positions, rows))
    got, after = run(g.params, g.config, *packed[:2], cache, rows=packed[2], rope_lengths=lengths)
    scale = max(np.abs(want).max() for want, _ in separate)
    for row, (want, one) in enumerate(separate):
        mine = np.flatnonzero((rows == row) & (positions >= 0))
        np.testing.assert_allclose(got[0, mine], want, atol=TOLERANCE * scale)
        np.testing.assert_allclose(stored(after, row), stored(one, 0), atol=1e-5)
    np.testing.assert_array_equal(after.lengths, lengths)
    last = np.asarray([[np.flatnonzero((rows == row) & (positions >= 0))[-1] for row in range(3)]])
    picked, _ = run(g.params, g.config, *packed[:2], cache, rows=packed[2], rope_lengths=lengths, logits_at=last)
    np.testing.assert_allclose(picked[0], np.asarray(got)[0, last[0]], atol=TOLERANCE * scale)


def test_packed_tokens_are_booked_in_their_order() -> None:
    """Token by token gives the same, whatever the order of rows."""
    rng = np.random.default_rng(0)
    cache = PagedCache.create(CONFIG, 3, 32, jnp.float32, page_size=16)
    cache, _ = cache.extend(jnp.array([[0, 1], [0, -1], [-1, -1]]))
    rows = rng.integers(0, 5, 24).astype(np.int32)  # 3 and 4 are none
    positions = np.where(rows < 3, np.arange(24), -1)
    positions[5] = -1
    after, slots = cache.extend(jnp.asarray(positions[None]), jnp.asarray(rows[None]))
    one_by_one, each = cache, []
    for row, position in zip(rows, positions, strict=True):
        one_by_one, slot = one_by_one.extend(jnp.asarray([[position]]), jnp.asarray([[row]]))
        each.append(slot)
    chex.assert_trees_all_equal(after, one_by_one)
    booked = positions >= 0
    for got, want in zip(slots, zip(*each, strict=True), strict=True):
        np.testing.assert_array_equal(got[0, booked], np.concatenate(want)[:, 0][booked])
    with pytest.raises(RequestError, match="1 tokens"):
        cache.extend(jnp.array([[2]]), jnp.array([[-1]]))  # no row has that number


def test_pool() -> None:
    pool = PagePool.create(5)
    first, after = pool.take(3)
    second, full = after.take(2)
    assert sorted([*first, *second]) == list(range(5))
    assert (pool.free, after.free, full.free) == (5, 2, 0)  # the pools themselves never change
    with pytest.raises(DoesNotFit, match="1 pages are needed, 0 of 5 are free"):
        full.take(1)
    shared = full.share(first[:1])
    once = shared.release(first)
    assert once.free == 2
    assert once.release(first[:1]).free == 3
    again, _ = once.take(2)
    assert sorted(again) == sorted(first[1:])
    for bad in ([int(first[1])], [5], [-1], [int(second[0])] * 2):
        with pytest.raises(RequestError) as caught:
            once.release(bad)
        assert caught.value.param == "pages"
    assert pool.take(0)[0].size == 0


# ---- memory of a decode step


def compiled_step(pages: int, donate: bool) -> Any:
    def one(params: Any, tokens: jax.Array, positions: jax.Array, cache: PagedCache) -> Any:
        return forward(params, CONFIG, tokens, positions, cache)

    cache = PagedCache.create(CONFIG, 2, 32, jnp.float32, page_size=16, pages=pages)
    token = jnp.zeros((2, 1), jnp.int32)
    jitted = jax.jit(one, donate_argnames=("cache",) if donate else ())
    return jitted.lower(PARAMS, token, token, cache).compile()


def copies(compiled: Any, size: int) -> list[str]:
    """Copies of a whole layer's keys or values, in whatever order of dimensions."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(r"= f32\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", line)
        if match and np.prod([int(n) for n in match.group(1).split(",")]) == size:
            found.append(line.strip())
    return found


def test_a_decode_step_does_not_copy_donated_pages() -> None:
    pages = 37  # a prime: no other array has this size
    size = pages * CONFIG.num_kv_heads * 16 * CONFIG.head_dim
    donated = compiled_step(pages, donate=True)
    assert copies(donated, size) == []
    assert donated.memory_analysis().alias_size_in_bytes >= 2 * CONFIG.num_layers * size * 4
    # The search finds copies where there have to be some.
    assert len(copies(compiled_step(pages, donate=False), size)) >= 2 * CONFIG.num_layers


def test_donated_pages_are_reused() -> None:
    one = jax.jit(lambda t, p, cache: forward(PARAMS, CONFIG, t, p, cache)[1], donate_argnums=2)
    cache = PagedCache.create(CONFIG, 2, 16, jnp.float32, page_size=16)
    buffers = {x.unsafe_buffer_pointer() for x in cache.k + cache.v}
    assert len(buffers) == 2 * CONFIG.num_layers
    token = jnp.zeros((2, 1), jnp.int32)
    after = one(token, token, cache)
    assert {x.unsafe_buffer_pointer() for x in after.k + after.v} == buffers


# ---- generation


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(PARAMS, CONFIG)


@pytest.mark.slow
def test_generation_gives_the_same_tokens(model: Model) -> None:
    """Prompts of unlike lengths, two samples of one of them."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in (3, 20, 33)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=45, ignore_eos=True, logprobs=1),
        SamplingParams(temperature=1.0, seed=1, n=2, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.7, seed=2, max_tokens=31, ignore_eos=True, prompt_logprobs=1),
    ]
    large = batch_generate(model, None, prompts, params)
    small = batch_generate(model, None, prompts, params, page_size=16)
    for one, other in zip(large, small, strict=True):
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]
    assert len(small[1].outputs) == 2
    first, second = (o[0].outputs[0].logprobs for o in (large, small))
    assert first is not None
    assert second is not None
    np.testing.assert_allclose([x.logprob for x in first], [x.logprob for x in second], atol=1e-4)


@pytest.mark.slow
def test_generate_and_stream(model: Model) -> None:
    prompt, fields = [1, 2, 3], {"max_tokens": 6, "ignore_eos": True}
    large = [x.token for x in stream_generate(model, None, prompt, **fields)]
    small = [x.token for x in stream_generate(model, None, prompt, page_size=32, **fields)]
    assert len(small) == 6
    assert large == small
    for function in (generate, stream_generate):
        with pytest.raises(RequestError, match="cannot have 17 slots") as caught:
            function(model, None, prompt, page_size=17)
        assert caught.value.param == "page_size"


def test_the_command_line_knows_the_sizes() -> None:
    from llama_jax.cli.generate import command

    (option,) = (p for p in command.params if p.name == "page_size")
    assert option.type.choices == PAGE_SIZES  # type: ignore[attr-defined]
