"""A quantised weight times rows by matrix units: tiles of it are decoded in registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from llama_jax.kernels.pallas import dot, launch
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.tiles import Tiles

# 16-bit floats whose last bit counts 1, with the sign of two's complement turned to what is counted from -8; and what
# they are more than the code.
_MAGIC = {"bfloat16": (0x4308, 128 + 8), "float16": (0x6408, 1024 + 8)}


def halves(codes: jax.Array) -> list[jax.Array]:
    """Codes of eight bits as they are; of four, the first and the second of every byte, as int32."""
    if codes.dtype == jnp.int8:
        return [codes]
    wide = codes.astype(jnp.int32)
    return [wide << 28 >> 28, wide << 24 >> 28]


def through_float32(codes: jax.Array, zeros: jax.Array | None) -> list[jax.Array]:
    """bfloat16 codes [cols, inner], less zeros [cols, 1] float32: the upper half of a float32, which so small a whole
    number fills. For targets that do not compute with bfloat16."""

    def upper(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) >> 16
        return jax.lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.bfloat16)

    wide = [half.astype(jnp.float32) for half in halves(codes)]
    return [upper(x if zeros is None else x - zeros) for x in wide]


def directly(codes: jax.Array, zeros: jax.Array | None, dtype: DTypeLike) -> list[jax.Array]:
    """Codes [cols, inner] in a 16-bit dtype, less zeros [cols, 1] float32. All differences on the way are exact."""
    if codes.dtype == jnp.int8:
        return [codes.astype(dtype)]
    bits, added = _MAGIC[jnp.dtype(dtype).name]
    wide = codes.astype(jnp.int16)
    large = [jax.lax.bitcast_convert_type(half ^ bits, dtype) for half in (wide & 15, wide >> 4)]
    exact = [x - jnp.asarray(added, dtype) for x in large]
    return exact if zeros is None else [x - zeros.astype(dtype) for x in exact]


def product(
    x: jax.Array, weight: Weight, tiles: Tiles, dtype: DTypeLike, *, by_float32: bool, interpret: bool
) -> jax.Array:
    """x [rows, in] times the weight [out, in]: [rows, out] in `dtype`.

    Args:
      by_float32: whether codes become bfloat16 by way of float32.
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
            codes = load(codes_ref, near_column, i * inner, inner, row_bytes)
            n = load(x_ref, near_row, i * span, span, x.shape[1])
            scale = zeros = shift = None
            if group is not None:
                at = near_column, i * span // group
                scale = plgpu.load(scales_ref.at[at]).astype(jnp.float32)
                if offset == "zero":
                    zeros = plgpu.load(offsets_ref.at[at]).astype(jnp.float32)[:, None]
                elif offset == "min":
                    shift = weight.shift(scale, plgpu.load(offsets_ref.at[at]))
            parts = through_float32(codes, zeros) if by_float32 else directly(codes, zeros, x.dtype)
            inputs = [n] if per_byte == 1 else jnp.unstack(n.reshape(tiles.rows, inner, 2), axis=-1)
            part = sum(dot(w, y, transpose_b=True) for w, y in zip(parts, inputs, strict=True))
            total += part if scale is None else part * scale[:, None]
            if shift is not None:
                total += shift[:, None] * jnp.sum(n.astype(jnp.float32), axis=1)[None, :]
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
