"""Codes as exact 16-bit floats, in registers, by what an instruction set is best at.

Codes of eight bits make one array; those of four make two, of the first and of the second of every byte. Whole numbers
this small are exact in every dtype on the way, also with zeros subtracted.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from llama_jax.targets import Target

Unpack = Callable[[jax.Array, jax.typing.DTypeLike], list[jax.Array]]
"""Takes codes int8 or uint8 [cols, bytes] and a 16-bit dtype; [cols, bytes] in it, one or two."""

HAS_BFLOAT16_SUB = ("sm_90", "sm_100", "sm_103", "sm_120")
"""NVIDIA's architectures that subtract two bfloat16 in one instruction."""

# 16-bit floats whose last bit counts 1, with the sign of two's complement turned to what is counted from -8; and what
# they are more than the code.
_MAGIC = {"bfloat16": (0x4308, 128 + 8), "float16": (0x6408, 1024 + 8)}


def directly(codes: jax.Array, dtype: jax.typing.DTypeLike) -> list[jax.Array]:
    """By a conversion that the compiler knows; of four bits, put into the last bits of a large number."""
    if codes.dtype == jnp.int8:
        return [codes.astype(dtype)]
    bits, added = _MAGIC[jnp.dtype(dtype).name]
    wide = codes.astype(jnp.int16)
    large = [jax.lax.bitcast_convert_type(half ^ bits, dtype) for half in (wide & 15, wide >> 4)]
    return [x - jnp.asarray(added, dtype) for x in large]


def through_float32(codes: jax.Array, dtype: jax.typing.DTypeLike) -> list[jax.Array]:
    """To bfloat16 as the upper half of a float32: AMD's GPUs convert bytes to float32 in one instruction, and do not
    compute with bfloat16."""

    def upper(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) >> 16
        return jax.lax.bitcast_convert_type(bits.astype(jnp.int16), dtype)

    if codes.dtype == jnp.int8:
        return [upper(codes)]
    wide = codes.astype(jnp.int32)
    return [upper(wide << 28 >> 28), upper(wide << 24 >> 28)]


def by_assembly(codes: jax.Array, dtype: jax.typing.DTypeLike) -> list[jax.Array]:
    """`directly` to bfloat16, two numbers to an instruction of NVIDIA's, where the compiler would take one by one."""
    if codes.dtype == jnp.int8:
        return directly(codes, dtype)

    def half(first: str) -> jax.Array:
        asm = f"""{{
            .reg .b32 w, a, b, c;
            {first}
            mov.b32 c, 0x43084308;
            prmt.b32 a, w, 0, 0x4140;
            prmt.b32 b, w, 0, 0x4342;
            lop3.b32 a, a, 0x000f000f, c, 0x6a;
            lop3.b32 b, b, 0x000f000f, c, 0x6a;
            sub.rn.bf16x2 $0, a, c;
            sub.rn.bf16x2 $1, b, c;
        }}"""
        out = jax.ShapeDtypeStruct(codes.shape, dtype)
        return plgpu.elementwise_inline_asm(
            asm, args=[codes], constraints="=r,=r,r", pack=4, result_shape_dtypes=[out]
        )[0]

    return [half("mov.b32 w, $2;"), half("shr.u32 w, $2, 4;")]


def unpack_for(target: Target, dtype: jax.typing.DTypeLike, *, interpret: bool) -> Unpack:
    """The way that takes the fewest instructions on a target."""
    if interpret or jnp.dtype(dtype) != jnp.bfloat16:
        return directly
    if target.vendor == "amd":
        return through_float32
    return by_assembly if target.arch in HAS_BFLOAT16_SUB else directly
