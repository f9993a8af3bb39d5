"""A cache of one array a layer, with as many slots for every row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.kernels.attention import Visibility, attention
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
    ) -> tuple[jax.Array, DenseLayer]:
        """See `LayerCache`."""

        def store(slots: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.swapaxes(new, 1, 2).astype(slots.dtype)
            return constrain(jax.lax.dynamic_update_slice_in_dim(slots, new, self.start, axis=2), DENSE_AXES)

        # The barrier keeps XLA from doing the update twice, once for the result and once, on a copy of the whole cache,
        # inside whatever reads it.
        stored_k, stored_v = jax.lax.optimization_barrier((store(self.k, k), store(self.v, v)))
        layer = dataclasses.replace(self, k=stored_k, v=stored_v)
        out = attention(q, layer.k, layer.v, q_positions, layer.positions, visibility, scale=scale)
        return out, layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Every row has `capacity` slots; the tokens of one call take the same slots in every row.

    Each slot remembers its token's position, and attention asks only for positions: so left- and right-padded rows,
    several prefill chunks and single decode steps are all the same to it.

    Attributes:
      k, v: per layer [batch, kv_heads, capacity, head_dim].
      positions: int32 [batch, capacity], -1 where the slot is empty or padding.
      length: int32 [], slots in use; `start`: where the tokens of the current call go.
      rope_length: int32 [batch], the text length that fixes the frequencies of dynamic rope, 0 until known.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    positions: jax.Array
    length: jax.Array
    start: jax.Array
    rope_length: jax.Array

    @classmethod
    def create(cls, config: LlamaConfig, batch: int, capacity: int, dtype: DTypeLike) -> DenseCache:
        """An empty cache for `batch` rows of `capacity` tokens."""
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        # Separate buffers: donated arrays must not alias one another.
        k = tuple(constrain(jnp.zeros(shape, dtype), DENSE_AXES) for _ in config.layers)
        v = tuple(constrain(jnp.zeros(shape, dtype), DENSE_AXES) for _ in config.layers)
        return cls(
            k,
            v,
            positions=jnp.full((batch, capacity), -1, jnp.int32),
            length=jnp.zeros((), jnp.int32),
            start=jnp.zeros((), jnp.int32),
            rope_length=jnp.zeros((batch,), jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self.positions.shape[1]

    def extend(self, positions: jax.Array, rope_length: jax.Array) -> DenseCache:
        """See `KVCache`. Outside of jit, raises RequestError when the slots do not suffice; inside, where the slots in
        use are not known, only when all of them would not suffice: the caller must have made the cache large enough."""
        tokens = positions.shape[1]
        taken = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length)
        if taken + tokens > self.capacity:
            raise RequestError(
                f"{tokens} more tokens do not fit: {taken} of the cache's {self.capacity} slots are taken",
                param="cache",
                hint="create the cache with a larger capacity",
            )
        return dataclasses.replace(
            self,
            positions=jax.lax.dynamic_update_slice_in_dim(self.positions, positions, self.length, axis=1),
            length=self.length + tokens,
            start=self.length,
            rope_length=rope_length,
        )

    def layer(self, index: int) -> DenseLayer:
        """See `KVCache`."""
        return DenseLayer(self.k[index], self.v[index], self.positions, self.start)

    def with_layers(self, views: list[DenseLayer]) -> DenseCache:
        """See `KVCache`."""
        return dataclasses.replace(self, k=tuple(view.k for view in views), v=tuple(view.v for view in views))

    def grow(self, capacity: int) -> DenseCache:
        """The same cache with more slots.

        Raises:
          RequestError: `capacity` is smaller than it is now.
        """
        more = capacity - self.capacity
        if more < 0:
            raise RequestError(
                f"a cache of {self.capacity} slots cannot grow to {capacity}",
                param="capacity",
                hint="create a smaller cache instead",
            )

        def pad(x: jax.Array) -> jax.Array:
            return constrain(jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))), DENSE_AXES)

        return dataclasses.replace(
            self,
            k=tuple(map(pad, self.k)),
            v=tuple(map(pad, self.v)),
            positions=jnp.pad(self.positions, ((0, 0), (0, more)), constant_values=-1),
        )

    def rows(self, index: jax.Array) -> DenseCache:
        """The cache of rows `index` int32 [n]: rows may be repeated (several samples of one prompt) or left out."""
        return dataclasses.replace(
            self,
            k=tuple(constrain(x[index], DENSE_AXES) for x in self.k),
            v=tuple(constrain(x[index], DENSE_AXES) for x in self.v),
            positions=self.positions[index],
            rope_length=self.rope_length[index],
        )
