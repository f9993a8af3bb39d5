"""A quantised weight times rows by matrix units: tiles of it are decoded in registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.pallas import dot, launch
from llama_jax.kernels.quantized_matmul.operands import Weight
from llama_jax.kernels.quantized_matmul.tiles import Tiles

# 16-bit floats whose last bits count by 1, with the sign of two's complement turned to what is counted from -8.
_MAGIC = {"bfloat16": (0x4308, 128 + 8), "float16": (0x6408, 1024 + 8)}


def unpacked(codes: jax.Array, dtype: Any, upper: bool) -> tuple[list[jax.Array], int]:
    """Codes in a 16-bit dtype, of int4 the first and the second of every byte, and what has been added to each."""
    if codes.dtype == jnp.int8:
        if upper:
            bits = jax.lax.bitcast_convert_type(codes.astype(jnp.float32), jnp.int32)
            return [jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.int16), dtype)], 0
        return [codes.astype(dtype)], 0
    bits, added = _MAGIC[jnp.dtype(dtype).name]
    wide = codes.astype(jnp.int16)
    parts = [jax.lax.bitcast_convert_type(part ^ bits, dtype) for part in (wide & 15, wide >> 4)]
    return parts, added


def product(x: jax.Array, weight: Weight, tiles: Tiles, dtype: Any, *, interpret: bool, upper: bool = True) -> jax.Array:
    """x [rows, in] times the weight [out, in]: [rows, out] in `dtype`."""
    rows, out, row_bytes = x.shape[0], *weight.codes.shape
    per_byte, grouped = weight.layout.per_byte, weight.layout.group is not None
    inner = min(tiles.inner, weight.layout.group // per_byte) if grouped else tiles.inner
    in_group = weight.layout.group // per_byte // inner if grouped else 1  # steps of a group
    steps = -(-row_bytes // inner)
    share = -(-steps // tiles.splits)
    span = inner * per_byte

    def quantized_matmul(x_ref: Any, codes_ref: Any, scales_ref: Any, offsets_ref: Any, out_ref: Any) -> None:
        column = pl.program_id(0) * tiles.cols + jnp.arange(tiles.cols, dtype=jnp.int32)
        row = pl.program_id(1) * tiles.rows + jnp.arange(tiles.rows, dtype=jnp.int32)
        split = pl.program_id(2)
        real_column, real_row = column, row
        if out % tiles.cols:
            column = jnp.minimum(column, out - 1)
        if rows % tiles.rows:
            row = jnp.minimum(row, rows - 1)

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            at = i * inner + jnp.arange(inner, dtype=jnp.int32)
            numbers = i * span + jnp.arange(span, dtype=jnp.int32)
            ragged = row_bytes % inner
            codes = plgpu.load(
                codes_ref.at[column[:, None], at[None, :]],
                mask=(at < row_bytes)[None, :] if ragged else None,
                other=0 if ragged else None,
            )
            n = plgpu.load(
                x_ref.at[row[:, None], numbers[None, :]],
                mask=(numbers < x.shape[1])[None, :] if ragged else None,
                other=0 if ragged else None,
            )
            parts, added = unpacked(codes, x.dtype, upper)
            inputs = [n] if per_byte == 1 else jnp.unstack(n.reshape(tiles.rows, inner, 2), axis=-1)
            part = sum(dot(w, y, transpose_b=True) for w, y in zip(parts, inputs, strict=True))
            if not grouped:
                return total + part
            group = i // in_group
            scale = plgpu.load(scales_ref.at[column, group]).astype(jnp.float32)
            if added:
                sums = jnp.sum(n.astype(jnp.float32), axis=1)[None, :]
                part = part - added * sums
            total = total + part * scale[:, None]
            if offsets_ref is not None:
                shift = weight.shift(scale, plgpu.load(offsets_ref.at[column, group]))
                total = total + shift[:, None] * sums
            return total

        start = split * share
        stop = jnp.minimum(start + share, steps) if steps % tiles.splits else start + share
        total = jax.lax.fori_loop(start, stop, step, jnp.zeros((tiles.cols, tiles.rows), jnp.float32))
        if not grouped:
            total = total * plgpu.load(scales_ref.at[column]).astype(jnp.float32)[:, None]
        mask = None
        if out % tiles.cols or rows % tiles.rows:
            mask = (real_column < out)[:, None] & (real_row < rows)[None, :]
        plgpu.store(out_ref.at[split, real_row[None, :], real_column[:, None]], total.astype(out_ref.dtype), mask=mask)

    parts = launch(
        quantized_matmul,
        x,
        weight.codes,
        weight.scales,
        weight.offsets,
        grid=(-(-out // tiles.cols), -(-rows // tiles.rows), tiles.splits),
        out=jax.ShapeDtypeStruct((tiles.splits, rows, out), dtype if tiles.splits == 1 else jnp.float32),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )
    return parts[0] if tiles.splits == 1 else jnp.sum(parts, axis=0).astype(dtype)
