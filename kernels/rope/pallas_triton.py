"""Rotation and cache write in one kernel, through Pallas-Triton: each number is read once and written once.

The caches are both arguments and results in one place, so nothing of them is moved but the new tokens.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.pallas import MAX_ELEMENTS, next_power_of_2
from llama_jax.kernels.rope.reference import rope_and_store_reference
from llama_jax.kernels.rope.tiles import Tiles, default_tiles
from llama_jax.targets import Target, current

__all__ = ["Tiles", "run", "unsupported"]

DTYPES = ("bfloat16", "float16", "float32")
MOST_TOKENS = 512
"""Tokens of a call above which starting kernels no longer counts, and XLA's have not been beaten."""


def unsupported(
    target: Target,
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot: jax.Array,
    page: jax.Array | None = None,
    *,
    interleaved: bool,
    interpret: bool = False,
) -> str | None:
    """The reason this backend cannot run a call on `target`, or None."""
    if target.vendor == "cpu" and not interpret:
        return "Pallas-Triton compiles for GPUs only; pallas_interpret runs the same kernel"
    tokens = qkv.shape[0] * qkv.shape[1]
    if not tokens or qkv.shape[-2] < 3:
        return "there are no queries"
    if not interpret and tokens > MOST_TOKENS:
        return f"{tokens} tokens are more than {MOST_TOKENS}"
    if any(x.dtype.name not in DTYPES for x in (qkv, k, v)):
        return f"dtypes {qkv.dtype}, {k.dtype} and {v.dtype}, it takes {', '.join(DTYPES)}"
    if max(k.size, v.size, qkv.size) > MAX_ELEMENTS:
        return f"an array has more than {MAX_ELEMENTS} elements"
    return None


def run(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot: jax.Array,
    page: jax.Array | None = None,
    *,
    interleaved: bool,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `llama_jax.kernels.rope.rope_and_store`; differentiable as the reference is.

    Args:
      tiles: default: `default_tiles` of the current target.
      interpret: runs as plain JAX operations, on any device.
    """
    if tiles is None:
        tiles = default_tiles(current(), group=qkv.shape[-2] - 2, head_dim=qkv.shape[-1])
    forward = jax.custom_vjp(partial(_forward, interleaved=interleaved, tiles=tiles, interpret=interpret))

    def save(*args: Any) -> Any:
        return forward(*args), args

    def backward(args: Any, gradients: Any) -> Any:
        _, pull = jax.vjp(partial(rope_and_store_reference, interleaved=interleaved), *args)
        return pull(gradients)

    forward.defvjp(save, backward)
    out: tuple[jax.Array, jax.Array, jax.Array] = forward(qkv, cos, sin, k, v, slot, page)
    return out


def _forward(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot: jax.Array,
    page: jax.Array | None,
    *,
    interleaved: bool,
    tiles: Tiles,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch, length, kv_heads, parts, head_dim = qkv.shape
    tokens, group, half = batch * length, parts - 2, head_dim // 2
    entries, _, slots, _ = k.shape
    width, rows = next_power_of_2(half), next_power_of_2(group)

    def rope_and_store(
        qkv_ref: Any, cos_ref: Any, sin_ref: Any, page_ref: Any, slot_ref: Any, _k: Any, _v: Any, *out: Any
    ) -> None:
        q_out, k_out, v_out = out
        token, head = pl.program_id(0), pl.program_id(1)
        column = jnp.arange(width, dtype=jnp.int32)
        inside = None if width == half else column < half
        first, second = (2 * column, 2 * column + 1) if interleaved else (column, column + half)
        row = jnp.arange(rows, dtype=jnp.int32)
        real = None if rows == group else (row < group)[:, None]
        if inside is not None:
            real = inside[None, :] if real is None else real & inside[None, :]
            real = jnp.broadcast_to(real, (rows, width))
        elif real is not None:
            real = jnp.broadcast_to(real, (rows, width))

        def load(ref: Any, mask: Any) -> jax.Array:
            return plgpu.load(ref, mask=mask, other=None if mask is None else 0)

        def of_queries(columns: jax.Array) -> jax.Array:
            return load(qkv_ref.at[token, head, row[:, None], columns[None, :]], real)

        # All loads are issued before the first wait.
        queries = of_queries(first), of_queries(second)
        key, value = (
            [load(qkv_ref.at[token, head, part, c], inside) for c in (first, second)] for part in (group, group + 1)
        )
        c, s = load(cos_ref.at[token, column], inside), load(sin_ref.at[token, column], inside)
        if page is None:
            entry, into, there = token // length, slot_ref[0] + token % length, inside
            # As a `dynamic_update_slice` does, which never writes beyond the end.
            into = jnp.minimum(into, slots - length + token % length)
        else:
            entry, into = page_ref[token], slot_ref[token]
            stored = jnp.broadcast_to(entry < entries, column.shape)
            there = stored if inside is None else stored & inside
            entry = jnp.minimum(entry, entries - 1) if interpret else entry

        def rotated(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
            return (a * c - b * s).astype(qkv.dtype), (b * c + a * s).astype(qkv.dtype)

        for columns, numbers in zip((first, second), rotated(*queries), strict=True):
            plgpu.store(q_out.at[token, head, row[:, None], columns[None, :]], numbers, mask=real)
        for ref, pair in ((k_out, rotated(*key)), (v_out, value)):
            for columns, numbers in zip((first, second), pair, strict=True):
                plgpu.store(ref.at[entry, head, into, columns], numbers.astype(ref.dtype), mask=there)

    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    q, k, v = pl.pallas_call(
        rope_and_store,
        grid=(tokens, kv_heads),
        out_shape=(
            jax.ShapeDtypeStruct((tokens, kv_heads, group, head_dim), qkv.dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ),
        input_output_aliases={5: 1, 6: 2} if page is not None else {4: 1, 5: 2},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=1),
        interpret=interpret,
    )(
        qkv.reshape(tokens, kv_heads, parts, head_dim),
        *(x.reshape(tokens, half) for x in (cos, sin)),
        None if page is None else page.reshape(tokens),
        slot.reshape(-1),
        k,
        v,
    )
    return q.reshape(batch, length, kv_heads * group, head_dim), k, v
