"""Codes as exact 16-bit floats, in registers, by what an instruction set is best at.

On NVIDIA's GPUs a byte, or half of one, in the last bits of a 16-bit float is a subnormal number, and a fused
multiply-add, for two of them at once, makes of it the code, divided by a power of two (`Bytes`). Bytes stay bytes until
then, so the compiler reads them from shared memory in the order in which matrix units take them.

AMD's GPUs before gfx950 do not compute with bfloat16. There four bits are put into the last bits of a large number with
one "and" and one "xor" for two of them, in 32 bits: a word of eight codes, shifted, holds two in the places of two
16-bit floats. What the numbers are more than the codes is subtracted from the product (`Words`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from llama_jax.kernels.pallas import MIN_CONTRACTION
from llama_jax.quantized import Layout
from llama_jax.targets import Target

WORD = "int32"
WORD_BYTES = 4


class Unpack(Protocol):
    """A target's way to unpack."""

    @property
    def sums_apart(self) -> bool:
        """Whether the sums of several rows' inputs are worth a launch of their own (`shifts.Shifts`)."""

    def stored(self, codes: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Codes [out, bytes] and the input [rows, in] as the kernel reads them: the same memory."""

    def unit(self, dtype: DTypeLike) -> int:
        """The factor on the numbers of `parts`."""

    def added(self, codes: DTypeLike, dtype: DTypeLike) -> int:
        """By how much numbers of `parts`, times `unit`, exceed the codes. Args: the dtypes of both."""

    def parts(self, codes: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
        """Codes of a tile [cols, n] of what is stored, as numbers of the dtype: n parts [cols, codes / n], of codes 0,
        n, 2n ..., of codes 1, n + 1, ..."""

    def factors(self, parts: int, x: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
        """The numbers that as many parts are multiplied with, of a tile of the input."""


@dataclass(frozen=True)
class Words:
    """Four-bit codes by words of eight; numbers of 16 bits as they are.

    Attributes:
      whole: takes codes int8, or numbers, [cols, codes] and a 16-bit dtype: the codes in it.
      sums_apart: a launch takes longer on AMD's GPUs than the products with ones.
    """

    whole: Callable[[jax.Array, DTypeLike], jax.Array]
    sums_apart: bool = False

    def stored(self, codes: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if codes.dtype != jnp.uint8:
            return codes, x
        return jax.lax.bitcast_convert_type(codes.reshape(len(codes), -1, WORD_BYTES), WORD), x

    def unit(self, dtype: DTypeLike) -> int:
        return 1

    def added(self, codes: DTypeLike, dtype: DTypeLike) -> int:
        return _LARGE[jnp.dtype(dtype).name][1] if codes == WORD else 0

    def parts(self, codes: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
        if codes.dtype != WORD:
            return [self.whole(codes, dtype)]
        large, _ = _LARGE[jnp.dtype(dtype).name]
        shifted = [jax.lax.shift_right_logical(codes, jnp.full_like(codes, place)) for place in (0, 4, 8, 12)]
        parts = [_pairs(words & _MASK ^ large, dtype) for words in shifted]
        while parts[0].shape[1] < MIN_CONTRACTION:
            half = len(parts) // 2
            parts = [_interleaved(*pair) for pair in zip(parts[:half], parts[half:], strict=True)]
        return parts

    def factors(self, parts: int, x: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
        return every(parts, x)


_MASK = 0x000F000F
# 16-bit floats whose last bit counts 1, twice, with the sign of two's complement turned to what is counted from -8; and
# what they are more than the code.
_LARGE = {"bfloat16": (0x43084308, 128 + 8), "float16": (0x64086408, 1024 + 8)}


def every(n: int, x: jax.Array) -> list[jax.Array]:
    """x [rows, n * m] -> n times [rows, m]: numbers 0, n, 2n ...; 1, n + 1, ...; for n a power of two."""
    if n == 1:
        return [x]
    halves = [every(n // 2, half) for half in jnp.unstack(x.reshape(len(x), -1, 2), axis=-1)]
    return [part for parts in zip(*halves, strict=True) for part in parts]


def _interleaved(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.stack([first, second], axis=-1).reshape(len(first), -1)


def halves(words: jax.Array) -> list[jax.Array]:
    """The lower and the upper halves of int32 words, int16."""
    upper = jax.lax.shift_right_logical(words, jnp.full_like(words, 16))
    return [words.astype(jnp.int16), upper.astype(jnp.int16)]


def _pairs(words: jax.Array, dtype: DTypeLike) -> jax.Array:
    """int32 [cols, words] -> [cols, 2 * words], their lower and upper halves: no instruction where both stay in one
    register."""
    return jax.lax.bitcast_convert_type(_interleaved(*halves(words)), dtype)


@dataclass(frozen=True)
class Bytes:
    """Codes by bytes, four at a time. Each half of a byte has its own numbers of the input, which is read by pairs of
    them."""

    sums_apart: bool = True

    def stored(self, codes: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        if codes.dtype == jnp.int8:
            return codes, x
        return codes, jax.lax.bitcast_convert_type(x.reshape(len(x), -1, 2), WORD)

    def unit(self, dtype: DTypeLike) -> int:
        return FLOATS[jnp.dtype(dtype).name].unit

    def added(self, codes: DTypeLike, dtype: DTypeLike) -> int:
        return 0

    def parts(self, codes: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
        return [_numbers(codes, field, jnp.dtype(dtype)) for field in FIELDS[codes.dtype.name]]

    def factors(self, parts: int, x: jax.Array, dtype: DTypeLike) -> list[jax.Array]:
        return [x] if parts == 1 else [jax.lax.bitcast_convert_type(half, dtype) for half in halves(x)]


class Field(NamedTuple):
    """Some bits of a byte as a code: what they count once those of `flip` are turned, times `step`, less `zero`."""

    mask: int
    flip: int
    step: float
    zero: int


FIELDS = {"int8": (Field(0xFF, 0x80, 1, 128),), "uint8": (Field(0x0F, 0x08, 1, 8), Field(0xF0, 0x80, 1 / 16, 8))}
"""Contents of a byte, by dtype: one code; or two, the first in the lower half."""


class Float(NamedTuple):
    """A 16-bit float.

    Attributes:
      name: in instructions.
      last: what the last bit of a subnormal number counts.
      unit: numbers are codes divided by it: so the factor of the multiply-add is in the float's range.
    """

    name: str
    last: float
    unit: int

    def multiply_add(self, field: Field) -> tuple[float, float]:
        """The factor and the summand."""
        return field.step / self.last / self.unit, -field.zero / self.unit


FLOATS = {"bfloat16": Float("bf16", 2.0**-133, 128), "float16": Float("f16", 2.0**-24, 512)}

_FOUR = """{{
    .reg .b32 a, b, flip, factor, zero;
    mov.b32 flip, {flip};
    mov.b32 factor, {factor};
    mov.b32 zero, {zero};
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    lop3.b32 a, a, {mask}, flip, 0x6a;
    lop3.b32 b, b, {mask}, flip, 0x6a;
    fma.rn.{name}x2 $0, a, factor, zero;
    fma.rn.{name}x2 $1, b, factor, zero;
}}"""
# Four bytes $2 to two numbers each in $0 and $1. "lop3" is (bytes & mask) ^ flip; only one may be an immediate.


def _numbers(codes: jax.Array, field: Field, dtype: jnp.dtype) -> jax.Array:
    """A field of codes [cols, bytes], divided by the float's unit."""
    kind = FLOATS[dtype.name]
    factor, zero = (int(np.asarray(x, dtype).view(np.uint16)) for x in kind.multiply_add(field))
    bits = {"mask": field.mask, "flip": field.flip, "factor": factor, "zero": zero}
    asm = _FOUR.format(name=kind.name, **{name: f"{x * 0x00010001:#x}" for name, x in bits.items()})
    out = jax.ShapeDtypeStruct(codes.shape, dtype)
    (made,) = plgpu.elementwise_inline_asm(
        asm, args=[codes], constraints="=r,=r,r", pack=WORD_BYTES, result_shape_dtypes=[out]
    )
    numbers: jax.Array = made
    return numbers


def _converted(codes: jax.Array, dtype: DTypeLike) -> jax.Array:
    return codes.astype(dtype)


def _through_float32(codes: jax.Array, dtype: DTypeLike) -> jax.Array:
    """To bfloat16 as the upper half of a float32: AMD's GPUs convert bytes to float32 in one instruction, and do not
    compute with bfloat16."""
    if jnp.dtype(dtype) != jnp.bfloat16 or codes.dtype == dtype:
        return codes.astype(dtype)
    bits = jax.lax.bitcast_convert_type(codes.astype(jnp.float32), jnp.int32) >> 16
    return jax.lax.bitcast_convert_type(bits.astype(jnp.int16), dtype)


ANYWHERE = Words(_converted)
AMD = Words(_through_float32)
NVIDIA = Bytes()

NO_BFLOAT16 = ("sm_70", "sm_72", "sm_75")
"""NVIDIA's architectures that do not multiply bfloat16."""


LEAST_GROUP = 64
"""Of four-bit codes: matrix units take eight bytes of a tile's row at a time, twice. With shorter products Triton moves
numbers one by one."""


def unpack_for(target: Target, layout: Layout | None, *, one_row: bool, interpret: bool) -> Unpack:
    """The way that takes the fewest instructions on a target. A weight without a layout is not unpacked.

    Args:
      one_row: whether there is a single row of the input, with which several groups share a product.
    """
    if layout is None:
        return ANYWHERE
    short = layout.bits == 4 and (layout.group or LEAST_GROUP) < LEAST_GROUP and not one_row
    if target.vendor == "nvidia" and target.arch not in NO_BFLOAT16 and not short and not interpret:
        return NVIDIA
    return words_for(target, interpret=interpret)


def words_for(target: Target, *, interpret: bool) -> Words:
    """The way by words, for kernels that read the input as it is."""
    return AMD if target.vendor == "amd" and not interpret else ANYWHERE
