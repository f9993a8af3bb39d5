"""Meaning of the names of memory instructions, shared by those of global memory, scratch and LDS."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amd.emulator.errors import NotModelled
from amd.emulator.numerics import Array, U
from amd.emulator.waves import Waves

SIZES = {
    **{"BYTE": 1, "UBYTE": 1, "SBYTE": 1, "SHORT": 2, "USHORT": 2, "SSHORT": 2},
    **{"DWORD": 4, "DWORDX2": 8, "DWORDX3": 12, "DWORDX4": 16},
    **{"B8": 1, "U8": 1, "I8": 1, "B16": 2, "U16": 2, "I16": 2, "B32": 4, "B64": 8, "B96": 12, "B128": 16},
}
SIGNED = ("SBYTE", "SSHORT", "I8", "I16")


@dataclass(frozen=True)
class Access:
    """Width and form of a load or store.

    Attributes:
      size: bytes a lane.
      signed: a load sign-extends.
      high: the upper half of the register is meant.
      d16: a load leaves the other half of the register.
    """

    size: int
    signed: bool
    high: bool
    d16: bool

    @classmethod
    def of(cls, name: str) -> Access:
        """From an opcode such as GLOBAL_LOAD_SBYTE_D16_HI or DS_WRITE_B64."""
        parts = name.split("_")
        word = next((part for part in parts if part in SIZES), None)
        if word is None:
            raise NotModelled(name)
        return cls(SIZES[word], word in SIGNED, parts[-1] == "HI", "D16" in parts)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """(byte offset, bytes) of each register's part."""
        return [(k, min(4, self.size - k)) for k in range(0, self.size, 4)]

    def to_store(self, value: Array) -> Array:
        """The register's value as it is stored."""
        return value >> U(16) if self.high else value

    def extend(self, w: Waves, register: int, value: Array, mask: Array | None) -> None:
        """Writes a loaded value [waves, 64] to its register."""
        if self.signed:
            top = U(1 << 8 * self.size - 1)
            value = (value ^ top) - top
        if self.d16:
            old = w.v[register]
            value = old & U(0xFFFF) | value << U(16) if self.high else old & U(0xFFFF0000) | value & U(0xFFFF)
        w.put(register, value, mask)


def spread(value: Array, mask: Array | None) -> Array:
    """Values of the lanes of `mask` back in their places, [waves, 64]."""
    if mask is None:
        return value
    out = np.zeros(mask.shape, U)
    out[mask] = value
    return out
