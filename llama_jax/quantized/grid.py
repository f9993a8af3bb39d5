"""Grids: the numbers that a row's or a group's codes can represent, and the code of each number on one.

A grid is what a layout stores beside the codes, {"scales"} and perhaps "minima" or "zeros" [*out, groups], in their own
dtypes. Functions take numbers by groups [*out, groups, group]; a single column [*out, 1], with what the grid has for
it [*out], is one too. Every method of quantisation is a choice of grids, and of codes on them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llama_jax.quantized.layout import CODES, Layout, pack_codes

Grid = Mapping[str, jax.Array]


def by_group(layout: Layout, weight: jax.Array) -> jax.Array:
    """A weight [*out, in] as float32 [*out, groups, group]; a whole row is a group where the layout has none."""
    return weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, layout.group or weight.shape[-1])


def spanning(layout: Layout, grouped: jax.Array, share: jax.Array | float = 1.0) -> dict[str, jax.Array]:
    """The grid from the smallest to the largest number of each group, or to the largest magnitude.

    Args:
      share: of that range which the grid covers; what lies beyond takes the first or the last code. Broadcasts against
        [*out, groups]. Negative in a symmetric layout of four bits: the end with one code more is turned to the
        largest magnitude, whatever its sign.
    """
    if layout.symmetric:
        return {"scales": _stored(share * jnp.max(jnp.abs(grouped), axis=-1) / layout.largest, layout)}
    low, high = share * jnp.min(grouped, axis=-1), share * jnp.max(grouped, axis=-1)
    if layout.offset == "zero":  # which cannot be outside of the codes
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scales = _stored((high - low) / (layout.largest - layout.lowest), layout)
    if layout.offset == "min":
        return {"scales": scales, "minima": _stored(low, layout)}
    zeros = jnp.round(-low / _nonzero(scales)[..., 0])
    return {"scales": scales, "zeros": (zeros + layout.lowest).astype(jnp.int8)}


def nearest(layout: Layout, grid: Grid, grouped: jax.Array) -> jax.Array:
    """The codes that are nearest to numbers, as float32, from `lowest` to `largest` of the layout."""
    if layout.offset == "min":
        codes = jnp.round((grouped - grid["minima"].astype(jnp.float32)[..., None]) / _nonzero(grid["scales"]))
        codes = codes + layout.lowest
    elif layout.offset == "zero":
        codes = jnp.round(grouped / _nonzero(grid["scales"])) + grid["zeros"].astype(jnp.float32)[..., None]
    else:
        codes = grouped / _nonzero(grid["scales"])
    if layout.kind == "fp8":
        codes = jnp.clip(codes, -layout.largest, layout.largest)
        return codes.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    return jnp.clip(jnp.round(codes), layout.lowest, layout.largest)


def numbers(layout: Layout, grid: Grid, codes: jax.Array) -> jax.Array:
    """The numbers that codes represent, computed as `quantized.codes.decode` does."""
    scales = grid["scales"].astype(jnp.float32)[..., None]
    if layout.offset == "zero":
        return (codes - grid["zeros"].astype(jnp.float32)[..., None]) * scales
    if layout.offset == "min":
        return (codes - layout.lowest) * scales + grid["minima"].astype(jnp.float32)[..., None]
    return codes * scales


def members(layout: Layout, grid: Grid, codes: jax.Array) -> dict[str, jax.Array]:
    """The members (`quantized.codes`) of a weight with these codes [*out, in]."""
    if layout.kind == "int4":
        stored = pack_codes(codes.astype(jnp.int8))
    else:
        stored = codes.astype(CODES[layout.kind])
    rows = codes.shape[:-1]
    return {layout.name: stored} | {n: x.reshape(rows) if layout.group is None else x for n, x in grid.items()}


def _stored(x: jax.Array, layout: Layout) -> jax.Array:
    return x.astype(layout.scale_dtype)


def _nonzero(scales: jax.Array) -> jax.Array:
    """Return divisors [..., 1] in float32: the scales, with 1 for a scale of 0."""
    scales = scales.astype(jnp.float32)[..., None]
    return jnp.where(scales == 0, 1, scales)
