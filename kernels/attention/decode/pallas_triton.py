"""Decode attention on any GPU through Pallas-Triton: tiles, limits and the entry point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.reference import Visibility
from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.targets import Target, current


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      block_k: slots that a program reads at a time.
      block_rows: most query rows (group times queries) of one program.
      num_warps, num_stages: of Triton.
      programs_per_unit: programs aimed at for each compute unit of the device, over all heads and rows.
    """

    block_k: int
    block_rows: int
    num_warps: int
    num_stages: int
    programs_per_unit: int


def default_tiles(target: Target, *, head_dim: int, rows: int, itemsize: int) -> Tiles:
    return Tiles(64, 64, 4, 1, 4)


def unsupported(target: Target, q: jax.Array, k: jax.Array, *args: Any, **kwargs: Any) -> str | None:
    return None


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
    """See `llama_jax.kernels.attention.attention`."""
    from llama_jax.kernels.attention.decode.kernel import decode

    target = current()
    group = q.shape[2] // k.shape[1]
    if tiles is None:
        tiles = default_tiles(target, head_dim=q.shape[3], rows=group * q.shape[1], itemsize=k.dtype.itemsize)
    rows = group * q.shape[1]
    blocks = -(-rows // min(tiles.block_rows, max(16, next_power_of_2(rows))))
    wanted = max(target.compute_units * tiles.programs_per_unit // (k.shape[1] * blocks), 1)
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
        wanted=wanted,
        interpret=interpret,
    )
