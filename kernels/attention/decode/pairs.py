"""Codes of keys and values by pairs of bytes, as NVIDIA's matrix units take them.

Matrix units take two numbers of neighbouring slots from one register, for values. Instructions that transpose a tile on
its way from shared memory do so by 16 bits, not by 8. Two bytes in one number of 16 bits, therefore: a register holds
those of two slots, and gives the first of both, as two numbers, and the second of both. The products of these are
apart, as those of two halves of a head are where a byte holds two codes.

Nothing here has side effects, so that Triton converts what it has read from shared memory in the order of the matrix
units; conversions by themselves (`codes.Decoder`) take a way through shared memory more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from llama_jax.kernels.attention import float8
from llama_jax.kernels.attention.assembly import FIELDS, FLOAT, Field
from llama_jax.kernels.attention.codes import Decoder, Parts
from llama_jax.kernels.attention.records import KeysValues
from llama_jax.kernels.pallas import Index, tile_width


class Pairs(NamedTuple):
    """The parts of a head whose numbers are in one array each: even and odd numbers of its halves, or of all.

    Attributes:
      halves: 2 where a byte holds two codes, else 1; each: numbers of a part.
    """

    halves: int
    each: int
    pair: int = 2

    @classmethod
    def of(cls, x: Any, head_dim: int) -> Pairs:
        """For keys or values [..., bytes of a head]."""
        return cls(head_dim // x.shape[-1], x.shape[-1] // 2)

    @property
    def number(self) -> int:
        """Of parts."""
        return self.halves * self.pair

    @property
    def width(self) -> int:
        """Columns of a tile with a part."""
        return tile_width(self.each)

    def split(self, x: jax.Array) -> jax.Array:
        """[..., head_dim] as [..., halves, each, 2]."""
        return x.reshape(*x.shape[:-1], *self)

    def load(self, ref: Any, index: Index) -> list[jax.Array]:
        """A tile of each part of what `split` gives."""
        return [plgpu.load(at, mask=inside, other=0) for at, inside in self._places(ref, index)]

    def store(self, ref: Any, index: Index, tiles: Iterable[jax.Array], valid: jax.Array) -> None:
        """Writes a tile of each part into what is shaped as `split` gives it."""
        for tile, (at, inside) in zip(tiles, self._places(ref, index), strict=True):
            plgpu.store(at, tile, mask=inside & valid[:, None])

    def _places(self, ref: Any, index: Index) -> list[tuple[Any, jax.Array]]:
        column = jnp.arange(self.width, dtype=jnp.int32)[None, :]
        rows = tuple(i[:, None] if isinstance(i, jax.Array) and i.ndim else i for i in index)
        parts = [(half, which) for half in range(self.halves) for which in range(self.pair)]
        return [(ref.at[(*rows, half, column, which)], column < self.each) for half, which in parts]


class Reader(Protocol):
    """A way to read keys and values."""

    @property
    def parts(self) -> Callable[[Any, int], Parts | Pairs]:
        """The parts of heads that keys or values are read in."""

    def stored(self, x: jax.Array) -> jax.Array:
        """Keys or values as the kernel reads them: the same memory."""

    def numbers(self, tile: jax.Array, dtype: DTypeLike, block: jax.Array) -> list[jax.Array]:
        """A tile [slots, columns] of what is stored as numbers of a product, by parts.

        Args:
          dtype: of keys or values.
          block: see `Decoder.numbers`.
        """


@dataclass(frozen=True)
class ByNumbers:
    """Each number, or byte of codes, by itself."""

    decoder: Decoder
    parts = staticmethod(Parts.of)

    def stored(self, x: jax.Array) -> jax.Array:
        return float8.bits(x)

    def numbers(self, tile: jax.Array, dtype: DTypeLike, block: jax.Array) -> list[jax.Array]:
        return self.decoder.numbers(tile, dtype, block)


@dataclass(frozen=True)
class ByPairs:
    """Two bytes of codes at a time; numbers are as `assembly.made_of` says."""

    parts = staticmethod(Pairs.of)

    def stored(self, x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.int16)

    def numbers(self, tile: jax.Array, dtype: DTypeLike, block: jax.Array) -> list[jax.Array]:
        if jnp.dtype(dtype) == FLOAT:
            return [_converted(tile, _FLOATS.format(which=which), jnp.float16) for which in "ab"]
        return [_numbers(tile, field, which) for field in FIELDS[jnp.dtype(dtype).name] for which in BYTES]


def reader(kv: KeysValues, decoder: Decoder) -> Reader:
    """The way to read a cache whose numbers the decoder makes."""
    pairs = decoder.by_assembly and all(x.shape[-1] % 2 == 0 for x in (kv.k, kv.v))
    return ByPairs() if pairs else ByNumbers(decoder)


BYTES = ("0x4240", "0x4341")
"""The first bytes of two numbers of 16 bits, and the second ones, with zeros between them, for "prmt"."""

_TWO = """{{
    .reg .b32 w, factor, zero;
    mov.b32 factor, {factor};
    mov.b32 zero, {zero};
    xor.b32 w, $1, {flip};
    prmt.b32 w, w, 0, {which};
    and.b32 w, w, {mask};
    fma.rn.bf16x2 $0, w, factor, zero;
}}"""


_FLOATS = """{{
    .reg .b32 w;
    .reg .b16 a, b;
    prmt.b32 w, $1, 0, 0x3120;
    mov.b32 {{a, b}}, w;
    cvt.rn.f16x2.e4m3x2 $0, {which};
}}"""


def _numbers(pairs: jax.Array, field: Field, which: str) -> jax.Array:
    """A field of one byte of each pair, as in `assembly`."""
    factor, zero = (int(np.asarray(x, jnp.bfloat16).view(np.uint16)) for x in (field.factor, field.added))
    twice = {"factor": factor, "zero": zero, "mask": field.mask}
    asm = _TWO.format(
        which=which, flip=f"{field.flip * 0x01010101:#x}", **{name: f"{x * 0x00010001:#x}" for name, x in twice.items()}
    )
    return _converted(pairs, asm, jnp.bfloat16)


def _converted(pairs: jax.Array, asm: str, dtype: DTypeLike) -> jax.Array:
    out = jax.ShapeDtypeStruct(pairs.shape, dtype)
    (made,) = plgpu.elementwise_inline_asm(asm, args=[pairs], constraints="=r,r", pack=2, result_shape_dtypes=[out])
    numbers: jax.Array = made
    return numbers
