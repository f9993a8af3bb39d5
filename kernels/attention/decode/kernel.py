"""The two Pallas-Triton kernels of decode attention: shares of the cache, then their combination.

A program of the first kernel reads one share (`partition.py`) of one key/value head and keeps a running softmax of its
rows: the queries of the group that the head serves, times the queries of one text, padded to the 16 rows of a matrix
instruction. It leaves normalised outputs and base-2 log-sum-exps, from which the second kernel makes the result.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.attention.codes import Decoder, products, scaled
from llama_jax.kernels.attention.decode import partition
from llama_jax.kernels.attention.decode.call import Call
from llama_jax.kernels.attention.decode.pairs import reader
from llama_jax.kernels.attention.records import KeysValues, Places
from llama_jax.kernels.attention.reference import MASKED, sees
from llama_jax.kernels.exponential import exp2
from llama_jax.kernels.pallas import Index, dot, launch, load_tile, store_tile

LOG2_E = math.log2(math.e)
# The largest logit of rows that have seen nothing yet: so far above MASKED that 2 ** (MASKED - NONE) is 0.
NONE = MASKED / 2


def shares(
    call: Call, cut: partition.Shares, q: jax.Array, kv: KeysValues, places: Places
) -> tuple[jax.Array, jax.Array]:
    """Attention within each share.

    Returns:
      float32 [shares, kv_heads, rows, head_dim], and the base-2 log-sum-exp of the logits [shares, kv_heads, rows]:
      MASKED where nothing is seen. What there is no share for is not written.
    """
    block_k, height = call.tiles.block_k, call.height
    how: dict[str, Any] = {
        "num_warps": call.tiles.num_warps,
        "num_stages": call.tiles.num_stages,
        "interpret": call.interpret,
    }
    decoder = Decoder.of(kv, q.dtype, **how)
    read = reader(kv, decoder)
    kv_heads, of_k, of_v = kv.k.shape[1], read.parts(kv.k, call.head_dim), read.parts(kv.v, call.head_dim)
    # Where steps overlap, Triton loads ahead only what it multiplies: scales not.
    ahead, last = kv.quantised and call.tiles.num_stages > 1, -(-call.slots // block_k) - 1

    def page_of(table_ref: Any, row: jax.Array, slot: jax.Array) -> jax.Array:
        entry = jax.lax.div(slot, jnp.full_like(slot, call.page_size))
        # Entries of empty slots may be any number.
        return jnp.clip(plgpu.load(table_ref.at[row, entry]), 0, kv.k.shape[0] - 1)

    def decode_attention_shares(
        row_ref: Any,
        start_ref: Any,
        stop_ref: Any,
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        k_scale_ref: Any,
        v_scale_ref: Any,
        q_positions_ref: Any,
        kv_positions_ref: Any,
        table_ref: Any,
        q_segments_ref: Any,
        kv_segments_ref: Any,
        out_ref: Any,
        lse_ref: Any,
    ) -> None:
        row_block, index, head = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        # Of one row it is known where the queries are, so that reading them waits for nothing.
        row = row_ref[index] if call.batch > 1 else jnp.zeros((), jnp.int32)
        start, stop = start_ref[index], stop_ref[index]

        flat = row_block * height + jnp.arange(height, dtype=jnp.int32)
        query = jnp.minimum(flat // call.group, call.queries - 1)
        of_query: Index = (row, query, head * call.group + flat % call.group)
        q = [x.astype(decoder.dtype) for x in of_k.load(q_ref, of_query)]
        q_position = plgpu.load(q_positions_ref.at[row, query])

        def slots_of(block: jax.Array) -> tuple[jax.Array, Index]:
            """The slots of a block, and where they are."""
            begin, lane = block * block_k, jnp.arange(block_k, dtype=jnp.int32)
            slot = begin + lane
            if call.slots % block_k:  # the last block repeats the last slot, which is then masked
                slot = jnp.minimum(slot, call.slots - 1)
            if table_ref is None:
                return slot, (row, head, slot)
            if call.page_size % block_k == 0:
                return slot, (page_of(table_ref, row, begin), head, jax.lax.rem(begin, call.page_size) + lane)
            within = jax.lax.rem(slot, jnp.full_like(slot, call.page_size))
            return slot, (page_of(table_ref, row, slot), head, within)

        def beside(slot: jax.Array, at: Index) -> list[jax.Array]:
            """Positions of slots, and scales, if there are any, of their keys and values."""
            refs = (k_scale_ref, v_scale_ref) if kv.quantised else ()
            return [plgpu.load(kv_positions_ref.at[row, slot]), *(plgpu.load(ref.at[at]) for ref in refs)]

        def step(block: jax.Array, carry: tuple[tuple[jax.Array, ...], ...]) -> tuple[tuple[jax.Array, ...], ...]:
            (total, top, *acc), now = carry
            slot, at = slots_of(block)
            # All loads are issued before the first wait: a barrier of the products delays everything after it.
            kv_position, *scales = now or beside(slot, at)
            k, v = load_tile(k_ref, at, of_k.width), load_tile(v_ref, at, of_v.width)
            k_scales, v_scales = map(decoder.factors, scales) if scales else (None, None)
            keys, values = read.numbers(k, kv.k.dtype, block), read.numbers(v, kv.v.dtype, block)
            if call.slots % block_k:
                lane = block * block_k + jnp.arange(block_k, dtype=jnp.int32)
                kv_position = jnp.where(lane < call.slots, kv_position, -1)

            see = sees(q_position[:, None], kv_position[None, :], call.rule.visibility)
            if q_segments_ref is not None:
                q_segment = plgpu.load(q_segments_ref.at[row, query])
                see &= q_segment[:, None] == plgpu.load(kv_segments_ref.at[row, slot])[None, :]
            cap = call.rule.soft_cap
            factor = call.rule.scale * (LOG2_E if cap is None else 1 / cap)
            logits = products(q, keys)
            logits = logits * factor if k_scales is None else scaled(logits, k_scales * factor)
            if cap is not None:
                logits = jnp.tanh(logits) * (cap * LOG2_E)
            logits = jnp.where(see, logits, MASKED)
            above = jnp.maximum(top, jnp.max(logits, axis=1))
            weights, decay = exp2(logits - above[:, None]), exp2(top - above)
            weighted = scaled(weights, v_scales).astype(decoder.dtype)
            # Behind the last use of this block's, whose registers they take: a copy at the end would wait for them.
            following = beside(*slots_of(jnp.minimum(block + 1, last))) if ahead else []
            acc = [x * decay[:, None] + dot(weighted, of_part) for x, of_part in zip(acc, values, strict=True)]
            return (total * decay[:, None] + weights, above, *acc), tuple(following)

        # Sums of weights by columns: summing up these too takes barriers, and is done once.
        total, top = jnp.zeros((height, block_k), jnp.float32), jnp.full((height,), NONE, jnp.float32)
        init = (total, top, *(jnp.zeros((height, of_v.width), jnp.float32) for _ in range(of_v.number)))
        first = beside(*slots_of(jnp.minimum(start, last))) if ahead else []
        (total, top, *acc), _ = jax.lax.fori_loop(start, stop, step, (init, tuple(first)))

        total = jnp.sum(total, axis=1)
        some, real = total > 0, (flat < call.rows) & (start < stop)
        total = jnp.where(some, total, 1.0)
        of_v.store(out_ref, (index, head, flat), [x / total[:, None] for x in acc], real)
        plgpu.store(lse_ref.at[index, head, flat], jnp.where(some, top + jnp.log2(total), MASKED), mask=real)

    lse = jax.ShapeDtypeStruct((call.most_shares, kv_heads, call.rows), jnp.float32)
    part, lse = launch(
        decode_attention_shares,
        *(cut.row, cut.start, cut.stop, of_k.split(q), read.stored(kv.k), read.stored(kv.v), kv.k_scale, kv.v_scale),
        *(places.q_positions, places.kv_positions, kv.page_table, places.q_segments, places.kv_segments),
        grid=(-(-call.rows // height), call.most_shares, kv_heads),
        out=(jax.ShapeDtypeStruct((*lse.shape, *of_v), jnp.float32), lse),
        **how,
    )
    return part.reshape(*lse.shape, call.head_dim), lse


def combine(
    call: Call,
    cut: partition.Shares,
    part: jax.Array,
    lse: jax.Array,
    sinks: jax.Array | None,
    out: jax.ShapeDtypeStruct,
) -> jax.Array:
    """The result [batch, queries, q_heads, head_dim] from what `shares` returns."""
    at_a_time = call.combined
    # All shares there can be of the only row are read at once: none waits for the number of those that there are.
    at_once = call.batch == 1 and call.most_shares <= at_a_time

    def decode_attention_combine(
        first_ref: Any, end_ref: Any, part_ref: Any, lse_ref: Any, sinks_ref: Any, out_ref: Any
    ) -> None:
        row, q_head, query = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        start, stop = 0 if at_once else first_ref[row], end_ref[row]
        head, flat = q_head // call.group, query * call.group + q_head % call.group

        def step(i: jax.Array | int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            total, top, acc = carry
            index = start + i * at_a_time + jnp.arange(at_a_time, dtype=jnp.int32)
            real = index < stop
            read = index < call.most_shares if at_once else real
            lse = plgpu.load(lse_ref.at[index, head, flat], mask=read, other=MASKED)
            part = load_tile(part_ref, (index, head, flat), call.width, read)
            if at_once:
                lse, part = jnp.where(real, lse, MASKED), jnp.where(real[:, None], part, 0.0)
            above = jnp.maximum(top, jnp.max(lse))
            weights, decay = exp2(lse - above), exp2(top - above)
            return total * decay + jnp.sum(weights), above, acc * decay + jnp.sum(weights[:, None] * part, axis=0)

        total, top, acc = jnp.float32(0), jnp.float32(NONE), jnp.zeros((call.width,), jnp.float32)
        if sinks_ref is not None:  # a slot that everyone sees, with a value of zeros
            total, top = jnp.float32(1), plgpu.load(sinks_ref.at[q_head]).astype(jnp.float32) * LOG2_E
        if at_once:
            total, _, acc = step(0, (total, top, acc))
        else:
            steps = (stop - start + at_a_time - 1) // at_a_time
            total, _, acc = jax.lax.fori_loop(0, steps, step, (total, top, acc))
        store_tile(out_ref, (row, query, q_head), (acc / jnp.where(total > 0, total, 1.0))[None])

    return launch(
        decode_attention_combine,
        *(cut.first, cut.end, part, lse, sinks),
        grid=(call.batch, call.group * lse.shape[1], call.queries),
        out=out,
        num_warps=4,
        num_stages=1,
        interpret=call.interpret,
    )
