"""Round to nearest: the codes of a weight without any data."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.quantized.codes import HALF
from llama_jax.quantized.layout import Layout, pack_codes

_STEPS = 15
"""Between the smallest and the largest of a group in an asymmetric layout of four bits."""


@partial(jax.jit, static_argnums=0)
def encode(layout: Layout, weight: jax.Array) -> dict[str, jax.Array]:
    """The members (`quantize.codes`) of a weight [*out, in] in floating point; every code is the nearest to its number.

    Scales reach from the largest magnitude of a row or group, or from its smallest to its largest number, and codes are
    those of the scales as they are stored. What lies on such a grid, as GGUF's Q8_0 and Q4_1 do, comes out as it was.
    A group of zeros has the scale 0. A weight that is not finite, or too large for the scales' dtype, gives scales that
    are not.
    """
    weight = weight.astype(jnp.float32)
    grouped = weight.reshape(*weight.shape[:-1], -1, layout.group or weight.shape[-1])
    members = {}
    if layout.symmetric:
        scales = _stored(jnp.max(jnp.abs(grouped), axis=-1) / layout.largest, layout)
        codes = grouped / _nonzero(scales)
        if layout.kind != "fp8":
            codes = jnp.round(codes)
        codes = jnp.clip(codes, -layout.largest, layout.largest)
    else:
        low, high = jnp.min(grouped, axis=-1), jnp.max(grouped, axis=-1)
        if layout.offset == "zero":  # which cannot be outside of the codes
            low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        scales = _stored((high - low) / _STEPS, layout)
        if layout.offset == "min":
            minima = _stored(low, layout)
            codes = jnp.round((grouped - minima.astype(jnp.float32)[..., None]) / _nonzero(scales))
            members["minima"] = minima
        else:
            zeros = jnp.round(-low / _nonzero(scales)[..., 0])
            codes = jnp.round(grouped / _nonzero(scales)) + zeros[..., None]
            members["zeros"] = (zeros - HALF).astype(jnp.int8)
        codes = jnp.clip(codes, 0, _STEPS) - HALF
    codes = codes.reshape(weight.shape)
    if layout.kind == "int4":
        stored = pack_codes(codes.astype(jnp.int8))
    else:
        stored = codes.astype(jnp.int8 if layout.kind == "int8" else jnp.float8_e4m3fn)
    members = {layout.name: stored, "scales": scales} | members
    shape = scales.shape[:-1] if layout.group is None else scales.shape
    return {name: x if name == layout.name else x.reshape(shape) for name, x in members.items()}


def _stored(x: jax.Array, layout: Layout) -> jax.Array:
    return x.astype(layout.scale_dtype)


def _nonzero(scales: jax.Array) -> jax.Array:
    """Return divisors [..., 1] in float32: the scales, with 1 for a scale of 0."""
    scales = scales.astype(jnp.float32)[..., None]
    return jnp.where(scales == 0, 1, scales)
