"""Pages as the model sees them: which slots new tokens get, and one layer's keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.cache import stored
from llama_jax.cache.protocol import Queries
from llama_jax.kernels.attention import KeysValues, Places, Rule, attention
from llama_jax.kernels.attention.packed import packed_rows, ranks
from llama_jax.kernels.rope import rope_and_store
from llama_jax.sharding import local

NO_PAGE = -1
"""Marks a place in the page table where no page is booked."""

PAGE_AXES = ("batch", "kv_heads")
"""Logical axes of pages [pages, kv_heads, page_size, head_dim], and of their scales: each replica of the model has
its own pool."""


class PagedSlots(NamedTuple):
    """Places for new tokens, int32 [batch, len]: the page, and the slot in it. The page of padding, and of tokens for
    which no page is booked, does not exist, so that a write there is dropped. No two tokens go to one place: a GPU
    writes places that are known to be unique in a fifth of the time."""

    page: jax.Array
    offset: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLayer:
    """One layer of a `PagedCache`, by `stored.FIELDS`: slots are [pages, kv_heads, page_size]."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    page_table: jax.Array
    positions: jax.Array

    def append(
        self, qkv: jax.Array, angles: tuple[jax.Array, jax.Array], slots: PagedSlots, *, interleaved: bool
    ) -> tuple[jax.Array, PagedLayer]:
        """See `DenseLayer`."""
        cos, sin = angles
        q, *fields = rope_and_store(
            qkv, cos, sin, self.k, self.v, slots.offset, slots.page, self.k_scale, self.v_scale, interleaved=interleaved
        )
        found: dict[str, Any] = dict(zip(stored.FIELDS, fields, strict=True))
        return q, dataclasses.replace(self, **found)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        slots: PagedSlots,
        queries: Queries,
        rule: Rule,
    ) -> tuple[jax.Array, PagedLayer]:
        """See `LayerCache`. On a mesh every replica works on its own rows and pages, without communication."""

        def run(
            layer: PagedLayer,
            q: jax.Array,
            new: tuple[jax.Array, jax.Array] | None,
            slots: PagedSlots,
            at: Queries,
        ) -> tuple[jax.Array, dict[str, Any]]:
            def put(into: jax.Array, new: jax.Array) -> jax.Array:
                return into.at[slots.page, :, slots.offset].set(new, mode="drop", unique_indices=True)

            def attend(q: jax.Array, pages: dict[str, Any]) -> jax.Array:
                places = Places(at.positions, layer.positions, rows=at.rows)
                return attention(q, KeysValues(page_table=layer.page_table, **pages), places, rule)

            k, v = (None, None) if new is None else new
            return stored.attend(layer, q, k, v, put, attend)

        arguments = {
            "layer": self,
            "q": q,
            "new": None if k is None or v is None else (k, v),
            "slots": slots,
            "at": queries,
        }
        heads = ("batch", None, "kv_heads")
        axes = {
            "layer": PagedLayer(PAGE_AXES, PAGE_AXES, PAGE_AXES, PAGE_AXES, ("batch",), ("batch",)),  # type: ignore[arg-type]
            "q": heads,
            "new": heads,
            "slots": ("batch",),
            "at": ("batch",),
        }
        out, pages = local(run, arguments, axes, (heads, PAGE_AXES))
        return out, dataclasses.replace(self, **pages)


def book(
    page_table: jax.Array,
    slot_positions: jax.Array,
    lengths: jax.Array,
    shared: jax.Array,
    positions: jax.Array,
    rows: jax.Array | None,
    page_size: int,
    pages: int,
) -> tuple[jax.Array, ...]:
    """Slots for new tokens, in their order, after those of their rows.

    Args:
      page_table, slot_positions, lengths, shared: of a `PagedCache`.
      positions, rows: of `KVCache.extend`.

    Returns:
      page and offset of each token, int32 [batch, len], and the cache's new positions and lengths; then, bool
      [batch, len], which tokens have no slot, and which of them because their row is full.
    """
    capacity, real = slot_positions.shape[1], positions >= 0
    if rows is None:
        row = jnp.broadcast_to(jnp.arange(len(positions), dtype=jnp.int32)[:, None], positions.shape)
        rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    else:
        row = packed_rows(rows, positions, len(lengths))
        rank = ranks(row[0], len(lengths)).rank[None]
    slot = lengths.at[row].get(mode="fill", fill_value=0) + rank
    page = page_table.at[row, slot // page_size].get(mode="fill", fill_value=NO_PAGE)
    owned = slot >= shared.at[row].get(mode="fill", fill_value=0)
    booked = real & owned & (page >= 0) & (page < pages)
    lost = real & ~booked
    nowhere = pages + jnp.arange(page.size, dtype=jnp.int32).reshape(page.shape)
    page, into = jnp.where(booked, page, nowhere), jnp.where(booked, slot, capacity)
    written = slot_positions.at[row, into].set(positions, mode="drop")
    lengths = lengths.at[row].add(real.astype(jnp.int32), mode="drop")
    return page, into % page_size, written, lengths, lost, lost & (slot >= capacity)
