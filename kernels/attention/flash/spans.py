"""The blocks of slots that a block of queries needs: causal order, windows, padding and packing as one rule.

What a query sees is an interval of positions, `visible_from(position) .. position`. From the least and the greatest
position in each block follows, for each pair of blocks, whether any query sees any slot, and whether every query sees
every slot. Kernels skip the pairs of the first kind that have none, and need no mask for those of the second.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.records import Places, Visibility

EMPTY = 2**30
"""Beyond every position: the position of a slot that no query sees."""


def visible_from(positions: jax.Array, visibility: Visibility) -> jax.Array:
    """The first position that queries at these positions see; the last is their own."""
    if visibility.kind == "sliding":
        return positions - (visibility.window - 1)
    if visibility.kind == "chunked":
        return positions - jax.lax.rem(positions, jnp.full_like(positions, visibility.window))
    return jnp.zeros_like(positions)


def _in_blocks(x: jax.Array, block: int) -> jax.Array:
    """[batch, len] as [batch, blocks, block], filled up with -1."""
    batch, length = x.shape
    return jnp.pad(x, ((0, 0), (0, -length % block)), constant_values=-1).reshape(batch, -1, block)


def block_pairs(places: Places, visibility: Visibility, block_q: int, block_k: int) -> tuple[jax.Array, jax.Array]:
    """Returns whether some query of a block may see some slot of a block, and whether all queries see all of its slots.

    "Some" errs on the side of yes. Padding queries and queries beyond the last are left out of account: they may see
    anything. A block that reaches beyond the last slot is never seen whole.

    Returns:
      bool [batch, query blocks, slot blocks], twice.
    """
    q, kv = _in_blocks(places.q_positions, block_q), _in_blocks(places.kv_positions, block_k)
    real, filled = q >= 0, kv >= 0

    def bounds(x: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.min(jnp.where(keep, x, EMPTY), axis=2), jnp.max(jnp.where(keep, x, -EMPTY), axis=2)

    q_min, q_max = (x[:, :, None] for x in bounds(q, real))
    from_min, from_max = (x[:, :, None] for x in bounds(visible_from(q, visibility), real))
    kv_min, kv_max = (x[:, None, :] for x in bounds(kv, filled))
    some = (kv_min <= q_max) & (kv_max >= from_min)
    every = (kv_max <= q_min) & (kv_min >= from_max) & jnp.all(filled, axis=2)[:, None, :]
    if places.q_segments is not None and places.kv_segments is not None:
        q_first, q_last = (x[:, :, None] for x in bounds(_in_blocks(places.q_segments, block_q), real))
        kv_first, kv_last = (x[:, None, :] for x in bounds(_in_blocks(places.kv_segments, block_k), filled))
        some &= (q_first <= kv_last) & (kv_first <= q_last)
        every &= (q_first == q_last) & (kv_first == kv_last) & (q_first == kv_first)
    return some, some & every


def spans(some: jax.Array, every: jax.Array) -> jax.Array:
    """The blocks to visit: int32 [..., 4], (first, whole_first, whole_last, last) for bool [..., blocks].

    Blocks first <= i < last hold everything that is visible; those with whole_first <= i < whole_last need no mask.
    """
    count = some.shape[-1]
    index = jnp.arange(count, dtype=jnp.int32)
    first = jnp.min(jnp.where(some, index, count), axis=-1)
    last = jnp.max(jnp.where(some, index + 1, 0), axis=-1)
    whole_first = jnp.min(jnp.where(every, index, last[..., None]), axis=-1)
    ends = ~every & (index >= whole_first[..., None])
    whole_last = jnp.minimum(jnp.min(jnp.where(ends, index, count), axis=-1), last)
    return jnp.stack([jnp.minimum(first, last), whole_first, whole_last, last], axis=-1)
