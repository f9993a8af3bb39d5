"""The dense cache, the protocol it follows, and what a decode step does with its memory."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, arange_positions, error, random_params, random_tokens, run, tiny_config

from llama_jax.cache import DenseCache
from llama_jax.cache.protocol import Queries
from llama_jax.config import LayerSpec
from llama_jax.errors import RequestError
from llama_jax.kernels.attention import KeysValues, Places, Rule, attention
from llama_jax.model import forward

CONFIG = tiny_config(LayerSpec(mlp=24), LayerSpec("sliding", 3, mlp=24))
PARAMS = random_params(CONFIG)


def prefilled(batch: int, length: int, capacity: int, seed: int = 0) -> tuple[jax.Array, DenseCache]:
    """Logits and cache after random texts of `length` tokens."""
    cache = DenseCache.create(CONFIG, batch, capacity, jnp.float32)
    return run(PARAMS, CONFIG, random_tokens(CONFIG, batch, length, seed), arange_positions(batch, length), cache)


def decode(cache: DenseCache, token: list[int], position: int) -> tuple[jax.Array, DenseCache]:
    tokens = jnp.array(token, jnp.int32)[:, None]
    return run(PARAMS, CONFIG, tokens, jnp.full_like(tokens, position), cache)


def test_create() -> None:
    cache = DenseCache.create(CONFIG, 3, 10, jnp.bfloat16)
    assert cache.capacity == 10
    assert len(cache.k) == len(cache.v) == CONFIG.num_layers
    chex.assert_shape([*cache.k, *cache.v], (3, CONFIG.num_kv_heads, 10, CONFIG.head_dim))
    assert {x.dtype for x in cache.k + cache.v} == {jnp.dtype(jnp.bfloat16)}
    assert int(cache.length) == 0
    np.testing.assert_array_equal(cache.positions, np.full((3, 10), -1))


def test_slots_hold_what_was_stored() -> None:
    _, cache = prefilled(2, 4, 7)
    assert int(cache.length) == 4
    np.testing.assert_array_equal(cache.positions, [[0, 1, 2, 3, -1, -1, -1]] * 2)
    _, _, seen = run(PARAMS, CONFIG, random_tokens(CONFIG, 2, 4), capture=("layers.0.k", "layers.1.v"))
    chex.assert_trees_all_close(jnp.swapaxes(cache.k[0][:, :, :4], 1, 2), seen["layers.0.k"], atol=1e-5)
    chex.assert_trees_all_close(jnp.swapaxes(cache.v[1][:, :, :4], 1, 2), seen["layers.1.v"], atol=1e-5)
    assert not np.any(cache.k[0][:, :, 4:])


def test_overflow() -> None:
    _, cache = prefilled(2, 6, 8)
    positions = arange_positions(2, 2) + 6
    cache, slots = cache.extend(positions)  # fits exactly
    assert (int(cache.length), int(slots)) == (8, 6)
    with pytest.raises(RequestError, match=r"1 more tokens do not fit: 8 of the cache's 8 slots") as caught:
        cache.extend(positions[:, :1])
    assert caught.value.param == "cache"
    with pytest.raises(RequestError):
        forward(PARAMS, CONFIG, random_tokens(CONFIG, 2, 1), positions[:, :1], cache)
    with pytest.raises(RequestError, match="9 more tokens"):  # known from the shapes, so under jit too
        run(
            PARAMS,
            CONFIG,
            random_tokens(CONFIG, 2, 9),
            arange_positions(2, 9),
            DenseCache.create(CONFIG, 2, 8, "float32"),
        )


BEYOND = 2**31 - 1


def test_select_and_put() -> None:
    """Rows prefilled apart, in any order, and put back; other rows keep what they have. Numbers beyond are padding."""
    _, cache = prefilled(3, 5, 12)
    every, _ = decode(cache, [1, 2, 3], 5)
    rows = jnp.array([2, 0, BEYOND])
    part = cache.select(rows)
    some, part = decode(part, [3, 1, 0], 5)
    np.testing.assert_allclose(some[:2], every[jnp.array([2, 0])], atol=1e-5)
    cache = cache.put(rows, part)
    assert int(cache.length) == 6
    np.testing.assert_array_equal(cache.positions[:, 5], [5, -1, 5])
    _, want = decode(prefilled(3, 5, 12)[1], [1, 2, 3], 5)
    for tokens, position in (([7, 0, 7], 6), ([8, 0, 8], 7)):
        at = jnp.array([[position], [-1], [position]], jnp.int32)
        got, cache = run(PARAMS, CONFIG, jnp.array(tokens)[:, None], at, cache)
        expected, want = decode(want, tokens, position)
        np.testing.assert_allclose(got[jnp.array([0, 2])], expected[jnp.array([0, 2])], atol=1e-5)
    late, _ = run(PARAMS, CONFIG, jnp.array([[0], [2], [0]]), jnp.array([[-1], [5], [-1]], jnp.int32), cache)
    np.testing.assert_allclose(late[1], every[1], atol=1e-5)


def test_fork_truncate_and_release() -> None:
    _, cache = prefilled(3, 5, 12)
    forked = cache.fork(jnp.array([0, BEYOND]), jnp.array([2, BEYOND]))
    a, _ = decode(forked, [4, 4, 4], 5)
    np.testing.assert_allclose(a[2], a[0], atol=1e-6)
    np.testing.assert_allclose(a[:2], decode(cache, [4, 4, 4], 5)[0][:2], atol=1e-5)
    shorter = cache.truncate(jnp.array([3, 99, 5]))
    np.testing.assert_array_equal((shorter.positions >= 0).sum(axis=1), [3, 5, 5])
    b, _ = run(PARAMS, CONFIG, jnp.full((3, 1), 4), jnp.array([[3], [5], [5]], jnp.int32), shorter)
    short, _ = run(PARAMS, CONFIG, jnp.append(random_tokens(CONFIG, 3, 5)[0, :3], 4)[None])
    np.testing.assert_allclose(b[0, 0], short[0, -1], atol=1e-5)
    emptied = cache.release(jnp.array([False, True, False]))
    c, _ = run(PARAMS, CONFIG, jnp.full((3, 1), 4), jnp.array([[5], [0], [5]], jnp.int32), emptied)
    alone, _ = run(PARAMS, CONFIG, jnp.full((1, 1), 4))
    np.testing.assert_allclose(c[1], alone[0], atol=1e-5)


def test_packed_tokens_need_a_paged_cache() -> None:
    cache = DenseCache.create(CONFIG, 2, 8, jnp.float32)
    with pytest.raises(RequestError, match="packed") as caught:
        run(PARAMS, CONFIG, jnp.ones((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32), cache, rows=jnp.array([[0, 1]]))
    assert caught.value.param == "cache"


def test_grow() -> None:
    _, cache = prefilled(2, 5, 6)
    grown = cache.grow(11)
    assert grown.capacity == 11
    np.testing.assert_array_equal(grown.positions[:, 6:], np.full((2, 5), -1))
    a, _ = decode(cache, [3, 4], 5)
    b, after = decode(grown, [3, 4], 5)
    np.testing.assert_allclose(a, b, atol=1e-5)
    for i in range(5):  # the new slots are real
        b, after = decode(after, [7, 8], 6 + i)
    assert int(after.length) == 11
    chex.assert_trees_all_equal(cache.grow(6), cache)
    with pytest.raises(RequestError) as caught:
        cache.grow(5)
    assert caught.value.param == "capacity"


def test_rows_of_different_lengths_share_slots() -> None:
    """A row whose text goes on in a later slot than its neighbour's, with unused slots between."""
    tokens = random_tokens(CONFIG, 2, 8)
    positions = jnp.array([[0, 1, 2, 3, 4, -1, 5, 6], [-1, 0, -1, -1, 1, 2, -1, 3]], jnp.int32)
    cache = DenseCache.create(CONFIG, 2, 8, jnp.float32)
    parts = []
    for start in range(0, 8, 4):
        logits, cache = run(PARAMS, CONFIG, tokens[:, start : start + 4], positions[:, start : start + 4], cache)
        parts.append(logits)
    logits = np.concatenate(parts, axis=1)
    for row in range(2):
        real = np.asarray(positions[row]) >= 0
        alone, _ = run(PARAMS, CONFIG, tokens[row, real][None])
        assert error(logits[row, real], alone[0]) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_sixteen_bit_slots(dtype: str, bound: float) -> None:
    tokens, positions = random_tokens(CONFIG, 2, 6), arange_positions(2, 6)
    exact, _ = run(PARAMS, CONFIG, tokens, positions)
    logits, cache = run(PARAMS, CONFIG, tokens, positions, DenseCache.create(CONFIG, 2, 6, jnp.dtype(dtype)))
    assert cache.k[0].dtype == jnp.dtype(dtype)
    assert 1e-5 < error(logits, exact) < bound


