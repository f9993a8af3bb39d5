"""The rows that each program of a grouped product computes: ragged groups split into tiles of one expert each."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """Tiles of at most `block_rows` rows, all of one expert, over the (token, choice) pairs sorted by expert.

    A pair's number is token * top_k + choice. Groups are not padded in memory: only the last tile of each expert is
    short. As many tiles are scheduled as any routing could need; those that this one does not need are empty.

    Attributes:
      order: int32 [pairs], the pairs' numbers sorted by expert.
      expert: int32 [tiles], the expert of each tile; some expert for an empty one.
      start, end: int32 [tiles], the rows order[start:end] of each tile; equal for an empty one.
    """

    order: jax.Array
    expert: jax.Array
    start: jax.Array
    end: jax.Array


def tile_count(pairs: int, experts: int, block_rows: int) -> int:
    """The most tiles that `pairs` pairs over `experts` experts need: sum of ceil(group / block_rows), at worst."""
    groups = min(pairs, experts)
    return (pairs + groups * (block_rows - 1)) // block_rows


def schedule(expert_ids: jax.Array, experts: int, block_rows: int) -> Schedule:
    """Sorts the pairs of `expert_ids` int32 [tokens, top_k] by expert and cuts each group into tiles."""
    flat = expert_ids.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = jnp.sum(flat[:, None] == jnp.arange(experts, dtype=flat.dtype), axis=0, dtype=jnp.int32)
    group_end = jnp.cumsum(sizes)
    tiles_end = jnp.cumsum((sizes + block_rows - 1) // block_rows)
    tile = jnp.arange(tile_count(flat.size, experts, block_rows), dtype=jnp.int32)
    # The expert whose tiles include this one: as many experts' tiles end at or before it.
    expert = jnp.sum(tiles_end[None, :] <= tile[:, None], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, experts - 1)
    left = tiles_end[expert] - tile  # tiles of the expert from this one on; <= 0 for an empty tile
    end = group_end[expert]
    start = end - sizes[expert] + ((sizes[expert] + block_rows - 1) // block_rows - left) * block_rows
    start = jnp.where(left > 0, start, end)
    return Schedule(order, expert, start, jnp.minimum(start + block_rows, end))
