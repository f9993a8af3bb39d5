"""A quantised weight as kernels read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llama_jax.quantized import Layout
from llama_jax.quantized.codes import HALF
from llama_jax.quantized.layout import OFFSETS


@dataclass(frozen=True)
class Weight:
    """The arrays of a weight [out, in], and what the layout says of them.

    Attributes:
      codes: int8 [out, in], or uint8 [out, in / 2] with two codes in each.
      scales: [out], or [out, in / group].
      offsets: "minima" or "zeros", as `scales`; None of a symmetric layout.
    """

    layout: Layout
    codes: jax.Array
    scales: jax.Array
    offsets: jax.Array | None

    @classmethod
    def of(cls, layout: Layout, members: Mapping[str, jax.Array]) -> Weight:
        """Of the members of a weight [*out, in]."""

        def flat(name: str, last: int) -> jax.Array:
            return members[name].reshape(-1, *members[name].shape[members[name].ndim - last :])

        last = 0 if layout.group is None else 1
        offsets = None if layout.offset is None else flat(OFFSETS[layout.offset], last)
        return cls(layout, flat(layout.name, 1), flat("scales", last), offsets)

    @property
    def group(self) -> int | None:
        return self.layout.group

    @property
    def per_byte(self) -> int:
        return self.layout.per_byte

    def shift(self, scale: jax.Array, offset: jax.Array) -> jax.Array:
        """The difference between a weight and code * scale, in float32, of float32 scales and stored offsets."""
        offset = offset.astype(jnp.float32)
        return HALF * scale + offset if self.layout.offset == "min" else -offset * scale
