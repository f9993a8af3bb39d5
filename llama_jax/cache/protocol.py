"""The protocol between a key/value cache and its users; the memory layout is private to the cache. Also
functions that the caches of this package share.

The model books slots for its tokens once (`extend`), then gives each layer's new keys and values to that layer's view
(`layer(i).attend`). What a slot is, only the cache knows: the record of the booked slots passes through the model
unread. Any class with these methods is a cache, also one of another package.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Self

import jax

from llama_jax.errors import RequestError
from llama_jax.kernels.attention import Rule


class Queries(NamedTuple):
    """Queries of a call of attention, by position, row and segment.

    Attributes:
      positions: int32 [batch, queries], in the text of each.
      rows: int32 [1, queries], the row of each query of packed tokens; None if query and row have one batch index.
      segments: int32 [batch, queries], of texts packed in one row; None with a cache.
    """

    positions: jax.Array
    rows: jax.Array | None = None
    segments: jax.Array | None = None


class LayerCache(Protocol):
    """One layer's view of a cache.

    It may also have a method `append`, which rotates queries and keys and stores: see `DenseLayer`.
    """

    def attend(
        self,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        slots: Any,
        queries: Queries,
        rule: Rule,
    ) -> tuple[jax.Array, Self]:
        """Stores keys and values in the booked slots, then attends over all slots of each query's row.

        Args:
          q: [batch, queries, num_heads, head_dim].
          k, v: [batch, len, kv_heads, head_dim] of the tokens that `slots` were booked for; None if `append` has stored
            them.
          slots: what `extend` returned.
        """
        ...


class KVCache(Protocol):
    """Keys and values of `rows` texts, each of at most `capacity` tokens. Every operation returns a new cache.

    Row numbers may lie beyond the last row where they are arguments: such entries are padding, read as an empty row and
    never written.
    """

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        ...

    @property
    def dtype(self) -> str:
        """Name of what keys and values are stored in (`stored.stored_dtype`)."""
        ...

    def extend(self, positions: jax.Array, rows: jax.Array | None = None) -> tuple[Self, Any]:
        """Books slots for new tokens.

        Args:
          positions: int32 [batch, len], of each token in its text; negative for padding, which nothing ever sees.
          rows: int32 [1, len], the row of each packed token; None if tokens [i, :] belong to row i.

        Returns:
          The cache that knows of these tokens, and the record of their slots for `LayerCache.attend`.

        Raises:
          RequestError: outside of jit: the tokens do not fit. At any time: this kind of cache takes no packed tokens.
        """
        ...

    def layer(self, index: int) -> Any:
        """The view of layer `index`, a `LayerCache`."""
        ...

    def with_layers(self, views: list[Any]) -> Self:
        """The cache with every layer's view put back."""
        ...

    def select(self, rows: jax.Array) -> Self:
        """The rows `rows` int32 [n] as a separate cache, to be changed and put back; each row at most once."""
        ...

    def put(self, rows: jax.Array, part: Self) -> Self:
        """The cache with rows `rows` int32 [n] replaced by those of `part`, which `select` has made of this cache."""
        ...

    def fork(self, source: jax.Array, target: jax.Array) -> Self:
        """The cache with rows `target` int32 [n] holding the texts of rows `source` int32 [n]: several continuations of
        one prompt. From then on neither row's new tokens touch the other's."""
        ...

    def truncate(self, lengths: jax.Array) -> Self:
        """The cache with only the first `lengths` int32 [batch] tokens of each row; a length beyond a row's changes
        nothing."""
        ...

    def release(self, rows: jax.Array) -> Self:
        """The cache with rows bool [batch] emptied, ready for other texts."""
        ...

    def grow(self, capacity: int) -> Self:
        """The cache with at least `capacity` slots a row.

        Raises:
          RequestError: it has more already.
        """
        ...


def take_rows(x: jax.Array, rows: jax.Array, empty: int) -> jax.Array:
    """Rows `rows` int32 [n] of an array with a row for each text; `empty` beyond the last one."""
    return x.at[rows].get(mode="fill", fill_value=empty, wrap_negative_indices=False)


def put_rows(x: jax.Array, rows: jax.Array, new: jax.Array) -> jax.Array:
    """The array with `new` as its rows `rows` int32 [n]; those beyond the last one are dropped."""
    return x.at[rows].set(new, mode="drop", wrap_negative_indices=False)


def check_grows(old: int, new: int) -> None:
    """Raises RequestError unless a cache of `old` slots a row can grow to `new`."""
    if new < old:
        raise RequestError(
            f"a cache of {old} slots cannot grow to {new}",
            param="capacity",
            hint="create a smaller cache instead",
        )
