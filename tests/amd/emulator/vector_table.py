"""Vector instructions that are a function of their operands, lane by lane: one row each. CDNA3 ISA, chapter 12."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from amd.emulator.numerics import (
    F64,
    I64,
    LANES_BEFORE,
    U64,
    Array,
    F,
    I,
    U,
    bf16,
    bit_field,
    fma,
    half,
    join,
    leading_zeros,
    permute_bytes,
    reverse_bits,
    signed_bit_field,
    signed_bytes,
    to_bf16,
    to_half,
    to_half_towards_zero,
    to_int,
    trailing_zeros,
)


@dataclass(frozen=True)
class Op:
    """One row: what an instruction computes.

    Attributes:
      fn: takes the operands, numpy arrays of the types named in `sources`.
      sources: operand types (`operands.py`), one letter each.
      result: the type of what fn returns. For f, float64 is taken too and rounded when it is stored.
      accumulate: the destination's old value is a last operand.
      keeps_high: a 16-bit result leaves the upper half of the register (else it is zeroed).
    """

    fn: Callable[..., Any]
    sources: str
    result: str
    accumulate: bool = False
    keeps_high: bool = False


def _wide(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one float32 computed in float64: what the hardware's approximations come closest to."""
    return lambda a: fn(a.astype(F64))


def _frexp(part: int, other: Any) -> Callable[[Array], Array]:
    return lambda a: np.where(np.isfinite(a), np.frexp(a)[part].astype(a.dtype if part == 0 else I), other(a))


def _fract(a: Array) -> Array:
    # Never 1, also where the subtraction would round to it.
    return np.where(np.isfinite(a), np.minimum(a - np.floor(a), np.nextafter(F(1), F(0))), a - a)


