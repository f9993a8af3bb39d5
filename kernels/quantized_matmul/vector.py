"""A quantised weight times one row, without matrix units: every thread multiplies and adds what it has loaded."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from llama_jax.kernels.pallas import launch
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.tiles import CHUNK, Tiles

WORDS = CHUNK // 4
"""Words of 32 bits that a thread reads at once."""


@dataclass(frozen=True)
class Code:
    """How a code becomes a float32 in two operations, a shift of its word and a choice of bits: it is put into the
    mantissa of a number so large that the last of its bits counts 1.

    Attributes:
      shift: of the word, to the right.
      mask: the bits of the code then.
      bits: of the number that is added, and the sign, which turns two's complement into a count from the least code.
      added: what the float32 is more than the code.
    """

    shift: int
    mask: int
    bits: int
    added: int

    @classmethod
    def at(cls, place: int, bits: int, first: int) -> Code:
        """Of `bits` bits, the first of which is moved from bit `first` of its word to bit `place`."""
        half = 1 << (bits - 1)
        exponent = 127 + 23 - place
        return cls(first - place, (2 * half - 1) << place, exponent << 23 | half << place, (1 << (23 - place)) + half)


# Of all places few are used, so that a word is seldom shifted: several codes take one shift.
CODES = {
    8: tuple(Code.at(8, 8, first) for first in (0, 8, 16, 24)),
    4: tuple(Code.at(place, 4, 4 * i) for i, place in enumerate((16, 12, 16, 12, 16, 12, 16, 16))),
}
"""Those of a word of 32 bits, by their bits."""


def split(x: jax.Array, parts: int) -> list[jax.Array]:
    """[..., n] to `parts` of [..., n / parts]: every one of `parts` neighbours."""
    if parts == 1:
        return [x]
    even, odd = jnp.unstack(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2), axis=-1)
    pairs = zip(split(even, parts // 2), split(odd, parts // 2), strict=True)
    return [part for pair in pairs for part in pair]


def product(x: jax.Array, weight: Weight, tiles: Tiles, dtype: DTypeLike, *, interpret: bool) -> jax.Array:
    """x [1, in] times the weight [out, in]: [1, out] in `dtype`.

    A thread reads `WORDS` neighbouring words of `tiles.cols` rows of the weight, and keeps the numbers of x that they
    are multiplied with in registers.
    """
    out, row_bytes = weight.codes.shape
    codes, per_word, group = CODES[weight.layout.bits], 32 // weight.layout.bits, weight.layout.group
    span, chunks, width = WORDS * per_word, row_bytes // CHUNK, tiles.inner // CHUNK
    steps = -(-chunks // width)
    unroll = min(tiles.num_stages, steps)
    turns = -(-steps // unroll)
    ragged, other = (True, 0) if chunks % (width * unroll) else (False, None)

    def quantized_matvec(x_ref: Any, codes_ref: Any, scales_ref: Any, offsets_ref: Any, out_ref: Any) -> None:
        column = pl.program_id(0) * tiles.cols + jnp.arange(tiles.cols, dtype=jnp.int32)
        near = jnp.minimum(column, out - 1) if out % tiles.cols else column
        # 0, which the compiler does not know: constants to which it is added stay in registers, and what would be two
        # operations with a constant each is one.
        nothing = pl.program_id(0) >> 30
        word = jnp.arange(WORDS, dtype=jnp.int32)
        number = jnp.arange(per_word, dtype=jnp.int32)

        def step(i: jax.Array | int, total: jax.Array) -> jax.Array:
            at = i * width + jnp.arange(width, dtype=jnp.int32)
            mask = (at < chunks)[:, None, None] if ragged else None
            where = near[None, :, None], at[:, None, None], word[None, None, :]
            stored = plgpu.load(codes_ref.at[where], mask=mask, other=other)
            where = at[:, None, None], word[None, :, None], number[None, None, :]
            x = plgpu.load(x_ref.at[where], mask=mask, other=other)
            numbers = [n.reshape(width, WORDS).astype(jnp.float32) for n in split(x, per_word)]
            part = jnp.zeros((width, tiles.cols, WORDS), jnp.float32)
            for code, n in zip(codes, numbers, strict=True):
                moved = stored >> code.shift if code.shift >= 0 else stored << -code.shift
                value = jax.lax.bitcast_convert_type((moved & code.mask) ^ (code.bits + nothing), jnp.float32)
                part += value * n[:, None, :]
            sums = [jnp.sum(n, axis=1) for n in numbers]
            added = functools.reduce(jnp.add, (code.added * s for code, s in zip(codes, sums, strict=True)))
            part = jnp.sum(part, axis=2) - added[:, None]
            if group is None:
                return total + part
            of = near[None, :], (jnp.minimum(at, chunks - 1) * span // group)[:, None]
            scale = plgpu.load(scales_ref.at[of]).astype(jnp.float32)
            total += part * scale
            if offsets_ref is not None:
                total += weight.shift(scale, plgpu.load(offsets_ref.at[of])) * functools.reduce(jnp.add, sums)[:, None]
            return total

        def several(i: jax.Array | int, total: jax.Array) -> jax.Array:
            for j in range(unroll):
                total = step(i * unroll + j, total)
            return total

        total = jnp.zeros((width, tiles.cols), jnp.float32)
        total = jax.lax.fori_loop(0, turns, several, total) if turns > 1 else several(0, total)
        result = jnp.sum(total, axis=0)
        if group is None:
            result = result * plgpu.load(scales_ref.at[near]).astype(jnp.float32)
        plgpu.store(out_ref.at[column], result.astype(dtype), mask=column < out if out % tiles.cols else None)

    found: jax.Array = launch(
        quantized_matvec,
        x.reshape(chunks, WORDS, per_word),
        jax.lax.bitcast_convert_type(weight.codes.reshape(out, chunks, WORDS, 4), jnp.int32),
        *(weight.scales, weight.offsets),
        grid=(-(-out // tiles.cols),),
        out=jax.ShapeDtypeStruct((out,), dtype),
        num_warps=tiles.num_warps,
        num_stages=1,
        interpret=interpret,
    )
    return found[None]
