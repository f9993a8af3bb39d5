"""Eight-bit floats as numbers of a product, in kernels: Pallas' Triton refuses those of CDNA 3, and Triton does not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.pallas.triton import lowering  # no public module has `register_lowering`
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton


def _plain(x: jax.Array, *, dtype: Any) -> jax.Array:
    return x.astype(dtype)


_widened_p = Primitive("float8_widened")
_widened_p.def_abstract_eval(lambda x, dtype: jax.core.ShapedArray(x.shape, dtype))
# Interpreted kernels run as plain JAX operations.
_widened_p.def_impl(_plain)
mlir.register_lowering(_widened_p, mlir.lower_fun(_plain, multiple_results=False))


@lowering.register_lowering(_widened_p)
def _lower(ctx: Any, x: Any, *, dtype: Any) -> Any:
    (made,) = ctx.avals_out
    return triton.fp_to_fp(ir.RankedTensorType.get(made.shape, mlir.dtype_to_ir_type(made.dtype)), x)


def widened(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A tile of eight-bit floats in another dtype, exactly."""
    out: jax.Array = _widened_p.bind(x, dtype=jnp.dtype(dtype))
    return out
