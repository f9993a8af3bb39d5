"""Codes as exact 16-bit floats, in registers, by what an instruction set is best at.

Four bits are put into the last bits of a large number with one "and" and one "xor" for two of them, in 32 bits: a word
of eight codes, shifted, holds two in the places of two 16-bit floats. What the numbers are more than the codes is not
subtracted from each, but from the product: AMD's GPUs before gfx950 do not compute with bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from llama_jax.kernels.pallas import MIN_CONTRACTION
from llama_jax.targets import Target

WORD = "int32"
WORD_BYTES = 4
FEW_ROWS = 8
_MASK = 0x000F000F
# 16-bit floats whose last bit counts 1, twice, with the sign of two's complement turned to what is counted from -8; and
# what they are more than the code.
_LARGE = {"bfloat16": (0x43084308, 128 + 8), "float16": (0x64086408, 1024 + 8)}


@dataclass(frozen=True)
class Unpack:
    """A target's way to unpack.

    Attributes:
      whole: takes codes int8 [cols, codes] and a 16-bit dtype: the codes in it.
      masked: takes words int32 and two numbers a and b: (words & a) ^ b.
      exact: takes words int32 of two bfloat16 each, and such a word b: what the words have more than b. None where
        numbers stay larger than the codes.
    """

    whole: Callable[[jax.Array, DTypeLike], jax.Array]
    masked: Callable[[jax.Array, int, int], jax.Array]
    exact: Callable[[jax.Array, int], jax.Array] | None = None

    def parts(self, codes: jax.Array, dtype: DTypeLike) -> tuple[list[jax.Array], int]:
        """Codes as factors of products.

        Args:
          codes: int8 [cols, codes], or int32 [cols, words] of eight codes of four bits.

        Returns:
          n parts [cols, codes / n], of codes 0, n, 2n ..., of codes 1, n + 1, ...; and what their numbers are more than
          the codes.
        """
        if codes.dtype == jnp.int8:
            return [self.whole(codes, dtype)], 0
        large, added = _LARGE[jnp.dtype(dtype).name]
        shifted = [jax.lax.shift_right_logical(codes, jnp.full_like(codes, place)) for place in (0, 4, 8, 12)]
        wide = [self.masked(words, _MASK, large) for words in shifted]
        if self.exact and jnp.dtype(dtype) == jnp.bfloat16:
            wide, added = [self.exact(words, large) for words in wide], 0
        parts = [_halves(words, dtype) for words in wide]
        while parts[0].shape[1] < MIN_CONTRACTION:
            half = len(parts) // 2
            parts = [_interleaved(*pair) for pair in zip(parts[:half], parts[half:], strict=True)]
        return parts, added


def every(n: int, x: jax.Array) -> list[jax.Array]:
    """x [rows, n * m] -> n times [rows, m]: numbers 0, n, 2n ...; 1, n + 1, ...; for n a power of two."""
    if n == 1:
        return [x]
    halves = [every(n // 2, half) for half in jnp.unstack(x.reshape(len(x), -1, 2), axis=-1)]
    return [part for parts in zip(*halves, strict=True) for part in parts]


def _interleaved(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.stack([first, second], axis=-1).reshape(len(first), -1)


def _halves(words: jax.Array, dtype: DTypeLike) -> jax.Array:
    """int32 [cols, words] -> [cols, 2 * words], their lower and upper halves: no instruction where both stay in one
    register."""
    upper = jax.lax.shift_right_logical(words, jnp.full_like(words, 16))
    both = _interleaved(words.astype(jnp.int16), upper.astype(jnp.int16))
    return jax.lax.bitcast_convert_type(both, dtype)


def _converted(codes: jax.Array, dtype: DTypeLike) -> jax.Array:
    return codes.astype(dtype)


def _through_float32(codes: jax.Array, dtype: DTypeLike) -> jax.Array:
    """To bfloat16 as the upper half of a float32: AMD's GPUs convert bytes to float32 in one instruction, and do not
    compute with bfloat16."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        return codes.astype(dtype)
    bits = jax.lax.bitcast_convert_type(codes.astype(jnp.float32), jnp.int32) >> 16
    return jax.lax.bitcast_convert_type(bits.astype(jnp.int16), dtype)


def _masked(words: jax.Array, a: int, b: int) -> jax.Array:
    return words & a ^ b


def _assembly(asm: str, words: jax.Array) -> jax.Array:
    """One number to an instruction of NVIDIA's; $0 is made of $1."""
    out = jax.ShapeDtypeStruct(words.shape, words.dtype)
    (made,) = plgpu.elementwise_inline_asm(asm, args=[words], constraints="=r,r", pack=1, result_shape_dtypes=[out])
    result: jax.Array = made
    return result


def _masked_at_once(words: jax.Array, a: int, b: int) -> jax.Array:
    """One instruction, which NVIDIA's assembler does not find: only one of the numbers may be an immediate."""
    return _assembly(f"{{ .reg .b32 b; mov.b32 b, {b:#x}; lop3.b32 $0, $1, {a:#x}, b, 0x6a; }}", words)


def _less(words: jax.Array, b: int) -> jax.Array:
    return _assembly(f"{{ .reg .b32 b; mov.b32 b, {b:#x}; sub.rn.bf16x2 $0, $1, b; }}", words)


ANYWHERE = Unpack(_converted, _masked)
AMD = Unpack(_through_float32, _masked)
NVIDIA = Unpack(_converted, _masked_at_once)
NVIDIA_EXACT = Unpack(_converted, _masked_at_once, _less)

HAS_BFLOAT16_SUB = ("sm_90", "sm_100", "sm_103", "sm_120")
"""NVIDIA's architectures that subtract two bfloat16 in one instruction."""


def unpack_for(target: Target, rows: int, *, interpret: bool) -> Unpack:
    """The way that takes the fewest instructions on a target, for tiles of this many input rows.

    Where numbers stay larger, a second product gives the sums of the input: little for few rows, half of all arithmetic
    for many.
    """
    if target.vendor == "nvidia" and not interpret:
        return NVIDIA_EXACT if rows > FEW_ROWS and target.arch in HAS_BFLOAT16_SUB else NVIDIA
    return AMD if target.vendor == "amd" and not interpret else ANYWHERE
