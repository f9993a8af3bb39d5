"""How the vector encodings read operands and store results: plain, with a literal, SDWA, DPP, or in 64 bits.

CDNA3 ISA, sections 6.2 (modifiers), 6.6 (SDWA) and 6.7 (DPP).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amd.emulator.errors import NotModelled
from amd.emulator.instruction import Instruction
from amd.emulator.lane_exchange import dpp_source
from amd.emulator.numerics import Array, F, U
from amd.emulator.operands import AS, FROM, WIDE, Reader, Registers, is_vector, vector
from amd.emulator.vector_table import Op
from amd.emulator.waves import Waves

type Source = Callable[[int, str], Reader]
"""Operand number and type to a reader of its values, modifiers applied."""
type Store = Callable[[str], Callable[[Waves, Array], None]]
"""Result type to a function that stores values in the lanes that are on."""


def _modified(read: Reader, kind: str, absolute: int, negative: int) -> Reader:
    """|x| and -x, on the sign bit."""
    if not absolute and not negative:
        return read
    if kind not in "fhdu":
        raise NotModelled(f"absolute or negated operand of type {kind}")

    def modified(w: Waves) -> Array:
        value = read(w)
        if kind == "u":
            value = value & U(0x7FFFFFFF) if absolute else value
            return value ^ U(0x80000000) if negative else value
        value = np.abs(value) if absolute else value
        return np.negative(value) if negative else value

    return modified


def plain_store(d: int, registers: Registers) -> Store:
    """To vector register number d."""

    def store(kind: str) -> Callable[[Waves, Array], None]:
        row = registers.index(d, 2 if kind in WIDE else 1)
        if kind in WIDE:
            return lambda w, value: w.write64(row, np.broadcast_to(FROM[kind](value), (w.count, 64)))
        if kind == "f":

            def put_float(w: Waves, value: Array) -> None:
                lanes = w.lanes()
                if lanes is None:
                    w.f[row] = value
                else:
                    np.copyto(w.f[row], value, where=lanes, casting="same_kind")

            return put_float
        if kind == "u":
            return lambda w, value: w.put(row, value, w.lanes())
        return lambda w, value: w.put(row, FROM[kind](np.asarray(value)), w.lanes())

    return store


def short(x: Instruction, registers: Registers) -> tuple[Source, Store]:
    """VOP1, VOP2 and VOPC in their 32-bit form, with a literal, SDWA or DPP."""
    second = 256 + x.field("vsrc1", 0)

    if x.variant == "SDWA":
        return _sdwa_source(x, registers), _sdwa_store(x, registers)
    if x.variant == "DPP16":
        moved, lanes = dpp_source(x, registers)

        def dpp(k: int, kind: str) -> Reader:
            read: Reader = (lambda w: AS[kind](moved(w))) if k == 0 else vector(second, kind, registers)
            return _modified(read, kind, x.field(f"src{k}_abs"), x.field(f"src{k}_neg"))

        d = registers.index(x.field("vdst"))

        def store(kind: str) -> Callable[[Waves, Array], None]:
            if kind in WIDE:
                raise NotModelled("DPP with a 64-bit result")
            return lambda w, value: w.put(d, FROM[kind](np.asarray(value)), lanes(w))

        return dpp, store
    if x.variant not in ("", "LIT"):
        raise NotModelled(f"{x.format}_{x.variant}")
    first = x.field("src0")

    def source(k: int, kind: str) -> Reader:
        return vector(first if k == 0 else second, kind, registers, x.literal)

    return source, plain_store(x.field("vdst", 0), registers)


def _part(x: Array, select_: int, signed: int) -> Array:
    """SDWA: a byte (0 to 3) or half (4, 5) of a word, or the word (6)."""
    if select_ > 5:
        return x
    bits, at = (8, 8 * select_) if select_ < 4 else (16, 16 * (select_ - 4))
    x = x >> U(at) & U((1 << bits) - 1)
    return (x ^ U(1 << bits - 1)) - U(1 << bits - 1) if signed else x


def _sdwa_source(x: Instruction, registers: Registers) -> Source:
    def source(k: int, kind: str) -> Reader:
        number, is_scalar = x.field("vsrc0" if k == 0 else "vsrc1"), x.field(f"s{k}")
        raw = vector(number if is_scalar else 256 + number, "u", registers)
        which, signed = x.field(f"src{k}_sel"), x.field(f"src{k}_sext")

        def read(w: Waves) -> Array:
            return AS[kind](_part(raw(w), which, signed))

        return _modified(read, kind, x.field(f"src{k}_abs"), x.field(f"src{k}_neg"))

    return source


def _sdwa_store(x: Instruction, registers: Registers) -> Store:
    if "dst_sel" not in x.fields:
        return plain_store(0, registers)  # a comparison
    d, which, unused = registers.index(x.field("vdst")), x.field("dst_sel"), x.field("dst_unused")
    if x.field("clmp") or x.field("omod") or unused == 1:
        raise NotModelled("SDWA with clamp, output modifier or sign extension")

    def store(kind: str) -> Callable[[Waves, Array], None]:
        def put(w: Waves, value: Array) -> None:
            word = FROM[kind](np.asarray(value))
            if which < 6:
                bits, at = (8, 8 * which) if which < 4 else (16, 16 * (which - 4))
                field = U(((1 << bits) - 1) << at)
                word = word << U(at) & field
                if unused == 2:
                    word = word | w.v[d] & ~field
            w.put(d, word, w.lanes())

        return put

    return store


def vop3_source(x: Instruction, registers: Registers) -> Source:
    """The 64-bit encoding: sign modifiers, and the upper half of 16-bit operands."""
    absolute, negative, upper = x.field("abs", 0), x.field("neg"), x.field("opsel", 0)

    def source(k: int, kind: str) -> Reader:
        code = x.field(f"src{k}")
        if upper >> k & 1:
            if kind not in "hws" or not is_vector(code):
                raise NotModelled(f"upper half of operand {k}")
            raw = vector(code, "u", registers)
            read: Reader = lambda w: AS[kind](raw(w) >> U(16))  # noqa: E731
        else:
            read = vector(code, kind, registers)
        return _modified(read, kind, absolute >> k & 1, negative >> k & 1)

    return source


def vop3_store(x: Instruction, registers: Registers, op: Op | None) -> Store:
    plain = plain_store(x.field("vdst"), registers)
    clamp, scale = x.field("clmp", 0), {0: None, 1: 2.0, 2: 4.0, 3: 0.5}[x.field("omod", 0)]
    to_high = x.field("opsel", 0) >> 3 & 1
    d = x.field("vdst")

    def store(kind: str) -> Callable[[Waves, Array], None]:
        if kind in "hws" and (to_high or (op is not None and op.keeps_high)):
            return _half_store(registers.index(d), kind, bool(to_high), clamp or scale)
        if not clamp and scale is None:
            return plain(kind)
        if kind != "f":
            raise NotModelled(f"clamp or output modifier on a result of type {kind}")
        put = plain(kind)

        def modified(w: Waves, value: Array) -> None:
            value = np.asarray(value, F) if scale is None else np.asarray(value, F) * F(scale)
            put(w, np.nan_to_num(value, nan=0.0, posinf=np.inf, neginf=-np.inf).clip(0, 1) if clamp else value)

        return modified

    return store


def _half_store(row: int, kind: str, high: bool, modifiers: object) -> Callable[[Waves, Array], None]:
    if modifiers:
        raise NotModelled("clamp or output modifier on half a register")

    def put(w: Waves, value: Array) -> None:
        word, old = FROM[kind](np.asarray(value)), w.v[row]
        w.put(row, old & U(0xFFFF) | word << U(16) if high else old & U(0xFFFF0000) | word, w.lanes())

    return put
