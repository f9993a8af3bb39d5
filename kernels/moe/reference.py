"""The contract of the routed experts: tokens sorted by expert, then one ragged matrix product per projection."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from llama_jax.kernels.precision import matmul_precision

Activation = Callable[[jax.Array], jax.Array]


def routed_experts_reference(
    x: jax.Array,
    expert_ids: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation,
    input_scale: jax.Array | None = None,
    output_scale: jax.Array | None = None,
) -> jax.Array:
    """See `llama_jax.kernels.moe.routed_experts`."""
    tokens, top_k = expert_ids.shape
    order = jnp.argsort(expert_ids.reshape(-1), stable=True)
    group_sizes = jnp.bincount(expert_ids.reshape(-1), length=gate.shape[0]).astype(jnp.int32)

    def grouped(rows: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(
            rows, jnp.swapaxes(weight, 1, 2), group_sizes, precision=matmul_precision(rows.dtype)
        ).astype(rows.dtype)

    rows = x[order // top_k]
    if input_scale is not None:
        rows = rows * input_scale.reshape(-1)[order, None].astype(rows.dtype)
    rows = grouped(activation(grouped(rows, gate)) * grouped(rows, up), down)
    if output_scale is not None:
        rows = rows * output_scale.reshape(-1)[order, None].astype(rows.dtype)
    # Back to the tokens' order, then a sum over each token's experts in float32.
    unsorted = jnp.zeros_like(rows).at[order].set(rows)
    return unsorted.reshape(tokens, top_k, -1).sum(axis=1, dtype=jnp.float32).astype(x.dtype)