def _median(low: Callable[..., Any], high: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b, c: high(low(a, b), low(high(a, b), c))


def _three(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b, c: fn(fn(a, b), c)


def _dot2(widen: Callable[[Array], Array]) -> Callable[..., Any]:
    def dot(a: Array, b: Array, c: Array) -> Array:
        first = fma(widen(a & U(0xFFFF)), widen(b & U(0xFFFF)), c).astype(F)
        return fma(widen(a >> U(16)), widen(b >> U(16)), first)

    return dot


def _dot2_bf16(a: Array, b: Array, c: Array) -> Array:
    # Products of bfloat16 are exact in float32; C comes last, unlike in the accumulating form.
    return (bf16(a & U(0xFFFF)) * bf16(b & U(0xFFFF)) + bf16(a >> U(16)) * bf16(b >> U(16))).astype(F) + c


def _dot4_i8(a: Array, b: Array, c: Array) -> Array:
    return sum((p * q for p, q in zip(signed_bytes(a), signed_bytes(b), strict=True)), c)


def _i24(a: Array) -> Array:
    return (a << U(8)).view(I) >> I(8)


def _shift_left(a: Array, b: Array) -> Array:
    return b << (a & U(31))


ROWS: dict[str, tuple[Callable[..., Any], str]] = {
    # --- moves and bits
    "V_MOV_B32": (lambda a: a, "u>u"),
    "V_MOV_B64": (lambda a: a, "U>U"),
    "V_ACCVGPR_MOV_B32": (lambda a: a, "u>u"),
    "V_NOT_B32": (np.invert, "u>u"),
    "V_BFREV_B32": (reverse_bits, "u>u"),
    "V_FFBH_U32": (leading_zeros, "u>u"),
    "V_FFBH_I32": (lambda a: leading_zeros((a ^ (a >> 31)).view(U)), "i>u"),
    "V_FFBL_B32": (trailing_zeros, "u>u"),
    "V_AND_B32": (np.bitwise_and, "uu>u"),
    "V_OR_B32": (np.bitwise_or, "uu>u"),
    "V_XOR_B32": (np.bitwise_xor, "uu>u"),
    "V_XNOR_B32": (lambda a, b: ~(a ^ b), "uu>u"),
    "V_LSHLREV_B32": (_shift_left, "uu>u"),
    "V_LSHRREV_B32": (lambda a, b: b >> (a & U(31)), "uu>u"),
    "V_ASHRREV_I32": (lambda a, b: b >> (a & U(31)).astype(I), "ui>i"),
    "V_LSHLREV_B64": (lambda a, b: b << (a & U(63)).astype(U64), "uU>U"),
    "V_LSHRREV_B64": (lambda a, b: b >> (a & U(63)).astype(U64), "uU>U"),
    "V_ASHRREV_I64": (lambda a, b: b >> (a & U(63)).astype(I64), "uI>I"),
    "V_AND_OR_B32": (lambda a, b, c: a & b | c, "uuu>u"),
    "V_OR3_B32": (lambda a, b, c: a | b | c, "uuu>u"),
    "V_LSHL_OR_B32": (lambda a, b, c: a << (b & U(31)) | c, "uuu>u"),
    "V_BFI_B32": (lambda a, b, c: a & b | ~a & c, "uuu>u"),
    "V_BFE_U32": (bit_field, "uuu>u"),
    "V_BFE_I32": (signed_bit_field, "uuu>u"),
    "V_BFM_B32": (lambda a, b: ((U(1) << (a & U(31))) - U(1)) << (b & U(31)), "uu>u"),
    "V_BCNT_U32_B32": (lambda a, b: np.bitwise_count(a).astype(U) + b, "uu>u"),
    "V_MBCNT_LO_U32_B32": (lambda a, b: np.bitwise_count(a & LANES_BEFORE[:, 0]).astype(U) + b, "uu>u"),
    "V_MBCNT_HI_U32_B32": (lambda a, b: np.bitwise_count(a & LANES_BEFORE[:, 1]).astype(U) + b, "uu>u"),
    "V_ALIGNBIT_B32": (lambda a, b, c: (join(b, a) >> (c & U(31)).astype(U64)).astype(U), "uuu>u"),
    "V_ALIGNBYTE_B32": (lambda a, b, c: (join(b, a) >> (c & U(3)).astype(U64) * U64(8)).astype(U), "uuu>u"),
    "V_PERM_B32": (permute_bytes, "uuu>u"),
    # --- integers
    "V_ADD_U32": (np.add, "uu>u"),
    "V_SUB_U32": (np.subtract, "uu>u"),
    "V_SUBREV_U32": (lambda a, b: b - a, "uu>u"),
    "V_ADD_I32": (np.add, "ii>i"),
    "V_SUB_I32": (np.subtract, "ii>i"),
    "V_ADD3_U32": (lambda a, b, c: a + b + c, "uuu>u"),
    "V_XAD_U32": (lambda a, b, c: (a ^ b) + c, "uuu>u"),
    "V_LSHL_ADD_U32": (lambda a, b, c: (a << (b & U(31))) + c, "uuu>u"),
    "V_ADD_LSHL_U32": (lambda a, b, c: a + b << (c & U(31)), "uuu>u"),
    "V_LSHL_ADD_U64": (lambda a, b, c: (a << (b & U(7)).astype(U64)) + c, "UuU>U"),
    "V_MUL_LO_U32": (np.multiply, "uu>u"),
    "V_MUL_HI_U32": (lambda a, b: (a.astype(U64) * b >> U64(32)).astype(U), "uu>u"),
    "V_MUL_HI_I32": (lambda a, b: (a.astype(I64) * b >> 32).astype(I), "ii>i"),
    "V_MUL_U32_U24": (lambda a, b: (a & U(0xFFFFFF)) * (b & U(0xFFFFFF)), "uu>u"),
    "V_MUL_I32_I24": (lambda a, b: _i24(a) * _i24(b), "uu>i"),
    "V_MUL_HI_U32_U24": (
        lambda a, b: ((a & U(0xFFFFFF)).astype(U64) * (b & U(0xFFFFFF)) >> U64(32)).astype(U),
        "uu>u",
    ),
    "V_MAD_U32_U24": (lambda a, b, c: (a & U(0xFFFFFF)) * (b & U(0xFFFFFF)) + c, "uuu>u"),
    "V_MAD_I32_I24": (lambda a, b, c: _i24(a) * _i24(b) + c, "uui>i"),
    "V_MAD_U32_U16": (lambda a, b, c: a * b + c, "wwu>u"),
    "V_MAD_I32_I16": (lambda a, b, c: a * b + c, "ssi>i"),
    "V_MIN_U32": (np.minimum, "uu>u"),
    "V_MAX_U32": (np.maximum, "uu>u"),
    "V_MIN_I32": (np.minimum, "ii>i"),
    "V_MAX_I32": (np.maximum, "ii>i"),
    "V_MIN3_U32": (_three(np.minimum), "uuu>u"),
    "V_MAX3_U32": (_three(np.maximum), "uuu>u"),
    "V_MIN3_I32": (_three(np.minimum), "iii>i"),
    "V_MAX3_I32": (_three(np.maximum), "iii>i"),
    "V_MED3_U32": (_median(np.minimum, np.maximum), "uuu>u"),
    "V_MED3_I32": (_median(np.minimum, np.maximum), "iii>i"),
    "V_SAD_U32": (lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c, "uuu>u"),
    # --- 16-bit integers
    "V_LSHLREV_B16": (lambda a, b: b << (a & U(15)), "ww>w"),
    "V_LSHRREV_B16": (lambda a, b: b >> (a & U(15)), "ww>w"),
    "V_ASHRREV_I16": (lambda a, b: b >> (a & U(15)).astype(I), "ws>s"),
    "V_ADD_U16": (np.add, "ww>w"),
    "V_SUB_U16": (np.subtract, "ww>w"),
    "V_SUBREV_U16": (lambda a, b: b - a, "ww>w"),
    "V_MUL_LO_U16": (np.multiply, "ww>w"),
    "V_MAD_LEGACY_U16": (lambda a, b, c: a * b + c, "www>w"),
    "V_MIN_U16": (np.minimum, "ww>w"),
    "V_MAX_U16": (np.maximum, "ww>w"),
    "V_MIN_I16": (np.minimum, "ss>s"),
    "V_MAX_I16": (np.maximum, "ss>s"),
    # --- float32
    "V_ADD_F32": (np.add, "ff>f"),
    "V_SUB_F32": (np.subtract, "ff>f"),
    "V_SUBREV_F32": (lambda a, b: b - a, "ff>f"),
    "V_MUL_F32": (np.multiply, "ff>f"),
    "V_FMA_F32": (fma, "fff>f"),
    "V_MIN_F32": (np.fmin, "ff>f"),
    "V_MAX_F32": (np.fmax, "ff>f"),
    "V_MIN3_F32": (_three(np.fmin), "fff>f"),
    "V_MAX3_F32": (_three(np.fmax), "fff>f"),
    "V_MED3_F32": (_median(np.fmin, np.fmax), "fff>f"),
    "V_MINIMUM3_F32": (_three(np.minimum), "fff>f"),  # these two propagate NaN
    "V_MAXIMUM3_F32": (_three(np.maximum), "fff>f"),
    "V_EXP_F32": (_wide(np.exp2), "f>f"),
    "V_LOG_F32": (_wide(np.log2), "f>f"),
    "V_RCP_F32": (_wide(lambda a: 1 / a), "f>f"),
    "V_RCP_IFLAG_F32": (_wide(lambda a: 1 / a), "f>f"),
    "V_RSQ_F32": (_wide(lambda a: 1 / np.sqrt(a)), "f>f"),
    "V_SQRT_F32": (np.sqrt, "f>f"),
    "V_SIN_F32": (_wide(lambda a: np.sin(2 * np.pi * a)), "f>f"),
    "V_COS_F32": (_wide(lambda a: np.cos(2 * np.pi * a)), "f>f"),
    "V_FRACT_F32": (_fract, "f>f"),
    "V_FLOOR_F32": (np.floor, "f>f"),
    "V_CEIL_F32": (np.ceil, "f>f"),
    "V_TRUNC_F32": (np.trunc, "f>f"),
    "V_RNDNE_F32": (np.rint, "f>f"),
    "V_LDEXP_F32": (np.ldexp, "fi>f"),
    "V_FREXP_MANT_F32": (_frexp(0, lambda a: a), "f>f"),
    "V_FREXP_EXP_I32_F32": (_frexp(1, lambda a: I(0)), "f>i"),
    # Compilers divide by scaling, refining, fixing up. Without the scaling (see vector.py) the last step may divide.
    "V_DIV_FMAS_F32": (fma, "fff>f"),
    "V_DIV_FIXUP_F32": (lambda a, b, c: c.astype(F64) / b, "fff>f"),
    # --- float64
    "V_ADD_F64": (np.add, "dd>d"),
    "V_MUL_F64": (np.multiply, "dd>d"),
    "V_MIN_F64": (np.fmin, "dd>d"),
    "V_MAX_F64": (np.fmax, "dd>d"),
    "V_RCP_F64": (lambda a: 1 / a, "d>d"),
    "V_FLOOR_F64": (np.floor, "d>d"),
    "V_RNDNE_F64": (np.rint, "d>d"),
    # --- conversions
    "V_CVT_I32_F32": (lambda a: to_int(a, -(2**31), 2**31 - 1).astype(I), "f>i"),
    "V_CVT_U32_F32": (lambda a: to_int(a, 0, 2**32 - 1).astype(U), "f>u"),
    "V_CVT_F32_I32": (lambda a: a.astype(F), "i>f"),
    "V_CVT_F32_U32": (lambda a: a.astype(F), "u>f"),
    "V_CVT_F16_F32": (lambda a: a, "f>h"),
    "V_CVT_F32_F16": (lambda a: a, "h>f"),
    "V_CVT_F32_BF16": (bf16, "w>f"),
    "V_CVT_F64_F32": (lambda a: a.astype(F64), "f>d"),
    "V_CVT_F32_F64": (lambda a: a, "d>f"),
    "V_CVT_F64_I32": (lambda a: a.astype(F64), "i>d"),
    "V_CVT_F64_U32": (lambda a: a.astype(F64), "u>d"),
    "V_CVT_I32_F64": (lambda a: to_int(a, -(2**31), 2**31 - 1).astype(I), "d>i"),
    "V_CVT_U32_F64": (lambda a: to_int(a, 0, 2**32 - 1).astype(U), "d>u"),
    "V_CVT_F16_U16": (lambda a: a.astype(F), "w>h"),
    "V_CVT_F16_I16": (lambda a: a.astype(F), "s>h"),
    "V_CVT_U16_F16": (lambda a: to_int(a, 0, 2**16 - 1).astype(U), "h>w"),
    "V_CVT_I16_F16": (lambda a: to_int(a, -(2**15), 2**15 - 1).astype(I), "h>s"),
    "V_CVT_PK_BF16_F32": (lambda a, b: to_bf16(a) | to_bf16(b) << U(16), "ff>u"),
    "V_CVT_PK_F16_F32": (lambda a, b: to_half(a) | to_half(b) << U(16), "ff>u"),
    "V_CVT_PKRTZ_F16_F32": (lambda a, b: to_half_towards_zero(a) | to_half_towards_zero(b) << U(16), "ff>u"),
    "V_PACK_B32_F16": (lambda a, b: a & U(0xFFFF) | b << U(16), "ww>u"),
    # --- float16
    "V_ADD_F16": (np.add, "hh>h"),
    "V_SUB_F16": (np.subtract, "hh>h"),
    "V_SUBREV_F16": (lambda a, b: b - a, "hh>h"),
    "V_MUL_F16": (np.multiply, "hh>h"),
    "V_MIN_F16": (np.fmin, "hh>h"),
    "V_MAX_F16": (np.fmax, "hh>h"),
    "V_LDEXP_F16": (np.ldexp, "hs>h"),
    "V_EXP_F16": (_wide(np.exp2), "h>h"),
    "V_LOG_F16": (_wide(np.log2), "h>h"),
    "V_RCP_F16": (_wide(lambda a: 1 / a), "h>h"),
    "V_RSQ_F16": (_wide(lambda a: 1 / np.sqrt(a)), "h>h"),
    "V_SQRT_F16": (_wide(np.sqrt), "h>h"),
    "V_FLOOR_F16": (np.floor, "h>h"),
    "V_CEIL_F16": (np.ceil, "h>h"),
    "V_TRUNC_F16": (np.trunc, "h>h"),
    "V_RNDNE_F16": (np.rint, "h>h"),
    "V_FREXP_MANT_F16": (_frexp(0, lambda a: a), "h>h"),
}
for _k in range(4):
    ROWS[f"V_CVT_F32_UBYTE{_k}"] = (lambda a, k=_k: (a >> U(8 * k) & U(255)).astype(F), "u>f")

# The destination is the last operand.
ACCUMULATING: dict[str, tuple[Callable[..., Any], str]] = {
    "V_FMAC_F32": (fma, "fff>f"),
    "V_FMAC_F64": (lambda a, b, c: a * b + c, "ddd>d"),
    "V_DOT2C_F32_BF16": (_dot2(bf16), "uuf>f"),
    "V_DOT2C_F32_F16": (_dot2(half), "uuf>f"),
    "V_DOT4C_I32_I8": (_dot4_i8, "uui>i"),
}
# Three operands of 16 bits; the other half of the destination stays.
KEEPING_HIGH: dict[str, tuple[Callable[..., Any], str]] = {
    "V_MAD_U16": (lambda a, b, c: a * b + c, "www>w"),
    "V_MAD_I16": (lambda a, b, c: a * b + c, "sss>s"),
    "V_FMA_F16": (fma, "hhh>h"),
    "V_DIV_FIXUP_F16": (lambda a, b, c: c.astype(F64) / b, "hhh>h"),
    "V_MIN3_F16": (_three(np.fmin), "hhh>h"),
    "V_MAX3_F16": (_three(np.fmax), "hhh>h"),
    "V_MED3_F16": (_median(np.fmin, np.fmax), "hhh>h"),
}
# Dot products of the packed encoding that take whole words.
DOTS: dict[str, tuple[Callable[..., Any], str]] = {
    "V_DOT2_F32_F16": (_dot2(half), "uuf>f"),
    "V_DOT2_F32_BF16": (_dot2_bf16, "uuf>f"),
    "V_DOT4_I32_I8": (_dot4_i8, "uui>i"),
}


def row(entry: tuple[Callable[..., Any], str], **more: bool) -> Op:
    """From a function and its types, operands before `>` and the result behind it."""
    sources, _, result = entry[1].partition(">")
    return Op(entry[0], sources, result, **more)


OPS: dict[str, Op] = {
    **{name: row(entry) for name, entry in ROWS.items()},
    **{name: row(entry, accumulate=True) for name, entry in ACCUMULATING.items()},
    **{name: row(entry, keeps_high=True) for name, entry in KEEPING_HIGH.items()},
    **{name: row(entry) for name, entry in DOTS.items()},
}

LIMITS = {"u": (0, 2**32 - 1), "i": (-(2**31), 2**31 - 1), "w": (0, 2**16 - 1), "s": (-(2**15), 2**15 - 1)}
_SATURATING = ["ADD_U32", "SUB_U32", "SUBREV_U32", "ADD_I32", "SUB_I32", "ADD_U16", "SUB_U16", "SUBREV_U16"]


def saturated(name: str) -> Op | None:
    """The row of an integer sum or difference whose result is clamped to its type; None for other instructions."""
    op = OPS.get(name)
    if op is None or name.removeprefix("V_") not in _SATURATING:
        return None
    low, high = LIMITS[op.result]
    exact, to = op.fn, {"i": I, "s": I}.get(op.result, U)
    return replace(op, fn=lambda *x: np.clip(exact(*(a.astype(I64) for a in x)), low, high).astype(to))
