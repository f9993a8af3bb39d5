"""The kernel: rows times a weight by matrix units; tiles of a quantised one are decoded in registers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from llama_jax.errors import KernelError
from llama_jax.kernels.pallas import dot, launch, load_tile, next_power_of_2
from llama_jax.kernels.quantized_matmul.folding import apart, parted, unfolded
from llama_jax.kernels.quantized_matmul.groups import Groups
from llama_jax.kernels.quantized_matmul.operands import SQUARED, Weight
from llama_jax.kernels.quantized_matmul.shifts import RowShifts, Shifts, shifts_of
from llama_jax.kernels.quantized_matmul.tiles import TOGETHER_BELOW, Tiles
from llama_jax.kernels.quantized_matmul.unpack import Unpack


@dataclass(frozen=True)
class Around:
    """The operations around a product that its kernel does too; those that are None are left out.

    Attributes:
      squares: float32 [rows, n] that add up to the sum of squares of the input's rows before a norm's gain: the result
        is divided by their root mean square, a mean over the `in` columns of the input, to which `eps` is added.
      activation: the weight has rows of gates, and below as many others; the result is activation(gate) * other.
      residual: [rows, out] to add. gain: [out], of the norm that follows.
    """

    squares: jax.Array | None = None
    eps: float = 0.0
    activation: Callable[[jax.Array], jax.Array] | None = None
    residual: jax.Array | None = None
    gain: jax.Array | None = None


NOTHING = Around()


def product(
    x: jax.Array, weight: Weight, tiles: Tiles, dtype: DTypeLike, unpack: Unpack, *, interpret: bool
) -> jax.Array:
    """x [rows, in] times the weight [out, in]: [rows, out] in `dtype`."""
    return fused_product(x, weight, tiles, dtype, unpack, NOTHING, interpret=interpret)[0]


def fused_product(
    x: jax.Array, weight: Weight, tiles: Tiles, dtype: DTypeLike, unpack: Unpack, around: Around, *, interpret: bool
) -> tuple[jax.Array, ...]:
    """The product and what is `around` it: [rows, out] in `dtype`; behind an activation half as many columns.

    With a residual that is the sum, and two more follow: the sum times the gain, like it; and float32 [rows, n], sums
    of its squares, one of each program, which every program of the next product reads (or of SQUARED neighbours, where
    programs have unequal parts of a row).

    A step of the loop reads `tiles.inner` bytes of each row of the weight. Scales of groups multiply partial sums, in
    float32. They are loaded a step ahead: matrix units do not take them, so the compiler would wait for them in every
    step. Offsets multiply the sums of the input, after the loop (`shifts`) or like scales.

    A step is split into pieces no longer than a group, each with its own product. Where groups are small,
    a single row has the rows of the tile to itself: each holds the numbers of one group and zeros elsewhere, so that
    one product gives the sums of all groups of a step.

    A row of the weight cut into `tiles.fold` parts is as many rows, and so is a row of the input: a part of one has its
    own row of the tile, which few rows leave empty, and meets all parts of the other there. What parts of the same
    place gave is summed up. So more waves share a row, without a kernel more.

    Raises:
      KernelError: a step has more groups than the tile has rows.
    """
    fold, size = tiles.fold, x.shape[1]
    parts_of_out = 1 if around.activation is None else 2
    columns = len(weight.codes) // parts_of_out
    x, weight = x.reshape(fold * len(x), -1), weight.folded(fold)
    rows, out, row_bytes = x.shape[0], *weight.codes.shape
    group, per_byte, offset = weight.layout.group, weight.layout.per_byte, weight.layout.offset
    # Columns that one of the parts of the result has, and a program of each; counted with those that are folded.
    out, width = out // parts_of_out, tiles.cols // parts_of_out
    squared = width // fold if columns % (width // fold) == 0 else SQUARED
    codes, inputs = unpack.stored(weight.codes, x)
    # Bytes, and numbers of the input, that one number of these arrays holds.
    word, pair = row_bytes // codes.shape[1], x.shape[1] // inputs.shape[1]
    unit, added = unpack.unit(x.dtype), unpack.added(codes.dtype, x.dtype)
    # What products with the numbers of codes lack is added after the loop, or in it by products with ones.
    shifted, alone = bool(offset or added), rows == fold
    shifts = shifts_of(weight, x, fold, added, several=unpack.sums_apart) if shifted else None
    spread = rows == 1 and group is not None and group < TOGETHER_BELOW
    piece = min(tiles.inner, group // per_byte if group and not spread else tiles.inner) // word
    pieces, span = tiles.inner // word // piece, piece * word * per_byte // pair
    window = tiles.rows
    if spread and tiles.inner * per_byte > window * (group or 1):
        raise KernelError(
            f"tiles of {tiles.inner} bytes have more than {window} groups of {group}",
            hint="make inner smaller, or leave the tiles to default_tiles",
        )
    scales, offsets, read = weight.scales, None if shifts else weight.offsets, []
    if group and not spread:
        read = [Groups.of(array, pieces) for array in (scales, offsets) if array is not None]
        scales, offsets = (*(way.array for way in read), None)[:2]
    steps = -(-row_bytes // tiles.inner)
    share = -(-steps // tiles.splits)
    ragged = row_bytes % tiles.inner > 0

    def quantized_matmul(
        x_ref: Any,
        codes_ref: Any,
        scales_ref: Any,
        offsets_ref: Any,
        shift_refs: Any,
        squares_ref: Any,
        residual_ref: Any,
        gain_ref: Any,
        out_ref: Any,
        gained_ref: Any,
        sums_ref: Any,
    ) -> None:
        place = jnp.arange(tiles.cols, dtype=jnp.int32)
        row = pl.program_id(1) * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
        part_of_row = pl.program_id(2)
        # Folded rows of one row of the weight are neighbours, and beside them are those of its row in the other part.
        within, of_out = (place, 0) if parts_of_out == 1 else parted(place, fold, parts_of_out)
        near_column = pl.program_id(0) * width + within
        near_column = jnp.minimum(near_column, out - 1) if out % width else near_column
        near_column += of_out * out
        grouped = [ref for ref in (scales_ref, offsets_ref) if ref is not None and group]

        def load(ref: Any, at: jax.Array, along: jax.Array, mask: jax.Array | None) -> jax.Array:
            if ragged:
                inside = (along < ref.shape[1])[None, :]
                mask = inside if mask is None else mask & inside
            return plgpu.load(ref.at[at[:, None], along[None, :]], mask=mask, other=None if mask is None else 0)

        def load_codes(first: jax.Array) -> jax.Array:
            return load(codes_ref, near_column, first + jnp.arange(piece, dtype=jnp.int32), None)

        def load_x(first: jax.Array) -> jax.Array:
            along = first + jnp.arange(span, dtype=jnp.int32)
            if spread:
                of_group = jax.lax.rem(
                    jax.lax.div(along, jnp.full_like(along, (group or 1) // pair)), jnp.full_like(along, window)
                )
                return load(x_ref, row * 0, along, of_group[None, :] == row[:, None])
            return load(x_ref, row, along, (row < rows)[:, None] if rows % tiles.rows else None)

        def first_group(i: jax.Array) -> jax.Array:
            return i * (tiles.inner * per_byte) // group if group else i * 0

        def of_groups(i: jax.Array, known: list[jax.Array]) -> list[jax.Array]:
            """Scales, and offsets if there are any, that step i needs: [cols] of each piece, or those of all groups in
            the tile, [cols, window]: where these are `known`, those of the step before, nothing is read."""
            if not spread:
                ways = zip(grouped, read, strict=True)
                return [one for ref, way in ways for one in way.load(ref, near_column, first_group(i), pieces)]
            first = first_group(i) // window * window
            along = (first + jnp.arange(window, dtype=jnp.int32))[None, :]
            found = []
            for n, ref in enumerate(grouped):
                mask = along < ref.shape[1]
                if known:
                    mask &= first_group(i - 1) // window * window != first
                other = known[n] if known else 0
                found.append(plgpu.load(ref.at[near_column[:, None], along], mask=mask, other=other))
            return found

        def of_piece(now: list[jax.Array], k: int) -> list[jax.Array]:
            """The scale and the offset of a step's k-th piece."""
            if spread:
                return now
            starts = itertools.accumulate((way.vectors(pieces) for way in read), initial=0)
            return [way.group(now[start:], k) for start, way in zip(starts, read, strict=False)]

        def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            total, *now = carry
            ahead = of_groups(i + 1, now)
            words = [load_codes((i * pieces + k) * piece) for k in range(pieces)]
            numbers = [load_x((i * pieces + k) * span) for k in range(pieces)]
            for k in range(pieces):
                parts = unpack.parts(words[k], x.dtype)
                factors = unpack.factors(len(parts), numbers[k], x.dtype)
                part = _products(parts, factors)
                values = [each.astype(jnp.float32).reshape(tiles.cols, -1) for each in of_piece(now, k)]
                scale = values[0] if values else 1.0
                total += part * (scale * unit) if values else part
                if shifted and not shifts:
                    sums = _products([jnp.ones_like(parts[0])] * len(parts), factors)
                    more = weight.shift(values[0], values[1]) if offset else 0.0
                    total += (more - added * scale) * sums
            return total, *ahead

        # The part of the result that this program writes, and what is beside it.
        height = 1 if spread else tiles.rows // fold
        out_row = pl.program_id(1) * height + jnp.arange(height, dtype=jnp.int32)
        column = pl.program_id(0) * (width // fold) + jnp.arange(width // fold, dtype=jnp.int32)
        few = None if spread or rows % tiles.rows == 0 else out_row < rows // fold
        real = None
        if out % width or few is not None:
            real = (column < columns)[:, None]
            real = real if few is None else real & few[None, :]

        def at(ref: Any) -> Any:
            return ref.at[out_row[None, :], column[:, None]]

        def read_squares() -> jax.Array:
            row, mask = (jnp.zeros(1, jnp.int32), None) if alone else (out_row, few)
            return load_tile(squares_ref, (row,), next_power_of_2(squares_ref.shape[1]), mask)

        def read_residual() -> tuple[jax.Array, jax.Array]:
            residual = plgpu.load(at(residual_ref), mask=real, other=None if real is None else 0)
            return residual, plgpu.load(gain_ref.at[jnp.minimum(column, columns - 1) if out % width else column])

        # Behind the loop a program has nothing to do but wait for these. Where they need few registers, and codes need
        # none, they are read before it.
        early = scales_ref is None
        squares = read_squares() if early and alone and squares_ref is not None else None
        beside = read_residual() if early and residual_ref is not None else None

        # Where it is plain that nothing is negative, AMD's compiler loads by buffer, with no branches around masks.
        start = jnp.clip(part_of_row * share, 0, steps)
        stop = jnp.minimum(start + share, steps)
        carry = (jnp.zeros((tiles.cols, tiles.rows), jnp.float32), *of_groups(start, []))
        total, *_ = jax.lax.fori_loop(start, stop, step, carry)
        if group is None and scales_ref is not None:
            total = total * (plgpu.load(scales_ref.at[near_column // fold]).astype(jnp.float32) * unit)[:, None]
        numbers = [step * tiles.inner * per_byte for step in (start, stop)]
        if isinstance(shifts, Shifts):
            total += shifts.of(shift_refs, near_column, jnp.minimum(row, rows - 1), *numbers)
        if fold > 1:
            total = unfolded(total, place, row, fold)
        if spread:
            total = jnp.sum(total, axis=1)[:, None]
        if isinstance(shifts, RowShifts):
            total += shifts.of(shift_refs, near_column, *numbers)
        if squares_ref is not None:
            squares = read_squares() if squares is None else squares
            total *= jax.lax.rsqrt(jnp.sum(squares, axis=1) * (1 / size) + around.eps)[None, :]
        if around.activation is not None:
            gate, other = apart(total, parts_of_out)
            total = around.activation(gate) * other
        if residual_ref is None:
            out_at = out_ref.at[part_of_row, out_row[None, :], column[:, None]]
            plgpu.store(out_at, total.astype(out_ref.dtype), mask=real)
            return
        residual, gain = read_residual() if beside is None else beside
        total = (total + residual.astype(jnp.float32)).astype(out_ref.dtype)
        plgpu.store(out_ref.at[part_of_row, out_row[None, :], column[:, None]], total, mask=real)
        total = total.astype(jnp.float32)
        plgpu.store(at(gained_ref), (total * gain.astype(jnp.float32)[:, None]).astype(gained_ref.dtype), mask=real)
        squares = total * total if real is None else jnp.where(real, total * total, 0.0)
        sums = jnp.sum(squares.reshape(-1, squared, squares.shape[1]), axis=1)
        first = pl.program_id(0) * len(sums) + jnp.arange(len(sums), dtype=jnp.int32)
        some = None if real is None else (first < columns // squared)[:, None]
        some = some if few is None or some is None else some & few[None, :]
        plgpu.store(sums_ref.at[out_row[None, :], first[:, None]], sums, mask=some)

    if around is not NOTHING:
        quantized_matmul.__name__ = "fused_matmul"
    flat = rows // fold, columns
    adds = around.residual is not None
    parts, *others = launch(
        quantized_matmul,
        *(inputs, codes, scales, offsets, shifts and shifts.arrays, around.squares, around.residual, around.gain),
        grid=(-(-out // width), -(-rows // tiles.rows), tiles.splits),
        out=(
            jax.ShapeDtypeStruct((tiles.splits, *flat), dtype if tiles.splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct(flat, dtype) if adds else None,
            jax.ShapeDtypeStruct((flat[0], columns // squared), jnp.float32) if adds else None,
        ),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )
    total = parts[0] if tiles.splits == 1 else jnp.sum(parts, axis=0).astype(dtype)
    return total, *others


def _products(parts: list[jax.Array], factors: list[jax.Array]) -> jax.Array:
    """The sum of the products of tiles [cols, k] and [rows, k]: [cols, rows]."""
    return functools.reduce(jnp.add, [dot(w, y, transpose_b=True) for w, y in zip(parts, factors, strict=True)])
