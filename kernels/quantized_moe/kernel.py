"""The kernel: pairs of a token and an expert times that expert's quantised weights, which are decoded in registers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.moe.reference import Activation
from llama_jax.kernels.moe.schedule import Schedule
from llama_jax.kernels.pallas import MIN_CONTRACTION, dot, launch
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.unpack import WORD, WORD_BYTES, Words, every
from llama_jax.kernels.quantized_moe.tiles import Tiles


def step_bytes(row_bytes: int, group_bytes: int | None, inner: int) -> int:
    """Bytes of a row that a step reads: a power of two up to `inner` that divides the row, in whole groups or in one;
    0 if there is none that a product could take."""
    size = min(row_bytes & -row_bytes, inner)
    if group_bytes is not None and size % group_bytes and group_bytes % size:
        return 0
    return size


@dataclass(frozen=True)
class Call:
    """One of the two products.

    Attributes:
      name: of the kernel in profiles.
      activation: with it there are two weights, and the result is activation(the first product) * the second.
      splits: programs that share a row of a weight; 1 with an activation.
    """

    name: str
    activation: Activation | None
    splits: int


def grouped_product(
    call: Call,
    x: jax.Array,
    weights: Sequence[Weight],
    columns: int,
    schedule: Schedule,
    scale: jax.Array | None,
    tiles: Tiles,
    unpack: Words,
    *,
    interpret: bool,
) -> jax.Array:
    """x[row of pair] @ w[expert of pair].T * scale[pair], for every (token, choice) pair.

    Scales of groups multiply partial sums, in float32, and offsets the sums of the input.

    Args:
      x: [rows, inner]; pair p reads row p // (pairs // rows).
      weights: one, or two with an activation, of all experts below each other: [experts * columns, inner].
      columns: rows of a weight that each expert has.
      schedule: made with `tiles.rows`.
      scale: float32 [pairs], or None.

    Returns:
      [splits, pairs, columns], float32 with several splits, else in x's dtype; their sum is the product.
    """
    layout, row_bytes = weights[0].layout, weights[0].codes.shape[1]
    group, per_byte, offset, unit = layout.group, layout.per_byte, layout.offset, 1
    pairs = schedule.order.shape[0]
    inner = step_bytes(row_bytes, group // per_byte if group else None, tiles.inner)
    piece = min(inner, group // per_byte if group else inner)
    pieces, span = inner // piece, piece * per_byte
    steps = row_bytes // inner
    share = -(-steps // call.splits)
    codes = [weight.codes for weight in weights]
    if per_byte > 1:
        words = [one.reshape(len(one), -1, WORD_BYTES) for one in codes]
        codes, unit = [jax.lax.bitcast_convert_type(one, WORD) for one in words], WORD_BYTES  # no copy
    more = unpack.added(codes[0].dtype, x.dtype)
    arrays = [(one, weight.scales, weight.offsets) for one, weight in zip(codes, weights, strict=True)]

    def kernel(order: Any, expert: Any, start: Any, end: Any, x_ref: Any, scale_ref: Any, refs: Any, out: Any) -> None:
        tile, block, split = (pl.program_id(axis) for axis in range(3))
        first, last, which = start[tile], end[tile], expert[tile]

        @pl.when(first < last)
        def _() -> None:
            row = first + jnp.arange(tiles.rows, dtype=jnp.int32)
            live = row < last
            # Rows past the end compute pair 0 and store nothing, so that loads of rows need no mask.
            pair = plgpu.load(order.at[row], mask=live, other=0)
            source = pair // (pairs // x.shape[0])
            column = block * tiles.cols + jnp.arange(tiles.cols, dtype=jnp.int32)
            near = jnp.minimum(column, columns - 1) if columns % tiles.cols else column
            line = which * columns + near

            def added(i: jax.Array, total: jax.Array, ref: tuple[Any, Any, Any], weight: Weight) -> jax.Array:
                """The sum with step i's products."""
                codes_ref, scales_ref, offsets_ref = ref
                for k in range(pieces):
                    at = (i * pieces + k) * (piece // unit) + jnp.arange(piece // unit, dtype=jnp.int32)
                    along = (i * pieces + k) * span + jnp.arange(span, dtype=jnp.int32)
                    numbers = plgpu.load(x_ref.at[source[:, None], along[None, :]])
                    parts = unpack.parts(plgpu.load(codes_ref.at[line[:, None], at[None, :]]), x.dtype)
                    factors = every(len(parts), numbers)
                    part = _products(parts, factors)
                    if not group:
                        total += part
                        if more:
                            total -= more * _products([jnp.ones_like(parts[0])] * len(parts), factors)
                        continue
                    of_group = ((i * pieces + k) * span) // group
                    step_scale = plgpu.load(scales_ref.at[line, of_group]).astype(jnp.float32)[:, None]
                    total += part * step_scale
                    if offset or more:
                        sums = _products([jnp.ones_like(parts[0])] * len(parts), factors)
                        factor = -more * step_scale
                        if offset:
                            factor += weight.shift(
                                step_scale, plgpu.load(offsets_ref.at[line, of_group]).astype(jnp.float32)[:, None]
                            )
                        total += factor * sums
                return total

            def step(i: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                return tuple(added(i, *each) for each in zip(totals, refs, weights, strict=True))

            zero = jnp.zeros((tiles.cols, tiles.rows), jnp.float32)
            begin = jnp.clip(split * share, 0, steps)
            totals = jax.lax.fori_loop(begin, jnp.minimum(begin + share, steps), step, (zero,) * len(weights))
            if not group:
                row_scales = [plgpu.load(ref[1].at[line]).astype(jnp.float32)[:, None] for ref in refs]
                totals = tuple(total * one for total, one in zip(totals, row_scales, strict=True))
            if scale_ref is not None:
                factor = plgpu.load(scale_ref.at[pair])[None, :]
                totals = tuple(total * factor for total in totals)
            result = totals[0] if call.activation is None else call.activation(totals[0]) * totals[1]
            # Interpret mode writes old values where the mask is off: those rows have to be out of range.
            target = jnp.where(live, pair, pairs)[None, :]
            mask = live[None, :] & (column < columns)[:, None] if columns % tiles.cols else live[None, :]
            plgpu.store(
                out.at[split, target, column[:, None]],
                result.astype(out.dtype),
                mask=jnp.broadcast_to(mask, zero.shape),
            )

    kernel.__name__ = call.name
    found: jax.Array = launch(
        kernel,
        *schedule,
        x,
        scale,
        arrays,
        # The first axis runs fastest: tiles of one expert follow one another and share its weights in the cache.
        grid=(schedule.expert.shape[0], -(-columns // tiles.cols), call.splits),
        out=jax.ShapeDtypeStruct((call.splits, pairs, columns), jnp.float32 if call.splits > 1 else x.dtype),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )
    return found


def takes(layout_group: int | None, per_byte: int, row_bytes: int, inner: int) -> bool:
    """Returns whether `grouped_product` can cut rows of this many bytes into steps."""
    group_bytes = layout_group // per_byte if layout_group else None
    size = step_bytes(row_bytes, group_bytes, inner)
    return bool(size) and min(size, group_bytes or size) * per_byte >= 2 * MIN_CONTRACTION


def _products(parts: list[jax.Array], factors: list[jax.Array]) -> jax.Array:
    """The sum of the products of tiles [cols, k] and [rows, k]: [cols, rows]."""
    return functools.reduce(jnp.add, [dot(w, y, transpose_b=True) for w, y in zip(parts, factors, strict=True)])
