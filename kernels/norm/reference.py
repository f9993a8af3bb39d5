"""The contract of the residual sum and the norm behind it; and the norm alone, for where there is nothing to add."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """Root mean square norm over the last axis (arXiv:1910.07467), in float32; without weight if None."""
    xf = x.astype(jnp.float32)
    out = (xf * jax.lax.rsqrt(jnp.mean(xf * xf, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return out if weight is None else out * weight.astype(x.dtype)


def add_rms_norm_reference(
    x: jax.Array, delta: jax.Array, weight: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """See `llama_jax.kernels.norm.add_rms_norm`."""
    total = x + delta
    return total, rms_norm(total, weight, eps)
