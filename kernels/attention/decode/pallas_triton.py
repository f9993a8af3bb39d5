"""Decode attention on any GPU through Pallas-Triton; differentiable by q, k, v and sinks."""

from __future__ import annotations

from typing import Any

import jax

from llama_jax.kernels.attention.codes import lacks
from llama_jax.kernels.attention.decode import call
from llama_jax.kernels.attention.decode.kernel import combine, shares
from llama_jax.kernels.attention.decode.tiles import Tiles
from llama_jax.kernels.attention.records import KeysValues, Places, Rule
from llama_jax.kernels.pallas import MAX_ELEMENTS
from llama_jax.targets import Target

__all__ = ["Tiles", "run", "unsupported"]

WIDE_BYTES = 2**32
"""Pallas-Triton computes offsets in 64 bits, not in 32 with a sign, in arrays of more bytes alone."""


def unsupported(
    target: Target, q: jax.Array, kv: KeysValues, *args: Any, interpret: bool = False, **arguments: Any
) -> str | None:
    """The reason the kernels cannot run these arguments on that target, or None."""
    if target.vendor == "cpu" and not interpret:
        return "Pallas-Triton compiles for GPUs only; pallas_interpret runs the same kernels"
    if not interpret and target.vendor == "amd" and target.wave_size == 32 and q.dtype == "float32":
        return f"{target.arch} has no matrix instruction for float32, and the kernels would spill registers"
    if any(x.size > MAX_ELEMENTS and x.size * x.dtype.itemsize <= WIDE_BYTES for x in (kv.k, kv.v)):
        return f"its offsets into an array of {kv.k.size} bytes would not be right"
    return (None if interpret else lacks(kv, q.shape[3], target)) or call.unsupported(q, kv, *args, **arguments)


def run(
    q: jax.Array,
    kv: KeysValues,
    places: Places,
    rule: Rule,
    *,
    sinks: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `call.run`."""
    kernels = call.Kernels(shares, combine)
    return call.run(kernels, q, kv, places, rule, sinks=sinks, tiles=tiles, interpret=interpret)
