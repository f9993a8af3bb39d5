"""Which part of the cache each program of the decode kernels reads.

The slots of a row that any of its queries may see lie in a range of blocks of `block_k` slots. These ranges, over all
rows of the batch, are cut into shares of equal length, one for each program of a key/value head: however different the
rows' lengths are, every program reads about as many bytes, and none reads what lies before a window or in empty slots.
("Flash-Decoding", https://crfm.stanford.edu/2023/10/12/flashdecoding.html, cuts each row alone.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.records import Visibility


def visible_slots(
    q_positions: jax.Array, kv_positions: jax.Array, visibility: Visibility
) -> tuple[jax.Array, jax.Array]:
    """The slots [first, end) of each row, int32 [batch], among which is everything that any of its queries sees.

    Depends on positions only, so that the layers of a model share one computation, and is one reduction.
    """
    latest = jnp.max(q_positions, axis=1, keepdims=True)
    earliest = jnp.min(jnp.where(q_positions < 0, latest, q_positions), axis=1, keepdims=True)
    see = (kv_positions >= 0) & (kv_positions <= latest)
    if visibility.kind == "sliding":
        see &= earliest - kv_positions < visibility.window
    elif visibility.kind == "chunked":
        see &= kv_positions >= earliest // visibility.window * visibility.window
    slot = jax.lax.broadcasted_iota(jnp.int32, see.shape, 1)
    slots = see.shape[1]

    def widest(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])

    each = jnp.where(see, slot, slots), jnp.where(see, slot + 1, 0)
    return jax.lax.reduce(each, (jnp.int32(slots), jnp.int32(0)), widest, (1,))


def shares(
    first: jax.Array, end: jax.Array, block_k: int, wanted: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cuts the rows' slots into shares of whole blocks, at most `wanted` + batch - 1, each within one row.

    Args:
      first, end: int32 [batch], each row's slots.

    Returns:
      int32 []: the blocks of one share (the last one of a row may have fewer). int32 [batch]: each row's first block;
      how many blocks it has; and in how many shares.
    """
    start = first // block_k
    blocks = jnp.maximum((end + block_k - 1) // block_k - start, 0)
    length = jnp.maximum((jnp.sum(blocks) + wanted - 1) // wanted, 1)
    return length, start, blocks, (blocks + length - 1) // length


def share(
    first: jax.Array, end: jax.Array, block_k: int, wanted: int, index: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The row of share `index` int32 [], and its blocks [start, stop); none if there is no such share."""
    length, start, blocks, count = shares(first, end, block_k, wanted)
    until = jnp.cumsum(count)
    row = jnp.sum((until <= index).astype(jnp.int32))

    def of_row(values: jax.Array) -> jax.Array:
        return total_where(jnp.arange(first.shape[0], dtype=jnp.int32) == row, values)

    skipped = (index - of_row(until - count)) * length
    begin = of_row(start)
    return row, begin + skipped, begin + jnp.minimum(skipped + length, of_row(blocks))


def shares_of(
    first: jax.Array, end: jax.Array, block_k: int, wanted: int, row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The shares [start, stop) of one row."""
    *_, count = shares(first, end, block_k, wanted)
    index = jnp.arange(first.shape[0], dtype=jnp.int32)
    start = total_where(index < row, count)
    return start, start + total_where(index == row, count)


def total_where(condition: jax.Array, values: jax.Array) -> jax.Array:
    """The sum of the values for which the condition holds."""
    return jnp.sum(jnp.where(condition, values, 0))
