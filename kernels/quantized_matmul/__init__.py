"""Products with quantised weights, which are decoded inside the product."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax.typing import DTypeLike

from llama_jax.kernels.dispatch import Backend, Operation
from llama_jax.kernels.quantized_matmul.cases import product_candidates, product_cases, product_models, product_shape
from llama_jax.kernels.quantized_matmul.reference import quantized_matmul_reference
from llama_jax.quantized import Layout

__all__ = ["quantized_matmul", "quantized_matmul_op", "quantized_matmul_reference"]

quantized_matmul_op = Operation(
    "quantized_matmul",
    {
        "reference": Backend(quantized_matmul_reference),
        "pallas_triton": Backend.at(f"{__name__}.pallas_triton", candidates=product_candidates),
        "pallas_interpret": Backend.at(f"{__name__}.pallas_triton", interpreted=True, interpret=True),
    },
    shape=product_shape,
    cases=product_cases,
    models=product_models,
)


def quantized_matmul(
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout,
    dtype: DTypeLike | None = None,
    backend: str = "auto",
) -> jax.Array:
    """x times the weight that `members` represent, accumulated in float32.

    Differentiable by x.

    Args:
      x: [..., in].
      members: of a weight [*out, in] in the layout (`llama_jax.quantized.codes`).
      dtype: of the result; by default that of x.
      backend: "auto" or the name of one backend.

    Returns:
      [..., *out].

    Raises:
      KernelError: the named backend does not exist, or cannot run this here.
    """
    out: jax.Array = quantized_matmul_op(x, dict(members), layout=layout, dtype=dtype, backend=backend)
    return out
