"""A cache of one array a layer, with as many slots for every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.cache.protocol import Queries, check_grows, put_rows, take_rows
from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.kernels.attention import KeysValues, Places, Rule, attention
from llama_jax.sharding import constrain

DENSE_AXES = ("batch", "kv_heads")
"""Logical axes of keys and values [batch, kv_heads, capacity, head_dim]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """One layer of a `DenseCache`: k, v [batch, kv_heads, capacity, head_dim]."""

    k: jax.Array
    v: jax.Array
    positions: jax.Array

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        slots: jax.Array,
        queries: Queries,
        rule: Rule,
    ) -> tuple[jax.Array, DenseLayer]:
        """See `LayerCache`."""

        def store(into: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.swapaxes(new, 1, 2).astype(into.dtype)
            return constrain(jax.lax.dynamic_update_slice_in_dim(into, new, slots, axis=2), DENSE_AXES)

        # The barrier keeps XLA from doing the update twice, once for the result and once, on a copy of the whole cache,
        # inside whatever reads it.
        stored_k, stored_v = jax.lax.optimization_barrier((store(self.k, k), store(self.v, v)))
        layer = dataclasses.replace(self, k=stored_k, v=stored_v)
        places = Places(queries.positions, layer.positions, rows=queries.rows)
        return attention(q, KeysValues(layer.k, layer.v), places, rule), layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Every row has `capacity` slots; the tokens of one call take the same slots in every row.

    Each slot remembers its token's position, and attention asks only for positions: so left- and right-padded rows,
    several prefill chunks and single decode steps are all the same to it. A row that has nothing to store still uses up
    a slot, so rows that come and go are for the paged cache.

    Attributes:
      k, v: per layer [batch, kv_heads, capacity, head_dim].
      positions: int32 [batch, capacity], -1 where the slot is empty or padding.
      length: int32 [], slots in use.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    positions: jax.Array
    length: jax.Array

    @classmethod
    def create(cls, config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike) -> DenseCache:
        """An empty cache for `batch` rows of `capacity` tokens."""
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        # Separate buffers: donated arrays must not alias one another.
        k, v = (tuple(jnp.zeros(shape, dtype) for _ in config.layers) for _ in "kv")
        return cls(k, v, jnp.full((batch, capacity), -1, jnp.int32), jnp.zeros((), jnp.int32))._laid_out()

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.positions.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        """See `KVCache`."""
        return self.k[0].dtype

    def extend(self, positions: jax.Array, rows: jax.Array | None = None) -> tuple[DenseCache, jax.Array]:
        """See `KVCache`; the record is the first slot, int32 []. Outside of jit, raises RequestError when the slots do
        not suffice; inside, where the slots in use are not known, only when all of them would not suffice: the caller
        must have made the cache large enough."""
        if rows is not None:
            raise RequestError(
                "a dense cache takes no packed tokens: its rows have their slots in common",
                param="cache",
                hint="use a PagedCache (page_size=)",
            )
        tokens = positions.shape[1]
        taken = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if taken + tokens > self.capacity:
            raise RequestError(
                f"{tokens} more tokens do not fit: {taken} of the cache's {self.capacity} slots are taken",
                param="cache",
                hint="create the cache with a larger capacity",
            )
        written = jax.lax.dynamic_update_slice_in_dim(self.positions, positions, self.length, axis=1)
        return dataclasses.replace(self, positions=written, length=self.length + tokens)._laid_out(), self.length

    def layer(self, index: int) -> DenseLayer:
        """See `KVCache`."""
        return DenseLayer(self.k[index], self.v[index], self.positions)

    def with_layers(self, views: list[DenseLayer]) -> DenseCache:
        """See `KVCache`."""
        return dataclasses.replace(self, k=tuple(view.k for view in views), v=tuple(view.v for view in views))

    def grow(self, capacity: int) -> DenseCache:
        """The same cache with more slots.

        Raises:
          RequestError: `capacity` is smaller than it is now.
        """
        check_grows(self.capacity, capacity)
        more = capacity - self.capacity
        return self._with(
            lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))),
            jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1),
        )

    def select(self, rows: jax.Array) -> DenseCache:
        """See `KVCache`; a copy."""
        return self._with(lambda x: take_rows(x, rows, 0), take_rows(self.positions, rows, -1))

    def put(self, rows: jax.Array, part: DenseCache) -> DenseCache:
        """See `KVCache`. Other rows have nothing in the slots that the part has taken meanwhile."""

        def write(into: jax.Array, new: jax.Array) -> jax.Array:
            return put_rows(into, rows, new)

        k, v = (tuple(map(write, a, b)) for a, b in ((self.k, part.k), (self.v, part.v)))
        length = jnp.maximum(self.length, part.length)
        return DenseCache(k, v, write(self.positions, part.positions), length)._laid_out()

    def fork(self, source: jax.Array, target: jax.Array) -> DenseCache:
        """See `KVCache`; a copy."""
        return self.put(target, self.select(source))

    def truncate(self, lengths: jax.Array) -> DenseCache:
        """See `KVCache`; slots of dropped tokens stay used up."""
        rank = jnp.cumsum(self.positions >= 0, axis=1)
        return dataclasses.replace(self, positions=jnp.where(rank <= lengths[:, None], self.positions, -1))

    def release(self, rows: jax.Array) -> DenseCache:
        """See `KVCache`; slots of the released rows stay used up."""
        return dataclasses.replace(self, positions=jnp.where(rows[:, None], -1, self.positions))

    def _with(self, change: Callable[[jax.Array], jax.Array], positions: jax.Array) -> DenseCache:
        """Keys and values changed in one way."""
        k, v = (tuple(map(change, each)) for each in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, positions=positions)._laid_out()

    def _laid_out(self) -> DenseCache:
        """Over a mesh alike after every change, so that no program is compiled twice."""
        k, v = (tuple(constrain(x, DENSE_AXES) for x in each) for each in (self.k, self.v))
        return DenseCache(k, v, constrain(self.positions, ("batch",)), constrain(self.length, ()))
