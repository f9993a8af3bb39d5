"""The weights of a running softmax, 2 ** (logits * factor - shift), with one multiply-add for each on NVIDIA GPUs.

XLA compiles Pallas-Triton kernels without fusing a product and a difference. With it a step of the forward kernel, 128
queries by 64 slots, is 687 instructions of an H200 instead of 746. Pallas has none, hence the separate primitive.
"""

from __future__ import annotations

import struct
from typing import Any

import jax
from jax._src.pallas.triton import lowering  # no public module has `register_lowering`
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.triton import dialect as triton

from llama_jax.kernels.exponential import exp2

_ASSEMBLY = "{{ .reg .f32 x; fma.rn.f32 x, $1, 0f{factor:08X}, $2; ex2.approx.ftz.f32 $0, x; }}"


def _plain(logits: jax.Array, shift: jax.Array, *, factor: float) -> jax.Array:
    return exp2(logits * factor + shift)


_weights_p = Primitive("softmax_weights")
_weights_p.def_abstract_eval(lambda logits, shift, factor: jax.core.ShapedArray(logits.shape, logits.dtype))
# Interpreted kernels run as plain JAX operations.
_weights_p.def_impl(_plain)
mlir.register_lowering(_weights_p, mlir.lower_fun(_plain, multiple_results=False))


@lowering.register_lowering(_weights_p)
def _lower(ctx: Any, logits: Any, shift: Any, *, factor: float) -> Any:
    if ctx.context.platform == "rocm":
        return lowering.lower_fun(_plain, multiple_results=False)(ctx, logits, shift, factor=factor)
    assembly = _ASSEMBLY.format(factor=struct.unpack("<I", struct.pack("<f", factor))[0])
    return triton.elementwise_inline_asm(
        [logits.type], assembly, constraints="=f,f,f", pure=True, packed_element=1, args=[logits, shift]
    )


def weights(logits: jax.Array, peak: jax.Array, factor: float) -> jax.Array:
    """2 ** ((logits - peak) * factor) for float32 [queries, slots] and [queries]. Not differentiable: for use inside
    kernels. A logit of MASKED is a weight of 1 where the peak is MASKED too, in one rounding or in two."""
    shift = jax.lax.broadcast_in_dim(peak * -factor, logits.shape, (0,))
    out: jax.Array = _weights_p.bind(logits, shift, factor=factor)
    return out
