"""Products of a few rows together with what lies around them in a block: a norm, an activation, the residual sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import KernelError
from llama_jax.kernels.dispatch import Backend, Operation
from llama_jax.kernels.dispatch.operation import REFERENCE, choose
from llama_jax.kernels.quantized_matmul.fused.cases import fused_candidates, fused_cases, fused_models, fused_shape
from llama_jax.kernels.quantized_matmul.fused.reference import Activation, fused_matmul_reference
from llama_jax.quantized import Layout
from llama_jax.targets import current

__all__ = ["Normed", "fused_matmul", "fused_matmul_op", "fused_matmul_reference", "is_fused"]

fused_matmul_op = Operation(
    "fused_matmul",
    {
        "reference": Backend(fused_matmul_reference),
        "pallas_triton": Backend.at(f"{__name__}.pallas_triton", candidates=fused_candidates),
        "pallas_interpret": Backend.at(f"{__name__}.pallas_triton", interpreted=True, interpret=True),
    },
    shape=fused_shape,
    cases=fused_cases,
    models=fused_models,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Normed:
    """The root mean square norm (arXiv:1910.07467) of rows, of which the division is left to the product that follows.

    Attributes:
      gained: [..., width], rows times the norm's weight.
      squares: float32 [..., n] that add up to the sum of squares of the rows without that weight.
      eps: what is added to their mean.
    """

    gained: jax.Array
    squares: jax.Array
    eps: float = field(metadata={"static": True})

    def value(self) -> jax.Array:
        """The norm itself: [..., width]."""
        mean = jnp.sum(self.squares, axis=-1, keepdims=True) / self.gained.shape[-1]
        return (self.gained.astype(jnp.float32) * jax.lax.rsqrt(mean + self.eps)).astype(self.gained.dtype)


def fused_matmul(
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout | None,
    squares: jax.Array | None = None,
    eps: float = 0.0,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    gain: jax.Array | None = None,
    backend: str = "auto",
) -> Any:
    """x times a weight, accumulated in float32, with the operations around it, nothing rounded in between.

    Differentiable by all floating arrays but those of a quantised weight.

    Args:
      x: [..., in].
      members: of a weight [*out, in] in the layout (`llama_jax.quantized.codes`); {"weight"} without one.
      squares, eps: of `Normed`, where x is `gained`: the product is divided by the root mean square.
      activation: of a weight [2, width, in]: the result is activation(first) * second, [..., width].
      residual, gain: [..., out] to add to the product, and [out], the weight of the norm that follows. Both or neither.
      backend: "auto" or the name of one backend.

    Returns:
      [..., *out] in x's dtype. With a residual the sum, and `gained` and `squares` of its norm.

    Raises:
      KernelError: the named backend does not exist, or cannot run this here.
    """
    around = {"squares": squares, "eps": eps, "activation": activation, "residual": residual, "gain": gain}
    return fused_matmul_op(x, dict(members), layout=layout, backend=backend, **around)


def is_fused(x: Any, members: Mapping[str, Any], **around: Any) -> bool:
    """Returns whether a kernel is chosen for a call of `fused_matmul`. The operations themselves, each in its
    own kernel, are faster than the reference.

    Args:
      x, members, around: as for `fused_matmul`; shapes and dtypes are enough.
    """
    try:
        return choose(fused_matmul_op, current(), "auto", x, dict(members), **around).backend != REFERENCE
    except KernelError:  # of a backend that was named, for the calls that it can run
        return False
