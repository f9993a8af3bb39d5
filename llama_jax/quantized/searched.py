"""Grid search: each group's grid covers the share of its range that minimises the rounding error."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.quantized.grid import by_group, nearest, numbers, spanning
from llama_jax.quantized.layout import Layout

_SHARES = tuple(1 - i / 40 for i in range(17))
"""Shares of a group's range, from all of it to three fifths."""


@partial(jax.jit, static_argnums=0)
def searched(layout: Layout, weight: jax.Array, importance: jax.Array) -> dict[str, jax.Array]:
    """The grid (`quantized.grid`) of each group that has the least sum of importance * (number - original)^2.

    A narrower range has finer steps for most numbers and cuts off the largest; which is better depends on how much the
    large ones matter. The range from end to end is among those tried, so that the error is never above that of rounding
    to the nearest.

    Args:
      weight: [*out, in].
      importance: [in], of each input; the mean of its squares, for the error of a layer's outputs.
    """
    grouped = by_group(layout, weight)
    importance = jnp.broadcast_to(importance, weight.shape[-1:]).astype(jnp.float32).reshape(grouped.shape[-2:])

    def with_share(share: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        grid = spanning(layout, grouped, share)
        wrong = numbers(layout, grid, nearest(layout, grid, grouped)) - grouped
        return grid, jnp.sum(jnp.square(wrong) * importance, axis=-1)

    def better(
        best: tuple[dict[str, jax.Array], jax.Array], share: jax.Array
    ) -> tuple[tuple[dict[str, jax.Array], jax.Array], None]:
        tried = with_share(share)
        less = tried[1] < best[1]
        return jax.tree.map(lambda new, old: jnp.where(less, new, old), tried, best), None

    shares = jnp.asarray(_shares(layout), jnp.float32)
    (grid, _), _ = jax.lax.scan(better, with_share(shares[0]), shares[1:])
    return grid


def _shares(layout: Layout) -> tuple[float, ...]:
    """Shares to try. Four bits reach from -8 to 7: a scale of the other sign has the longer end on the other side."""
    both = layout.symmetric and layout.kind == "int4"
    return (*_SHARES, *(-share for share in _SHARES)) if both else _SHARES
