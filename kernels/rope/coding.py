"""Keys and values as codes with a scale for each token and head: the rotation by a Hadamard matrix, and the rounding.

A key often has a few numbers much larger than the others, which set the step for all. So keys are rotated, and queries
with them, which spreads every number over its whole head ("QuaRot", arXiv:2404.00456). Values are rotated if they have
four bits, and attention's output is rotated back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama_jax.errors import RequestError
from llama_jax.kernels.attention.records import CODES, SCHEMES
from llama_jax.kernels.precision import matmul_precision

SCALES = jnp.dtype(jnp.bfloat16)


def turns_values(scheme: str) -> bool:
    """Returns whether values are rotated in a scheme of `SCHEMES`."""
    return CODES[SCHEMES[scheme][1]].per_byte > 1


def encoded(
    q: jax.Array, k: jax.Array, v: jax.Array, scheme: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    """Queries that fit the codes, in their dtype; codes of keys and of values, and the scales of each."""
    of_k, of_v = SCHEMES[scheme]
    q, k = (hadamard(q) / block(q.shape[-1])).astype(q.dtype), hadamard(k)
    codes, scales = zip(quantise(k, of_k), quantise(hadamard(v) if turns_values(scheme) else v, of_v), strict=True)
    return q, (*codes, *scales)


def block(head_dim: int) -> int:
    """Numbers that are rotated together: the largest power of two that divides them."""
    return head_dim & -head_dim


def signs(size: int, dtype: DTypeLike) -> jax.Array:
    """The Hadamard matrix [size, size] of ones and minus ones."""
    index = np.arange(size)
    return jnp.asarray(1 - 2 * (np.bitwise_count(index[:, None] & index) % 2).astype(np.int8), dtype)


def hadamard(x: jax.Array) -> jax.Array:
    """float32 products of each block of x's last axis with a Hadamard matrix of ones and minus ones, exact in 16 bits
    too; twice gives the block times its size."""
    size = block(x.shape[-1])
    blocks = x.reshape(*x.shape[:-1], -1, size)
    matrix, precision = signs(size, x.dtype), matmul_precision(x.dtype)
    turned = jnp.matmul(blocks, matrix, precision=precision, preferred_element_type=jnp.float32)
    return turned.reshape(x.shape)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def quantise(x: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Codes of vectors [..., n], and scales [...] of the largest magnitude in each. A NaN or infinity gives a scale
    that is none.

    Args:
      kind: of the codes, a key of `CODES`.

    Returns:
      [..., n]; of four bits [..., n / 2], as `records.numbers` reads them.
    """
    of = CODES[kind]
    x = x.astype(jnp.float32)
    scales = (jnp.max(jnp.abs(x), axis=-1) / of.largest).astype(SCALES)
    steps = scales.astype(jnp.float32)[..., None]
    steps = x / jnp.where(steps == 0, 1, steps)
    if of.largest == 1:
        return no_negative_zeros(steps).astype(of.dtype), scales
    if of.per_byte == 1:
        return jnp.clip(jnp.round(steps), -of.largest, of.largest).astype(of.dtype), scales
    # Code c stands for the odd number 2c - 15, the nearest to all from 2c - 16 to 2c - 14.
    codes = jnp.clip(jnp.floor(steps / 2) + 8, 0, 15).astype(of.dtype)
    first, second = jnp.split(codes, 2, axis=-1)
    return first | second << 4, scales


def no_negative_zeros(x: jax.Array) -> jax.Array:
    """Zeros in place of what rounds to zero in eight-bit floats: the bits of -0 are a NaN in those of CDNA 3, and
    compilers write them."""
    return jnp.where(jnp.abs(x) <= 2.0**-11, 0.0, x)


@quantise.defjvp
def _no_gradient(kind: str, primals: Any, tangents: Any) -> Any:
    raise RequestError(
        "a quantised cache has no gradient", param="kv_dtype", hint="differentiate with a cache in the model's dtype"
    )
