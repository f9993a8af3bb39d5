"""The sum that a block of the residual stream ends with, and the norm that the next begins with, in one operation."""

from __future__ import annotations

import jax

from llama_jax.kernels.dispatch import Backend, Operation
from llama_jax.kernels.norm.cases import norm_candidates, norm_cases, norm_models, norm_shape
from llama_jax.kernels.norm.gradient import with_gradient
from llama_jax.kernels.norm.reference import add_rms_norm_reference, rms_norm
from llama_jax.sharding import in_use, local

__all__ = ["add_rms_norm", "add_rms_norm_op", "add_rms_norm_reference", "rms_norm"]

add_rms_norm_op = Operation(
    "add_rms_norm",
    {
        "reference": Backend(add_rms_norm_reference),
        "pallas_triton": Backend.at(f"{__name__}.pallas_triton", candidates=norm_candidates),
        "pallas_interpret": Backend.at(f"{__name__}.pallas_triton", interpreted=True, interpret=True),
    },
    shape=norm_shape,
    cases=norm_cases,
    models=norm_models,
)


def add_rms_norm(
    x: jax.Array, delta: jax.Array, weight: jax.Array, *, eps: float, backend: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """x + delta, and the root mean square norm of it (arXiv:1910.07467) times the weight.

    The sum is rounded to x's dtype. The norm is computed from the rounded sum in float32, and rounded to x's dtype
    before the weight multiplies it.

    Args:
      x, delta: [..., hidden], of one dtype. On a mesh the first axis of several is split as the rows of a batch.
      weight: [hidden].
      eps: what is added to the mean square.
      backend: "auto" or the name of one backend.

    Returns:
      The sum and the norm, both [..., hidden] in x's dtype.

    Raises:
      KernelError: the named backend does not exist, or cannot run this here.
    """

    def run(x: jax.Array, delta: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        out: tuple[jax.Array, jax.Array] = add_rms_norm_op(x, delta, weight, eps=eps, backend=backend)
        return out

    if not in_use():
        return run(x, delta, weight)
    rows = ("batch",) if x.ndim > 1 else ()

    def on_each_device(x: jax.Array, delta: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes = {"x": rows, "delta": rows, "weight": ()}
        out: tuple[jax.Array, jax.Array] = local(run, {"x": x, "delta": delta, "weight": weight}, axes, (rows, rows))
        return out

    # A gradient from inside of `local` would be summed over devices that all have the same: it is taken outside.
    return with_gradient(on_each_device, eps)(x, delta, weight)
