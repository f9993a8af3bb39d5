"""Operands for the tests of vector instructions, and how they are run on them."""

from __future__ import annotations

from typing import Any

import numpy as np

from amd.assembly import Machine, isa, v

RNG = np.random.default_rng(7)
WORDS = RNG.integers(0, 2**32, (3, 64), dtype=np.uint32)
WORDS[:, :4] = [0, 1, 0x80000000, 0xFFFFFFFF]
FLOATS = (RNG.standard_normal((3, 64)) * 10.0 ** RNG.integers(-6, 7, (3, 64))).astype(np.float32)
FLOATS[:, :3] = [[0.0, -0.0, np.inf], [1.5, 2.5, -1.0], [-0.5, 3.0, 7.0]]
MASK = (1 << 32) - 1
"""All bits of a word."""


def run(name: str, operands: np.ndarray, *, count: int = 1, **modifiers: Any) -> np.ndarray:
    """Result words [count, 64] of an instruction on vector registers 1, 2, 3; the destination is register 8."""
    sources = [v[1], v[2], v[3]][: len(operands)]
    d = v[8] if count == 1 else v[8 : 8 + count - 1]
    machine = Machine(vectors={k + 1: x for k, x in enumerate(operands)})
    return machine.run(getattr(isa, name)(d, *sources, **modifiers)).v[8 : 8 + count, 0]
