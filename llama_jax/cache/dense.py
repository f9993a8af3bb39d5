"""A cache of one array per layer, with the same number of slots for every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.cache import stored
from llama_jax.cache.protocol import Queries, check_grows, put_rows, take_rows
from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.kernels.attention import KeysValues, Places, Rule, attention
from llama_jax.kernels.rope import rope_and_store
from llama_jax.sharding import constrain

DENSE_AXES = ("batch", "kv_heads")
"""Logical axes of keys and values [batch, kv_heads, capacity, head_dim], and of their scales."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """One layer of a `DenseCache`, by `stored.FIELDS`: slots are [batch, kv_heads, capacity]."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    positions: jax.Array

    def append(
        self, qkv: jax.Array, angles: tuple[jax.Array, jax.Array], slots: jax.Array, *, interleaved: bool
    ) -> tuple[jax.Array, DenseLayer]:
        """Rotates queries and keys and stores keys and values in the booked slots: the queries for `attend`, and the
        view. Arguments as for `kernels.rope.rope_and_store`."""
        cos, sin = angles
        q, *fields = rope_and_store(
            qkv, cos, sin, self.k, self.v, slots, None, self.k_scale, self.v_scale, interleaved=interleaved
        )
        found: dict[str, Any] = dict(zip(stored.FIELDS, fields, strict=True))
        return q, dataclasses.replace(self, **found)

    def attend(
        self,
        q: jax.Array,
        k: jax.Array | None,
        v: jax.Array | None,
        slots: jax.Array,
        queries: Queries,
        rule: Rule,
    ) -> tuple[jax.Array, DenseLayer]:
        """See `LayerCache`."""

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.swapaxes(new, 1, 2)
            return constrain(jax.lax.dynamic_update_slice_in_dim(into, new, slots, axis=2), DENSE_AXES)

        places = Places(queries.positions, self.positions, rows=queries.rows)
        out, fields = stored.attend(self, q, k, v, put, lambda q, x: attention(q, KeysValues(**x), places, rule))
        return out, dataclasses.replace(self, **fields)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Every row has `capacity` slots; the tokens of a call occupy the same slots in every row.

    Each slot remembers its token's position, and attention asks only for positions: so left- and right-padded rows,
    several prefill chunks and single decode steps are all the same to it. A row that has nothing to store still uses up
    a slot, so rows that come and go are for the paged cache.

    Attributes:
      k, v: per layer [batch, kv_heads, capacity, head_dim], or its codes.
      k_scale, v_scale: per layer [batch, kv_heads, capacity], of a quantised cache; None of others.
      positions: int32 [batch, capacity], -1 where the slot is empty or padding.
      length: int32 [], slots in use.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    k_scale: tuple[jax.Array | None, ...]
    v_scale: tuple[jax.Array | None, ...]
    positions: jax.Array
    length: jax.Array

    @classmethod
    def create(cls, config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike) -> DenseCache:
        """An empty cache for `batch` rows of `capacity` tokens, of a dtype or a name of `KV_DTYPES`."""
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        slots = stored.new_slots(shape, dtype, config.num_layers)
        positions = jnp.full((batch, capacity), -1, jnp.int32)
        return cls(**slots, positions=positions, length=jnp.zeros((), jnp.int32))._laid_out()

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.positions.shape[1]

    @property
    def dtype(self) -> str:
        """See `KVCache`."""
        return stored.dtype_of(self.k[0], self.v[0], self.k_scale[0])

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
        return DenseLayer(**stored.of_layer(self, index), positions=self.positions)

    def with_layers(self, views: list[DenseLayer]) -> DenseCache:
        """See `KVCache`."""
        return dataclasses.replace(self, **stored.of_views(views))

    def grow(self, capacity: int) -> DenseCache:
        """The same cache with more slots per row.

        Raises:
          RequestError: `capacity` is smaller than it is now.
        """
        check_grows(self.capacity, capacity)
        more = capacity - self.capacity
        return self._with(
            lambda x: jnp.pad(x, [(0, more if axis == 2 else 0) for axis in range(x.ndim)]),
            jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1),
        )

    def select(self, rows: jax.Array) -> DenseCache:
        """See `KVCache`; a copy."""
        return self._with(lambda x: take_rows(x, rows, 0), take_rows(self.positions, rows, -1))

    def put(self, rows: jax.Array, part: DenseCache) -> DenseCache:
        """See `KVCache`. Other rows have nothing in the slots that the part has used meanwhile."""

        def write(into: jax.Array, new: jax.Array) -> jax.Array:
            return put_rows(into, rows, new)

        length = jnp.maximum(self.length, part.length)
        positions = write(self.positions, part.positions)
        changed = stored.changed(self, write, part)
        return dataclasses.replace(self, **changed, positions=positions, length=length)._laid_out()

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
        """Applies one change to keys, values and scales."""
        return dataclasses.replace(self, **stored.changed(self, change), positions=positions)._laid_out()

    def _laid_out(self) -> DenseCache:
        """Keeps the same sharding after every change, so that no program is compiled twice."""
        return dataclasses.replace(
            self,
            **stored.changed(self, lambda x: constrain(x, DENSE_AXES)),
            positions=constrain(self.positions, ("batch",)),
            length=constrain(self.length, ()),
        )
