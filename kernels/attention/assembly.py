"""Codes in the dtype of a product by NVIDIA's instructions, one for two numbers, in registers as they were loaded.

A byte in the last bits of a bfloat16 is a subnormal number, `BYTE` times its value: a fused multiply-add turns
it, exactly, into the number that it represents, divided by `UNIT`. Eight-bit floats become float16 by one instruction.

Triton moves conversions behind the exchange of a tile between threads if it may. For values that is the worst order:
each thread then reads from local memory byte by byte, which takes twice the time of the whole kernel. So these
instructions are marked as having side effects, which nothing is moved across. Pallas has no such function, hence the
separate primitive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.triton import lowering  # no public module has `register_lowering`
from jax.extend.core import Primitive
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton

BYTE, UNIT = 2.0**-133, 128

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

_FLOATS = """{{
    .reg .b16 a, b;
    mov.b32 {{a, b}}, $2;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
}}""".format()

_numbers_p = Primitive("numbers_of_codes")
_numbers_p.def_abstract_eval(lambda codes, assembly, made: jax.core.ShapedArray(codes.shape, made))


@lowering.register_lowering(_numbers_p)
def _lower(ctx: Any, codes: Any, *, assembly: str, made: Any) -> Any:
    element = ir.F16Type if made == jnp.float16 else ir.BF16Type
    result = ir.RankedTensorType.get(ir.RankedTensorType(codes.type).shape, element.get())
    return triton.elementwise_inline_asm(
        [result], assembly, constraints="=r,=r,r", pure=False, packed_element=4, args=[codes]
    )


def _twice(x: float) -> str:
    """A number as the bits of two bfloat16."""
    bits = int(np.asarray(x, jnp.bfloat16).view(np.uint16))
    return f"0x{bits:04x}{bits:04x}"


class Field(NamedTuple):
    """Some bits of a byte as a number: what they count once those of `flip` are turned, times `step`, less `zero`."""

    mask: int
    step: float
    zero: int
    flip: int = 0

    @property
    def factor(self) -> float:
        """Of the multiply-add, on the bits as a subnormal bfloat16."""
        return self.step / BYTE / UNIT

    @property
    def added(self) -> float:
        """Of the multiply-add."""
        return -self.zero / UNIT


FIELDS = {"int8": (Field(0xFF, 1, 128, 0x80),), "uint8": (Field(0x0F, 2, 15), Field(0xF0, 2 / 16, 15))}
"""Contents of a byte of codes, by dtype: one number, or one of each half of a head."""


FLOAT = "float8_e4m3fn"


class Made(NamedTuple):
    """Numbers that codes become: their dtype, and the unit that they are divided by."""

    dtype: Any
    unit: int


def made_of(dtype: DTypeLike) -> Made:
    """Describes the numbers that codes of a dtype become."""
    return Made(jnp.float16, 1) if jnp.dtype(dtype) == FLOAT else Made(jnp.bfloat16, UNIT)


def numbers(codes: jax.Array, given: DTypeLike) -> list[jax.Array]:
    """The numbers of a tile of codes in the dtype `given`, as `made_of` says: by halves of a head where a byte holds
    two."""
    made = jnp.dtype(made_of(given).dtype)
    if jnp.dtype(given) == FLOAT:
        return [_numbers_p.bind(codes, assembly=_FLOATS, made=made)]
    found = []
    for field in FIELDS[jnp.dtype(given).name]:
        bits = {"mask": f"0x{field.mask * 0x00010001:08x}", "flip": f"0x{field.flip * 0x01010101:08x}"}
        assembly = _PAIRS.format(**bits, factor=_twice(field.factor), zero=_twice(field.added))
        found.append(_numbers_p.bind(codes, assembly=assembly, made=made))
    return found
