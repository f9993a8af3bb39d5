"""Decode attention on any GPU through Pallas-Triton."""

from __future__ import annotations

import jax

from llama_jax.kernels.attention.decode.kernel import Call, combine, shares
from llama_jax.kernels.attention.decode.plan import visible_slots
from llama_jax.kernels.attention.decode.tiles import Tiles, default_tiles, padded_rows
from llama_jax.kernels.attention.reference import Visibility
from llama_jax.targets import current


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
    programs = k.shape[1] * -(-rows // padded_rows(rows, tiles.block_rows))
    call = Call(
        batch=q.shape[0],
        queries=q.shape[1],
        group=q.shape[2] // k.shape[1],
        head_dim=q.shape[3],
        slots=kv_positions.shape[1],
        page_size=0 if page_table is None else k.shape[2],
        wanted=max(max(target.compute_units, 1) * tiles.programs_per_unit // programs, 1),
        visibility=visibility,
        scale=scale,
        soft_cap=soft_cap,
        tiles=tiles,
        interpret=interpret,
    )
    ranges = visible_slots(q_positions, kv_positions, visibility)
    part, lse = shares(call, *ranges, q, k, v, q_positions, kv_positions, page_table, q_segments, kv_segments)
    return combine(call, *ranges, part, lse, sinks, jax.ShapeDtypeStruct(q.shape, q.dtype))
