"""Quantised keys and values in kernels: codes become numbers of a product, exactly, and scales factors beside it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.kernels.attention.records import KeysValues
from llama_jax.kernels.pallas import Index, load_row
from llama_jax.targets import Target


def widen(tile: jax.Array, dtype: DTypeLike, once: jax.Array | None = None) -> jax.Array:
    """A tile of keys or values in the dtype of a product.

    Codes become bfloat16 through float32, whose lower half is then zeros: to take the upper one is an operation, where
    rounding takes five (`pallas.rounds_to_bfloat16`).

    Args:
      once: from `turn`.
    """

    def convert() -> jax.Array:
        if jnp.dtype(dtype) != jnp.bfloat16:
            return tile.astype(dtype)
        bits = jax.lax.bitcast_convert_type(tile.astype(jnp.float32), jnp.int32)
        upper = jax.lax.shift_right_logical(bits, jnp.full_like(bits, 16)).astype(jnp.int16)
        return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)

    if tile.dtype != jnp.int8:
        return tile.astype(dtype)
    if once is None:
        return convert()
    return jax.lax.fori_loop(0, once, lambda _, numbers: convert(), jnp.zeros(tile.shape, dtype))


def turn(kv: KeysValues, block: jax.Array, *, num_warps: int, num_stages: int) -> jax.Array | None:
    """How often the loop of `widen` runs: once, which the compiler cannot know of `block` >= 0; None without a loop.

    Triton hands codes to all waves and has each convert all of them, which doubles the instructions of attention. It
    moves nothing out of a loop: in one of one turn, each wave converts what it has loaded. Where steps of the loop
    around overlap, that loop may hold no other.
    """
    return jnp.minimum(block + 1, 1) if kv.quantised and num_warps > 1 and num_stages == 1 else None


def load_scales(ref: Any, index: Index, valid: jax.Array | None) -> jax.Array | None:
    """float32 [slots], the scales at `index`, zeros where not valid; None without scales."""
    return None if ref is None else load_row(ref, index, valid, 0.0).astype(jnp.float32)


def scaled(x: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Logits or weights [rows, slots] times the scales of their slots' keys or values, if they have any."""
    return x if scales is None else x * scales[None, :]


def spills(kv: KeysValues, target: Target) -> str | None:
    """The reason why kernels with codes do not fit a target's registers; None if they do."""
    if kv.quantised and target.arch.startswith("gfx11") and kv.k.shape[3] > 128:
        return f"with codes of head_dim {kv.k.shape[3]} {target.arch} would spill registers"
    return None
