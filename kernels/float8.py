"""Eight-bit floats in kernels: Pallas' Triton refuses to convert those of CDNA 3, and Triton does not."""

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

from llama_jax.targets import Target


def _plain(x: jax.Array, *, dtype: Any) -> jax.Array:
    return x.astype(dtype)


_converted_p = Primitive("float8_converted")
_converted_p.def_abstract_eval(lambda x, dtype: jax.core.ShapedArray(x.shape, dtype))
# Interpreted kernels run as plain JAX operations.
_converted_p.def_impl(_plain)
mlir.register_lowering(_converted_p, mlir.lower_fun(_plain, multiple_results=False))


@lowering.register_lowering(_converted_p)
def _lower(ctx: Any, x: Any, *, dtype: Any) -> Any:
    (given,), (made,) = ctx.avals_in, ctx.avals_out
    result = ir.RankedTensorType.get(made.shape, mlir.dtype_to_ir_type(made.dtype))
    narrows = made.dtype.itemsize < given.dtype.itemsize
    return triton.fp_to_fp(result, x, rounding=triton.RoundingMode.RTNE if narrows else None)


def converted(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """A tile in another dtype, where one of the two is of eight-bit floats: the nearest, ties to even."""
    out: jax.Array = _converted_p.bind(x, dtype=jnp.dtype(dtype))
    return out


def lacks_floats(dtype: DTypeLike, target: Target) -> str | None:
    """The reason why a target does not convert a dtype; None if it does, or if these are no eight-bit floats."""
    flavours = {"float8_e4m3fn": "ocp", "float8_e4m3fnuz": "fnuz"}
    wanted = flavours.get(jnp.dtype(dtype).name)
    if wanted in (None, target.rates.fp8_flavour):
        return None
    return f"{target.arch} has no instructions for {jnp.dtype(dtype).name}"
