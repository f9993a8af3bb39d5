"""Decode attention on any GPU through Pallas-Triton: what it takes, and the call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.decode.kernel import decode
from llama_jax.kernels.attention.decode.tiles import Tiles, block_rows, default_tiles
from llama_jax.kernels.attention.reference import Visibility
from llama_jax.targets import Target, current

DTYPES = ("bfloat16", "float16", "float32")


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    page_table: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`.

    Not differentiable. Slots that nothing sees may be read, as padding of a block: what they hold must be finite.

    Args:
      tiles: default: `default_tiles` of the current target.
      interpret: runs as plain JAX operations, on any device.
    """
    target = current()
    rows = q.shape[2] // k.shape[1] * q.shape[1]
    if tiles is None:
        itemsize = max(q.dtype.itemsize, k.dtype.itemsize)
        tiles = default_tiles(target, rows=rows, head_dim=q.shape[3], itemsize=itemsize)
    programs = k.shape[1] * -(-rows // block_rows(rows))
    return decode(
        q,
        k,
        v,
        q_positions,
        kv_positions,
        visibility,
        scale=scale,
        soft_cap=soft_cap,
        sinks=sinks,
        q_segments=q_segments,
        kv_segments=kv_segments,
        page_table=page_table,
        tiles=tiles,
        wanted=max(target.compute_units * tiles.programs_per_unit // programs, 1),
        interpret=interpret,
    )
