"""Routed experts: each token passes through a few of many MLPs."""

from __future__ import annotations

from functools import partial

import jax

from llama_jax.kernels.dispatch import Backend, Operation
from llama_jax.kernels.moe import jax_triton, pallas_triton, products
from llama_jax.kernels.moe.cases import moe_candidates, moe_cases, moe_models, moe_shape
from llama_jax.kernels.moe.reference import Activation, routed_experts_reference

grouped_experts = Operation(
    "moe",
    {
        "reference": Backend(routed_experts_reference),
        "pallas_triton": Backend(
            pallas_triton.run, pallas_triton.unsupported, tiles=pallas_triton.Tiles, candidates=moe_candidates
        ),
        "pallas_interpret": Backend(partial(pallas_triton.run, interpret=True), products.unsupported, interpreted=True),
        "jax_triton": Backend(
            jax_triton.run, jax_triton.unsupported, tiles=pallas_triton.Tiles, candidates=moe_candidates
        ),
    },
    shape=moe_shape,
    cases=moe_cases,
    models=moe_models,
)

__all__ = ["grouped_experts", "routed_experts", "routed_experts_reference"]


def routed_experts(
    x: jax.Array,
    expert_ids: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation: Activation,
    input_scale: jax.Array | None = None,
    output_scale: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Sum over each token's experts of down(activation(gate(x)) * up(x)).

    Args:
      x: [tokens, hidden].
      expert_ids: int32 [tokens, top_k], the experts of each token.
      gate, up: [experts, intermediate, hidden]. down: [experts, hidden, intermediate].
      input_scale, output_scale: float32 [tokens, top_k], factors on each expert's input or output.
      backend: "auto" or the name of one backend.

    Returns:
      [tokens, hidden] in x's dtype.

    Raises:
      KernelError: the named backend does not exist, or cannot run this here.
    """
    return grouped_experts(
        x,
        expert_ids,
        gate,
        up,
        down,
        activation=activation,
        input_scale=input_scale,
        output_scale=output_scale,
        backend=backend,
    )