# ---- another layout under the same protocol


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackwardsLayer:
    """k, v [batch, kv_heads, slots, head_dim], the latest token first."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        slots: None,
        queries: Queries,
        rule: Rule,
    ) -> tuple[jax.Array, BackwardsLayer]:
        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.concatenate([jnp.swapaxes(new, 1, 2)[:, :, ::-1], old], axis=2)

        layer = dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))
        places = Places(queries.positions, self.positions)
        return attention(q, KeysValues(layer.k, layer.v), places, rule), layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BackwardsCache:
    """Grows with every call."""

    layers: tuple[BackwardsLayer, ...]
    positions: jax.Array

    def extend(self, positions: jax.Array, rows: None = None) -> tuple[BackwardsCache, None]:
        positions = jnp.concatenate([positions[:, ::-1], self.positions], axis=1)
        return dataclasses.replace(self, positions=positions), None

    def layer(self, index: int) -> BackwardsLayer:
        return dataclasses.replace(self.layers[index], positions=self.positions)

    def with_layers(self, views: list[Any]) -> BackwardsCache:
        return dataclasses.replace(self, layers=tuple(views))


def test_the_model_does_not_know_the_layout() -> None:
    empty = jnp.zeros((2, CONFIG.num_kv_heads, 0, CONFIG.head_dim))
    nowhere = jnp.zeros((2, 0), jnp.int32)
    cache: Any = BackwardsCache(tuple(BackwardsLayer(empty, empty, nowhere) for _ in CONFIG.layers), nowhere)
    tokens, positions = random_tokens(CONFIG, 2, 6), arange_positions(2, 6)
    whole, _ = run(PARAMS, CONFIG, tokens, positions)
    parts = []
    for start in (0, 4, 5):
        stop = {0: 4, 4: 5, 5: 6}[start]
        logits, cache = run(PARAMS, CONFIG, tokens[:, start:stop], positions[:, start:stop], cache)
        parts.append(logits)
    assert error(np.concatenate(parts, axis=1), whole) < 1e-5


# ---- memory of a decode step


def compiled_step(config: Any, capacity: int, donate: bool) -> Any:
    def step(params: Any, tokens: jax.Array, positions: jax.Array, cache: DenseCache) -> Any:
        return forward(params, config, tokens, positions, cache)

    token = jnp.zeros((2, 1), jnp.int32)
    cache = DenseCache.create(config, 2, capacity, jnp.float32)
    jitted = jax.jit(step, donate_argnames=("cache",) if donate else ())
    return jitted.lower(random_params(config), token, token, cache).compile()


def copies(compiled: Any, config: Any, capacity: int) -> list[str]:
    """Copies of a whole layer's keys or values in a compiled step, in whatever order of dimensions."""
    size = 2 * config.num_kv_heads * capacity * config.head_dim
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(r"= f32\[([\d,]+)\]\S* (?:copy|copy-start|transpose)\(", line)
        if match and np.prod([int(n) for n in match.group(1).split(",")]) == size:
            found.append(line.strip())
    return found


