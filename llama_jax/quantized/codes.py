"""Computations with weights in few bits: the weights themselves, products, rows of a table.

Members of a weight [*out, in] in the layout `layout`: codes under the layout's name [*out, in] (int4: [*out, in / 2]),
"scales" [*out] or [*out, in / group], and "minima" or "zeros" like these. `*out` may be any dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.quantized.layout import Layout
from llama_jax.sharding import in_use

HALF = 8
"""Number that is subtracted from an unsigned code of four bits to store it."""


def unpack(packed: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The inverse of `layout.pack_codes`: codes [..., n], in `dtype`.

    On a GPU it is no work: jax keeps int4 in the same way, so XLA reads the bytes as they are. The barrier is needed
    for that: without one XLA looks for the bytes' own dimensions behind a product, and ends the process when it finds
    none (jaxlib 0.11.2, `triton_tiling_propagation.cc`). XLA's CPU compiler takes int4 bit by bit, which lasts ten
    times as long as shifts of bytes.
    """

    def shifted(packed: jax.Array) -> jax.Array:
        both = jax.lax.bitcast_convert_type(packed, jnp.int8)
        return jnp.stack([both << 4 >> 4, both >> 4], axis=-1).astype(dtype)

    def as_they_lie(packed: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(packed, jnp.int4)).astype(dtype)

    pairs = jax.lax.platform_dependent(packed, cpu=shifted, default=as_they_lie)
    return pairs.reshape(*packed.shape[:-1], -1)


def codes_as(layout: Layout, members: Mapping[str, Any], dtype: DTypeLike) -> jax.Array:
    """Codes one by one, [*out, in], in a floating-point dtype, which holds each of them exactly."""
    stored = members[layout.name]
    return unpack(stored, dtype) if layout.kind == "int4" else stored.astype(dtype)


def decode(layout: Layout, members: Mapping[str, Any], dtype: DTypeLike) -> jax.Array:
    """The weight [*out, in], computed in float32 and rounded once, to `dtype`.

    Equal to the bit to what other programs decode: products of codes and 16-bit scales are exact in float32.
    """
    codes, scales = codes_as(layout, members, jnp.float32), _float32(members, "scales")
    grouped = codes.reshape(*scales.shape, -1)
    if layout.offset == "zero":
        grouped = grouped - _float32(members, "zeros")[..., None]
    elif layout.offset == "min":
        grouped = grouped + HALF
    weight = grouped * scales[..., None]
    if layout.offset == "min":
        weight = weight + _float32(members, "minima")[..., None]
    return weight.reshape(codes.shape).astype(dtype)


def lookup(layout: Layout, members: Mapping[str, Any], tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows `tokens` int32 [batch, len] of a table [vocab, hidden]: [batch, len, hidden]. Reads no other rows."""
    return decode(layout, {name: member[tokens] for name, member in members.items()}, dtype)


def reads_codes(layout: Layout) -> bool:
    """Whether XLA's GPU compiler reads codes in the kernel of `product`; if not, it first writes the decoded weight.

    So it is with the flags that XLA has by default, with which prompts are computed; `decode.weights_read` has integers
    in groups read, too, by decode steps. No AMD GPU before gfx950 converts float8_e4m3fn by itself.
    """
    return layout.group is None and layout.kind != "fp8"


def product(layout: Layout, x: jax.Array, members: Mapping[str, Any], dtype: DTypeLike) -> jax.Array:
    """x [..., in] times the weight [*out, in]: [..., *out], accumulated in float32, in `dtype`.

    Written so that XLA reads the codes in the product's own kernel (compiled for gfx942; docs/quantization.md): scales
    of whole rows come after the product, those of groups are multiplied in the dtype of `x`, and what asymmetric
    layouts add to every code of a group is a second, small product with sums over the groups of `x`.
    """
    codes, scales = codes_as(layout, members, x.dtype), members["scales"]
    if layout.group is None:
        out = _contract(x, codes) * scales.astype(jnp.float32)
        if (shift := _shift(layout, members)) is not None:
            out = out + jnp.sum(x, -1, dtype=jnp.float32).reshape(*x.shape[:-1], *(1,) * shift.ndim) * shift
        return out.astype(dtype)
    grouped = codes.reshape(*scales.shape, layout.group) * scales.astype(x.dtype)[..., None]
    out = _contract(x, grouped.reshape(codes.shape))
    if (shift := _shift(layout, members)) is not None:
        out = out + _contract(_group_sums(x, layout.group), shift)
    return out.astype(dtype)


def _shift(layout: Layout, members: Mapping[str, Any]) -> jax.Array | None:
    """Return the difference between a weight and code * scale, float32 like the scales; None if there is none."""
    if layout.offset is None:
        return None
    scales = _float32(members, "scales")
    return (
        HALF * scales + _float32(members, "minima") if layout.offset == "min" else -_float32(members, "zeros") * scales
    )


def _group_sums(x: jax.Array, group: int) -> jax.Array:
    """x [..., in] -> float32 [..., in / group]."""
    return jnp.sum(x.reshape(*x.shape[:-1], -1, group), axis=-1, dtype=jnp.float32)


def _contract(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product with a weight [*out, in], in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    if weight.ndim > 2 and not in_use():
        return _contract(x, weight.reshape(-1, weight.shape[-1])).reshape(*x.shape[:-1], *weight.shape[:-1])
    last = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, weight, last, precision=precision, preferred_element_type=jnp.float32)


def _float32(members: Mapping[str, Any], name: str) -> jax.Array:
    return members[name].astype(jnp.float32)
