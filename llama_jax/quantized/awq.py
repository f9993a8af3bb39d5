"""AWQ: scales inputs so that the weights of large inputs are rounded more finely (Lin et al., arXiv:2306.00978)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.quantized.grid import by_group, members, nearest, numbers, spanning
from llama_jax.quantized.layout import Layout
from llama_jax.quantized.searched import searched

EXPONENTS = tuple(i / 20 for i in range(20))
"""Exponents of the inputs' sizes to try; 0 means no scaling."""


@partial(jax.jit, static_argnums=0)
def encode(layout: Layout, weight: jax.Array, gram: jax.Array) -> dict[str, jax.Array]:
    """The members (`quantized.codes`) of a weight [*out, in], whose grids are searched for by the inputs' sizes."""
    grid = searched(layout, weight, jnp.diagonal(gram))
    return members(layout, grid, nearest(layout, grid, by_group(layout, weight)).reshape(weight.shape))


@partial(jax.jit, static_argnums=0)
def input_scales(
    layouts: tuple[Layout, ...], weights: tuple[jax.Array, ...], gram: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Scales s [in] of the inputs that some weights share, such that weights * s lose least by rounding.

    s is a power of the inputs' sizes, the one with the least error of the products, s undone, over the given inputs.

    Args:
      layouts, weights: of each projection of these inputs, [*out, in].
      gram: float32 [in, in], the sum or mean of x x^T over inputs x.
      sizes: [in], root mean squares of the inputs, or what has to stand for them where several share a scale.
    """
    flat = tuple(weight.astype(jnp.float32).reshape(-1, weight.shape[-1]) for weight in weights)
    sizes = jnp.maximum(sizes, 1e-4 * jnp.max(sizes) + 1e-30)

    def scales(exponent: jax.Array) -> jax.Array:
        powers = sizes**exponent
        return powers / jnp.sqrt(jnp.max(powers) * jnp.min(powers))

    def loss(exponent: jax.Array) -> jax.Array:
        s, total = scales(exponent), jnp.float32(0)
        for layout, weight in zip(layouts, flat, strict=True):
            grouped = by_group(layout, weight * s)
            grid = spanning(layout, grouped)
            stored = numbers(layout, grid, nearest(layout, grid, grouped)).reshape(weight.shape)
            total += output_error(stored / s - weight, gram)
        return total

    exponents = jnp.asarray(EXPONENTS, jnp.float32)
    return scales(exponents[jnp.argmin(jax.lax.map(loss, exponents))])


def output_error(difference: jax.Array, gram: jax.Array) -> jax.Array:
    """Sum of the squares of (difference x) over the inputs x of a Gram matrix; difference [*out, in]."""
    flat = difference.reshape(-1, difference.shape[-1])
    return jnp.sum(jnp.matmul(flat, gram, precision=jax.lax.Precision.HIGHEST) * flat)
