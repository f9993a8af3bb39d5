"""The residual sum and its norm in one kernel, through Pallas-Triton: each row is read once, and stays in registers."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from llama_jax.kernels.norm.gradient import with_gradient
from llama_jax.kernels.norm.tiles import Tiles, default_tiles
from llama_jax.kernels.pallas import MAX_ELEMENTS, Index, launch, load_tile, next_power_of_2, store_tile
from llama_jax.targets import Target, current

__all__ = ["Tiles", "run", "unsupported"]

MAX_HIDDEN = 32768
DTYPES = ("bfloat16", "float16", "float32")


def unsupported(
    target: Target, x: jax.Array, delta: jax.Array, weight: jax.Array, *, interpret: bool = False, **options: Any
) -> str | None:
    """The reason this backend cannot run a call on `target`, or None."""
    if target.vendor == "cpu" and not interpret:
        return "Pallas-Triton compiles for GPUs only; pallas_interpret runs the same kernel"
    if not x.size:
        return "there are no rows"
    if x.shape != delta.shape or weight.shape != x.shape[-1:]:
        return f"shapes {x.shape} and {delta.shape} and a weight of {weight.shape} do not belong together"
    if x.dtype.name not in DTYPES or delta.dtype != x.dtype:
        return f"it adds two arrays of one dtype of {', '.join(DTYPES)}; they have {x.dtype} and {delta.dtype}"
    if x.shape[-1] > MAX_HIDDEN:
        return f"rows of {x.shape[-1]} numbers are longer than {MAX_HIDDEN}"
    if x.size > MAX_ELEMENTS:
        return f"an array has more than {MAX_ELEMENTS} elements"
    return None


def run(
    x: jax.Array,
    delta: jax.Array,
    weight: jax.Array,
    *,
    eps: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `llama_jax.kernels.norm.add_rms_norm`.

    Args:
      tiles: default: `default_tiles` of the current target.
      interpret: runs as plain JAX operations, on any device.
    """
    hidden = x.shape[-1]
    if tiles is None:
        tiles = default_tiles(current(), rows=x.size // hidden, hidden=hidden)
    return with_gradient(partial(_rows, eps=eps, tiles=tiles, interpret=interpret), eps)(x, delta, weight)


def _rows(
    x: jax.Array, delta: jax.Array, weight: jax.Array, *, eps: float, tiles: Tiles, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    hidden = x.shape[-1]
    rows, width = x.size // hidden, next_power_of_2(hidden)

    def add_rms_norm(x_ref: Any, delta_ref: Any, weight_ref: Any, total_ref: Any, normed_ref: Any) -> None:
        first, valid = pl.program_id(0) * tiles.rows, None
        index: Index = (first,)
        if tiles.rows > 1:
            row = first + jnp.arange(tiles.rows, dtype=jnp.int32)
            index, valid = (row,), row < rows if rows % tiles.rows else None
        # All loads are issued before the first wait.
        term, other = load_tile(x_ref, index, width, valid), load_tile(delta_ref, index, width, valid)
        weight = load_tile(weight_ref, (0,), width)
        # A sum or product of two 16-bit floats, rounded to float32 before, is what rounding it once gives.
        total = (term.astype(jnp.float32) + other.astype(jnp.float32)).astype(x.dtype)
        store_tile(total_ref, index, total, valid)
        # Columns beyond `hidden` are zeros.
        wide = total.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.sum(wide * wide, axis=1) * (1 / hidden) + eps)
        normed = (wide * factor[:, None]).astype(x.dtype).astype(jnp.float32)
        normed = normed * weight.astype(x.dtype).astype(jnp.float32)
        store_tile(normed_ref, index, normed, valid)

    flat = jax.ShapeDtypeStruct((rows, hidden), x.dtype)
    total, normed = launch(
        add_rms_norm,
        *(x.reshape(rows, hidden), delta.reshape(rows, hidden), weight.reshape(1, hidden)),
        grid=(-(-rows // tiles.rows),),
        out=(flat, flat),
        num_warps=tiles.num_warps,
        num_stages=1,
        interpret=interpret,
    )
    return total.reshape(x.shape), normed.reshape(x.shape)
