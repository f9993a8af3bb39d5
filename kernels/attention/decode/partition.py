"""The part of the cache that each program of the decode kernels reads.

The slots of a row that any of its queries may see lie in a range of blocks of `block_k` slots. These ranges, over all
rows of the batch, are cut into shares of about equal length, one for each program of a key/value head: however
different the rows' lengths are, every program reads about as many bytes, and none reads what lies before a window or in
empty slots. Where a row's result must not depend on the others (`Rule.batch_invariant`), shares have a fixed length.
("Flash-Decoding", https://crfm.stanford.edu/2023/10/12/flashdecoding.html, cuts each row alone.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.records import Visibility

LEAST_FIXED, MOST_FIXED = 512, 32
"""Slots of a share of fixed length, at least, and such shares of a row, at most."""


@dataclass(frozen=True)
class Cut:
    """The split of the rows' slots into shares.

    Attributes:
      block_k: slots of a block.
      wanted: shares to make of all rows.
      length: blocks of a share, whatever is wanted, but for the last of a row; 0 for shares of a row that differ by one
        block at most, and are as many as are wanted.
    """

    block_k: int
    wanted: int
    length: int = 0

    def most_shares(self, batch: int, slots: int) -> int:
        """As many shares as there can be of `batch` rows of `slots`."""
        blocks = -(-slots // self.block_k)
        if self.length:
            return batch * -(-blocks // self.length)
        return min(self.wanted + batch - 1, batch * blocks)


def fixed_length(slots: int, block_k: int) -> int:
    """Blocks of a share of fixed length for rows of `slots`. It follows from the room that rows have, not from what is
    in them: long shares leave a GPU idle where there are few rows, and many shares of long rows cost memory."""
    return -(-max(LEAST_FIXED, -(-slots // MOST_FIXED)) // block_k)


def visible_slots(
    q_positions: jax.Array, kv_positions: jax.Array, visibility: Visibility
) -> tuple[jax.Array, jax.Array]:
    """The slots [first, end) of each row, int32 [batch], that contain everything any of its queries sees.

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


class Shares(NamedTuple):
    """The rows' slots in shares of whole blocks, each within one row.

    Attributes:
      row: int32 [shares], of each share; start, stop: its blocks [start, stop); none if there is no such share.
      first, end: int32 [batch], the shares [first, end) of each row.
    """

    row: jax.Array
    start: jax.Array
    stop: jax.Array
    first: jax.Array
    end: jax.Array


def shares(first: jax.Array, end: jax.Array, cut: Cut, most: int) -> Shares:
    """Cuts the rows' slots.

    Like `visible_slots`, this is one computation for all layers; it makes its sums without a scan, which takes several
    kernels of a GPU.

    Args:
      first, end: int32 [batch], each row's slots.
      most: shares that there can be (`Cut.most_shares`).
    """
    batch = first.shape[0]
    rows, index = jnp.arange(batch, dtype=jnp.int32), jnp.arange(most, dtype=jnp.int32)
    block = first // cut.block_k
    blocks = jnp.maximum((end + cut.block_k - 1) // cut.block_k - block, 0)
    length = jnp.int32(cut.length)
    if not cut.length:
        length = jnp.maximum((jnp.sum(blocks) + cut.wanted - 1) // cut.wanted, 1)
    count = (blocks + length - 1) // length
    until = jnp.sum(jnp.where(rows <= rows[:, None], count, 0), axis=1, dtype=jnp.int32)
    row = jnp.sum(until <= index[:, None], axis=1, dtype=jnp.int32)
    there, row = row < batch, jnp.minimum(row, batch - 1)
    of_row = index - (until - count)[row]

    def before(n: jax.Array) -> jax.Array:
        """The number of blocks before a row's n-th share."""
        if cut.length:
            return jnp.minimum(n * length, blocks[row])
        return n * blocks[row] // jnp.maximum(count[row], 1)

    start, stop = block[row] + before(of_row), block[row] + before(of_row + 1)
    return Shares(row, start, jnp.where(there, stop, start), until - count, until)
