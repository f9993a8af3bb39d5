"""Routed experts with quantised weights, which are decoded inside the products."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from llama_jax.kernels.dispatch import Backend, Operation
from llama_jax.kernels.moe.reference import Activation
from llama_jax.kernels.quantized_moe.cases import experts_candidates, experts_cases, experts_models, experts_shape
from llama_jax.kernels.quantized_moe.reference import quantized_experts_reference
from llama_jax.quantized import Layout

__all__ = ["quantized_experts", "quantized_experts_reference", "quantized_moe_op"]

quantized_moe_op = Operation(
    "quantized_moe",
    {
        "reference": Backend(quantized_experts_reference),
        "pallas_triton": Backend.at(f"{__name__}.pallas_triton", candidates=experts_candidates),
        "pallas_interpret": Backend.at(f"{__name__}.pallas_triton", interpreted=True, interpret=True),
    },
    shape=experts_shape,
    cases=experts_cases,
    models=experts_models,
)


def quantized_experts(
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
    backend: str = "auto",
) -> jax.Array:
    """`kernels.moe.routed_experts` with quantised weights. Differentiable by x and the scales.

    Args:
      x: [tokens, hidden].
      expert_ids: int32 [tokens, top_k], the experts of each token.
      gate, up: members of weights [experts, intermediate, hidden] in the first of `layouts`; down: of
        [experts, hidden, intermediate] in the second (`llama_jax.quantized.codes`).
      input_scale, output_scale: float32 [tokens, top_k], factors on each expert's input or output.
      backend: "auto" or the name of one backend.

    Returns:
      [tokens, hidden] in x's dtype.

    Raises:
      KernelError: the named backend does not exist, or cannot run this here.
    """
    out: jax.Array = quantized_moe_op(
        x,
        expert_ids,
        dict(gate),
        dict(up),
        dict(down),
        layouts=layouts,
        activation=activation,
        input_scale=input_scale,
        output_scale=output_scale,
        backend=backend,
    )
    return out
