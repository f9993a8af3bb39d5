"""GPTQ: codes that compensate each other's errors (Frantar et al., arXiv:2210.17323)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from llama_jax.quantized.grid import Grid, members, nearest, numbers
from llama_jax.quantized.layout import Layout
from llama_jax.quantized.searched import searched

DAMPING = 0.01
"""Share of the mean square of an input that is added to each input's, so that the Gram matrix can be inverted."""
BLOCK = 64
"""Columns whose errors are propagated to all later columns at once, by one product."""


@partial(jax.jit, static_argnums=0)
def encode(layout: Layout, weight: jax.Array, gram: jax.Array) -> dict[str, jax.Array]:
    """The members (`quantized.codes`) of a weight [*out, in], with little error of its products with given inputs.

    Columns are rounded one by one, those with the largest inputs first, and the error of each is taken off the
    columns that are not rounded yet, as far as their inputs go together with its own. Grids are fixed before
    (`searched`), so that the order of the rounding is free of the order in which columns are stored.

    Args:
      gram: float32 [in, in], the sum or mean of x x^T over inputs x of the layer.
    """
    flat = weight.astype(jnp.float32).reshape(-1, weight.shape[-1])
    grid = searched(layout, flat, jnp.diagonal(gram))
    order = jnp.argsort(-jnp.diagonal(gram), stable=True)
    of_columns = {n: jnp.repeat(x, flat.shape[-1] // x.shape[-1], axis=-1)[:, order] for n, x in grid.items()}
    codes = _codes(layout, flat[:, order], of_columns, inverse_factor(gram[order][:, order]))
    codes = jnp.zeros_like(codes).at[:, order].set(codes)
    shape = weight.shape[:-1]
    grid = {name: x.reshape(*shape, -1) for name, x in grid.items()}
    return members(layout, grid, codes.reshape(weight.shape))


def inverse_factor(gram: jax.Array) -> jax.Array:
    """The upper triangular U [in, in] with U^T U the inverse of the damped Gram matrix.

    With columns and rows turned round, Cholesky's factor of the matrix itself is upper triangular, R R^T, and U is the
    inverse of R: one factorisation and one triangular solve, and no inverse of the whole.
    """
    size = len(gram)
    damped = gram + jnp.eye(size, dtype=gram.dtype) * (DAMPING * jnp.mean(jnp.diagonal(gram)) + 1e-30)
    turned = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(turned, jnp.eye(size, dtype=gram.dtype), lower=False)


def _codes(layout: Layout, weight: jax.Array, grid: Grid, factor: jax.Array) -> jax.Array:
    """Codes [out, in] of columns in the order of `weight`, with what the grid has for each [out, in]."""
    rows, columns = weight.shape
    block = min(BLOCK, columns)
    padded = -columns % block  # of zeros, with scales of 0: they change nothing
    weight = jnp.pad(weight, ((0, 0), (0, padded)))
    grid = {name: jnp.pad(x, ((0, 0), (0, padded))) for name, x in grid.items()}
    factor = jnp.pad(factor, ((0, padded), (0, padded))) + jnp.diag((jnp.arange(columns + padded) >= columns) * 1.0)

    def one_block(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weight, codes = state
        start = i * block

        def part(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, start, block, axis=1)

        here = {name: part(x) for name, x in grid.items()}
        within = jax.lax.dynamic_slice(factor, (start, start), (block, block))

        def one_column(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            left, codes, errors = state
            column = {n: x[:, j] for n, x in here.items()}
            code = nearest(layout, column, left[:, j, None])
            error = (left[:, j] - numbers(layout, column, code)[:, 0]) / within[j, j]
            left = left - error[:, None] * jnp.where(jnp.arange(block) > j, within[j], 0)
            return left, codes.at[:, j].set(code[:, 0]), errors.at[:, j].set(error)

        zeros = jnp.zeros((rows, block), jnp.float32)
        _, found, errors = jax.lax.fori_loop(0, block, one_column, (part(weight), zeros, zeros))
        behind = jax.lax.dynamic_slice_in_dim(factor, start, block, axis=0)  # zero left of the block
        weight = weight - jnp.matmul(errors, behind, precision=jax.lax.Precision.HIGHEST)
        return weight, jax.lax.dynamic_update_slice_in_dim(codes, found, start, axis=1)

    _, codes = jax.lax.fori_loop(0, (columns + padded) // block, one_block, (weight, jnp.zeros_like(weight)))
    return codes[:, :columns]
