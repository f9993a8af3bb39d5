"""The computation of one pair of blocks, shared by the forward and backward kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.flash.spans import EMPTY, visible_from
from llama_jax.kernels.attention.flash.tiles import Tiles
from llama_jax.kernels.attention.records import Places, Rule
from llama_jax.kernels.attention.reference import MASKED
from llama_jax.kernels.pallas import Index, load_row

LOG2_E = math.log2(math.e)
NOTHING_SEEN = -MASKED
"""The log-sum-exp of a query that sees nothing: weights made from it are zero."""


@dataclass(frozen=True, kw_only=True)
class Program(Rule):
    """The rule of a call, and the tiling of the work."""

    tiles: Tiles
    interpret: bool
    round_by_hand: bool

    @property
    def factor(self) -> float:
        """From `logits` to powers of two."""
        return LOG2_E if self.soft_cap else self.scale * LOG2_E

    def logits(self, products: jax.Array) -> jax.Array:
        """Logits of q k^T, up to `factor`."""
        if self.soft_cap is None:
            return products
        return self.soft_cap * jnp.tanh(products * (self.scale / self.soft_cap))

    def logits_slope(self, logits: jax.Array) -> jax.Array | float:
        """Derivative of the logits by scale * q k^T."""
        return 1.0 if self.soft_cap is None else 1.0 - jnp.square(logits / self.soft_cap)


class Queries(NamedTuple):
    """Some queries of one row, by vectors: the last position that they see, their own, how many they see before it, and
    their segments."""

    last: jax.Array
    before: jax.Array
    segments: jax.Array | None


def load_queries(places: Places, row: jax.Array, index: jax.Array, valid: jax.Array | None, rule: Rule) -> Queries:
    """The queries at `index` int32 [n]; those that are not valid see nothing."""
    last = load_row(places.q_positions, (row, index), valid, -1)
    segments = None
    if places.q_segments is not None:
        segments = load_row(places.q_segments, (row, index), valid, 0)
    return Queries(last, jnp.maximum(last - visible_from(last, rule.visibility), 0), segments)


class Slots(NamedTuple):
    """Some slots of one row, by vectors: their positions (`EMPTY` where there is nothing to see), and segments."""

    positions: jax.Array
    segments: jax.Array | None


def load_slots(places: Places, row: jax.Array, index: jax.Array, valid: jax.Array | None) -> Slots:
    """The slots at `index` int32 [n]; nobody sees those that are not valid."""
    positions = load_row(places.kv_positions, (row, index), valid, -1)
    segments = None
    if places.kv_segments is not None:
        segments = load_row(places.kv_segments, (row, index), valid, 0)
    return Slots(jnp.where(positions < 0, EMPTY, positions), segments)


def sees(queries: Queries, slots: Slots) -> jax.Array:
    """bool [queries, slots]."""
    positions = slots.positions[None, :]
    if queries.segments is not None and slots.segments is not None:
        positions = jnp.where(queries.segments[:, None] == slots.segments[None, :], positions, EMPTY)
    # One comparison for both ends: what is behind the last position is far as an unsigned number.
    away = (queries.last[:, None] - positions).astype(jnp.uint32)
    return away <= queries.before[:, None].astype(jnp.uint32)


def slot_index(table: Any, row: jax.Array, head: jax.Array, start: jax.Array, block: int, page_size: int) -> Index:
    """Places of slots start .. start + block - 1 of a row in k and v, which are pages if there is a page table."""
    offsets = jnp.arange(block, dtype=jnp.int32)
    if table is None:
        return row, head, start + offsets
    size = jnp.int32(page_size)
    if page_size % block == 0:  # one page for all
        return table[row, jax.lax.div(start, size)], head, jax.lax.rem(start, size) + offsets
    slots = start + offsets
    page = jax.lax.div(slots, jnp.full_like(slots, page_size))
    inside = page < table.shape[1]
    pages = load_row(table, (row, page), inside, 0)
    return pages, head, jax.lax.rem(slots, jnp.full_like(slots, page_size))


def visit[Carry](span: tuple[jax.Array, ...], step: Callable[[bool, jax.Array, Carry], Carry], carry: Carry) -> Carry:
    """`step(masked, block, carry)` for all blocks of a span: first those that need no mask, in one loop, then the
    others, before and after them, in another."""
    first, whole_first, whole_last, last = span
    carry = jax.lax.fori_loop(whole_first, whole_last, lambda i, c: step(False, i, c), carry)
    before = whole_first - first

    def masked(i: jax.Array, carry: Carry) -> Carry:
        return step(True, jnp.where(i < before, first + i, whole_last + (i - before)), carry)

    return jax.lax.fori_loop(0, before + (last - whole_last), masked, carry)


def load_span(spans: Any, row: jax.Array, block: jax.Array) -> tuple[jax.Array, ...]:
    """The four numbers of `llama_jax.kernels.attention.flash.spans.spans` for one block."""
    return tuple(spans[row, block, i] for i in range(4))
