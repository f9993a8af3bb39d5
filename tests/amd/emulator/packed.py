"""VOP3P: two operations in one, on the halves of registers or on pairs of registers. CDNA3 ISA, section 6.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from amd.emulator.encodings import plain_store
from amd.emulator.errors import NotModelled
from amd.emulator.instruction import Instruction
from amd.emulator.matrix import mfma
from amd.emulator.numerics import Array, F, I, U, fma, half, to_half
from amd.emulator.operands import AS, FROM, Reader, Registers, Step, is_vector, vector
from amd.emulator.vector import compute
from amd.emulator.vector_table import OPS, Op, row
from amd.emulator.waves import Waves

_PACKED: dict[str, tuple[Callable[..., Any], str]] = {
    "MUL_LO_U16": (np.multiply, "ww>w"),
    "ADD_U16": (np.add, "ww>w"),
    "ADD_I16": (np.add, "ss>s"),
    "SUB_U16": (np.subtract, "ww>w"),
    "SUB_I16": (np.subtract, "ss>s"),
    "MAD_U16": (lambda a, b, c: a * b + c, "www>w"),
    "MAD_I16": (lambda a, b, c: a * b + c, "sss>s"),
    "LSHLREV_B16": (lambda a, b: b << (a & U(15)), "ww>w"),
    "LSHRREV_B16": (lambda a, b: b >> (a & U(15)), "ww>w"),
    "ASHRREV_I16": (lambda a, b: b >> (a & U(15)).astype(I), "ws>s"),
    "MIN_U16": (np.minimum, "ww>w"),
    "MAX_U16": (np.maximum, "ww>w"),
    "MIN_I16": (np.minimum, "ss>s"),
    "MAX_I16": (np.maximum, "ss>s"),
    "ADD_F16": (np.add, "hh>h"),
    "MUL_F16": (np.multiply, "hh>h"),
    "MIN_F16": (np.fmin, "hh>h"),
    "MAX_F16": (np.fmax, "hh>h"),
    "FMA_F16": (fma, "hhh>h"),
    "ADD_F32": (np.add, "ff>f"),
    "MUL_F32": (np.multiply, "ff>f"),
    "FMA_F32": (fma, "fff>f"),
}
PACKED: dict[str, Op] = {f"V_PK_{name}": row(entry) for name, entry in _PACKED.items()}
"""Functions of each half of a packed operation."""


def vop3p(x: Instruction, registers: Registers, arch: str) -> Step:
    """Any VOP3P instruction, matrix instructions included."""
    if "MFMA" in x.name or "MFMAC" in x.name:
        return mfma(x, registers, arch)
    if x.name == "V_ACCVGPR_READ":
        source = registers.index(x.field("src0") - 256, accumulation=True)
        d = registers.index(x.field("vdst"))
        return lambda w: w.write(d, w.v[source])
    if x.name == "V_ACCVGPR_WRITE":
        read, d = vector(x.field("src0"), "u", registers), registers.index(x.field("vdst"), accumulation=True)
        return lambda w: w.write(d, read(w))
    if x.field("clmp"):
        raise NotModelled(f"{x.name} with clamp")
    if x.name.startswith("V_MAD_MIX"):
        return mixed_fma(x, registers)
    if x.name == "V_PK_MOV_B32":
        return packed_move(x, registers)
    if x.name in PACKED:
        return packed(x, registers)
    if x.name in OPS and x.name.startswith("V_DOT"):
        if x.field("neg") or x.field("neg_hi") or x.field("opsel") or _high(x) != 7:
            raise NotModelled(f"{x.name} with modifiers")
        op = OPS[x.name]
        readers = [vector(x.field(f"src{k}"), kind, registers) for k, kind in enumerate(op.sources)]
        return compute(op, readers, plain_store(x.field("vdst"), registers))
    raise NotModelled(x.name)


def _high(x: Instruction) -> int:
    """op_sel_hi: for the upper operation, which half of each operand."""
    return x.field("opsel_hi") | x.field("opsel_hi2") << 2


def packed(x: Instruction, registers: Registers) -> Step:
    """V_PK: the same function for a lower and an upper half."""
    op = PACKED[x.name]
    pairs = op.result == "f"  # halves are registers, not 16 bits
    choice = (x.field("opsel"), _high(x))
    negated = (x.field("neg"), x.field("neg_hi"))

    def reader(k: int, upper: int) -> Reader:
        code, kind, take = x.field(f"src{k}"), op.sources[k], choice[upper] >> k & 1
        if pairs:
            in_register = is_vector(code) or code < 128
            read = vector(code + take if in_register else code, kind, registers)
        elif is_vector(code) or code < 128:
            raw = vector(code, "u", registers)
            read = (lambda w: AS[kind](raw(w) >> U(16))) if take else (lambda w: AS[kind](raw(w)))
        else:
            read = vector(128 if take else code, kind, registers)  # constants have zeros above
        if not negated[upper] >> k & 1:
            return read
        if kind not in "fh":
            raise NotModelled(f"{x.name} with a negated operand")
        return lambda w: np.negative(read(w))

    low, high = ([reader(k, upper) for k in range(len(op.sources))] for upper in (0, 1))
    fn, d = op.fn, registers.index(x.field("vdst"), 2 if pairs else 1)

    def step_pairs(w: Waves) -> None:
        # Both before either is stored: the destination may be an operand.
        first, second = fn(*[r(w) for r in low]), fn(*[r(w) for r in high])
        lanes = w.lanes()
        for k, value in enumerate((first, second)):
            if lanes is None:
                w.f[d + k] = value
            else:
                np.copyto(w.f[d + k], value, where=lanes, casting="same_kind")

    def step_halves(w: Waves) -> None:
        first, second = fn(*[r(w) for r in low]), fn(*[r(w) for r in high])
        word = FROM[op.result]
        w.write(d, word(np.asarray(first)) | word(np.asarray(second)) << U(16))

    return step_pairs if pairs else step_halves


def packed_move(x: Instruction, registers: Registers) -> Step:
    """V_PK_MOV_B32: one register of each pair."""
    d, choice = registers.index(x.field("vdst"), 2), x.field("opsel")

    def reader(k: int) -> Reader:
        code = x.field(f"src{k}")
        in_register = is_vector(code) or code < 128
        return vector(code + (choice >> k & 1) if in_register else code, "u", registers)

    a, b = reader(0), reader(1)

    def step(w: Waves) -> None:
        first, second = np.array(a(w)), np.array(b(w))
        w.write(d, first)
        w.write(d + 1, second)

    return step


def mixed_fma(x: Instruction, registers: Registers) -> Step:
    """V_MAD_MIX: float32 arithmetic on operands that are float32 or either half of a register as float16."""
    is_half, upper, absolute, negative = _high(x), x.field("opsel"), x.field("neg_hi"), x.field("neg")

    def reader(k: int) -> Reader:
        code = x.field(f"src{k}")
        if not is_half >> k & 1:
            read = vector(code, "f", registers)
        elif is_vector(code) or code < 128:
            raw = vector(code, "u", registers)
            read = (lambda w: half(raw(w) >> U(16))) if upper >> k & 1 else (lambda w: half(raw(w)))
        else:
            read = vector(code, "h", registers)

        def signed(w: Waves) -> Array:
            value = read(w)
            value = np.abs(value) if absolute >> k & 1 else value
            return np.negative(value) if negative >> k & 1 else value

        return signed

    a, b, c = (reader(k) for k in range(3))
    d = registers.index(x.field("vdst"))
    place: Callable[[Array, Array], Array] = {
        "V_MAD_MIX_F32": lambda old, value: value.astype(F).view(U),
        "V_MAD_MIXLO_F16": lambda old, value: old & U(0xFFFF0000) | to_half(value.astype(F)),
        "V_MAD_MIXHI_F16": lambda old, value: old & U(0xFFFF) | to_half(value.astype(F)) << U(16),
    }[x.name]
    return lambda w: w.write(d, place(w.v[d], np.asarray(fma(a(w), b(w), c(w)))))
