"""Routed experts: each token passes through a few of many MLPs."""

from __future__ import annotations

import jax

from llama_jax.kernels.dispatch import Backend, Operation
from llama_jax.kernels.moe.cases import moe_candidates, moe_cases, moe_models, moe_shape
from llama_jax.kernels.moe.reference import Activation, routed_experts_reference

routed_experts_op = Operation(
    "moe",
    {
        "reference": Backend(routed_experts_reference),
        "pallas_triton": Backend.at(f"{__name__}.pallas_triton", candidates=moe_candidates),
        "pallas_interpret": Backend.at(f"{__name__}.pallas_triton", interpreted=True, interpret=True),
        "jax_triton": Backend.at(f"{__name__}.jax_triton", candidates=moe_candidates),
    },
    shape=moe_shape,
    cases=moe_cases,
    models=moe_models,
)

__all__ = ["routed_experts", "routed_experts_op", "routed_experts_reference"]


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
    return routed_experts_op(
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
