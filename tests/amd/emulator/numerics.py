"""Number formats and the arithmetic that numpy does not have, on arrays of any shape."""

from __future__ import annotations

import ml_dtypes
import numpy as np

U, I, F = np.uint32, np.int32, np.float32  # noqa: E741
U16, U64, I64, F64 = np.uint16, np.uint64, np.int64, np.float64
type Array = np.ndarray

LANES = np.arange(64)
# Inline constants of the operand encoding (CDNA3 ISA, section 6.1): operand code -> value.
INLINE_FLOATS = {240: 0.5, 241: -0.5, 242: 1.0, 243: -1.0, 244: 2.0, 245: -2.0, 246: 4.0, 247: -4.0, 248: 0.5 / np.pi}
# [64, 2]: the lanes before each lane, as two words.
LANES_BEFORE = np.array([[(1 << min(n, 32)) - 1, (1 << max(n - 32, 0)) - 1] for n in range(64)], U)


def join(low: Array, high: Array) -> Array:
    """Two words to uint64."""
    return low.astype(U64) | high.astype(U64) << U64(32)


def unpack_lanes(low: Array, high: Array) -> Array:
    """Words [n] and [n] to bool [n, 64]."""
    return np.unpackbits(np.stack([low, high], 1).view(np.uint8), axis=1, bitorder="little").view(bool)


def pack_lanes(lanes: Array) -> Array:
    """bool [n, 64] to words [n, 2]."""
    return np.packbits(lanes, axis=1, bitorder="little").view(U)


def half(x: Array) -> Array:
    """The low 16 bits as float16, widened to float32."""
    return x.astype(U16).view(np.float16).astype(F)


def to_half(x: Array) -> Array:
    """Rounded to float16, as a word with zeros above."""
    return np.asarray(x).astype(np.float16).view(U16).astype(U)


def to_half_towards_zero(x: Array) -> Array:
    """As `to_half`, but never away from zero."""
    rounded = np.asarray(x, F).astype(np.float16)
    over = np.abs(rounded.astype(F)) > np.abs(x)
    return rounded.view(U16).astype(U) - over.astype(U)


def signed16(x: Array) -> Array:
    """The low 16 bits as a signed number, int32."""
    return x.astype(U16).view(np.int16).astype(I)


def bf16(x: Array) -> Array:
    """The low 16 bits as bfloat16, widened to float32."""
    return (x << U(16)).view(F)


def to_bf16(x: Array) -> Array:
    """Rounded to nearest even, as a word with zeros above; on float64 input there is one rounding to float32 before."""
    return np.asarray(x, F).astype(ml_dtypes.bfloat16).view(U16).astype(U)


def signed_bytes(x: Array) -> list[Array]:
    """The four bytes as int32 each."""
    return [(x >> U(8 * k)).astype(np.uint8).view(np.int8).astype(I) for k in range(4)]


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c as float64: the product of two float32 is exact, the sum is rounded once, and once more when stored."""
    return np.multiply(a, b, dtype=F64) + c


def to_int(x: Array, low: int, high: int) -> Array:
    """Truncated and saturated, NaN to 0; int64."""
    return np.clip(np.nan_to_num(np.trunc(x.astype(F64))), low, high).astype(I64)


def bit_field(a: Array, offset: Array, width: Array) -> Array:
    """Bits offset.. of a, zero-extended; offset and width count modulo 32."""
    return a >> (offset & U(31)) & (U(1) << (width & U(31))) - U(1)


def signed_bit_field(a: Array, offset: Array, width: Array) -> Array:
    """The same, sign-extended."""
    width = width & U(31)
    top = np.where(width > 0, U(1) << (width - U(1)) % U(32), U(0))
    return (bit_field(a, offset, width) ^ top) - top


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """V_PERM_B32: each byte of the selector names one of the 8 bytes of {a, b}, a sign, 0x00 or 0xff."""
    data = join(b, a)
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, np.shape(selector)), U)
    for k in range(4):
        s = np.asarray(selector >> U(8 * k) & U(255))
        byte = (data >> (np.minimum(s, 7).astype(U64) * U64(8))).astype(U) & U(255)
        for code, bit in ((8, 15), (9, 31), (10, 47), (11, 63)):
            byte = np.where(s == code, np.where(data >> U64(bit) & U64(1), U(255), U(0)), byte)
        byte = np.where(s == 12, U(0), np.where(s > 12, U(255), byte))
        out |= byte.astype(U) << U(8 * k)
    return out


def reverse_bits(a: Array) -> Array:
    """Bit 0 becomes bit 31."""
    a = np.ascontiguousarray(a)
    bits = np.unpackbits(a.view(np.uint8), bitorder="little").reshape(-1, 32)[:, ::-1]
    return np.packbits(bits, axis=1, bitorder="little").view(U).reshape(a.shape)


def ternary_logic(a: Array, b: Array, c: Array, table: int) -> Array:
    """Each bit is bit (4 a + 2 b + c) of the table."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), U)
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out


def leading_zeros(a: Array) -> Array:
    """Zeros above the highest one, 0xffffffff for 0."""
    return np.where(a == 0, U(0xFFFFFFFF), U(32) - np.frexp(a.astype(F64))[1].astype(U))


def trailing_zeros(a: Array) -> Array:
    """Zeros below the lowest one, 0xffffffff for 0."""
    return np.where(a == 0, U(0xFFFFFFFF), np.frexp((a & (~a + U(1))).astype(F64))[1].astype(U) - U(1))
