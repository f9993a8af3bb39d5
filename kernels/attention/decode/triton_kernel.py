"""The two kernels of decode attention in Triton's own language, as `kernel.py` has them in Pallas. Imports triton: only
the backend imports this."""

from __future__ import annotations

import triton
import triton.language as tl

from llama_jax.kernels.attention.reference import MASKED as _MASKED

MASKED = tl.constexpr(_MASKED)
# The largest logit of rows that have seen nothing yet.
NONE = tl.constexpr(_MASKED / 2)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(base, at, columns, HEAD_DIM: tl.constexpr):
    """[rows, columns] of an array, zeros in columns that it lacks."""
    if columns.shape[0] == HEAD_DIM:
        return tl.load(base + at[:, None] + columns[None, :])
    return tl.load(base + at[:, None] + columns[None, :], mask=(columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def widened(tile, dtype: tl.constexpr):
    """A tile of the cache in the dtype of the queries; as `pallas.widen`."""
    if tile.dtype == tl.int8 and dtype == tl.bfloat16:
        bits = tile.to(tl.float32).to(tl.uint32, bitcast=True) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tile.to(dtype)


@triton.jit
def decode_attention_shares(
    share_row,
    share_start,
    share_stop,
    q,
    k,
    v,
    k_scale,
    v_scale,
    q_positions,
    kv_positions,
    page_table,
    q_segments,
    kv_segments,
    out,
    lse,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One share of one key/value head; as `kernel.shares`."""
    row_block, index, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, start, stop = tl.load(share_row + index), tl.load(share_start + index), tl.load(share_stop + index)

    flat = row_block * HEIGHT + tl.arange(0, HEIGHT)
    query = tl.minimum(flat // GROUP, QUERIES - 1)
    columns = tl.arange(0, WIDTH)
    q_row = (row * QUERIES + query) * (KV_HEADS * GROUP) + head * GROUP + flat % GROUP
    queries = load_rows(q, q_row * HEAD_DIM, columns, HEAD_DIM)
    q_position = tl.load(q_positions + row * QUERIES + query)
    lane = tl.arange(0, BLOCK_K)
    total = tl.zeros((HEIGHT,), tl.float32)
    top = tl.full((HEIGHT,), NONE, tl.float32)
    acc = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for block in range(start, stop):
        slot = block * BLOCK_K + lane
        if SLOTS % BLOCK_K != 0:  # the last block repeats the last slot, which is then masked
            slot = tl.minimum(slot, SLOTS - 1)
        # Of a whole cache offsets may take more than 32 bits; within a row or page they do not.
        if PAGE == 0:
            base, within = (row * KV_HEADS + head).to(tl.int64) * SLOTS, slot
        else:
            if PAGE % BLOCK_K == 0:
                page = tl.load(page_table + row * (SLOTS // PAGE) + block * BLOCK_K // PAGE)
                in_page = block * BLOCK_K % PAGE + lane
            else:
                page = tl.load(page_table + row * (SLOTS // PAGE) + slot // PAGE)
                in_page = slot % PAGE
            # Entries of empty slots may be any number.
            page = tl.minimum(tl.maximum(page, 0), PAGES - 1)
            base, within = (page * KV_HEADS + head).to(tl.int64) * PAGE, in_page
        at = base * HEAD_DIM + within * HEAD_DIM
        # All loads are issued before the first wait.
        kv_position = tl.load(kv_positions + row * SLOTS + slot)
        keys = load_rows(k, at, columns, HEAD_DIM)
        values = load_rows(v, at, columns, HEAD_DIM)
        if SCALED:
            of_key, of_value = tl.load(k_scale + base + within), tl.load(v_scale + base + within)
        if SLOTS % BLOCK_K != 0:
            kv_position = tl.where(block * BLOCK_K + lane < SLOTS, kv_position, -1)

        see = (kv_position[None, :] >= 0) & (kv_position[None, :] <= q_position[:, None])
        if KIND == "sliding":
            see = see & (q_position[:, None] - kv_position[None, :] < WINDOW)
        if KIND == "chunked":  # nothing is seen from or at a negative position, so its rounding does not matter
            see = see & (q_position[:, None] // WINDOW == kv_position[None, :] // WINDOW)
        if SEGMENTS:
            q_segment = tl.load(q_segments + row * QUERIES + query)
            see = see & (q_segment[:, None] == tl.load(kv_segments + row * SLOTS + slot)[None, :])
        logits = tl.dot(queries, widened(keys, queries.dtype).T, input_precision="ieee")
        if SCALED:
            logits = logits * of_key.to(tl.float32)[None, :]
        if SOFT_CAP == 0:
            logits = logits * (SCALE * LOG2_E)
        else:  # tanh of x is 2 / (1 + e ** -2x) - 1
            power = tl.math.exp2(logits * (-2.0 * LOG2_E * SCALE / SOFT_CAP))
            logits = (2.0 / (1.0 + power) - 1.0) * (SOFT_CAP * LOG2_E)
        logits = tl.where(see, logits, MASKED)
        above = tl.maximum(top, tl.max(logits, 1))
        weights = tl.math.exp2(logits - above[:, None])
        decay = tl.math.exp2(top - above)
        weighted = weights
        if SCALED:
            weighted = weights * of_value.to(tl.float32)[None, :]
        acc = tl.dot(
            weighted.to(queries.dtype), widened(values, queries.dtype), acc * decay[:, None], input_precision="ieee"
        )
        total = total * decay + tl.sum(weights, 1)
        top = above

    some = total > 0
    real = (flat < GROUP * QUERIES) & (start < stop)
    total = tl.where(some, total, 1.0)
    at = (index * KV_HEADS + head) * (GROUP * QUERIES) + flat
    mask = real[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(out + at[:, None] * HEAD_DIM + columns[None, :], acc / total[:, None], mask=mask)
    tl.store(lse + at, tl.where(some, top + tl.log2(total), MASKED), mask=real)


@triton.jit
def decode_attention_combine(
    first,
    end,
    part,
    lse,
    sinks,
    out,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    AT_A_TIME: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One query of one head, from its row's shares; as `kernel.combine`."""
    row, q_head, query = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(first + row), tl.load(end + row)
    flat = query * GROUP + q_head % GROUP
    columns = tl.arange(0, WIDTH)
    total, top = 0.0, NONE
    if SINKS:  # a slot that everyone sees, with a value of zeros
        total, top = 1.0, tl.load(sinks + q_head).to(tl.float32) * LOG2_E
    acc = tl.zeros((WIDTH,), tl.float32)
    for begin in range(start, stop, AT_A_TIME):
        index = begin + tl.arange(0, AT_A_TIME)
        at = (index * KV_HEADS + q_head // GROUP) * (GROUP * QUERIES) + flat
        real = index < stop
        of_share = tl.load(lse + at, mask=real, other=MASKED)
        mask = real[:, None] & (columns < HEAD_DIM)[None, :]
        tile = tl.load(part + at[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
        above = tl.maximum(top, tl.max(of_share, 0))
        weights = tl.math.exp2(of_share - above)
        decay = tl.math.exp2(top - above)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay + tl.sum(weights[:, None] * tile, 0)
        top = above
    at = ((row * QUERIES + query) * (KV_HEADS * GROUP) + q_head) * HEAD_DIM
    result = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + at + columns, result.to(out.dtype.element_ty), mask=columns < HEAD_DIM)
