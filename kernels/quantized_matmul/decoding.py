"""The kernel that decodes a weight once, for products with enough rows that a library should compute them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from llama_jax.kernels.pallas import launch
from llama_jax.kernels.quantized_matmul.operands import Weight

ROWS = 16
BYTES = 512
"""Of the weight, and of a row of its codes: what a program decodes at most."""
WARPS = 4


def decoded(weight: Weight, dtype: DTypeLike, *, interpret: bool) -> jax.Array:
    """The weight [out, in], computed in float32 and rounded once: `quantized.codes.decode` in one kernel.

    Rows are cut into pieces of equal length that lie in one group each, so that a tile is [rows, pieces, bytes].
    """
    layout, (out, row_bytes) = weight.layout, weight.codes.shape
    group_bytes = layout.group // layout.per_byte if layout.group else row_bytes
    width = min(group_bytes & -group_bytes, BYTES)
    pieces, tile = row_bytes // width, BYTES // width

    def decode_weight(codes_ref: Any, scales_ref: Any, offsets_ref: Any, out_ref: Any) -> None:
        row = pl.program_id(0) * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
        piece = pl.program_id(1) * tile + jnp.arange(tile, dtype=jnp.int32)
        inside = ((row < out)[:, None] & (piece < pieces)[None, :])[:, :, None]
        real = None if out % ROWS == 0 and pieces % tile == 0 else inside
        near = jnp.minimum(row, out - 1)[:, None], jnp.minimum(piece, pieces - 1)[None, :]

        def of_groups(ref: Any) -> jax.Array:
            at = (near[0], near[1] * width // group_bytes) if layout.group else (near[0],)
            return plgpu.load(ref.at[at])

        def at(ref: Any) -> Any:
            along = jnp.arange(ref.shape[2], dtype=jnp.int32)
            return ref.at[row[:, None, None], piece[None, :, None], along[None, None, :]]

        codes = plgpu.load(at(codes_ref), mask=real, other=None if real is None else 0)
        if layout.per_byte == 1:
            values = codes.astype(jnp.float32)
        else:
            wide = codes.astype(jnp.int32)
            pair = [(wide << up >> 28).astype(jnp.float32) for up in (28, 24)]
            values = jnp.stack(pair, axis=-1).reshape(ROWS, tile, 2 * width)
        scale = of_groups(scales_ref).astype(jnp.float32)
        values = values * scale[..., None]
        if offsets_ref is not None:
            values += weight.shift(scale, of_groups(offsets_ref))[..., None]
        plgpu.store(at(out_ref), values.astype(out_ref.dtype), mask=real)

    span = width * layout.per_byte
    found = launch(
        decode_weight,
        *(weight.codes.reshape(out, pieces, width), weight.scales, weight.offsets),
        grid=(-(-out // ROWS), -(-pieces // tile)),
        out=jax.ShapeDtypeStruct((out, pieces, span), dtype),
        num_warps=WARPS,
        num_stages=1,
        interpret=interpret,
    )
    decoded: jax.Array = found.reshape(out, pieces * span)
    return decoded
