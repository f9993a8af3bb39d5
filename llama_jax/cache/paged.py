"""A cache of pages: rows of different lengths share one store, and a row takes what its own tokens need.

"Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.kernels.attention import Visibility, attention

DEFAULT_PAGE_SIZE = 64
"""A block of the decode kernels then lies in one page on every target, and a row leaves 32 slots unused on average."""

PAGE_SIZES = (16, 32, 64, 128, 256)

NO_PAGE = -1
"""Stands in the page table where no page is booked."""


def check_page_size(page_size: int) -> None:
    """Raises RequestError unless a page can have so many slots."""
    if page_size not in PAGE_SIZES:
        raise RequestError(
            f"a page cannot have {page_size!r} slots",
            param="page_size",
            hint=f"choose one of {', '.join(map(str, PAGE_SIZES))}",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLayer:
    """One layer of a `PagedCache`: k, v [pages, kv_heads, page_size, head_dim]."""

    k: jax.Array
    v: jax.Array
    page_table: jax.Array
    positions: jax.Array
    start: jax.Array

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_positions: jax.Array,
        positions: jax.Array,
        visibility: Visibility,
        *,
        scale: float,
    ) -> tuple[jax.Array, PagedLayer]:
        """See `LayerCache`."""
        pages, _, page_size, _ = self.k.shape
        page, slot = _places(self.page_table, self.start, positions, pages, page_size)

        def store(into: jax.Array, new: jax.Array) -> jax.Array:
            return into.at[page, :, slot % page_size].set(new.astype(into.dtype), mode="drop")

        # As in a dense layer: the barrier keeps XLA from storing twice, for the result and, on a copy, for its reader.
        stored_k, stored_v = jax.lax.optimization_barrier((store(self.k, k), store(self.v, v)))
        layer = dataclasses.replace(self, k=stored_k, v=stored_v)
        out = attention(
            q, layer.k, layer.v, q_positions, self.positions, visibility, scale=scale, page_table=self.page_table
        )
        return out, layer


def _places(
    page_table: jax.Array, start: jax.Array, positions: jax.Array, pages: int, page_size: int
) -> tuple[jax.Array, jax.Array]:
    """Where new tokens go: each row's real ones, in their order, from its slot `start` on.

    Returns:
      page and slot in the row, int32 [batch, len]: those of padding and of tokens for which no page is booked do not
      exist (`pages`, and the row's number of slots), so that a write there is dropped.
    """
    real = positions >= 0
    slot = start[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    page = jnp.take_along_axis(page_table, slot // page_size, axis=1, mode="fill", fill_value=NO_PAGE)
    booked = real & (page >= 0) & (page < pages)
    return jnp.where(booked, page, pages), jnp.where(booked, slot, page_table.shape[1] * page_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Each row appends its own tokens, and no padding, to the pages that its line of the table names.

    `create` books pages for every slot. Whoever hands out pages by need (`PagePool`) writes them into `page_table`
    before the tokens come. Rows may have pages in common as long as none of them appends to such a page: who shares
    pages knows which of them has to be copied first.

    Attributes:
      k, v: per layer [pages, kv_heads, page_size, head_dim].
      page_table: int32 [batch, pages_per_row]: entry i is the page of slots i * page_size and following of the row;
        NO_PAGE, or any number that is no page, where none is booked.
      positions: int32 [batch, pages_per_row * page_size], of the token in each slot, -1 where there is none.
      lengths: int32 [batch], tokens of each row; `start`: without those of the current call.
      rope_length: int32 [batch], the text length that fixes the frequencies of dynamic rope, 0 until known.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    page_table: jax.Array
    positions: jax.Array
    lengths: jax.Array
    start: jax.Array
    rope_length: jax.Array

    @classmethod
    def create(
        cls,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: DTypeLike,
        *,
        page_size: int = DEFAULT_PAGE_SIZE,
        pages: int | None = None,
    ) -> PagedCache:
        """An empty cache for `batch` rows of `capacity` tokens, rounded up to whole pages.

        Args:
          pages: so many pages, none of them booked; by default as many as there are slots for, all booked.

        Raises:
          RequestError: `page_size` is not one of PAGE_SIZES.
        """
        check_page_size(page_size)
        per_row = -(-capacity // page_size)
        if pages is None:
            table = jnp.arange(batch * per_row, dtype=jnp.int32).reshape(batch, per_row)
        else:
            table = jnp.full((batch, per_row), NO_PAGE, jnp.int32)
        shape = (table.size if pages is None else pages, config.num_kv_heads, page_size, config.head_dim)
        # Separate buffers: donated arrays must not alias one another.
        return cls(
            k=tuple(jnp.zeros(shape, dtype) for _ in config.layers),
            v=tuple(jnp.zeros(shape, dtype) for _ in config.layers),
            page_table=table,
            positions=jnp.full((batch, per_row * page_size), -1, jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
            start=jnp.zeros((batch,), jnp.int32),
            rope_length=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.positions.shape[1]

    @property
    def pages(self) -> int:
        """Pages of the store."""
        return self.k[0].shape[0]

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.k[0].shape[2]

    def extend(self, positions: jax.Array, rope_length: jax.Array) -> PagedCache:
        """See `KVCache`. Outside of jit, raises RequestError when a token has no slot; inside, where that is not known,
        such tokens are dropped: the caller must have made the cache large enough and booked the pages."""
        page, slot = _places(self.page_table, self.lengths, positions, self.pages, self.page_size)
        lost = jnp.sum((positions >= 0) & (page == self.pages))
        if not isinstance(lost, jax.core.Tracer) and lost:
            full = self.lengths + jnp.sum(positions >= 0, axis=1) > self.capacity
            raise RequestError(
                f"{int(lost)} tokens do not fit into the pages of their rows",
                param="cache",
                hint="create the cache with a larger capacity" if full.any() else "book pages for them first",
            )
        rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]
        return dataclasses.replace(
            self,
            positions=self.positions.at[rows, slot].set(positions, mode="drop"),
            lengths=self.lengths + jnp.sum(positions >= 0, axis=1, dtype=jnp.int32),
            start=self.lengths,
            rope_length=rope_length,
        )

    def layer(self, index: int) -> PagedLayer:
        """See `KVCache`."""
        return PagedLayer(self.k[index], self.v[index], self.page_table, self.positions, self.start)

    def with_layers(self, views: list[PagedLayer]) -> PagedCache:
        """See `KVCache`."""
        return dataclasses.replace(self, k=tuple(view.k for view in views), v=tuple(view.v for view in views))

    def truncate(self, lengths: jax.Array) -> PagedCache:
        """The cache with only the first `lengths` int32 [batch] tokens of each row: drafts that were not accepted are
        dropped, and a row of length 0 is free for another text."""
        lengths = jnp.minimum(self.lengths, lengths.astype(jnp.int32))
        keep = jnp.arange(self.capacity, dtype=jnp.int32) < lengths[:, None]
        return dataclasses.replace(
            self,
            positions=jnp.where(keep, self.positions, -1),
            lengths=lengths,
            rope_length=jnp.where(lengths > 0, self.rope_length, 0),
        )

    def grow(self, capacity: int) -> PagedCache:
        """The same cache with more slots, and new pages for them.

        Raises:
          RequestError: `capacity` is smaller than it is now.
        """
        if capacity < self.capacity:
            raise RequestError(
                f"a cache of {self.capacity} slots cannot grow to {capacity}",
                param="capacity",
                hint="create a smaller cache instead",
            )
        batch = self.page_table.shape[0]
        more = -(-capacity // self.page_size) - self.page_table.shape[1]
        new = self.pages + jnp.arange(batch * more, dtype=jnp.int32).reshape(batch, more)

        def pad(x: jax.Array) -> jax.Array:
            return jnp.pad(x, ((0, batch * more), (0, 0), (0, 0), (0, 0)))

        return dataclasses.replace(
            self,
            k=tuple(map(pad, self.k)),
            v=tuple(map(pad, self.v)),
            page_table=jnp.concatenate([self.page_table, new], axis=1),
            positions=jnp.pad(self.positions, ((0, 0), (0, more * self.page_size)), constant_values=-1),
        )

    def rows(self, index: jax.Array) -> PagedCache:
        """The cache of rows `index` int32 [n]: rows may be repeated (several samples of one prompt) or left out. Each
        row gets pages of its own, copies of those it comes from."""
        table = self.page_table[index]

        def copy(x: jax.Array) -> jax.Array:
            return jnp.take(x, table.reshape(-1), axis=0, mode="clip")

        return dataclasses.replace(
            self,
            k=tuple(map(copy, self.k)),
            v=tuple(map(copy, self.v)),
            page_table=jnp.arange(table.size, dtype=jnp.int32).reshape(table.shape),
            positions=self.positions[index],
            lengths=self.lengths[index],
            start=self.start[index],
            rope_length=self.rope_length[index],
        )
