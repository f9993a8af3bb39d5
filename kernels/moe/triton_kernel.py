"""The grouped product of the routed experts in Triton's own language. Imports triton: only the backend imports this."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def moe_grouped(
    order,
    expert,
    start,
    end,
    x,
    first_weight,
    second_weight,
    scale,
    out,
    PAIRS: tl.constexpr,
    DIVISOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COLS_RAGGED: tl.constexpr,
    INNER_RAGGED: tl.constexpr,
):
    """One tile of rows times COLS columns, over STEPS steps of the inner axis; as `grouped.grouped_product`."""
    tile = tl.program_id(0)
    split = tl.program_id(2)
    first = tl.load(start + tile)
    last = tl.load(end + tile)
    if first < last:
        rows = first + tl.arange(0, ROWS)
        live = rows < last
        # Rows past the end compute pair 0 and store nothing, so that loads of rows need no mask.
        pair = tl.load(order + rows, mask=live, other=0).to(tl.int64)
        cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
        k = split * (STEPS * STEP) + tl.arange(0, STEP)
        x_at = x + (pair // DIVISOR)[:, None] * INNER + k[None, :]
        # Of all experts, weights may have more than 2**31 elements; of one they do not.
        base = tl.load(expert + tile).to(tl.int64) * (COLUMNS * INNER)
        w_at = base + (cols[None, :] * INNER + k[:, None])
        in_cols = (cols < COLUMNS)[None, :]
        total = tl.full((ROWS, COLS), 0.0, tl.float32)
        other = tl.full((ROWS, COLS), 0.0, tl.float32)
        for i in range(STEPS):
            left = INNER - i * STEP
            if INNER_RAGGED:
                a = tl.load(x_at, mask=(k < left)[None, :], other=0.0)
                w_mask = (k < left)[:, None] & in_cols
                w = tl.load(first_weight + w_at, mask=w_mask, other=0.0)
            elif COLS_RAGGED:
                a = tl.load(x_at)
                w_mask = in_cols & (k >= 0)[:, None]
                w = tl.load(first_weight + w_at, mask=w_mask, other=0.0)
            else:
                a = tl.load(x_at)
                w = tl.load(first_weight + w_at)
            total = tl.dot(a, w, total, input_precision="ieee")
            if ACTIVATION != "none":
                if INNER_RAGGED or COLS_RAGGED:
                    w = tl.load(second_weight + w_at, mask=w_mask, other=0.0)
                else:
                    w = tl.load(second_weight + w_at)
                other = tl.dot(a, w, other, input_precision="ieee")
            x_at += STEP
            w_at += STEP
        if SCALED:
            # The products are linear: a scaled sum is the sum of a scaled row.
            factor = tl.load(scale + pair)[:, None]
            total *= factor
            other *= factor
        if ACTIVATION == "silu":
            total = total / (1.0 + tl.exp(-total)) * other
        if ACTIVATION == "relu":
            total = tl.maximum(total, 0.0) * other
        at = out + (split * PAIRS + pair)[:, None] * COLUMNS + cols[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=live[:, None] & in_cols)
