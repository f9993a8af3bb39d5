"""The forward kernel: a tile of queries against one block of slots after another, with a running softmax."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.attention import float8
from llama_jax.kernels.attention.codes import Decoder, Parts, products, scaled
from llama_jax.kernels.attention.flash.blocks import (
    LOG2_E,
    NOTHING_SEEN,
    Program,
    load_queries,
    load_slots,
    load_span,
    sees,
    slot_index,
    visit,
)
from llama_jax.kernels.attention.flash.spans import block_pairs, spans
from llama_jax.kernels.attention.flash.weights import weights
from llama_jax.kernels.attention.records import KeysValues, Places
from llama_jax.kernels.attention.reference import MASKED
from llama_jax.kernels.exponential import exp2
from llama_jax.kernels.pallas import Index, dot, launch, load_row, load_tile, narrow


class _Softmax(NamedTuple):
    """The running softmax of a tile of queries: weighted values [queries, columns] of each part of a head, the largest
    logit, and the sum of weights, relative to it."""

    acc: list[jax.Array]
    peak: jax.Array
    total: jax.Array


def forward(
    rule: Program, q: jax.Array, kv: KeysValues, sinks: jax.Array | None, places: Places, *, with_lse: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Attention, and with `with_lse` the log-sum-exp of each query's logits (sink included), as powers of two.

    Returns:
      q's shape and dtype; float32 [batch, q_heads, q_len] or None. Queries that are padding or see nothing: zeros, and
      `NOTHING_SEEN`.
    """
    tiles = rule.tiles
    (batch, q_len), (q_heads, head_dim) = places.q_positions.shape, q.shape[2:]
    kv_heads, page_size = kv.k.shape[1], kv.k.shape[2]
    kv_len = places.kv_positions.shape[1]
    group = q_heads // kv_heads
    queries = tiles.block_q // tiles.heads  # of each head in a tile
    of_k, of_v = Parts.of(kv.k, head_dim), Parts.of(kv.v, head_dim)
    how: dict[str, Any] = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "interpret": rule.interpret}
    decoder = Decoder.of(kv, q.dtype, **how)
    pairs = block_pairs(places, rule.visibility, queries, tiles.block_k)

    def flash_attention_forward(
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        k_scale_ref: Any,
        v_scale_ref: Any,
        sinks_ref: Any,
        at: Places,
        table_ref: Any,
        spans_ref: Any,
        out_ref: Any,
        lse_ref: Any,
    ) -> None:
        # Work-groups with consecutive numbers go to the XCDs of an MI300 in turn: those of one key/value head share one
        # XCD's cache. The last queries of a causal text have the most to do, so they begin.
        kv_head = jax.lax.rem(pl.program_id(0), kv_heads)
        block = pl.num_programs(1) - 1 - pl.program_id(1)
        row = pl.program_id(2)
        lane = jnp.arange(tiles.block_q, dtype=jnp.int32)
        heads = jnp.full_like(lane, tiles.heads)
        first_head = kv_head * group + jax.lax.div(pl.program_id(0), kv_heads) * tiles.heads
        head = first_head + jax.lax.rem(lane, heads)
        nth = jax.lax.div(lane, heads)
        query = block * queries + nth
        valid = (nth < queries) & (query < q_len)
        query_rows = load_queries(at, row, query, valid, rule)
        place: Index = (row, query, head)
        if at.q_index is not None:
            packed = load_row(at.q_index, (row, query), valid, q.shape[1])
            place, valid = (0, packed, head), packed < q.shape[1]
        q_tile = [x.astype(decoder.dtype) for x in of_k.load(q_ref, place, valid)]

        def step(masked: bool, j: jax.Array, carry: _Softmax) -> _Softmax:
            acc, peak, total = carry
            start = j * tiles.block_k
            index = slot_index(table_ref, row, kv_head, start, tiles.block_k, page_size)
            slots = start + jnp.arange(tiles.block_k, dtype=jnp.int32)
            there = slots < kv_len if kv_len % tiles.block_k else None
            keys = decoder.numbers(load_tile(k_ref, index, of_k.width, there), kv.k.dtype, j)
            logits = rule.logits(scaled(products(q_tile, keys), decoder.scales(k_scale_ref, index, there)))
            if masked:
                see = sees(query_rows, load_slots(at, row, slots, there))
                logits = jnp.where(see, logits, MASKED)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
            now = weights(logits, new_peak, rule.factor)
            shrink = exp2((peak - new_peak) * rule.factor)
            total = total * shrink + jnp.sum(now, axis=1)
            values = decoder.numbers(load_tile(v_ref, index, of_v.width, there), kv.v.dtype, j)
            now = scaled(now, decoder.scales(v_scale_ref, index, there))
            narrowed = narrow(now, decoder.dtype, by_hand=rule.round_by_hand)
            acc = [x * shrink[:, None] + dot(narrowed, part) for x, part in zip(acc, values, strict=True)]
            return _Softmax(acc, new_peak, total)

        peak = jnp.full((tiles.block_q,), MASKED, jnp.float32)
        total = jnp.zeros((tiles.block_q,), jnp.float32)
        if sinks_ref is not None:  # a slot that everyone sees, with a value of zeros
            sink = load_row(sinks_ref, (head,), valid, 0.0)
            peak, total = sink * (LOG2_E / rule.factor), total + 1.0
        acc = [jnp.zeros((tiles.block_q, of_v.width), jnp.float32) for _ in range(of_v.number)]
        acc, peak, total = visit(load_span(spans_ref, row, block), step, _Softmax(acc, peak, total))

        # What padding saw in blocks without a mask, and what the others made of blocks where they see nothing, is void.
        seen = (peak > MASKED / 2) & (query_rows.last >= 0)
        out = [jnp.where(seen[:, None], x * (1.0 / total)[:, None], 0.0) for x in acc]
        of_v.store(out_ref, place, out, valid)
        if lse_ref is not None:
            lse = jnp.where(seen, peak * rule.factor + jnp.log2(total), NOTHING_SEEN)
            plgpu.store(lse_ref.at[row, head, query], lse, mask=valid)

    out, lse = launch(
        flash_attention_forward,
        of_k.split(q),
        float8.bits(kv.k),
        float8.bits(kv.v),
        kv.k_scale,
        kv.v_scale,
        sinks,
        places,
        kv.page_table,
        spans(*pairs),
        grid=(q_heads // tiles.heads, -(-q_len // queries), batch),
        out=(
            jax.ShapeDtypeStruct((*q.shape[:-1], *of_v), q.dtype),
            jax.ShapeDtypeStruct((batch, q_heads, q_len), jnp.float32) if with_lse else None,
        ),
        **how,
    )
    return out.reshape(q.shape), lse
