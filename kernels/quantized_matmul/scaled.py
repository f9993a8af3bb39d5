"""The kernel for many rows: scales and offsets multiply the weight itself, in 16 bits, not the sums of its groups.

The more rows, the more sums there are for each scale: with 64 of them, groups of 128 take as many multiplications for
sums as for the weight. Matrix units add up a whole row of the weight without a break, and nothing comes after the loop
but the scales of whole rows. The numbers are those of a weight decoded to the input's dtype.

Bytes are read as words of two. One shift, "and" and "xor" for a pair of words put two codes, of the same place in both,
where a fused multiply-add makes numbers of them (`unpack`). So the parts of a tile have every second or fourth code of
a row, and the input is copied apart in the same way. In words of 16 bits the compiler loads tiles of the weight like
those of a weight that is not quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from llama_jax.kernels.pallas import dot, launch
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.tiles import Tiles
from llama_jax.kernels.quantized_matmul.unpack import FIELDS, FLOATS, WORD, WORD_BYTES, Field

PAIR = 2
"""Bytes of a word."""

Numbers = Callable[[jax.Array, Field, int, list[jax.Array], jnp.dtype], jax.Array]
"""Makes the numbers, in a dtype, of a field of one byte of words [cols, n], by its first bit; given tiles [cols, n] of
that dtype: the factor on the code and, in an asymmetric layout, the summand; none leave the code as it is."""


def product(
    x: jax.Array, weight: Weight, tiles: Tiles, dtype: DTypeLike, numbers: Numbers, *, interpret: bool
) -> jax.Array:
    """x [rows, in] times the weight [out, in]: [rows, out] in `dtype`. Rows are not folded; one group has no offset."""
    layout, rows, (out, row_bytes) = weight.layout, len(x), weight.codes.shape
    assert weight.scales is not None and tiles.fold == 1
    places = [(field, 8 * byte) for byte in range(PAIR) for field in FIELDS[weight.codes.dtype.name]]
    codes = jax.lax.bitcast_convert_type(weight.codes.reshape(out, -1, PAIR), jnp.int16)
    apart = x.reshape(rows, -1, len(places))
    inputs = jnp.concatenate([apart[..., n] for n in range(len(places))])
    inner, group = tiles.inner // PAIR, (layout.group or 0) // len(places)
    groups = max(inner // group, 1) if group else 0
    # Of each program as many: ptxas has matrix units wait for each product of a loop that may have no step.
    steps = -(-row_bytes // (tiles.inner * tiles.splits))
    ragged = steps * tiles.splits * tiles.inner > row_bytes
    of_groups = [array for array in (weight.scales, weight.offsets) if array is not None and group]
    members = [Member.of(array, groups) for array in of_groups]

    def quantized_matmul(x_ref: Any, codes_ref: Any, member_refs: Any, scales_ref: Any, out_ref: Any) -> None:
        column = pl.program_id(0) * tiles.cols + jnp.arange(tiles.cols, dtype=jnp.int32)
        row = pl.program_id(1) * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
        part_of_row = pl.program_id(2)
        first_step = part_of_row * steps
        near_column = jnp.minimum(column, out - 1) if out % tiles.cols else column
        few = row < rows if rows % tiles.rows else None

        def factors(i: jax.Array) -> list[jax.Array]:
            """Factors on the codes of step i, and summands: tiles in the dtype of the input."""
            if not group:
                return []
            first = jax.lax.div(i * inner, jnp.int32(group))
            read = zip(member_refs, members, strict=True)
            found = [member.load(ref, near_column, first, groups, ragged=ragged) for ref, member in read]
            scale, *offset = (one.astype(jnp.float32) for one in found)
            both = [scale, *(weight.shift(scale, one) for one in offset)]
            return [_spread(one.astype(x.dtype), inner) for one in both]

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            i += first_step
            along = i * inner + jnp.arange(inner, dtype=jnp.int32)
            inside = (along < codes_ref.shape[1])[None, :] if ragged else None
            words = _load(codes_ref, near_column, along, inside)
            real = inside if few is None else few[:, None] if inside is None else inside & few[:, None]
            tiles_of_factors = factors(i)
            for n, place in enumerate(places):
                part = numbers(words, *place, tiles_of_factors, x.dtype)
                total += dot(part, _load(x_ref, row + n * rows, along, real), transpose_b=True)
            return total

        zero = jnp.zeros((tiles.cols, tiles.rows), jnp.float32)
        total = jax.lax.fori_loop(0, steps, step, zero)
        if not group:
            total *= plgpu.load(scales_ref.at[near_column]).astype(jnp.float32)[:, None]
        mask = (column < out)[:, None] if out % tiles.cols else None
        mask = mask if few is None else few[None, :] if mask is None else mask & few[None, :]
        at = out_ref.at[part_of_row, row[None, :], column[:, None]]
        plgpu.store(at, total.astype(out_ref.dtype), mask=mask)

    parts = launch(
        quantized_matmul,
        *(inputs, codes, [member.array for member in members], None if group else weight.scales),
        grid=(-(-out // tiles.cols), -(-rows // tiles.rows), tiles.splits),
        out=jax.ShapeDtypeStruct((tiles.splits, rows, out), dtype if tiles.splits == 1 else jnp.float32),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )
    total: jax.Array = parts[0] if tiles.splits == 1 else jnp.sum(parts, axis=0).astype(dtype)
    return total


class Member(NamedTuple):
    """The scales or the offsets of a weight, as a step of the loop reads them.

    The compiler loads four bytes ahead, not fewer: where a step has one group, a word is read that holds its number.

    Attributes:
      array: [out, groups], or int32 [out, groups / packed].
      packed: numbers in one of `array`.
      dtype: of a number.
    """

    array: jax.Array
    packed: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, array: jax.Array, groups: int) -> Member:
        """Of [out, groups of a row], where a step has `groups`."""
        packed = WORD_BYTES // array.dtype.itemsize
        if groups > 1 or packed == 1 or array.shape[1] % packed:
            return cls(array, 1, array.dtype)
        words = jax.lax.bitcast_convert_type(array.reshape(len(array), -1, packed), WORD)
        return cls(words, packed, array.dtype)

    def load(self, ref: Any, row: jax.Array, first: jax.Array, groups: int, *, ragged: bool) -> jax.Array:
        """[n, groups] for rows [n]; where `ragged` says that there may be less of them, 0 or of any group."""
        last = self.array.shape[1]
        if groups > 1:
            along = first + jnp.arange(groups, dtype=jnp.int32)
            return _load(ref, row, along, (along < last)[None, :] if ragged else None)
        packed = jnp.int32(self.packed)
        number = plgpu.load(ref.at[row, jnp.minimum(jax.lax.div(first, packed), last - 1)])
        if self.packed > 1:
            place = jax.lax.rem(first, packed) * (8 * self.dtype.itemsize)
            number = jax.lax.shift_right_logical(number, jnp.broadcast_to(place, number.shape))
            number = number.astype(f"int{8 * self.dtype.itemsize}")
            number = jax.lax.bitcast_convert_type(number, self.dtype)
        return number[:, None]


def _load(ref: Any, row: jax.Array, along: jax.Array, mask: jax.Array | None) -> jax.Array:
    return plgpu.load(ref.at[row[:, None], along[None, :]], mask=mask, other=None if mask is None else 0)


def _spread(of_groups: jax.Array, width: int) -> jax.Array:
    """[cols, groups] -> [cols, width]: each for as many neighbours."""
    cols, groups = of_groups.shape
    if groups == 1:
        return jnp.broadcast_to(of_groups, (cols, width))
    return jnp.broadcast_to(of_groups[:, :, None], (cols, groups, width // groups)).reshape(cols, width)


def plain(words: jax.Array, field: Field, place: int, factors: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """`Numbers` by plain operations."""
    bits = (words.astype(jnp.int32) >> place & field.mask) ^ field.flip
    value = (bits * field.step - field.zero).astype(jnp.float32)
    if factors:
        scale, *shift = (factor.astype(jnp.float32) for factor in factors)
        value = sum(shift, value * scale)
    return value.astype(dtype)


_TWO = """{{
    .reg .b32 codes, flip, factor, zero, unit;
    mov.b32 flip, {flip};
    mov.b32 factor, {factor};
    mov.b32 zero, {zero};
    mov.b32 unit, {unit};
    shr.b32 codes, $1, {place};
    lop3.b32 codes, codes, {mask}, flip, 0x6a;
    fma.rn.{name}x2 codes, codes, factor, zero;
    {last}
}}"""
_LAST = (
    "mul.rn.{name}x2 $0, codes, unit;",
    "mul.rn.{name}x2 unit, $2, unit; mul.rn.{name}x2 $0, codes, unit;",
    "mul.rn.{name}x2 unit, $2, unit; fma.rn.{name}x2 $0, codes, unit, $3;",
)
# Two words $1 to two numbers $0. "lop3" is (codes & mask) ^ flip; the assembler multiplies by the unit once for a row.
# The last instructions are by the number of factors.


def nvidia(words: jax.Array, field: Field, place: int, factors: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    """`Numbers` by instructions of NVIDIA's GPUs, two at a time."""
    kind = FLOATS[dtype.name]
    factor, zero, unit = (int(np.asarray(x, dtype).view(np.uint16)) for x in (*kind.multiply_add(field), kind.unit))
    bits = {"mask": field.mask, "flip": field.flip, "factor": factor, "zero": zero, "unit": unit}
    asm = _TWO.format(
        name=kind.name,
        place=place,
        last=_LAST[len(factors)].format(name=kind.name),
        **{name: f"{x * 0x00010001:#x}" for name, x in bits.items()},
    )
    (made,) = plgpu.elementwise_inline_asm(
        asm,
        args=[words, *factors],
        constraints=",".join(["=r", "r", *["r"] * len(factors)]),
        pack=PAIR,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, dtype)],
    )
    numbers: jax.Array = made
    return numbers
