"""The grouped product of the routed experts as a Pallas kernel in Triton's dialect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.moe.schedule import Schedule
from llama_jax.kernels.pallas import dot, launch


def grouped_product(
    name: str,
    x: jax.Array,
    weights: Sequence[jax.Array],
    schedule: Schedule,
    combine: Callable[..., jax.Array],
    *,
    scale: jax.Array | None,
    block_rows: int,
    block_cols: int,
    block_inner: int,
    splits: int,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> jax.Array:
    """combine(x[row of pair] @ w[expert of pair].T * scale[pair] for w in weights), for every (token, choice) pair.

    A program computes one tile of the schedule times `block_cols` columns. It gathers the rows of x and reads the
    weights where they lie, and writes each pair's result to the pair's place: nothing is sorted or padded in memory.

    Args:
      name: of the kernel in profiles.
      x: [rows, inner]; pair p reads row p // (pairs // rows).
      weights: each [experts, columns, inner], in x's dtype.
      schedule: made with the same `block_rows`.
      combine: of one float32 [block_rows, block_cols] for each weight, to one.
      scale: float32 [pairs], or None.
      splits: so many programs share the inner axis of a tile; each writes its own float32 sum.

    Returns:
      [splits, pairs, columns], float32 with several splits, else in x's dtype.
    """
    pairs = schedule.order.shape[0]
    _, columns, inner = weights[0].shape
    steps = pl.cdiv(pl.cdiv(inner, block_inner), splits)
    scales = () if scale is None else (scale,)
    cols_ragged, inner_ragged = columns % block_cols != 0, splits * steps * block_inner != inner

    def kernel(order: Any, expert: Any, start: Any, end: Any, x_ref: Any, *refs: Any) -> None:
        *weight_refs, out = refs
        scale_ref = weight_refs.pop() if scales else None
        tile, block, split = (pl.program_id(axis) for axis in range(3))
        first, last, which = start[tile], end[tile], expert[tile]

        @pl.when(first < last)
        def _() -> None:
            rows = first + jnp.arange(block_rows)
            live = rows < last
            # Rows past the end compute pair 0 and store nothing, so that loads of rows need no mask.
            pair = plgpu.load(order.at[rows], mask=live, other=0)
            source = (pair // (pairs // x.shape[0]))[:, None]
            # Every index is an array, never a slice: interpret mode knows no mixture of the two.
            cols = block * block_cols + jnp.arange(block_cols)

            def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                k = ((split * steps + i) * block_inner + jnp.arange(block_inner))[None, :]
                in_k = k < inner if inner_ragged else None
                in_cols = (cols < columns)[:, None] if cols_ragged else None
                a = _load(x_ref.at[source, k], in_k)
                return tuple(
                    # Both operands have the inner axis last: weights lie [out, in].
                    total + dot(a, _load(ref.at[which, cols[:, None], k], in_cols, in_k), transpose_b=True)
                    for total, ref in zip(sums, weight_refs, strict=True)
                )

            zero = jnp.zeros((block_rows, block_cols), jnp.float32)
            sums = jax.lax.fori_loop(0, steps, step, (zero,) * len(weights))
            if scale_ref is not None:
                # The products are linear: a scaled sum is the sum of a scaled row.
                factor = plgpu.load(scale_ref.at[pair])[:, None]
                sums = tuple(total * factor for total in sums)
            # Interpret mode writes old values where the mask is off: those rows have to be out of range.
            target = jnp.where(live, pair, pairs)[:, None]
            mask = live[:, None] & (cols < columns)[None, :] if cols_ragged else live[:, None]
            plgpu.store(
                out.at[split, target, cols[None, :]],
                combine(*sums).astype(out.dtype),
                mask=jnp.broadcast_to(mask, zero.shape),
            )

    kernel.__name__ = name
    return launch(
        kernel,
        *schedule,
        x,
        *weights,
        *scales,
        # The first axis runs fastest: tiles of one expert follow one another and share its weights in the cache.
        grid=(schedule.expert.shape[0], pl.cdiv(columns, block_cols), splits),
        out=jax.ShapeDtypeStruct((splits, pairs, columns), jnp.float32 if splits > 1 else x.dtype),
        num_warps=num_warps,
        num_stages=num_stages,
        interpret=interpret,
    )


def _load(ref: Any, *masks: jax.Array | None) -> jax.Array:
    """The elements of `ref`, zeros where one of the masks is off."""
    mask: jax.Array | None = None
    for other in masks:
        if other is not None:
            mask = other if mask is None else mask & other
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=0)
