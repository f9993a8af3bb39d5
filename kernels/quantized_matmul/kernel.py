"""The kernel: rows times a quantised weight by matrix units; tiles of the weight are decoded in registers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from llama_jax.kernels.pallas import dot, launch
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.tiles import Tiles
from llama_jax.kernels.quantized_matmul.unpack import Unpack


def product(
    x: jax.Array, weight: Weight, tiles: Tiles, dtype: DTypeLike, unpack: Unpack, *, interpret: bool
) -> jax.Array:
    """x [rows, in] times the weight [out, in]: [rows, out] in `dtype`.

    Scales of groups multiply the partial sums of a step, which never reaches into a second group; minima are multiplied
    with sums of the input, zeros subtracted from the codes.
    """
    rows, out, row_bytes = x.shape[0], *weight.codes.shape
    group, per_byte, offset = weight.layout.group, weight.layout.per_byte, weight.layout.offset
    inner = tiles.inner if group is None else min(tiles.inner, group // per_byte)
    span = inner * per_byte
    steps = -(-row_bytes // inner)
    share = -(-steps // tiles.splits)
    ragged, other = (True, 0) if row_bytes % inner else (False, None)

    def quantized_matmul(x_ref: Any, codes_ref: Any, scales_ref: Any, offsets_ref: Any, out_ref: Any) -> None:
        column = pl.program_id(0) * tiles.cols + jnp.arange(tiles.cols, dtype=jnp.int32)
        row = pl.program_id(1) * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
        part_of_row = pl.program_id(2)
        near_column = jnp.minimum(column, out - 1) if out % tiles.cols else column
        near_row = jnp.minimum(row, rows - 1) if rows % tiles.rows else row

        def load(ref: Any, at: jax.Array, first: jax.Array, width: int, end: int) -> jax.Array:
            along = first + jnp.arange(width, dtype=jnp.int32)
            mask = (along < end)[None, :] if ragged else None
            return plgpu.load(ref.at[at[:, None], along[None, :]], mask=mask, other=other)

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            parts = unpack(load(codes_ref, near_column, i * inner, inner, row_bytes), x.dtype)
            n = load(x_ref, near_row, i * span, span, x.shape[1])
            inputs = [n] if per_byte == 1 else jnp.unstack(n.reshape(tiles.rows, inner, 2), axis=-1)
            at = (near_column, i * span // group) if group else ()
            if offset == "zero":
                zeros = plgpu.load(offsets_ref.at[at]).astype(x.dtype)[:, None]
                parts = [part - zeros for part in parts]
            products = [dot(w, y, transpose_b=True) for w, y in zip(parts, inputs, strict=True)]
            part = functools.reduce(jnp.add, products)
            if group is None:
                return total + part
            scale = plgpu.load(scales_ref.at[at]).astype(jnp.float32)
            total += part * scale[:, None]
            if offset == "min":
                sums = jnp.sum(n.astype(jnp.float32), axis=1)
                total += weight.shift(scale, plgpu.load(offsets_ref.at[at]))[:, None] * sums[None, :]
            return total

        start = part_of_row * share
        stop = jnp.minimum(start + share, steps) if steps % tiles.splits else start + share
        total = jax.lax.fori_loop(start, stop, step, jnp.zeros((tiles.cols, tiles.rows), jnp.float32))
        if group is None:
            total = total * plgpu.load(scales_ref.at[near_column]).astype(jnp.float32)[:, None]
        real = None
        if out % tiles.cols or rows % tiles.rows:
            real = (column < out)[:, None] & (row < rows)[None, :]
        at = out_ref.at[part_of_row, row[None, :], column[:, None]]
        plgpu.store(at, total.astype(out_ref.dtype), mask=real)

    parts = launch(
        quantized_matmul,
        *(x, weight.codes, weight.scales, weight.offsets),
        grid=(-(-out // tiles.cols), -(-rows // tiles.rows), tiles.splits),
        out=jax.ShapeDtypeStruct((tiles.splits, rows, out), dtype if tiles.splits == 1 else jnp.float32),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )
    return parts[0] if tiles.splits == 1 else jnp.sum(parts, axis=0).astype(dtype)
