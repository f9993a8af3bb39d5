"""Attention of packed tokens: what `by_row` gives, which makes each token a batch row of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import on_eight_devices
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.kernels.attention import KeysValues, Places, Rule, Visibility, attention, attention_reference
from llama_jax.kernels.attention.packed import (
    MAX_BLOCK,
    Ranks,
    block_multiple,
    block_size,
    blocks,
    most_blocks,
    packed_attention,
    ranks,
)

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
run = jax.jit(attention, static_argnames=("rule", "backend"))
reference = jax.jit(attention_reference, static_argnames=("rule",))


@dataclass(frozen=True)
class Call:
    """A packed call; `real` says which of its tokens mean something."""

    q: np.ndarray
    kv: KeysValues
    places: Places
    sinks: np.ndarray | None
    real: np.ndarray


def packed_call(
    new: Sequence[int],
    old: Sequence[int],
    *,
    length: int,
    page_size: int = 16,
    capacity: int = 64,
    head_dim: int = HEAD_DIM,
    shuffled: bool = False,
    extras: bool = False,
    seed: int = 0,
) -> Call:
    """Row r has new[r] tokens behind old[r] in its cache; padding up to `length` tokens.

    Args:
      page_size: 0 for rows of slots.
      shuffled: tokens are in any order, padding among them.
      extras: sinks, segments of rows, and spans.
    """
    rng, rows = np.random.default_rng(seed), len(new)
    tokens = [(r, old[r] + i) for r in range(rows) for i in range(new[r])]
    # Padding of all kinds: no such row, no position, neither.
    tokens += [(rows, 3), (0, -1), (-1, 3)][: length - len(tokens)] + [(rows + 2, -1)] * (length - len(tokens) - 3)
    if shuffled:
        tokens = [tokens[i] for i in rng.permutation(length)]
    row, position = (np.asarray(x, np.int32) for x in zip(*tokens, strict=True))
    slot = np.arange(capacity)
    filled = np.asarray(old)[:, None] + np.asarray(new)[:, None]
    kv_positions = np.where(slot < filled, slot, -1).astype(np.int32)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    table = None
    store: tuple[int, ...] = (rows, KV_HEADS, capacity, head_dim)
    if page_size:
        per_row = capacity // page_size
        table = rng.permutation(rows * per_row).reshape(rows, per_row).astype(np.int32)
        store = (rows * per_row, KV_HEADS, page_size, head_dim)
        table = np.where(kv_positions[:, ::page_size] < 0, 10_000, table).astype(np.int32)  # no page is booked
    places = Places(position[None], kv_positions, rows=row[None])
    if extras:
        segments = (kv_positions >= 5).astype(np.int32)
        places = replace(places, kv_segments=segments, q_segments=(position[None] >= 5).astype(np.int32))
    sinks = normal(HEADS) if extras else None
    kv = KeysValues(normal(*store), normal(*store), table)
    real = (row >= 0) & (row < rows) & (position >= 0)
    return Call(normal(1, length, HEADS, head_dim), kv, places, sinks, real)


def assert_as_by_row(call: Call, rule: Rule, backend: str) -> None:
    want = reference(call.q, call.kv, call.places, rule=rule, sinks=call.sinks)
    got = run(call.q, call.kv, call.places, rule=rule, sinks=call.sinks, backend=backend)
    assert got.shape == call.q.shape
    chex.assert_tree_all_finite(got)
    np.testing.assert_allclose(got[0, call.real], want[0, call.real], rtol=1e-5, atol=1e-5)


RULES = (
    (Rule(Visibility(), 0.3), False),
    (Rule(Visibility("sliding", 7), 0.3, chunk_rows=2), False),
    (Rule(Visibility("chunked", 12), 0.3), True),
)
"""And whether a call has sinks and segments."""


@st.composite
def calls(draw: st.DrawFn) -> tuple[Call, Rule]:
    """Five rows, 40 tokens: few shapes, so that little is compiled."""
    rule, extras = draw(st.sampled_from(RULES))
    new: list[int] = []
    for _ in range(5):
        most = 1 if sum(n > 1 for n in new) == rule.chunk_rows else 40 - sum(new)
        new.append(draw(st.sampled_from([n for n in (0, 1, 1, 2, 3, 17, 38) if n <= min(most, 40 - sum(new))])))
    old = [draw(st.integers(0, 64 - n)) for n in new]
    order = draw(st.permutations(range(5)))
    new, old = [new[i] for i in order], [old[i] for i in order]
    seed = draw(st.integers(0, 99))
    return packed_call(new, old, length=40, shuffled=draw(st.booleans()), extras=extras, seed=seed), rule


@pytest.mark.slow
@given(calls())
def test_any_mix_of_rows(drawn: tuple[Call, Rule]) -> None:
    assert_as_by_row(*drawn, "reference")


KERNEL_CALLS: dict[str, tuple[dict[str, Any], Rule]] = {
    "mixed": ({"new": (1, 20, 0, 1, 3), "old": (9, 30, 5, 0, 0), "length": 26}, Rule(Visibility(), 0.3)),
    "one chunk": (
        {"new": (1, 21, 1, 1), "old": (50, 40, 0, 63), "length": 24},
        Rule(Visibility(), 0.3, chunk_rows=1),
    ),
    "window": (
        {"new": (1, 20, 0, 1, 12), "old": (9, 30, 5, 0, 40), "length": 36, "shuffled": True},
        Rule(Visibility("sliding", 9), 0.3, chunk_rows=2),
    ),
    "chunked, sinks, segments, soft cap": (
        {"new": (1, 20, 11), "old": (9, 30, 5), "length": 34, "extras": True},
        Rule(Visibility("chunked", 16), 0.3, soft_cap=2.0, chunk_rows=2),
    ),
    "dense": (
        {"new": (1, 20, 1), "old": (9, 3, 0), "length": 23, "page_size": 0, "capacity": 30},
        Rule(Visibility(), 0.3, chunk_rows=1),
    ),
    "drafts": ({"new": (4, 4, 1, 4), "old": (9, 3, 7, 50), "length": 16}, Rule(Visibility(), 0.3)),
    "decode only": ({"new": (1, 1, 0, 1), "old": (9, 3, 7, 50), "length": 3}, Rule(Visibility(), 0.3)),
    "one token": ({"new": (0, 1), "old": (4, 3), "length": 1}, Rule(Visibility(), 0.3)),
    "only padding": ({"new": (0, 0), "old": (4, 3), "length": 4}, Rule(Visibility(), 0.3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "pallas_interpret"])
@pytest.mark.parametrize("name", KERNEL_CALLS)
def test_backends(name: str, backend: str) -> None:
    arguments, rule = KERNEL_CALLS[name]
    assert_as_by_row(packed_call(**arguments), rule, backend)


@pytest.mark.slow
@given(calls())
def test_any_mix_of_rows_by_kernels(drawn: tuple[Call, Rule]) -> None:
    assert_as_by_row(*drawn, "pallas_interpret")


def test_what_no_kernel_computes_is_left_to_the_reference() -> None:
    """Spans, queries that see all, quantised keys and values."""
    call = packed_call((1, 9, 0, 4), (3, 20, 5, 0), length=16)
    spans = np.where((call.places.kv_positions >= 2) & (call.places.kv_positions < 24), 1, -1).astype(np.int32)
    at = np.asarray(call.places.q_positions)
    q_spans = np.where((at >= 2) & (at < 24), 1, -1).astype(np.int32)
    rule = Rule(Visibility(), 0.3)
    assert_as_by_row(replace(call, places=replace(call.places, q_spans=q_spans, kv_spans=spans)), rule, "auto")
    assert_as_by_row(call, replace(rule, visibility=Visibility("all")), "auto")
    scales = [np.abs(x).max(axis=-1) / 127 for x in (call.kv.k, call.kv.v)]
    small = [np.round(x / s[..., None]).astype(np.int8) for x, s in zip((call.kv.k, call.kv.v), scales, strict=True)]
    assert_as_by_row(replace(call, kv=KeysValues(*small, call.kv.page_table, *scales)), rule, "auto")


@pytest.mark.slow
def test_a_broken_guarantee_shows() -> None:
    """Three rows with 20 tokens where one row with several was promised: two blocks are made, and for indexed backends
    one that is for padding. What is lost is NaN where queries are gathered; all else is right."""
    call = packed_call((1, 20, 20, 20), (5, 0, 7, 0), length=61)
    rule = Rule(Visibility(), 0.3, chunk_rows=1)
    want = attention_reference(call.q, call.kv, call.places, rule)
    for backend in ("reference", "pallas_interpret"):
        got = np.asarray(run(call.q, call.kv, call.places, rule=rule, backend=backend))[0]
        np.testing.assert_allclose(got[:41], want[0, :41], rtol=1e-5, atol=1e-5)
        if backend == "reference":
            assert np.isnan(got).all(axis=(1, 2)).nonzero()[0].tolist() == list(range(41, 61))


# ---- what the pieces are


@given(st.sampled_from([1, 40]).flatmap(lambda n: st.lists(st.integers(0, 4), min_size=n, max_size=n)))
def test_ranks(row: list[int]) -> None:
    found = ranks(jnp.asarray(row, jnp.int32), 4)
    assert found.counts.tolist() == [row.count(r) for r in range(5)]
    for i, r in enumerate(row):
        assert found.rank[i] == row[:i].count(r)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.sampled_from([8, 16, 64, 256]))
def test_the_blocks_suffice(counts: list[int], size: int) -> None:
    tokens, several = sum(counts), [n for n in counts if n > 1]
    needed = sum(-(-n // size) for n in several)
    assert needed <= most_blocks(tokens, size, len(several)) <= most_blocks(tokens, size, len(counts))


@given(st.integers(0, 4096), st.sampled_from([8, 16, 64, 256]), st.integers(0, 300))
def test_fewer_blocks_would_not_suffice(tokens: int, size: int, rows: int) -> None:
    """Of `several` rows each has two tokens and a block; what is left of the tokens fills the others."""
    several = min(rows, tokens // 2)
    more = most_blocks(tokens, size, rows) - several
    counts = [2 if i >= more else 1 + size * len(range(i, more, several)) for i in range(several)]
    assert sum(counts) <= tokens
    assert sum(-(-n // size) for n in counts) == several + more


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.sampled_from([8, 16, 64, 256]))
def test_the_blocks_of_rows_with_any_suffice(counts: list[int], size: int) -> None:
    tokens, some = sum(counts), [n for n in counts if n]
    most = most_blocks(tokens, size, len(some), several=False)
    assert sum(-(-n // size) for n in some) <= most
    if some:  # one token each, but for the last: no fewer would do
        assert len(some) - 1 + -(-(tokens - len(some) + 1) // size) == most


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_same_bits_in_any_company_and_cut(backend: str) -> None:
    """33 tokens of a row at once, or 32 and then one; beside other rows, or none; in bfloat16."""
    rule = Rule(Visibility(), 0.3, chunk_rows=2, batch_invariant=True)
    length, old = 64, (0, 9, 30)
    multiple = block_multiple(length, 2)
    assert multiple == 32

    def bits(new: tuple[int, int, int], old: tuple[int, int, int], first: int, count: int) -> bytes:
        """Of `count` tokens of the row 0, which is at `first`."""
        call = packed_call(new, old, length=length, capacity=96)
        tables = np.arange(18, dtype=np.int32).reshape(3, 6)
        rng = np.random.default_rng(5)
        k, v = (jnp.asarray(rng.standard_normal(call.kv.k.shape), jnp.bfloat16) for _ in range(2))
        queries = rng.standard_normal((96, *call.q.shape[2:]))
        q = np.zeros(call.q.shape)
        q[0, : new[0]] = queries[first : first + new[0]]
        kv = KeysValues(k, v, tables)
        out = run(jnp.asarray(q, jnp.bfloat16), kv, call.places, rule=rule, backend=backend)
        assert jnp.isfinite(out).all()
        return np.asarray(out)[0, :count].tobytes()

    whole = bits((33, 0, 0), old, 0, 33)
    assert whole == bits((33, 20, 0), old, 0, 33) == bits((33, 0, 1), old, 0, 33)
    assert whole == bits((32, 32, 0), old, 0, 32) + bits((1, 0, 30), (32, 0, 30), 32, 1)


@given(st.integers(1, 4096), st.integers(1, 512))
def test_blocks_are_not_mostly_padding(tokens: int, rows: int) -> None:
    size, chunks = block_size(tokens, rows), min(rows, tokens // 2)
    assert size & (size - 1) == 0
    assert 8 <= size <= MAX_BLOCK
    assert most_blocks(tokens, size, rows) * size <= 2 * tokens + 8 * chunks


def test_every_token_has_a_place_of_its_own() -> None:
    row = np.repeat([2, 0, 4, 1], [9, 1, 3, 16]).astype(np.int32)  # row 4 is none
    of = ranks(jnp.asarray(row), 4)
    assert isinstance(of, Ranks)
    found = blocks(jnp.asarray(row), of, 8, 5)
    token = np.asarray(found.token)
    assert found.row.tolist() == [1, 1, 2, 2, 4]
    for i, (piece, place) in enumerate(zip(row, found.place, strict=True)):
        if piece in (1, 2):
            assert token.ravel()[place] == i
            assert found.row[place // 8] == piece
        else:
            assert place == 40
    assert (token < row.size).sum() == 25
    padded = blocks(jnp.asarray(row), of, 8, 6, padding=True)
    assert padded.row.tolist() == [1, 1, 2, 2, 4, 4]
    assert np.asarray(padded.token)[4, :3].tolist() == [10, 11, 12]


# ---- what it costs


def test_no_keys_are_copied_for_each_token() -> None:
    """1.5 MB of keys a row, 12 rows, 256 tokens: a row for each token would be a gigabyte."""
    n, rows, capacity, page = 256, 12, 2048, 64
    pages = jax.ShapeDtypeStruct((rows * capacity // page, 3, page, 64), jnp.float32)
    kv = KeysValues(pages, pages, jax.ShapeDtypeStruct((rows, capacity // page), jnp.int32))
    at = jax.ShapeDtypeStruct((1, n), jnp.int32)
    places = Places(at, jax.ShapeDtypeStruct((rows, capacity), jnp.int32), rows=at)
    q = jax.ShapeDtypeStruct((1, n, 9, 64), jnp.float32)
    for rule in (Rule(Visibility(), 0.125), Rule(Visibility(), 0.125, chunk_rows=4)):
        compiled = jax.jit(packed_attention, static_argnames="rule").lower(q, kv, places, rule=rule).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 30 << 20


@pytest.mark.slow
@pytest.mark.timeout(600)  # a process of its own
def test_on_eight_devices() -> None:
    on_eight_devices("eight_devices_packed.py")
