"""A weight as kernels read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax

from llama_jax.quantized import Layout
from llama_jax.quantized.codes import shift
from llama_jax.quantized.layout import OFFSETS


@dataclass(frozen=True)
class Weight:
    """The arrays of a weight [out, in], and what the layout says of them.

    Attributes:
      layout: None of a weight that is not quantised.
      codes: int8 [out, in], or uint8 [out, in / 2] with two codes in each; the weight itself where it has no layout.
      scales: [out], or [out, in / group]; None without a layout.
      offsets: "minima" or "zeros", as `scales`; None of a symmetric layout.
    """

    layout: Layout | None
    codes: jax.Array
    scales: jax.Array | None
    offsets: jax.Array | None

    @classmethod
    def of(cls, layout: Layout | None, members: Mapping[str, jax.Array]) -> Weight:
        """Of the members of a weight [*out, in]."""
        if layout is None:
            weight = members["weight"]
            return cls(None, weight.reshape(-1, weight.shape[-1]), None, None)

        def rows(name: str, last: int) -> jax.Array:
            """[out, ...] with the last dimensions as they are."""
            member = members[name]
            return member.reshape(-1, *member.shape[member.ndim - last :])

        by_group = 0 if layout.group is None else 1
        offsets = None if layout.offset is None else rows(OFFSETS[layout.offset], by_group)
        return cls(layout, rows(layout.name, 1), rows("scales", by_group), offsets)

    @property
    def group(self) -> int | None:
        """Numbers of a row that share a scale; None for all of it."""
        return None if self.layout is None else self.layout.group

    @property
    def per_byte(self) -> int:
        """Numbers of the weight in one of the array that holds the codes."""
        return 1 if self.layout is None else self.layout.per_byte

    def folded(self, parts: int) -> Weight:
        """Each row as `fold` rows: the same memory. Scales of whole rows stay as they are."""

        def cut(x: jax.Array) -> jax.Array:
            return x.reshape(parts * len(x), -1)

        if self.group is None or self.scales is None:
            return replace(self, codes=cut(self.codes))
        offsets = None if self.offsets is None else cut(self.offsets)
        return replace(self, codes=cut(self.codes), scales=cut(self.scales), offsets=offsets)

    def shift(self, scales: jax.Array, offsets: jax.Array) -> jax.Array:
        """`quantized.codes.shift` of some of the scales and offsets."""
        assert self.layout is not None and self.layout.offset is not None
        found = shift(self.layout, {"scales": scales, OFFSETS[self.layout.offset]: offsets})
        assert found is not None
        return found
