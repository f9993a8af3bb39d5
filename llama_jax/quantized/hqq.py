"""HQQ: half-quadratic quantisation, without data (Badri and Shaji, mobiusml.github.io/hqq_blog, 2023)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.quantized.grid import Grid, by_group, members, nearest, numbers, spanning
from llama_jax.quantized.layout import Layout

POWER, STEPS, BETA, GROWTH = 0.7, 20, 10.0, 1.01
"""Exponent of the error's norm; steps; weight of the quadratic term, and its growth from step to step."""


@partial(jax.jit, static_argnums=0)
def encode(layout: Layout, weight: jax.Array) -> dict[str, jax.Array]:
    """The members (`quantized.codes`) of a weight [*out, in] whose errors have a small sum of |error|^0.7.

    That forgives large errors of few numbers for smaller ones of the others. Codes, errors in a shrunken form, and
    the grid (minima, or the scales of a symmetric layout) take turns, each in closed form; of all grids on the way
    each group has the one with the least sum.

    Args:
      layout: symmetric, or with minima; whole zero points cannot be moved by less than a step.
    """
    grouped = by_group(layout, weight)
    first = spanning(layout, grouped)

    def sums(grid: Grid) -> jax.Array:
        wrong = jnp.abs(numbers(layout, grid, nearest(layout, grid, grouped)) - grouped)
        return jnp.sum(wrong**POWER, axis=-1)

    def step(
        state: tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array], beta: jax.Array
    ) -> tuple[tuple[dict[str, jax.Array], dict[str, jax.Array], jax.Array], None]:
        grid, best, least = state
        codes = nearest(layout, grid, grouped)
        wanted = grouped - _shrunken(grouped - numbers(layout, grid, codes), beta)
        grid = _fitted(layout, grid, codes, wanted)
        found = sums(grid)
        better = found < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), grid, best)
        return (grid, best, jnp.minimum(found, least)), None

    betas = BETA * GROWTH ** jnp.arange(STEPS)
    (_, best, _), _ = jax.lax.scan(step, (first, first, sums(first)), betas)
    return members(layout, best, nearest(layout, best, grouped).reshape(weight.shape))


def _shrunken(error: jax.Array, beta: jax.Array) -> jax.Array:
    """The proximal operator of |error|^POWER, as HQQ approximates it: generalised soft thresholding."""
    size = jnp.abs(error)
    less = size - jnp.where(size > 0, size, 1) ** (POWER - 1) / beta
    return jnp.sign(error) * jnp.maximum(less, 0)


def _fitted(layout: Layout, grid: Grid, codes: jax.Array, wanted: jax.Array) -> dict[str, jax.Array]:
    """The grid on which codes are nearest to what is wanted, in least squares: other minima, or other scales."""
    if layout.offset == "min":
        without = numbers(layout, {**grid, "minima": jnp.zeros_like(grid["minima"])}, codes)
        return {**grid, "minima": jnp.mean(wanted - without, axis=-1).astype(layout.scale_dtype)}
    squares = jnp.sum(codes * codes, axis=-1)
    scales = jnp.sum(codes * wanted, axis=-1) / jnp.where(squares > 0, squares, 1)
    return {"scales": scales.astype(layout.scale_dtype)}


def takes(layout: Layout) -> bool:
    """Returns whether a layout has what is fitted: minima, or scales of whole numbers that stand around 0."""
    return layout.offset == "min" or (layout.symmetric and layout.kind != "fp8")
