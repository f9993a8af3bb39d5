"""Keys and values as caches store them: as numbers, or as int8 codes with a scale for each token and head.

What stores them quantised is the layout `INT8` of `llama_jax.quantized`, of which each token's head is a row. So codes
depend on that token alone, however it came into the cache. Scales are bfloat16: codes are the nearest for the scale as
it is stored, so its rounding adds nothing to their error of half a step, and it has float32's range.

A few numbers of a key are often much larger than its others, and set their step. So keys are rotated first, and queries
with them, by a Hadamard matrix, which spreads every number over all of its head ("QuaRot", arXiv:2404.00456).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama_jax.errors import RequestError
from llama_jax.kernels.precision import matmul_precision
from llama_jax.quantized import layout_named
from llama_jax.quantized.nearest import encode

KV_DTYPES = ("int8",)
"""Names of dtypes besides the model's own."""

SCALES = jnp.dtype(jnp.bfloat16)

FIELDS = ("k", "v", "k_scale", "v_scale")
"""Of a cache's layer: numbers or codes [..., head_dim], and scales [...] or None. A whole cache has tuples of these."""

_LAYOUT = layout_named("int8_bf16")


def check_kv_dtype(kv_dtype: str | None) -> None:
    """Raises RequestError unless caches can store that dtype; None stands for the model's."""
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise RequestError(
            f"a cache cannot store {kv_dtype!r}",
            param="kv_dtype",
            hint=f"choose {' or '.join(KV_DTYPES)}, or leave it out for the dtype of the model",
        )


def stored_dtype(kv_dtype: str | None, dtype: DTypeLike) -> jnp.dtype:
    """The dtype of a cache's arrays `k` and `v`, for a model that computes in `dtype`."""
    return jnp.dtype(dtype if kv_dtype is None else kv_dtype)


def is_quantised(dtype: DTypeLike) -> bool:
    """Whether a cache of that dtype has scales."""
    return jnp.dtype(dtype).name in KV_DTYPES


def vector_bytes(head_dim: int, itemsize: int, kv_dtype: str | None = None) -> int:
    """Bytes of one token's key, or value, of one head: numbers of `itemsize` bytes, or codes with their scale."""
    return head_dim * itemsize if kv_dtype is None else head_dim * jnp.dtype(kv_dtype).itemsize + SCALES.itemsize


def new_slots(shape: Sequence[int], dtype: DTypeLike, layers: int) -> dict[str, tuple[Any, ...]]:
    """Empty arrays of `FIELDS` for each layer, of keys [*shape]. They have buffers of their own, since donated arrays
    must not alias one another."""
    of_scales = tuple(jnp.zeros(shape[:-1], SCALES) if is_quantised(dtype) else None for _ in range(2 * layers))
    k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(layers)) for _ in "kv")
    return dict(zip(FIELDS, (k, v, of_scales[:layers], of_scales[layers:]), strict=True))


def changed(cache: Any, change: Callable[..., jax.Array], *others: Any) -> dict[str, Any]:
    """`FIELDS` of a cache, all their arrays changed in one way, which takes those of `others` too."""
    return {name: jax.tree.map(change, *(getattr(each, name) for each in (cache, *others))) for name in FIELDS}


def of_layer(cache: Any, index: int) -> dict[str, Any]:
    """`FIELDS` of one layer."""
    return {name: getattr(cache, name)[index] for name in FIELDS}


def of_views(views: Sequence[Any]) -> dict[str, Any]:
    """`FIELDS` of a cache, from those of its layers."""
    return {name: tuple(getattr(view, name) for view in views) for name in FIELDS}


def rotated(layer: Any, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and keys as a layer with scales takes them: rotated, with the same products. Others take them as they
    are."""
    if not is_quantised(layer.k.dtype):
        return q, k
    return (_hadamard(q) / _block(q.shape[-1])).astype(q.dtype), _hadamard(k)


def _block(head_dim: int) -> int:
    """Numbers that are rotated together: the largest power of two that divides them."""
    return head_dim & -head_dim


def _hadamard(x: jax.Array) -> jax.Array:
    """float32 products of each block of x's last axis with a Hadamard matrix of ones and minus ones, exact in 16 bits
    too; twice gives the block times its size."""
    size = _block(x.shape[-1])
    index = np.arange(size)
    signs = jnp.asarray(1 - 2 * (np.bitwise_count(index[:, None] & index) % 2).astype(np.int8), x.dtype)
    blocks = x.reshape(*x.shape[:-1], -1, size)
    turned = jnp.matmul(blocks, signs, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
    return turned.reshape(x.shape)


def write(layer: Any, k: jax.Array, v: jax.Array, put: Callable[[jax.Array, jax.Array], jax.Array]) -> dict[str, Any]:
    """`FIELDS` of a layer with new keys and values stored, quantised where it has scales.

    The barrier keeps XLA from storing twice: once for the result and once, on a copy, inside whatever reads it.

    Args:
      k, v: [batch, len, kv_heads, head_dim].
      put: makes of an array of the layer, and of new numbers or codes [batch, len, kv_heads, head_dim] or scales
        [batch, len, kv_heads] for it, what it becomes.
    """
    (k, k_scale), (v, v_scale) = (_encoded(x, layer.k.dtype) for x in (k, v))
    new = dict(zip(FIELDS, (k, v, k_scale, v_scale), strict=True))
    return jax.lax.optimization_barrier(
        {name: None if x is None else put(getattr(layer, name), x) for name, x in new.items()}
    )


def _encoded(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array | None]:
    """Numbers or codes, and scales or None, as a cache of that dtype stores them."""
    return quantise(x) if is_quantised(dtype) else (x.astype(dtype), None)


@jax.custom_jvp
def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 codes of x's shape, and scales without its last axis, of the largest magnitude there. What is no number
    gives a scale that is none."""
    assert _LAYOUT is not None
    members = encode(_LAYOUT, x)
    return members[_LAYOUT.name], members["scales"]


@quantise.defjvp
def _no_gradient(primals: Any, tangents: Any) -> Any:
    raise RequestError(
        "a quantised cache has no gradient", param="kv_dtype", hint="differentiate with a cache in the model's dtype"
    )