@pytest.mark.parametrize("name", ["plain", "biased", "sigmoid-moe"])
def test_a_decode_step_does_not_copy_a_donated_cache(name: str) -> None:
    config, capacity = TINY[name], 53  # a prime: no other array has this size
    donated = compiled_step(config, capacity, donate=True)
    assert copies(donated, config, capacity) == []
    held = 2 * config.num_layers * 2 * config.num_kv_heads * capacity * config.head_dim * 4
    assert donated.memory_analysis().alias_size_in_bytes >= held
    # The search finds copies where there have to be some.
    kept = compiled_step(config, capacity, donate=False)
    assert len(copies(kept, config, capacity)) >= 2 * config.num_layers


def test_donated_buffers_are_reused() -> None:
    step = jax.jit(lambda t, p, cache: forward(PARAMS, CONFIG, t, p, cache)[1], donate_argnums=2)
    cache = DenseCache.create(CONFIG, 2, 8, jnp.float32)
    buffers = {x.unsafe_buffer_pointer() for x in cache.k + cache.v}
    assert len(buffers) == 2 * CONFIG.num_layers
    token = jnp.zeros((2, 1), jnp.int32)
    after = step(token, token, cache)
    assert all(x.is_deleted() for x in cache.k + cache.v)
    assert {x.unsafe_buffer_pointer() for x in after.k + after.v} == buffers
