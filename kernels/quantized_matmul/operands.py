"""A weight as kernels read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax

from llama_jax.quantized import Layout
from llama_jax.quantized.codes import shift
from llama_jax.quantized.layout import OFFSETS

SQUARED = 8
"""Neighbours in a row whose squares are added to one number, at least: the fewest columns of a program's result, where
it has to tell the next product how long the row is."""


@dataclass(frozen=True)
class Floats:
    """The layout of a weight that is not quantised: `Layout` as far as kernels ask."""

    group: int | None = None
    per_byte: int = 1
    offset: str | None = None


@dataclass(frozen=True)
class Weight:
    """The arrays of a weight [out, in], and what the layout says of them.

    Attributes:
      codes: int8 [out, in], or uint8 [out, in / 2] with two codes in each; of `Floats` the weight itself.
      scales: [out], or [out, in / group]; None of `Floats`.
      offsets: "minima" or "zeros", as `scales`; None of a symmetric layout.
    """

    layout: Layout | Floats
    codes: jax.Array
    scales: jax.Array | None
    offsets: jax.Array | None

    @classmethod
    def of(cls, layout: Layout | None, members: Mapping[str, jax.Array]) -> Weight:
        """Of the members of a weight [*out, in]; without a layout {"weight"}."""
        if layout is None:
            weight = members["weight"]
            return cls(Floats(), weight.reshape(-1, weight.shape[-1]), None, None)

        def rows(name: str, last: int) -> jax.Array:
            """[out, ...] with the last dimensions as they are."""
            member = members[name]
            return member.reshape(-1, *member.shape[member.ndim - last :])

        by_group = 0 if layout.group is None else 1
        offsets = None if layout.offset is None else rows(OFFSETS[layout.offset], by_group)
        return cls(layout, rows(layout.name, 1), rows("scales", by_group), offsets)

    def folded(self, parts: int) -> Weight:
        """Each row as `fold` rows: the same memory. Scales of whole rows stay as they are."""

        def cut(x: jax.Array) -> jax.Array:
            return x.reshape(parts * len(x), -1)

        if self.layout.group is None or self.scales is None:
            return replace(self, codes=cut(self.codes))
        offsets = None if self.offsets is None else cut(self.offsets)
        return replace(self, codes=cut(self.codes), scales=cut(self.scales), offsets=offsets)

    def shift(self, scales: jax.Array, offsets: jax.Array) -> jax.Array:
        """`quantized.codes.shift` of some of the scales and offsets."""
        assert isinstance(self.layout, Layout) and self.layout.offset is not None
        found = shift(self.layout, {"scales": scales, OFFSETS[self.layout.offset]: offsets})
        assert found is not None
        return found
