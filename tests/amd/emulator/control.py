"""Branches, and instructions that do nothing here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amd.emulator.numerics import Array
from amd.emulator.waves import EXEC, VCC, Waves

BRANCHES: dict[str, Callable[[Waves], Array]] = {
    "S_BRANCH": lambda w: np.ones(w.count, bool),
    "S_CBRANCH_SCC0": lambda w: ~w.scc,
    "S_CBRANCH_SCC1": lambda w: w.scc.copy(),
    "S_CBRANCH_EXECZ": lambda w: (w.s[EXEC] | w.s[EXEC + 1]) == 0,
    "S_CBRANCH_EXECNZ": lambda w: (w.s[EXEC] | w.s[EXEC + 1]) != 0,
    "S_CBRANCH_VCCZ": lambda w: (w.s[VCC] | w.s[VCC + 1]) == 0,
    "S_CBRANCH_VCCNZ": lambda w: (w.s[VCC] | w.s[VCC + 1]) != 0,
}
"""Which of the executing waves jump."""

NO_OPS = {
    *("S_NOP", "S_SLEEP", "S_SETPRIO", "S_INCPERFLEVEL", "S_DECPERFLEVEL"),  # hints
    "S_WAITCNT",  # loads arrive at once
    *("S_ICACHE_INV", "S_DCACHE_INV", "S_DCACHE_WB"),  # there are no caches
}
