"""Keys and values as caches store them: as numbers, or as codes with a scale for each token and head.

Codes depend only on their token, however it came into the cache, and are the nearest for the scale as it is stored:
rounding the scale to bfloat16 adds nothing to their error of half a step. `kernels.rope.coding` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.errors import RequestError
from llama_jax.kernels.attention.records import CODES, SCHEMES, KeysValues
from llama_jax.kernels.rope.coding import SCALES, block, encoded, hadamard, turns_values
from llama_jax.targets import Target, current

KV_DTYPES = tuple(name for name in SCHEMES if name != "fp8_fnuz")
"""Names of the formats of keys and values in caches, besides the model's own dtype. "fp8" is "fp8_fnuz" where a device
has floats of eight bits of that flavour."""

FIELDS = ("k", "v", "k_scale", "v_scale")
"""Of a cache's layer: numbers or codes [..., head_dim], or [..., head_dim / 2] of four bits, and scales [...] or None.
A whole cache has tuples of these."""


def check_kv_dtype(kv_dtype: str | None, target: Target | None = None) -> None:
    """Raises RequestError unless caches can store that dtype, on a target if one is given; None means the model's."""
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise RequestError(
            f"a cache cannot store {kv_dtype!r}",
            param="kv_dtype",
            hint=f"choose {' or '.join(KV_DTYPES)}, or leave it out for the dtype of the model",
        )
    if kv_dtype == "fp8" and target is not None and target.vendor != "cpu" and target.rates.fp8_flavour is None:
        raise RequestError(
            f"{target.label or target.name} has no floats of eight bits",
            param="kv_dtype",
            hint="choose int8: it takes as many bytes and is more exact",
        )


def stored_dtype(kv_dtype: str | None, dtype: DTypeLike, target: Target | None = None) -> str:
    """The name of what a cache stores keys and values in, for a model that computes in `dtype`: that of a dtype, or a
    key of `SCHEMES`.

    Args:
      target: of the cache; the current one by default.

    Raises:
      RequestError: the target has no floats of eight bits.
    """
    if kv_dtype is None:
        return jnp.dtype(dtype).name
    if kv_dtype == "fp8":
        target = target or current()
        check_kv_dtype(kv_dtype, target)
        return "fp8_fnuz" if target.rates.fp8_flavour == "fnuz" else "fp8"
    return kv_dtype


def dtype_of(k: Any, v: Any, k_scale: Any) -> str:
    """`stored_dtype` of a cache with such keys, values and scales."""
    return KeysValues(k, v, k_scale=k_scale).scheme or jnp.dtype(k.dtype).name


def pair_bytes(head_dim: int, itemsize: int, kv_dtype: str | None = None) -> int:
    """Bytes of one token's key and value of one head: numbers of `itemsize` bytes, or codes with their scales."""
    if kv_dtype is None:
        return 2 * head_dim * itemsize
    return sum(head_dim // CODES[kind].per_byte + SCALES.itemsize for kind in SCHEMES[kv_dtype])


def shapes(shape: Sequence[int], dtype: DTypeLike) -> dict[str, jax.ShapeDtypeStruct | None]:
    """`FIELDS` of a layer with keys [*slots, head_dim], as shapes.

    Args:
      dtype: one that caches can store numbers in, or a key of `SCHEMES`.

    Raises:
      RequestError: the head has no such codes.
    """
    *slots, head_dim = shape
    kinds = [CODES[kind] for kind in SCHEMES.get(_name(dtype), ())]
    if any(head_dim % kind.per_byte for kind in kinds):
        raise RequestError(
            f"two codes of four bits are a byte, and heads of {head_dim} numbers do not divide into pairs",
            param="kv_dtype",
            hint="choose int8",
        )
    scale = jax.ShapeDtypeStruct(tuple(slots), SCALES) if kinds else None
    arrays = [jax.ShapeDtypeStruct((*slots, head_dim // kind.per_byte), jnp.dtype(kind.dtype)) for kind in kinds]
    k, v = arrays or [jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))] * 2
    return dict(zip(FIELDS, (k, v, scale, scale), strict=True))


def _name(dtype: DTypeLike) -> str:
    return dtype if isinstance(dtype, str) else jnp.dtype(dtype).name


def new_slots(shape: Sequence[int], dtype: DTypeLike, layers: int) -> dict[str, tuple[Any, ...]]:
    """Empty arrays of `shapes` for each layer. They have separate buffers, since donated arrays must not alias one
    another."""
    return {
        name: tuple(None if x is None else jnp.zeros(x.shape, x.dtype) for _ in range(layers))
        for name, x in shapes(shape, dtype).items()
    }


def changed(cache: Any, change: Callable[..., jax.Array], *others: Any) -> dict[str, Any]:
    """`FIELDS` of a cache, all their arrays changed in one way, which takes those of `others` too."""
    return {name: jax.tree.map(change, *(getattr(each, name) for each in (cache, *others))) for name in FIELDS}


def of_layer(cache: Any, index: int) -> dict[str, Any]:
    """`FIELDS` of one layer."""
    return {name: getattr(cache, name)[index] for name in FIELDS}


def of_views(views: Sequence[Any]) -> dict[str, Any]:
    """`FIELDS` of a cache, from those of its layers."""
    return {name: tuple(getattr(view, name) for view in views) for name in FIELDS}


def attend(
    layer: Any,
    q: jax.Array,
    k: jax.Array | None,
    v: jax.Array | None,
    put: Callable[[jax.Array, jax.Array], jax.Array],
    attention: Callable[[jax.Array, dict[str, Any]], jax.Array],
) -> tuple[jax.Array, dict[str, Any]]:
    """Stores new keys and values in a layer, quantised where it has scales, then attends.

    The barrier keeps XLA from storing twice: once for the result and once, on a copy, inside whatever reads it.

    Args:
      q: [batch, queries, num_heads, head_dim]; k, v: [batch, len, kv_heads, head_dim], None where they are stored.
      put: makes of an array of the layer, and of new numbers or codes [batch, len, kv_heads, ...] or scales
        [batch, len, kv_heads] for it, what it becomes.
      attention: of queries, over `FIELDS`.

    Returns:
      What `attention` does for the keys and values themselves, and `FIELDS` with the new ones.
    """
    scheme, dtype = dtype_of(layer.k, layer.v, layer.k_scale), q.dtype
    if k is None or v is None:
        fields = {name: getattr(layer, name) for name in FIELDS}
    else:
        new: tuple[jax.Array | None, ...] = (k.astype(layer.k.dtype), v.astype(layer.v.dtype), None, None)
        if scheme in SCHEMES:
            q, new = encoded(q, k, v, scheme)
        fields = {n: None if x is None else put(getattr(layer, n), x) for n, x in zip(FIELDS, new, strict=True)}
    fields = jax.lax.optimization_barrier(fields)
    out = attention(q, fields)
    turned = scheme in SCHEMES and turns_values(scheme)
    return (hadamard(out) / block(q.shape[-1])).astype(dtype) if turned else out, fields
