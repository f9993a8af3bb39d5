"""The contract of products with quantised weights: plain operations, written so that XLA reads the codes."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.kernels.precision import matmul_precision
from llama_jax.quantized import Layout
from llama_jax.quantized.codes import codes_as, shift
from llama_jax.sharding import in_use


def reads_codes(layout: Layout) -> bool:
    """Returns whether XLA's GPU compiler reads codes in the product's kernel, or first writes the decoded weight.

    So it is with the flags that XLA has by default, with which prompts are computed; `decode.weights_read` has integers
    in groups read, too, by decode steps. No AMD GPU before gfx950 converts float8_e4m3fn by itself.
    """
    return layout.group is None and layout.kind != "fp8"


def quantized_matmul_reference(
    x: jax.Array, members: Mapping[str, jax.Array], *, layout: Layout, dtype: DTypeLike | None = None
) -> jax.Array:
    """See `llama_jax.kernels.quantized_matmul.quantized_matmul`.

    Written so that XLA reads the codes in the product's own kernel (compiled for gfx942; docs/quantization.md): scales
    of whole rows come after the product, those of groups are multiplied in the dtype of `x`, and what asymmetric
    layouts add to every code of a group is a second, small product with sums over the groups of `x`.
    """
    codes, scales, added = codes_as(layout, members, x.dtype), members["scales"], shift(layout, members)
    if layout.group is None:
        out = _contract(x, codes) * scales.astype(jnp.float32)
        if added is not None:
            out = out + jnp.sum(x, -1, dtype=jnp.float32).reshape(*x.shape[:-1], *(1,) * added.ndim) * added
        return out.astype(dtype or x.dtype)
    grouped = codes.reshape(*scales.shape, layout.group) * scales.astype(x.dtype)[..., None]
    out = _contract(x, grouped.reshape(codes.shape))
    if added is not None:
        out = out + _contract(_group_sums(x, layout.group), added)
    return out.astype(dtype or x.dtype)


def _group_sums(x: jax.Array, group: int) -> jax.Array:
    """x [..., in] -> float32 [..., in / group]."""
    return jnp.sum(x.reshape(*x.shape[:-1], -1, group), axis=-1, dtype=jnp.float32)


def _contract(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product with a weight [*out, in], in float32."""
    if weight.ndim > 2 and not in_use():
        return _contract(x, weight.reshape(-1, weight.shape[-1])).reshape(*x.shape[:-1], *weight.shape[:-1])
    last = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    precision = matmul_precision(x.dtype)
    return jax.lax.dot_general(x, weight, last, precision=precision, preferred_element_type=jnp.float32)
