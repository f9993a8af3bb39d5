"""Runs a few hand-written instructions in the emulator: what the unit tests of instructions are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tinygrad.renderer.amd.dsl import EXEC, LIT, M0, NULL, SCC, VCC, s, v
from tinygrad.runtime.autogen.amd.cdna import ins as isa

from amd.emulator.lds import Lds
from amd.emulator.memory import Memory, Region
from amd.emulator.numerics import U64, U
from amd.emulator.operands import Registers
from amd.emulator.program import Program
from amd.emulator.scheduler import run
from amd.emulator.waves import EXEC as EXEC_ROW
from amd.emulator.waves import Waves

__all__ = [
    "EXEC",
    "FIRST_BUFFER",
    "LIT",
    "M0",
    "NULL",
    "SCC",
    "VCC",
    "Machine",
    "bits",
    "isa",
    "rows",
    "s",
    "v",
    "without_base",
]

FIRST_BUFFER = 3
"""Address of buffer n: FIRST_BUFFER + n in the upper word, its byte offset in the lower one."""


SIXTY_FOUR = Registers(64, 64)


@dataclass
class Machine:
    """The state before and after a run.

    Attributes:
      vectors: vector register to a word, a list of 64 or an array [waves, 64]; all others are poisoned. Registers from
        256 on are accumulation registers.
      scalars: scalar register to a word.
      exec: the lanes that are on.
      groups, per_group: work-groups, and waves of each.
      buffers: uint8 arrays, padded to whole words.
    """

    vectors: dict[int, Any] = field(default_factory=dict)
    scalars: dict[int, int] = field(default_factory=dict)
    exec: int = (1 << 64) - 1
    groups: int = 1
    per_group: int = 1
    lds_bytes: int = 0
    scratch_bytes: int = 0
    buffers: Sequence[np.ndarray] = ()
    arch: str = "gfx942"
    seed: int | None = None
    check_races: bool = True
    limit: int = 100_000
    registers: Registers = SIXTY_FOUR

    def run(self, *code: Any) -> Waves:
        """Executes instructions (tinygrad's, or their bytes) and S_ENDPGM; returns the registers."""
        image = b"".join(x if isinstance(x, bytes) else x.to_bytes() for x in (*code, isa.s_endpgm()))
        program = Program.load("test", image + bytes(16), 0, self.registers, self.arch)
        buffers = [Region(f"buffer {k}", raw, raw.size) for k, raw in enumerate(self.buffers)]
        spare = np.zeros(4, np.uint8)
        memory = Memory([Region("the code", spare, 4), Region("the arguments", spare, 4), *buffers])
        lds = Lds(self.groups, self.lds_bytes, check_races=self.check_races)
        waves = Waves(self.groups, self.per_group, self.registers.count, memory, lds, self.scratch_bytes)
        for register, value in self.vectors.items():
            row = register if register < 256 else self.registers.vector + register - 256
            waves.all_v[row] = bits(value)
        for register, word in self.scalars.items():
            waves.all_s[register] = word & 0xFFFFFFFF
        waves.all_s[EXEC_ROW], waves.all_s[EXEC_ROW + 1] = self.exec & 0xFFFFFFFF, self.exec >> 32
        rng = None if self.seed is None else np.random.default_rng(self.seed)
        self.executed = run(program, waves, limit=self.limit, rng=rng)
        waves.select(slice(0, self.groups * self.per_group))
        return waves


def rows(first: int, count: int) -> Any:
    """Vector registers as an operand."""
    return v[first] if count == 1 else v[first : first + count - 1]


def without_base(instruction: Any) -> bytes:
    """A global or scratch access without a scalar address: 127 in its field, as compilers write it."""
    return (int.from_bytes(instruction.to_bytes(), "little") | 127 << 48).to_bytes(8, "little")


def bits(value: Any) -> np.ndarray:
    """Words of integers (also negative ones) or float32 numbers."""
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return array.astype(np.float32).view(U)
    return array if array.dtype == U else np.asarray(array.astype(object) & 0xFFFFFFFF, U64).astype(U)
