"""The contract of products with int8 activations: plain operations, on any device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.quantized import Layout
from llama_jax.quantized.codes import codes_as, shift
from llama_jax.sharding import in_use

LARGEST = 127
TINY = 1e-30
"""Activations that are all smaller count as 0: their scale would not be a normal float32."""
FEW_ROWS = 16
"""Rows up to which all groups are multiplied at once; the sums of groups are then not much beside the weight."""


def multiplies(layout: Layout) -> bool:
    """Returns whether codes of a layout are whole numbers."""
    return layout.kind in ("int8", "int4")


def quantize(x: jax.Array, group: int | None) -> tuple[jax.Array, jax.Array]:
    """Activations [..., in] as int8, each row or group of neighbours with a scale: its largest absolute value / 127.

    Returns:
      codes int8 [..., groups, in / groups], to the nearest, ties to even; and scales float32 [..., groups], NaN where
      one of the numbers is not finite.
    """
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group or x.shape[-1])
    size = jnp.max(jnp.abs(grouped), axis=-1, keepdims=True)
    scale = jnp.where(size < TINY, 0, size / LARGEST)
    divides = jnp.isfinite(scale) & (scale > 0)
    codes = jnp.where(divides, jnp.round(grouped / jnp.where(divides, scale, 1)), 0).astype(jnp.int8)
    return codes, jnp.where(jnp.isfinite(scale), scale, jnp.nan)[..., 0]


def integer_matmul_reference(
    x: jax.Array, members: Mapping[str, jax.Array], *, layout: Layout, dtype: DTypeLike | None = None
) -> jax.Array:
    """See `llama_jax.kernels.integer_matmul.integer_matmul`."""
    out = members[layout.name].shape[:-1]
    rows = math.prod(x.shape[:-1])
    codes, scales = quantize(x.reshape(rows, x.shape[-1]), layout.group)
    # On a mesh joining dimensions of the weight might gather what the devices have.
    joined = out if in_use() else (math.prod(out),)
    weight = codes_as(layout, members, jnp.int8).reshape(*joined, *codes.shape[1:])
    by_group = {name: member.reshape(*joined, -1) for name, member in members.items() if name != layout.name}
    result = _sum_of_groups(codes, scales, weight, by_group["scales"].astype(jnp.float32))
    added = shift(layout, by_group)
    if added is not None:
        sums = scales * jnp.sum(codes, axis=-1, dtype=jnp.int32)
        result = result + jnp.einsum("rg,...g->r...", sums, added, precision=jax.lax.Precision.HIGHEST)
    return result.reshape(*x.shape[:-1], *out).astype(dtype or x.dtype)


def _sum_of_groups(x: jax.Array, x_scales: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    """Codes [rows, groups, n] times codes [*out, groups, n], with scales [rows, groups] and [*out, groups]: float32
    [rows, *out]."""
    rows, groups, _ = x.shape
    if rows == 1:
        # XLA's CPU compiler writes a wider copy of the weight for one row, and not for two.
        x, x_scales = (jnp.pad(a, [(0, 1), *[(0, 0)] * (a.ndim - 1)]) for a in (x, x_scales))
    last = weight.ndim - 1
    x_scales, scales = x_scales.T.reshape(groups, -1, *(1,) * (last - 1)), jnp.moveaxis(scales, -1, 0)
    if groups == 1 or rows <= FEW_ROWS:
        # [groups, rows, *out]
        each = jax.lax.dot_general(x, weight, (((2,), (last,)), ((1,), (last - 1,))), preferred_element_type=jnp.int32)
        return jnp.sum(each.astype(jnp.float32) * x_scales * scales[:, None], axis=0)[:rows]

    def add(total: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x, x_scale, weight, scale = group
        contracted = (((1,), (weight.ndim - 1,)), ((), ()))
        whole = jax.lax.dot_general(x, weight, contracted, preferred_element_type=jnp.int32)
        return total + whole.astype(jnp.float32) * x_scale * scale, None

    first = (jnp.swapaxes(x, 0, 1), x_scales, jnp.moveaxis(weight, -2, 0), scales)
    return jax.lax.scan(add, jnp.zeros((rows, *weight.shape[:-2]), jnp.float32), first)[0]
