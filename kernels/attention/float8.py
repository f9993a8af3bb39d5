"""Eight-bit floats in kernels: Pallas' Triton reads none beside a mask and refuses to convert those of CDNA 3, and
Triton does neither. So they are read as integers of the same bits."""

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

FLAVOURS = {"float8_e4m3fn": "ocp", "float8_e4m3fnuz": "fnuz"}
"""`Rates.fp8_flavour` of devices that have a dtype."""


def bits(x: jax.Array) -> jax.Array:
    """Codes as kernels read them: the same memory, without floats of eight bits."""
    return jax.lax.bitcast_convert_type(x, jnp.int8) if x.dtype.name in FLAVOURS else x


def _plain(x: jax.Array, *, given: Any, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, given).astype(dtype)


_widened_p = Primitive("float8_widened")
_widened_p.def_abstract_eval(lambda x, given, dtype: jax.core.ShapedArray(x.shape, dtype))
# Interpreted kernels run as plain JAX operations.
_widened_p.def_impl(_plain)
mlir.register_lowering(_widened_p, mlir.lower_fun(_plain, multiple_results=False))


@lowering.register_lowering(_widened_p)
def _lower(ctx: Any, x: Any, *, given: Any, dtype: Any) -> Any:
    shape = ctx.avals_out[0].shape
    before, after = (ir.RankedTensorType.get(shape, mlir.dtype_to_ir_type(each)) for each in (given, dtype))
    if x.type != before:
        x = triton.bitcast(before, x)
    return triton.fp_to_fp(after, x)


def widened(tile: jax.Array, given: DTypeLike, dtype: DTypeLike) -> jax.Array:
    """A tile of the `bits` of floats in the dtype `given`, as numbers in another one."""
    out: jax.Array = _widened_p.bind(tile, given=jnp.dtype(given), dtype=jnp.dtype(dtype))
    return out


def lacks(dtype: DTypeLike, target: Target) -> str | None:
    """The reason why a target does not convert a dtype; None if it does, or if these are no eight-bit floats."""
    if FLAVOURS.get(jnp.dtype(dtype).name) in (None, target.rates.fp8_flavour):
        return None
    return f"{target.arch} has no instructions for {jnp.dtype(dtype).name}"
