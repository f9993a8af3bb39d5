"""The registers of the waves of some work-groups, and which of those waves execute at the moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from amd.emulator.numerics import Array, F, I, U, unpack_lanes

if TYPE_CHECKING:
    from amd.emulator.lds import Lds
    from amd.emulator.memory import Memory

POISON = 0x7FC07FC0
"""Content of fresh registers and fresh memory: NaN as float32 and as two bfloat16 or float16, and no valid address.
What nobody wrote then shows in the results."""

SCALARS = 128
VCC, M0, EXEC = 106, 124, 126


class Waves:
    """Work-groups that run together; the executing waves are always a slice of them, so that registers are views.

    Attributes:
      s: uint32 [SCALARS, waves], the scalar registers of the executing waves.
      v, f, i: [registers, waves, 64], their vector registers as uint32, float32 and int32. The accumulation registers
        stand behind the others.
      scc: bool [waves], the scalar condition code.
      group: int64 [waves], each wave's work-group within this object.
      member: int64 [waves], each wave's place in its work-group.
    """

    def __init__(self, groups: int, per_group: int, registers: int, memory: Memory, lds: Lds, scratch_bytes: int):
        n = groups * per_group
        self.per_group = per_group
        self.memory, self.lds = memory, lds
        self.all_s = np.full((SCALARS, n), POISON, U)
        self.all_v = np.full((registers, n, 64), POISON, U)
        self.all_scc = np.zeros(n, bool)
        self.all_group, self.all_member = np.divmod(np.arange(n), per_group)
        self.scratch_bytes = -(-scratch_bytes // 4) * 4
        self.scratch = np.full(n * 64 * self.scratch_bytes // 4, POISON, U)
        self.select(slice(0, n))

    def select(self, rows: slice) -> None:
        """Makes `rows` the executing waves."""
        self.rows = rows
        self.s, self.v = self.all_s[:, rows], self.all_v[:, rows]
        self.f, self.i = self.v.view(F), self.v.view(I)
        self.scc = self.all_scc[rows]
        self.group, self.member = self.all_group[rows], self.all_member[rows]
        self.exec_changed()

    @property
    def count(self) -> int:
        """How many waves execute."""
        return self.scc.size

    def exec_changed(self) -> None:
        """To be called after every write of EXEC."""
        self._mask_known = False

    def lanes(self) -> Array | None:
        """bool [waves, 64], the lanes that are on; None when all are, which is the usual case."""
        if not self._mask_known:
            low, high = self.s[EXEC], self.s[EXEC + 1]
            full = bool((low & high).min() == 0xFFFFFFFF)
            self._mask = None if full else unpack_lanes(low, high)
            self._mask_known = True
        return self._mask

    def mask(self) -> Array:
        """As `lanes`, but always an array."""
        lanes = self.lanes()
        return np.ones((self.count, 64), bool) if lanes is None else lanes

    def put(self, register: int, value: Array, mask: Array | None) -> None:
        """Writes words to a vector register in the lanes of `mask`, all of them if None."""
        if mask is None:
            self.v[register] = value
        else:
            np.copyto(self.v[register], value, where=mask)

    def write(self, register: int, value: Array) -> None:
        """Writes words to a vector register in the lanes that are on."""
        self.put(register, value, self.lanes())

    def write64(self, register: int, value: Array) -> None:
        """Writes uint64 to a pair of vector registers in the lanes that are on."""
        lanes = self.lanes()
        self.put(register, value.astype(U), lanes)
        self.put(register + 1, (value >> np.uint64(32)).astype(U), lanes)
