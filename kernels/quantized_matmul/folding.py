"""Rows of a tile that are parts of a row, or belong to one of two matrices: where they are, and what they add up to."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def parted(place: jax.Array, fold: int, parts: int) -> tuple[jax.Array, jax.Array]:
    """Of each place of a tile, where it is among those of its part, and which part it is of."""

    def by(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
        divisor = jnp.full_like(x, n)
        return jax.lax.div(x, divisor), jax.lax.rem(x, divisor)

    rows, in_row = by(place, fold)
    n, part = by(rows, parts)
    return n * fold + in_row, part


def apart(total: jax.Array, parts: int) -> list[jax.Array]:
    """Rows 0, parts, 2 parts ... of total; rows 1, parts + 1, ...; and so on."""
    total = total.reshape(-1, parts, total.shape[1])
    which = jnp.arange(parts, dtype=jnp.int32)[None, :, None]
    return [jnp.sum(jnp.where(which == n, total, 0.0), axis=1) for n in range(parts)]


def unfolded(total: jax.Array, column: jax.Array, row: jax.Array, fold: int) -> jax.Array:
    """The sums [cols / fold, rows / fold] over parts at the same place of columns and rows."""
    cols, rows = total.shape
    place, other = (jax.lax.rem(at, jnp.full_like(at, fold)) for at in (column, row))
    parts = jnp.where(place[:, None] == other[None, :], total, 0.0)
    return jnp.sum(jnp.sum(parts.reshape(cols // fold, fold, rows // fold, fold), axis=3), axis=1)
