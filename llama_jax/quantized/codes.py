"""Computations with quantised weights: the weights themselves, and rows of a table. Products with them are an
operation, `llama_jax.kernels.quantized_matmul`.

Members of a weight [*out, in] in the layout `layout`: codes under the layout's name [*out, in] (int4: [*out, in / 2]),
"scales" [*out] or [*out, in / group], and "minima" or "zeros" like these. `*out` may be any dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.quantized.layout import ORDER, Layout


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
        grouped = grouped - layout.lowest
    weight = grouped * scales[..., None]
    if layout.offset == "min":
        weight = weight + _float32(members, "minima")[..., None]
    return weight.reshape(codes.shape).astype(dtype)


def decode_ordered(layout: Layout, members: Mapping[str, Any], dtype: DTypeLike) -> jax.Array:
    """The weight [out, in] or [expert, out, in] of which columns are stored in the order of the member `ORDER`."""
    back = jnp.argsort(members[ORDER], axis=-1)[..., None, :]
    return jnp.take_along_axis(decode(layout, members, dtype), back, axis=-1)


def as_they_are(shape: tuple[int, ...]) -> jax.Array:
    """The member `ORDER` of a weight of this shape whose columns are stored in their own order."""
    return jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), (*shape[:-2], shape[-1]))


def in_order(x: jax.Array, members: Mapping[str, Any]) -> jax.Array:
    """x [..., in] as a product with these members of a weight [out, in] takes it: in the order of its columns."""
    if ORDER not in members:
        return x
    return jnp.take(x, members[ORDER], axis=-1, mode="clip", unique_indices=True)


def lookup(layout: Layout, members: Mapping[str, Any], tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows `tokens` int32 [batch, len] of a table [vocab, hidden]: [batch, len, hidden]. Reads no other rows."""
    return decode(layout, {name: member[tokens] for name, member in members.items()}, dtype)


def shift(layout: Layout, members: Mapping[str, Any]) -> jax.Array | None:
    """The number added to the product of code and scale in an asymmetric layout; None in a symmetric one.

    Args:
      members: at least "scales" and "minima" or "zeros", of any one shape.

    Returns:
      float32, of that shape.
    """
    if layout.offset is None:
        return None
    scales = _float32(members, "scales")
    if layout.offset == "min":
        return _float32(members, "minima") - layout.lowest * scales
    return -_float32(members, "zeros") * scales


def _float32(members: Mapping[str, Any], name: str) -> jax.Array:
    return members[name].astype(jnp.float32)
