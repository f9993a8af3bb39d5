"""The contract of routed experts with quantised weights: the weights decoded, then the operation `moe`."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llama_jax.kernels.moe import routed_experts
from llama_jax.kernels.moe.reference import Activation
from llama_jax.quantized import Layout
from llama_jax.quantized.codes import decode


def used_experts(
    expert_ids: jax.Array, *weights: Mapping[str, jax.Array]
) -> tuple[jax.Array, tuple[Mapping[str, jax.Array], ...]]:
    """Of a few tokens, which use fewer experts than there are, each one's own experts in stacks made for the call, and
    their numbers there; else what is given. So only those are decoded."""
    if expert_ids.size >= len(next(iter(weights[0].values()))):
        return expert_ids, weights
    used = expert_ids.reshape(-1)
    renumbered = jnp.arange(used.size, dtype=expert_ids.dtype).reshape(expert_ids.shape)
    return renumbered, tuple({name: member[used] for name, member in members.items()} for members in weights)


def quantized_experts_reference(
    x: jax.Array,
    expert_ids: jax.Array,
    gate: Mapping[str, jax.Array],
    up: Mapping[str, jax.Array],
    down: Mapping[str, jax.Array],
    *,
    layouts: tuple[Layout, Layout],
    activation: Activation,
    input_scale: jax.Array | None = None,
    output_scale: jax.Array | None = None,
) -> jax.Array:
    """See `llama_jax.kernels.quantized_moe.quantized_experts`."""
    expert_ids, stored = used_experts(expert_ids, gate, up, down)
    kinds = (layouts[0], layouts[0], layouts[1])
    weights = [decode(layout, members, x.dtype) for layout, members in zip(kinds, stored, strict=True)]
    return routed_experts(
        x, expert_ids, *weights, activation=activation, input_scale=input_scale, output_scale=output_scale
    )
