"""A paged cache: rows of different lengths share one store, and each row takes only the pages that its tokens need.

"Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.cache import stored
from llama_jax.cache.pages import NO_PAGE, PAGE_AXES, PagedLayer, PagedSlots, book
from llama_jax.cache.protocol import check_grows, put_rows, take_rows
from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.sharding import constrain, local, ways

DEFAULT_PAGE_SIZE = 64
"""A block of the decode kernels then lies in one page on every target, and a row leaves 32 slots unused on average."""

PAGE_SIZES = (16, 32, 64, 128, 256)

_EMPTY_ROW = {"page_table": NO_PAGE, "positions": -1, "lengths": 0, "shared": 0}
"""Arrays of a `PagedCache` with a line for each row, and their values for a row without a text."""


def check_page_size(page_size: int) -> None:
    """Raises RequestError unless a page can have this many slots."""
    if page_size not in PAGE_SIZES:
        raise RequestError(
            f"a page cannot have {page_size!r} slots",
            param="page_size",
            hint=f"choose one of {', '.join(map(str, PAGE_SIZES))}",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """Each row appends its own tokens, and no padding, to the pages that its line of the table names.

    `create` books pages for every slot. Whoever hands out pages by need (`PagePool`) books them (`book`) before the
    tokens come. Rows may have pages in common at their beginning; `extend` never writes there.

    On a mesh that splits rows over several replicas, each replica has its own pool, and numbers in the page table
    count the pages of the row's replica.

    Attributes:
      k, v: per layer [pages, kv_heads, page_size, head_dim], or its codes.
      k_scale, v_scale: per layer [pages, kv_heads, page_size], of a quantised cache; None of others.
      page_table: int32 [batch, pages_per_row]: entry i is the page of slots i * page_size and following of the row;
        NO_PAGE, or any number that is no page, where none is booked.
      positions: int32 [batch, pages_per_row * page_size], of the token in each slot, -1 where there is none.
      lengths: int32 [batch], tokens of each row.
      shared: int32 [batch], slots at the row's beginning that lie in pages which other rows may read.
      replicas: pools that the pages are divided into.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    k_scale: tuple[jax.Array | None, ...]
    v_scale: tuple[jax.Array | None, ...]
    page_table: jax.Array
    positions: jax.Array
    lengths: jax.Array
    shared: jax.Array
    replicas: int = dataclasses.field(default=1, metadata={"static": True})

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
        """An empty cache for `batch` rows of `capacity` tokens, rounded up to whole pages; of a dtype or a name of
        `KV_DTYPES`.

        Args:
          pages: pages of the store, none of them booked; by default as many as there are slots for, all booked.

        Raises:
          RequestError: `page_size` is not one of PAGE_SIZES, or the mesh in use cannot split the rows or pages.
        """
        check_page_size(page_size)
        per_row = -(-capacity // page_size)
        count = batch * per_row if pages is None else pages
        replicas = ways("batch")
        if batch % replicas or count % replicas:
            raise RequestError(
                f"{batch} rows and {count} pages cannot be divided among {replicas} replicas of the model",
                param="cache",
                hint=f"make both a multiple of {replicas}",
            )
        if pages is None:
            table = (jnp.arange(count, dtype=jnp.int32) % (count // replicas)).reshape(batch, per_row)
        else:
            table = jnp.full((batch, per_row), NO_PAGE, jnp.int32)
        shape = (count, config.num_kv_heads, page_size, config.head_dim)
        slots = stored.new_slots(shape, dtype, config.num_layers)
        cache = cls(
            **jax.tree.map(lambda x: constrain(x, PAGE_AXES), slots),
            page_table=table,
            positions=jnp.full((batch, per_row * page_size), -1, jnp.int32),
            lengths=jnp.zeros((batch,), jnp.int32),
            shared=jnp.zeros((batch,), jnp.int32),
            replicas=replicas,
        )
        return cache._laid_out()

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.positions.shape[1]

    @property
    def dtype(self) -> str:
        """See `KVCache`."""
        return stored.dtype_of(self.k[0], self.v[0], self.k_scale[0])

    @property
    def pages(self) -> int:
        """Pages of each pool."""
        return self.k[0].shape[0] // self.replicas

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.k[0].shape[2]

    def book(self, rows: jax.Array, pages: jax.Array, shared: jax.Array | None = None) -> PagedCache:
        """The cache with pages int32 [n, pages_per_row] as the lines of the page table of rows int32 [n].

        Args:
          shared: int32 [n], tokens at the beginning of each row that lie in pages of other rows too, a multiple of
            page_size: they are there, at positions 0, 1, 2, ..., and are never written. None: the rows keep what they
            have.
        """
        new = {"page_table": pages}
        if shared is not None:
            slot = jnp.arange(self.capacity, dtype=jnp.int32)
            new |= {"positions": jnp.where(slot < shared[:, None], slot, -1), "lengths": shared, "shared": shared}
        booked: dict[str, Any] = {name: put_rows(getattr(self, name), rows, x) for name, x in new.items()}
        return dataclasses.replace(self, **booked)

    def extend(self, positions: jax.Array, rows: jax.Array | None = None) -> tuple[PagedCache, PagedSlots]:
        """See `KVCache`. Outside of jit, raises RequestError when a token has no slot; inside, where that is not known,
        such tokens are dropped: the caller must have made the cache large enough and booked the pages."""
        self._check_mesh(packed=rows is not None)

        def on_each_replica(cache: Any, positions: jax.Array, rows: jax.Array | None) -> tuple[jax.Array, ...]:
            table, slot_positions, lengths, shared = cache
            return book(table, slot_positions, lengths, shared, positions, rows, self.page_size, self.pages)

        line = ("batch",)
        *booked, lost, full = local(
            on_each_replica,
            {
                "cache": (self.page_table, self.positions, self.lengths, self.shared),
                "positions": positions,
                "rows": rows,
            },
            {"cache": line, "positions": line, "rows": line},
            line,
        )
        page, offset, slot_positions, lengths = booked
        if not isinstance(lost, jax.core.Tracer) and lost.any():
            raise RequestError(
                f"{int(lost.sum())} tokens do not fit into the pages of their rows",
                param="cache",
                hint="create the cache with a larger capacity" if full.any() else "book pages for them first",
            )
        extended = dataclasses.replace(self, positions=slot_positions, lengths=lengths)
        return extended, PagedSlots(page, offset)

    def layer(self, index: int) -> PagedLayer:
        """See `KVCache`."""
        return PagedLayer(**stored.of_layer(self, index), page_table=self.page_table, positions=self.positions)

    def with_layers(self, views: list[PagedLayer]) -> PagedCache:
        """See `KVCache`."""
        return dataclasses.replace(self, **stored.of_views(views))

    def select(self, rows: jax.Array) -> PagedCache:
        """See `KVCache`; the part shares the same pages, without a copy."""
        self._check_one_pool()
        return self._by_row(lambda x, empty: take_rows(x, rows, empty))

    def put(self, rows: jax.Array, part: PagedCache) -> PagedCache:
        """See `KVCache`; the pages are the part's, which has those of all rows."""
        self._check_one_pool()
        written: dict[str, Any] = {
            name: put_rows(getattr(self, name), rows, getattr(part, name)) for name in _EMPTY_ROW
        }
        return dataclasses.replace(part, **written)

    def fork(self, source: jax.Array, target: jax.Array) -> PagedCache:
        """See `KVCache`. Full pages are shared; the partial last one is copied into the page that the target has booked
        for these slots. Outside of jit, raises RequestError where it has booked none."""
        self._check_one_pool()
        part = self.select(source)
        own = take_rows(self.page_table, target, NO_PAGE)
        full = part.lengths // self.page_size
        last = jnp.minimum(full, own.shape[1] - 1)[:, None]
        old, new = (jnp.take_along_axis(table, last, axis=1)[:, 0] for table in (part.page_table, own))
        partial = part.lengths % self.page_size > 0
        booked = (new >= 0) & (new < self.pages)
        missing = jnp.any(partial & ~booked & (target < len(self.lengths)))
        if not isinstance(missing, jax.core.Tracer) and missing:
            raise RequestError(
                "a row to fork into has no page for the last tokens of the text",
                param="cache",
                hint="book pages for the target rows first",
            )
        to = jnp.where(partial & booked, new, self.pages)

        def copy(x: jax.Array) -> jax.Array:
            return x.at[to].set(jnp.take(x, old, axis=0, mode="clip"), mode="drop")

        kept = jnp.arange(own.shape[1]) < full[:, None]
        shared = jnp.maximum(part.shared, full * self.page_size)
        part = dataclasses.replace(
            part,
            **stored.changed(self, copy),
            page_table=jnp.where(kept, part.page_table, own),
            shared=shared,
        )
        forked = self.put(target, part)
        return dataclasses.replace(forked, shared=forked.shared.at[source].max(shared, mode="drop"))

    def truncate(self, lengths: jax.Array) -> PagedCache:
        """See `KVCache`: drafts that were not accepted are dropped. A row that was cut within shared pages can only be
        read, forked or released."""
        lengths = jnp.minimum(self.lengths, lengths.astype(jnp.int32))
        keep = jnp.arange(self.capacity, dtype=jnp.int32) < lengths[:, None]
        return dataclasses.replace(self, positions=jnp.where(keep, self.positions, -1), lengths=lengths)

    def release(self, rows: jax.Array) -> PagedCache:
        """See `KVCache`. The rows then have no pages: `book` gives them some for the next text."""
        line = rows[:, None]
        return self._by_row(lambda x, empty: jnp.where(line if x.ndim > 1 else rows, empty, x))

    def grow(self, capacity: int) -> PagedCache:
        """See `KVCache`; every row gets new pages for the new slots, appended to the store."""
        check_grows(self.capacity, capacity)
        batch, per_row = self.page_table.shape
        more = -(-capacity // self.page_size) - per_row
        rows = batch // self.replicas
        new = self.pages + jnp.arange(rows * more, dtype=jnp.int32).reshape(rows, more)

        def pad(x: jax.Array) -> jax.Array:
            pools = x.reshape(self.replicas, self.pages, *x.shape[1:])
            pools = jnp.pad(pools, [(0, rows * more if axis == 1 else 0) for axis in range(pools.ndim)])
            return constrain(pools.reshape(-1, *x.shape[1:]), PAGE_AXES)

        grown = dataclasses.replace(
            self,
            **stored.changed(self, pad),
            page_table=jnp.concatenate([self.page_table, jnp.tile(new, (self.replicas, 1))], axis=1),
            positions=jnp.pad(self.positions, ((0, 0), (0, more * self.page_size)), constant_values=-1),
        )
        return grown._laid_out()

    def _laid_out(self) -> PagedCache:
        """Shards rows over a mesh, and pages by `PAGE_AXES`, so that no program is compiled twice."""
        return self._by_row(lambda x, _: constrain(x, ("batch",)))

    def _by_row(self, change: Callable[[jax.Array, int], jax.Array]) -> PagedCache:
        """Applies one change, which is given an empty row's value, to the arrays of `_EMPTY_ROW`."""
        changed: dict[str, Any] = {name: change(getattr(self, name), empty) for name, empty in _EMPTY_ROW.items()}
        return dataclasses.replace(self, **changed)

    def _check_mesh(self, *, packed: bool) -> None:
        if self.replicas != ways("batch"):
            raise RequestError(
                f"the paged cache has {self.replicas} pools, the mesh in use {ways('batch')} replicas of the model",
                param="cache",
                hint="create the cache inside of `sharding.on(mesh)`",
            )
        if packed:
            self._check_one_pool()

    def _check_one_pool(self) -> None:
        """Rows of different replicas share no pages, so tokens and rows are not moved between them."""
        if self.replicas > 1:
            raise RequestError(
                f"rows of a paged cache with {self.replicas} pools cannot be selected, forked or packed",
                param="cache",
                hint="give each replica of the model a cache of its own",
            )
