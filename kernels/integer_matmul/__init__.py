"""Products of int8 activations with quantised weights, summed as whole numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.kernels.dispatch import Backend, Operation
from llama_jax.kernels.integer_matmul.cases import integer_cases, integer_models
from llama_jax.kernels.integer_matmul.reference import integer_matmul_reference, multiplies
from llama_jax.kernels.quantized_matmul import quantized_matmul_reference
from llama_jax.kernels.quantized_matmul.cases import product_shape
from llama_jax.quantized import Layout

__all__ = ["integer_matmul", "integer_matmul_op", "integer_matmul_reference", "multiplies"]

integer_matmul_op = Operation(
    "integer_matmul",
    {"reference": Backend(integer_matmul_reference), "native": Backend.at(f"{__name__}.native")},
    shape=product_shape,
    cases=integer_cases,
    models=integer_models,
)


def integer_matmul(
    x: jax.Array,
    members: Mapping[str, jax.Array],
    *,
    layout: Layout,
    dtype: DTypeLike | None = None,
    backend: str = "auto",
) -> jax.Array:
    """x, rounded to int8, times the weight that `members` represent.

    Each row of x, or each part of it that meets a group of the weight, is rounded with a scale of its own
    (`reference.quantize`). Products of codes are summed in int32 within a group, and over groups in float32. The
    gradient by x is that of the product without rounding.

    Args:
      x: [..., in].
      members: of a weight [*out, in] in the layout (`llama_jax.quantized.codes`).
      layout: one that `multiplies` accepts.
      dtype: of the result; by default that of x.
      backend: "auto" or the name of one backend.

    Returns:
      [..., *out].

    Raises:
      KernelError: the named backend does not exist, or cannot run this here.
    """
    return _product((layout, jnp.dtype(dtype or x.dtype), backend), x, dict(members))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(call: tuple[Layout, jnp.dtype, str], x: jax.Array, members: dict[str, jax.Array]) -> jax.Array:
    layout, dtype, backend = call
    out: jax.Array = integer_matmul_op(x, members, layout=layout, dtype=dtype, backend=backend)
    return out


def _forward(call: tuple[Layout, jnp.dtype, str], x: jax.Array, members: dict[str, jax.Array]) -> tuple[Any, Any]:
    return _product(call, x, members), (x, members)


def _backward(call: tuple[Layout, jnp.dtype, str], saved: tuple[Any, Any], gradient: jax.Array) -> tuple[Any, None]:
    x, members = saved
    _, pull = jax.vjp(partial(quantized_matmul_reference, members=members, layout=call[0], dtype=call[1]), x)
    return *pull(gradient), None


_product.defvjp(_forward, _backward)
