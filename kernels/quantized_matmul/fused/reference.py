"""The contract of fused products: the plain operations, one after the other, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from llama_jax.kernels.precision import matmul_precision
from llama_jax.kernels.quantized_matmul.operands import SQUARED
from llama_jax.kernels.quantized_matmul.reference import quantized_matmul_reference
from llama_jax.quantized import Layout

Activation = Callable[[jax.Array], jax.Array]


def fused_matmul_reference(
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout | None,
    squares: jax.Array | None = None,
    eps: float = 0.0,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    gain: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """See `llama_jax.kernels.quantized_matmul.fused.fused_matmul`."""
    if layout is None:
        weight = members["weight"]
        last = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
        precision = matmul_precision(x.dtype)
        out = jax.lax.dot_general(x, weight, last, precision=precision, preferred_element_type=jnp.float32)
    else:
        out = quantized_matmul_reference(x, members, layout=layout, dtype=jnp.float32)
    if squares is not None:
        factor = jax.lax.rsqrt(jnp.sum(squares, axis=-1) / x.shape[-1] + eps)
        out *= factor.reshape(*factor.shape, *(1,) * (out.ndim - factor.ndim))
    if activation is not None:
        out = activation(out[..., 0, :]) * out[..., 1, :]
    if residual is None:
        return out.astype(x.dtype)
    assert gain is not None
    total = (out + residual.astype(jnp.float32)).astype(x.dtype)
    wide = total.astype(jnp.float32)
    sums = jnp.sum((wide * wide).reshape(*wide.shape[:-1], -1, SQUARED), axis=-1)
    return total, (wide * gain.astype(jnp.float32)).astype(x.dtype), sums
