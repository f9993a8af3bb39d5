"""Codes in the dtype of a product by NVIDIA's instructions, one for two numbers, in registers as they were loaded.

A byte in the last bits of a bfloat16 is a subnormal number, `BYTE` times what it counts: a fused multiply and add makes
of it, exactly, the number that it stands for, divided by `UNIT`.

Triton moves conversions behind the exchange of a tile between threads if it may. Of values that is the worst order:
each thread then reads from local memory byte by byte, which takes twice the time of the whole kernel. So these
instructions count as having side effects, which nothing is moved over. Pallas has no such function, hence a primitive
of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.triton import lowering  # no public module has `register_lowering`
from jax.extend.core import Primitive
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton

BYTE, UNIT = 2.0**-133, 64
_LARGEST = 127
"""Exponent of the largest power of two that bfloat16 holds."""

_PAIRS = """{{
    .reg .b32 w, a, b, factor, zero;
    mov.b32 factor, {factor};
    mov.b32 zero, {zero};
    xor.b32 w, $2, {flip};
    prmt.b32 a, w, 0, 0x4140;
    prmt.b32 b, w, 0, 0x4342;
    and.b32 a, a, {mask};
    and.b32 b, b, {mask};
    fma.rn.bf16x2 $0, a, factor, zero;
    fma.rn.bf16x2 $1, b, factor, zero;
}}"""

_numbers_p = Primitive("numbers_of_codes")
_numbers_p.def_abstract_eval(lambda codes, assembly: jax.core.ShapedArray(codes.shape, jnp.bfloat16))


@lowering.register_lowering(_numbers_p)
def _lower(ctx: Any, codes: Any, *, assembly: str) -> Any:
    result = ir.RankedTensorType.get(ir.RankedTensorType(codes.type).shape, ir.BF16Type.get())
    return triton.elementwise_inline_asm(
        [result], assembly, constraints="=r,=r,r", pure=False, packed_element=4, args=[codes]
    )


def _twice(x: float) -> str:
    """A number as the bits of two bfloat16."""
    bits = int(np.asarray(x, jnp.bfloat16).view(np.uint16))
    return f"0x{bits:04x}{bits:04x}"


def _part(codes: jax.Array, mask: int, count: int, zero: float, flip: int = 0) -> jax.Array:
    """(n - zero) / UNIT, where n is how many times `count` the bits under `mask` count once those of `flip` are
    turned."""
    fields = {"mask": f"0x{mask:04x}{mask:04x}", "flip": f"0x{flip * 0x01010101:08x}"}
    fields |= {"factor": _twice(2.0**_LARGEST / count), "zero": _twice(-zero / UNIT)}
    out: jax.Array = _numbers_p.bind(codes, assembly=_PAIRS.format(**fields))
    return out


def numbers(codes: jax.Array) -> list[jax.Array]:
    """bfloat16 numbers of a tile of codes, divided by `UNIT`: by halves of a head where a byte holds two codes."""
    if codes.dtype == jnp.int8:
        return [_part(codes, 0xFF, 1, 128, flip=0x80)]
    return [_part(codes, 0x0F, 1, 7.5), _part(codes, 0xF0, 16, 7.5)]
