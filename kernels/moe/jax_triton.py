"""Routed experts through jax-triton: the grouped products and tiles of Pallas-Triton, with an `@triton.jit` kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.dispatch import jax_triton
from llama_jax.kernels.moe import products
from llama_jax.kernels.moe.reference import Activation
from llama_jax.kernels.moe.schedule import Schedule
from llama_jax.kernels.moe.tiles import Cut, Tiles
from llama_jax.targets import Target

# The kernel is written in another language, so an activation has to be known to it by name.
ACTIVATIONS: dict[Activation | None, str] = {None: "none", jax.nn.silu: "silu", jax.nn.relu: "relu"}


def unsupported(
    target: Target,
    x: jax.Array,
    expert_ids: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation,
    tiles: Tiles | None = None,
    **scales: Any,
) -> str | None:
    """The reason this backend cannot run a call on `target`, or None."""
    if reason := jax_triton.unsupported(target):
        return reason
    if reason := products.unsupported(target, x, expert_ids, gate, up, down):
        return reason
    if activation not in ACTIVATIONS:
        return f"the kernel knows no such activation, only {', '.join(list(ACTIVATIONS.values())[1:])}"
    if tiles is not None and not tiles.fits(target, x.dtype.itemsize):
        return (
            f"the tiles take {tiles.lds_bytes(target, x.dtype.itemsize)} bytes of local memory, of {target.lds_bytes}"
        )
    return None


def launch(
    x: jax.Array,
    weights: Sequence[jax.Array],
    schedule: Schedule,
    activation: Activation | None,
    scale: jax.Array | None,
    cut: Cut,
) -> jax_triton.Launch:
    """Arguments of `triton_kernel.moe_grouped`."""
    pairs = schedule.order.shape[0]
    _, columns, inner = weights[0].shape
    steps = -(-inner // (cut.inner * cut.splits))
    # The kernel has a fixed number of arguments: x takes the place of those that it will not read.
    arrays = (*schedule, x, weights[0], weights[-1], x if scale is None else scale)
    constants = {
        "PAIRS": pairs,
        "DIVISOR": pairs // x.shape[0],
        "COLUMNS": columns,
        "INNER": inner,
        "ROWS": cut.rows,
        "COLS": cut.cols,
        "STEP": cut.inner,
        "STEPS": steps,
        "SCALED": scale is not None,
        "ACTIVATION": ACTIVATIONS[activation],
        "COLS_RAGGED": columns % cut.cols != 0,
        "INNER_RAGGED": cut.splits * steps * cut.inner != inner,
    }
    out = jax.ShapeDtypeStruct((cut.splits, pairs, columns), jnp.float32 if cut.splits > 1 else x.dtype)
    grid = (schedule.expert.shape[0], -(-columns // cut.cols), cut.splits)
    return jax_triton.Launch(arrays, constants, (out,), grid, cut.num_warps, cut.num_stages)


def grouped_product(
    name: str,
    x: jax.Array,
    weights: Sequence[jax.Array],
    schedule: Schedule,
    activation: Activation | None,
    scale: jax.Array | None,
    cut: Cut,
) -> jax.Array:
    """See `llama_jax.kernels.moe.products.GroupedProduct`."""
    from llama_jax.kernels.moe.triton_kernel import moe_grouped

    (out,) = jax_triton.call(moe_grouped, name, launch(x, weights, schedule, activation, scale, cut))
    return out


def run(*args: jax.Array, **options: Any) -> jax.Array:
    """`llama_jax.kernels.moe.routed_experts` with the keyword `tiles`: how to cut the products, or None."""
    return products.run(*args, product=grouped_product, **options)
