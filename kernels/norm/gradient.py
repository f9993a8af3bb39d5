"""The gradient of the sum and its norm, whatever computes them."""

from __future__ import annotations

from collections.abc import Callable

import jax

from llama_jax.kernels.norm.reference import rms_norm

Forward = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""x, delta and weight to the sum and its norm."""


def with_gradient(forward: Forward, eps: float) -> Forward:
    """`forward` with the reference's gradient, which computes the norm once more from the sum."""

    @jax.custom_vjp
    def add_norm(x: jax.Array, delta: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        return forward(x, delta, weight)

    def save(
        x: jax.Array, delta: jax.Array, weight: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        total, normed = forward(x, delta, weight)
        return (total, normed), (total, weight)

    def backward(
        saved: tuple[jax.Array, jax.Array], gradients: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        total, weight = saved
        for_total, for_normed = gradients
        _, pull = jax.vjp(lambda total, weight: rms_norm(total, weight, eps), total, weight)
        through_norm, for_weight = pull(for_normed)
        for_terms = for_total + through_norm
        return for_terms, for_terms, for_weight

    add_norm.defvjp(save, backward)
    return add_norm
