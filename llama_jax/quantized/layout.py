"""Memory layouts of quantised matrices: what the codes are, which of them share a scale, and where 0 is."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax
    import numpy as np

CODES: Mapping[str, str] = MappingProxyType({"int8": "int8", "int4": "uint8", "fp8": "float8_e4m3fn"})
"""Kinds of codes, each with the dtype of the array that holds them. Of int4, a byte holds two: the first in its low
half, each a number from -8 to 7 in two's complement."""

SCALES: Mapping[str, str] = MappingProxyType({"f32": "float32", "f16": "float16", "bf16": "bfloat16"})
OFFSETS: Mapping[str, str] = MappingProxyType({"min": "minima", "zero": "zeros"})
"""Kinds of offset of asymmetric layouts, each with the name of the member that stores it beside the scales."""
_NAME = re.compile(
    rf"({'|'.join(CODES)})(?:_g([1-9]\d{{0,5}}))?(?:_({'|'.join(OFFSETS)}))?(?:_({'|'.join(SCALES)}))?", re.ASCII
)


@dataclass(frozen=True)
class Layout:
    """One way to store weights [..., in] with a scale for each row, or each group of neighbours in a row.

    Attributes:
      kind: of the codes, a key of `CODES`.
      group: numbers of a row that share a scale; None for the whole row. Blocks of several rows are stored with the
        scale repeated for each row, so that rows can be joined, split and repeated whatever lies above them.
      offset: how 0 is stored. None: code 0 stands for it. "min": a weight is code * scale + minimum, as in GGUF's Q4_1
        and Q5_K, with codes from 0 to 15 (stored less 8) in int4, from 0 to 127 in int8. "zero": it is
        (code - zero) * scale, with a whole number `zero` of eight bits, as in GPTQ and AWQ.
      scales: short name of the dtype of scales and minima, a key of `SCALES`.
    """

    kind: str
    group: int | None = None
    offset: str | None = None
    scales: str = ""

    def __post_init__(self) -> None:
        if not self.scales:
            # Of a whole row, or of an 8-bit float with its narrow range, 16 bits more or less do not count.
            object.__setattr__(self, "scales", "f32" if self.group is None or self.kind == "fp8" else "f16")

    @property
    def name(self) -> str:
        """Its name, e.g. "int4_g64_min"; `layout_named` is the inverse."""
        parts = [self.kind, f"g{self.group}" if self.group else "", self.offset or ""]
        usual = Layout(self.kind, self.group, self.offset).scales
        return "_".join([*filter(None, parts), *([] if self.scales == usual else [self.scales])])

    @property
    def bits(self) -> int:
        return 4 if self.kind == "int4" else 8

    @property
    def per_byte(self) -> int:
        """Codes in one number of the array that holds them."""
        return 8 // self.bits

    @property
    def largest(self) -> int:
        """The largest code; in a symmetric layout it represents the largest magnitude."""
        return {"int8": 127, "int4": 7, "fp8": 448}[self.kind]

    @property
    def lowest(self) -> int:
        """The lowest code as it is stored; with "min" that of the minimum."""
        if self.kind == "int8":
            return {None: -127, "min": 0, "zero": -128}[self.offset]
        return -8 if self.kind == "int4" else -self.largest

    @property
    def symmetric(self) -> bool:
        return self.offset is None

    @property
    def scale_dtype(self) -> str:
        return SCALES[self.scales]

    def fits(self, columns: int) -> bool:
        """Returns whether rows of this many numbers can be stored."""
        return columns % (self.group or 1) == 0 and columns % self.per_byte == 0

    @property
    def described(self) -> str:
        """In a few words, for people: "int4 in groups of 64, with minima"."""
        where = "per row" if self.group is None else f"in groups of {self.group}"
        return f"{self.kind} {where}" + (f", with {OFFSETS[self.offset]}" if self.offset else "")


@functools.cache
def layout_named(name: str) -> Layout | None:
    """The layout of a name such as "int8" or "int4_g64_min"; None if it names none.

    A layout has one name: endings that say what is usual are none.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    kind, group, offset, scales = found.groups()
    layout = Layout(kind, int(group) if group else None, offset, scales or "")
    sound = layout.name == name and (offset is None or kind != "fp8")
    return layout if sound and (layout.group or 2) % layout.per_byte == 0 else None


ORDER = "order"
"""Member of a weight whose columns are stored in another order: int32 [in], of each stored column its place in the
weight. So the columns of a group are neighbours where a method has grouped them by the size of their inputs."""
_ORDERED = "_ordered"


def stored_name(layout: Layout, *, ordered: bool = False) -> str:
    """The name of a layout, or of its variant with reordered columns."""
    return layout.name + (_ORDERED if ordered else "")


def stored_layout(name: str) -> Layout | None:
    """The layout in which the codes of a name of `stored_name` lie, in whatever order; None if it is none."""
    return layout_named(name.removesuffix(_ORDERED))


def pack_codes[Codes: (np.ndarray, jax.Array)](codes: Codes) -> Codes:
    """Codes int8 [..., n], each from -8 to 7, two to a byte: uint8 [..., n / 2]; of numpy or of jax."""
    nibbles = codes.view("uint8") & 15
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4
