"""The two Pallas-Triton kernels of decode attention: shares of the cache, then their combination.

A program of the first kernel reads one share (`plan.py`) of one key/value head and keeps a running softmax of its rows:
the queries of the group that the head serves, times the queries of one text, padded to the 16 rows of a matrix
instruction. It leaves normalised outputs and base-2 log-sum-exps, from which the second kernel makes the result.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.attention.decode import plan
from llama_jax.kernels.attention.decode.tiles import Tiles, block_rows
from llama_jax.kernels.attention.reference import MASKED, Visibility, sees
from llama_jax.kernels.pallas import Index, dot, launch, load_tile, next_power_of_2, store_tile

LOG2_E = math.log2(math.e)
# The largest logit of rows that have seen nothing yet: so far above MASKED that 2 ** (MASKED - NONE) is 0.
NONE = MASKED / 2
# Shares that the second kernel reads at a time.
COMBINED = 32


def _cached(ref: Any, index: Index, width: int, dtype: Any) -> jax.Array:
    """Rows of the cache in the dtype of the queries. A quantised cache would be dequantised here."""
    return load_tile(ref, index, width).astype(dtype)


def _vector(ref: Any, length: int) -> jax.Array:
    """All of an int32 vector, zeros up to `length`."""
    index = jnp.arange(length, dtype=jnp.int32)
    if length == ref.shape[0]:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=index < ref.shape[0], other=0)


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    soft_cap: float | None,
    sinks: jax.Array | None,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    page_table: jax.Array | None,
    tiles: Tiles,
    wanted: int,
    interpret: bool,
) -> jax.Array:
    """`llama_jax.kernels.attention.attention` with these tiles, the cache cut into about `wanted` shares a head."""
    batch, queries, q_heads, head_dim = q.shape
    kv_heads, page_size, slots = k.shape[1], k.shape[2], kv_positions.shape[1]
    group = q_heads // kv_heads
    width, rows = next_power_of_2(head_dim), group * queries
    block_k, height = tiles.block_k, block_rows(rows)

    def ranges(first_ref: Any, end_ref: Any) -> tuple[jax.Array, jax.Array]:
        length = next_power_of_2(batch)
        return _vector(first_ref, length), _vector(end_ref, length)

    def page_of(table_ref: Any, row: jax.Array, slot: jax.Array) -> jax.Array:
        entry = jax.lax.div(slot, jnp.full_like(slot, page_size))
        # Entries of empty slots may be any number.
        return jnp.clip(plgpu.load(table_ref.at[row, entry]), 0, k.shape[0] - 1)

    def decode_attention_shares(
        first_ref: Any,
        end_ref: Any,
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        q_positions_ref: Any,
        kv_positions_ref: Any,
        table_ref: Any,
        q_segments_ref: Any,
        kv_segments_ref: Any,
        out_ref: Any,
        lse_ref: Any,
    ) -> None:
        index, head, row_block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        row, start, stop = plan.share(*ranges(first_ref, end_ref), block_k, wanted, index)
        row = jnp.minimum(row, batch - 1)

        flat = row_block * height + jnp.arange(height, dtype=jnp.int32)
        query = jnp.minimum(flat // group, queries - 1)
        q = load_tile(q_ref, (row, query, head * group + flat % group), width)
        q_position = plgpu.load(q_positions_ref.at[row, query])

        def step(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            total, top, acc = carry
            lane, start = jnp.arange(block_k, dtype=jnp.int32), block * block_k
            slot = start + lane
            exists = slot < slots
            if slots % block_k:
                slot = jnp.minimum(slot, slots - 1)
            if table_ref is None:
                at: Index = (row, head, slot)
            elif page_size % block_k == 0:
                at = (page_of(table_ref, row, start), head, jax.lax.rem(start, page_size) + lane)
            else:
                at = (page_of(table_ref, row, slot), head, jax.lax.rem(slot, jnp.full_like(slot, page_size)))
            # Everything is asked for before anything is waited for: each barrier of the products would hold up the loads
            # behind it.
            kv_position = plgpu.load(kv_positions_ref.at[row, slot])
            k = _cached(k_ref, at, width, q.dtype)
            v = _cached(v_ref, at, width, q.dtype)
            if slots % block_k:
                kv_position = jnp.where(exists, kv_position, -1)

            see = sees(q_position[:, None], kv_position[None, :], visibility)
            if q_segments_ref is not None:
                q_segment = plgpu.load(q_segments_ref.at[row, query])
                see &= q_segment[:, None] == plgpu.load(kv_segments_ref.at[row, slot])[None, :]
            logits = dot(q, k, transpose_b=True)
            if soft_cap is None:
                logits = logits * (scale * LOG2_E)
            else:
                logits = jnp.tanh(logits * (scale / soft_cap)) * (soft_cap * LOG2_E)
            logits = jnp.where(see, logits, MASKED)
            above = jnp.maximum(top, jnp.max(logits, axis=1))
            weights = jnp.exp2(logits - above[:, None])
            decay = jnp.exp2(top - above)
            acc = acc * decay[:, None] + dot(weights.astype(v.dtype), v)
            return total * decay + jnp.sum(weights, axis=1), above, acc

        nothing = jnp.zeros((height,), jnp.float32)
        init = (nothing, nothing + NONE, jnp.zeros((height, width), jnp.float32))
        total, top, acc = jax.lax.fori_loop(start, stop, step, init)

        some = total > 0
        total = jnp.where(some, total, 1.0)
        real = flat < rows
        store_tile(out_ref, (index, head, flat), acc / total[:, None], real)
        plgpu.store(lse_ref.at[index, head, flat], jnp.where(some, top + jnp.log2(total), MASKED), mask=real)

    def decode_attention_combine(
        first_ref: Any, end_ref: Any, part_ref: Any, lse_ref: Any, sinks_ref: Any, out_ref: Any
    ) -> None:
        row, q_head, query = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        start, stop = plan.shares_of(*ranges(first_ref, end_ref), block_k, wanted, row)
        head, flat = q_head // group, query * group + q_head % group

        def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            total, top, acc = carry
            index = start + i * COMBINED + jnp.arange(COMBINED, dtype=jnp.int32)
            real = index < stop
            lse = plgpu.load(lse_ref.at[index, head, flat], mask=real, other=MASKED)
            part = load_tile(part_ref, (index, head, flat), width, real)
            above = jnp.maximum(top, jnp.max(lse))
            weights = jnp.exp2(lse - above)
            decay = jnp.exp2(top - above)
            return total * decay + jnp.sum(weights), above, acc * decay + jnp.sum(weights[:, None] * part, axis=0)

        total, top, acc = jnp.float32(0), jnp.float32(NONE), jnp.zeros((width,), jnp.float32)
        if sinks_ref is not None:
            total, top = jnp.float32(1), plgpu.load(sinks_ref.at[q_head]).astype(jnp.float32) * LOG2_E
        steps = (stop - start + COMBINED - 1) // COMBINED
        total, _, acc = jax.lax.fori_loop(0, steps, step, (total, top, acc))
        store_tile(out_ref, (row, query, q_head), (acc / jnp.where(total > 0, total, 1.0))[None])

    first, end = plan.visible_slots(q_positions, kv_positions, visibility)
    most = min(wanted + batch - 1, batch * -(-slots // block_k))
    part, lse = launch(
        decode_attention_shares,
        *(first, end, q, k, v, q_positions, kv_positions, page_table, q_segments, kv_segments),
        grid=(most, kv_heads, -(-rows // height)),
        out=(
            jax.ShapeDtypeStruct((most, kv_heads, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((most, kv_heads, rows), jnp.float32),
        ),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )
    return launch(
        decode_attention_combine,
        *(first, end, part, lse, sinks),
        grid=(batch, q_heads, queries),
        out=jax.ShapeDtypeStruct(q.shape, q.dtype),
        num_warps=4,
        num_stages=1,
        interpret=interpret,
    )
