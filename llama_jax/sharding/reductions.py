"""Reductions over rows [batch, n] that may be split over devices, as sampling from them needs.

`axis` is the mesh axis, or several, that the rows are split over, inside `sharding.local`; None where they are
whole. Each function sends a few numbers per row, never the rows themselves, and returns what `jnp` does for whole rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.sharding.axes import MeshAxes

BLOCK = 64
"""Numbers whose maximum `top_k` looks at first."""


def start(x: jax.Array, axis: MeshAxes | None) -> jax.Array | int:
    """Index of the first of this device's columns in the whole row."""
    return 0 if axis is None else jax.lax.axis_index(axis) * x.shape[1]


def argmax(x: jax.Array, axis: MeshAxes | None) -> jax.Array:
    """int32 [batch], the index of the largest number of each row; of equal ones the first."""
    best = jnp.argmax(x, axis=-1).astype(jnp.int32)
    if axis is None:
        return best
    largest = jnp.take_along_axis(x, best[:, None], axis=1)[:, 0].astype(jnp.float32)
    # One message: the index travels in the bits of a float.
    mine = jnp.stack([jax.lax.bitcast_convert_type(largest, jnp.int32), best + start(x, axis)])
    values, index = jax.lax.all_gather(mine, axis, axis=1)
    shard = jnp.argmax(jax.lax.bitcast_convert_type(values, jnp.float32), axis=0)
    return jnp.take_along_axis(index, shard[None], axis=0)[0]


def top_k(x: jax.Array, k: int, axis: MeshAxes | None) -> tuple[jax.Array, jax.Array]:
    """The k largest numbers [batch, k] of each row, in descending order, and their int32 indices."""
    top, index = _own_top_k(x, min(k, x.shape[1]))
    if axis is None:
        return top, index
    # Shard after shard, so that of equal numbers the first come first.
    top = jax.lax.all_gather(top, axis, axis=1, tiled=True)
    index = jax.lax.all_gather(index + start(x, axis), axis, axis=1, tiled=True)
    top, among = jax.lax.top_k(top, k)
    return top, jnp.take_along_axis(index, among, axis=1)


def _own_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`top_k` of whole rows, which need not be searched as a whole: only the k blocks with the largest maxima."""
    blocks = -(-x.shape[1] // BLOCK)
    if blocks <= k:
        top, index = jax.lax.top_k(x, k)
        return top, index.astype(jnp.int32)
    padded = jnp.pad(x, ((0, 0), (0, blocks * BLOCK - x.shape[1])), constant_values=-jnp.inf)
    x = padded.reshape(len(x), blocks, BLOCK)
    # Were a number not in these blocks, k maxima would be larger, or as large and before it. In the blocks' own order,
    # so that of equal numbers the first come first.
    chosen = jnp.sort(jax.lax.top_k(jnp.max(x, axis=2), k)[1], axis=1)
    top, among = jax.lax.top_k(jnp.take_along_axis(x, chosen[:, :, None], axis=1).reshape(len(x), -1), k)
    block = jnp.take_along_axis(chosen, among // BLOCK, axis=1)
    return top, (block * BLOCK + among % BLOCK).astype(jnp.int32)


def take(x: jax.Array, index: jax.Array, axis: MeshAxes | None) -> jax.Array:
    """[batch], the number at int32 `index` [batch] of each row."""
    if axis is None:
        return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]
    column = index - start(x, axis)
    here = (column >= 0) & (column < x.shape[1])
    value = jnp.take_along_axis(x, jnp.where(here, column, 0)[:, None], axis=1)[:, 0]
    return jax.lax.psum(jnp.where(here, value, 0), axis)


def total(x: jax.Array, axis: MeshAxes | None) -> jax.Array:
    """Sums [batch] of the rows."""
    own = jnp.sum(x, axis=-1)
    return own if axis is None else jax.lax.psum(own, axis)


def largest(x: jax.Array, axis: MeshAxes | None) -> jax.Array:
    """The largest number [batch] of each row."""
    own = jnp.max(x, axis=-1)
    return own if axis is None else jax.lax.pmax(own, axis)
