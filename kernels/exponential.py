"""exp2 as the hardware has it: one instruction, where `jnp.exp2` in a Pallas-Triton kernel becomes five or six.

JAX lowers `exp2` to the functions of libdevice and ocml, which also give results below 2^-126 exactly: a comparison,
two selections, an addition and a scaling around the instruction. Weights of a softmax that small are nothing.

Pallas has no such function, so this is a separate primitive, with the one lowering rule that Pallas lacks.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax._src.pallas.triton import lowering  # no public module has `register_lowering`
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.triton import dialect as triton

AMD_INTRINSIC = "llvm.amdgcn.exp2.f32"
"""LLVM's name of v_exp_f32. An intrinsic, not assembly: LLVM must see it to keep the waits that follow it."""
NVIDIA_ASSEMBLY = "ex2.approx.ftz.f32 $0, $1;"

_exp2_p = Primitive("hardware_exp2")
_exp2_p.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
# Interpreted kernels run as plain JAX operations.
_exp2_p.def_impl(jnp.exp2)
mlir.register_lowering(_exp2_p, mlir.lower_fun(jnp.exp2, multiple_results=False))


@lowering.register_lowering(_exp2_p)
def _lower(ctx: Any, x: Any) -> Any:
    if ctx.context.platform == "rocm":
        return triton.extern_elementwise(x.type, [x], libname="", libpath="", symbol=AMD_INTRINSIC, pure=True)
    return triton.elementwise_inline_asm(
        [x.type], NVIDIA_ASSEMBLY, constraints="=f,f", pure=True, packed_element=1, args=[x]
    )


def exp2(x: jax.Array) -> jax.Array:
    """2 ** x of a float32 tile; 0 for results below 2^-126. Not differentiable: for use inside kernels."""
    if x.dtype != jnp.float32:
        raise TypeError(f"exp2 of a kernel takes float32, not {x.dtype}")
    out: jax.Array = _exp2_p.bind(x)
    return out
