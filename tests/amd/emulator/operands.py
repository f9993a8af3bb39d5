"""Operand codes to readers and writers. What an operand is gets decided once, when a program is decoded.

Operand types: u, i, f are 32-bit words; U, I, d 64-bit ones; h, w, s the low 16 bits of a word as float16 (widened to
float32), unsigned (uint32) and signed (int32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from amd.emulator.errors import Fault, NotModelled
from amd.emulator.numerics import (
    F64,
    I64,
    INLINE_FLOATS,
    U64,
    Array,
    F,
    I,
    U,
    half,
    join,
    signed16,
    to_half,
    unpack_lanes,
)
from amd.emulator.waves import EXEC, Waves

type Reader = Callable[[Waves], Array]
type Step = Callable[[Waves], Array | None]
type Write = Callable[[Waves, Array], None]

AS: dict[str, Callable[[Array], Array]] = {
    "u": lambda x: x,
    "i": lambda x: x.view(I),
    "f": lambda x: x.view(F),
    "h": half,
    "w": lambda x: x & U(0xFFFF),
    "s": signed16,
    "U": lambda x: x,
    "I": lambda x: x.view(I64),
    "d": lambda x: x.view(F64),
}
"""Words (uint32, or uint64 for U, I, d) to values of an operand type."""

FROM: dict[str, Callable[[Array], Array]] = {
    "u": lambda x: x,
    "i": lambda x: x.view(U),
    "f": lambda x: np.asarray(x, F).view(U),
    "h": to_half,
    "w": lambda x: x & U(0xFFFF),
    "s": lambda x: x.view(U) & U(0xFFFF),
    "U": lambda x: x,
    "I": lambda x: x.view(U64),
    "d": lambda x: np.asarray(x, F64).view(U64),
}
"""The inverse."""

WIDE = "UId"


@dataclass(frozen=True)
class Registers:
    """How many vector registers a kernel has: `vector` of its own, then `accumulation` ones behind them."""

    vector: int
    accumulation: int

    @property
    def count(self) -> int:
        return self.vector + self.accumulation

    def index(self, number: int, count: int = 1, *, accumulation: bool = False) -> int:
        """Row of a register in `Waves.v`.

        Raises:
          Fault: the kernel did not declare so many registers.
        """
        limit = self.accumulation if accumulation else self.vector
        if number + count > limit:
            name = "a" if accumulation else "v"
            raise Fault(f"{name}[{number}:{number + count - 1}] used, but the kernel declares {limit} of them")
        return number + (self.vector if accumulation else 0)


def is_vector(code: int) -> bool:
    """Whether an operand code names a vector register."""
    return code >= 256


def constant(code: int, kind: str, literal: int) -> int:
    """Bits of an inline constant or a literal as an operand of that type.

    Raises:
      NotModelled: the code is none, or this type does not take it.
    """
    bits = 64 if kind in WIDE else 32
    if 128 <= code <= 192:
        value = code - 128
    elif 193 <= code <= 208:
        value = (192 - code) & (1 << bits) - 1
    elif code in INLINE_FLOATS:
        number = np.float64(INLINE_FLOATS[code])
        if kind in "UI":
            raise NotModelled(f"inline constant {number} of a 64-bit integer operand")
        of: type[np.floating] = {"h": np.float16, "w": np.float16, "s": np.float16, "d": np.float64}.get(
            kind, np.float32
        )
        value = int(of(number).view(f"u{of().itemsize}"))
    elif code == 255:
        # LLVM puts numbers of 32 unsigned bits into such operands (S_MOV_B64_IMM_PSEUDO): bits are extended by zeros.
        if kind == "d" or (kind == "I" and literal >> 31):
            raise NotModelled(f"literal {literal:#x} of a 64-bit operand")
        value = literal
    else:
        raise NotModelled(f"operand code {code}")
    return value


def scalar(code: int, kind: str, literal: int = 0) -> Reader:
    """Reads a scalar operand: an array [waves], or a numpy scalar of a constant."""
    if code < 128:
        if kind in WIDE:
            return lambda w: AS[kind](join(w.s[code], w.s[code + 1]))
        if kind == "u":
            return lambda w: w.s[code]
        return lambda w: AS[kind](w.s[code])
    if code == 253:
        return lambda w: AS[kind](w.scc.astype(U64 if kind in WIDE else U))
    bits = constant(code, kind, literal)
    value = AS[kind](np.asarray(bits, U64 if kind in WIDE else U))[()]
    return lambda w: value


def vector(code: int, kind: str, registers: Registers, literal: int = 0) -> Reader:
    """Reads any operand of a vector instruction: [waves, 64], or [waves, 1] or a numpy scalar of a scalar operand."""
    if not is_vector(code):
        read = scalar(code, kind, literal)
        if code < 128 or code == 253:
            return lambda w: read(w)[:, None]
        return read
    r = registers.index(code - 256, 2 if kind in WIDE else 1)
    if kind in WIDE:
        return lambda w: AS[kind](join(w.v[r], w.v[r + 1]))
    if kind == "u":
        return lambda w: w.v[r]
    if kind == "f":
        return lambda w: w.f[r]
    if kind == "i":
        return lambda w: w.i[r]
    return lambda w: AS[kind](w.v[r])


def write_scalar(code: int) -> Write:
    """Writes words [waves] to a scalar register."""
    if not 0 <= code < 128:
        raise NotModelled(f"scalar destination {code}")
    if code in (EXEC, EXEC + 1):

        def to_exec(w: Waves, value: Array) -> None:
            w.s[code] = value
            w.exec_changed()

        return to_exec

    def write(w: Waves, value: Array) -> None:
        w.s[code] = value

    return write


def write_scalar64(code: int) -> Write:
    """Writes uint64 [waves] to a pair of scalar registers."""
    low, high = write_scalar(code), write_scalar(code + 1)

    def write(w: Waves, value: Array) -> None:
        low(w, np.asarray(value).astype(U))
        high(w, (value >> U64(32)).astype(U))

    return write


def write_lanes(code: int) -> Write:
    """Writes bool [waves, 64], off in lanes that are off, to a pair of scalar registers."""
    low, high = write_scalar(code), write_scalar(code + 1)

    def write(w: Waves, lanes: Array) -> None:
        words = np.packbits(lanes, axis=1, bitorder="little").view(U)
        low(w, words[:, 0])
        high(w, words[:, 1])

    return write


def read_lanes(code: int) -> Reader:
    """Reads a pair of scalar registers as bool [waves, 64]."""
    if code >= 128:
        raise NotModelled(f"lane mask from operand {code}")
    return lambda w: unpack_lanes(w.s[code], w.s[code + 1])
