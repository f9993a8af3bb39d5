"""What the model asks of a key/value cache, and nothing else: how it lies in memory is the cache's own affair.

The model books slots for its tokens once (`extend`), then gives each layer's new keys and values to that layer's view
(`layer(i).attend`). What a slot is, only the cache knows.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import jax

from llama_jax.kernels.attention import Visibility


class LayerCache(Protocol):
    """One layer's view of a cache whose slots are booked."""

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
    ) -> tuple[jax.Array, Self]:
        """Stores keys and values in the booked slots, then attends over all slots.

        Args:
          q: [batch, queries, num_heads, head_dim]; q_positions: int32 [batch, queries].
          k, v: [batch, len, kv_heads, head_dim]; positions: int32 [batch, len], those that the slots were booked for.
        """
        ...


class KVCache(Protocol):
    """What `forward` asks of a cache."""

    @property
    def rope_length(self) -> jax.Array:
        """int32 [batch], the text length that fixes the frequencies of dynamic rope, 0 until known."""
        ...

    def extend(self, positions: jax.Array, rope_length: jax.Array) -> Self:
        """Books slots for tokens at `positions` int32 [batch, len] (negative: padding)."""
        ...

    def layer(self, index: int) -> Any:
        """The view of layer `index`."""
        ...

    def with_layers(self, views: list[Any]) -> Self:
        """The cache with every layer's view put back."""
        ...
