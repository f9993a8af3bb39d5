"""The routed experts as two grouped products, whatever computes them; and their gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from llama_jax.kernels.moe.reference import Activation, routed_experts_reference
from llama_jax.kernels.moe.schedule import Schedule, schedule
from llama_jax.kernels.moe.tiles import Cut, Tiles, default_tiles
from llama_jax.targets import Target, current

DTYPES = ("bfloat16", "float16", "float32")


class GroupedProduct(Protocol):
    """A product of tokens and their experts' weights."""

    def __call__(
        self,
        name: str,
        x: jax.Array,
        weights: Sequence[jax.Array],
        schedule: Schedule,
        activation: Activation | None,
        scale: jax.Array | None,
        cut: Cut,
    ) -> jax.Array:
        """x[row of pair] @ w[expert of pair].T * scale[pair], for every (token, choice) pair.

        A program computes one tile of the schedule times `cut.cols` columns. It gathers the rows of x, reads the
        weights where they lie and writes each pair's result to the pair's place: nothing is sorted or padded in memory.

        Args:
          name: of the kernel in profiles.
          x: [rows, inner]; pair p reads row p // (pairs // rows).
          weights: each [experts, columns, inner], in x's dtype; one, or two with an activation.
          schedule: made with `cut.rows`.
          activation: with it the result is activation(product by the first weight) * product by the second.
          scale: float32 [pairs], or None.

        Returns:
          [splits, pairs, columns], float32 with several splits, else in x's dtype; their sum is the product.
        """
        ...


def unsupported(target: Target, x: jax.Array, expert_ids: jax.Array, *weights: jax.Array, **options: Any) -> str | None:
    """The reason grouped products cannot compute a call anywhere, or None."""
    if expert_ids.size == 0:
        return "there are no tokens"
    if x.dtype not in DTYPES or any(weight.dtype != x.dtype for weight in weights):
        dtypes = ", ".join(str(array.dtype) for array in (x, *weights))
        return f"tokens and weights need one dtype of {', '.join(DTYPES)}; they have {dtypes}"
    return None


def run(
    x: jax.Array,
    expert_ids: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    product: GroupedProduct,
    activation: Activation,
    input_scale: jax.Array | None = None,
    output_scale: jax.Array | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """See `llama_jax.kernels.moe.routed_experts`.

    Args:
      product: what computes; hashable.
      tiles: how to cut the products; by default those of `default_tiles` for the current target.
    """
    if tiles is None:
        experts, intermediate, hidden = gate.shape
        tiles = default_tiles(
            current(),
            pairs=expert_ids.size,
            experts=experts,
            hidden=hidden,
            intermediate=intermediate,
            itemsize=x.dtype.itemsize,
        )
    return _experts(product, activation, tiles, x, expert_ids, gate, up, down, input_scale, output_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _experts(
    product: GroupedProduct,
    activation: Activation,
    tiles: Tiles,
    x: jax.Array,
    expert_ids: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    input_scale: jax.Array | None,
    output_scale: jax.Array | None,
) -> jax.Array:
    def flat(scale: jax.Array | None) -> jax.Array | None:
        return None if scale is None else scale.reshape(-1).astype(jnp.float32)

    plan = schedule(expert_ids, gate.shape[0], tiles.rows)
    (inner,) = product("moe_gate_up", x, (gate, up), plan, activation, flat(input_scale), tiles.up)
    out = product("moe_down", inner, (down,), plan, None, flat(output_scale), tiles.down)
    # Over the splits, and over each token's experts.
    parts = out.reshape(tiles.down_splits, *expert_ids.shape, -1)
    return parts.sum(axis=(0, 2), dtype=jnp.float32).astype(x.dtype)


def _forward(
    product: GroupedProduct, activation: Activation, tiles: Tiles, *args: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _experts(product, activation, tiles, *args), args


def _backward(
    product: GroupedProduct, activation: Activation, tiles: Tiles, args: tuple[Any, ...], gradient: jax.Array
) -> tuple[Any, ...]:
    """The gradient of the reference, which computes the products again, with `jax.lax.ragged_dot`."""
    x, expert_ids, gate, up, down, input_scale, output_scale = args

    def reference(x: jax.Array, weights: tuple[jax.Array, ...], scales: tuple[Any, Any]) -> jax.Array:
        return routed_experts_reference(
            x, expert_ids, *weights, activation=activation, input_scale=scales[0], output_scale=scales[1]
        )

    _, pull = jax.vjp(reference, x, (gate, up, down), (input_scale, output_scale))
    for_x, for_weights, for_scales = pull(gradient)
    return for_x, None, *for_weights, *for_scales


_experts.defvjp(_forward, _backward)
