"""V_CMP: comparisons of numbers, and classes of floats, to a bit for each lane."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amd.emulator.encodings import Source
from amd.emulator.errors import NotModelled
from amd.emulator.instruction import Instruction
from amd.emulator.numerics import Array, U, pack_lanes
from amd.emulator.operands import Step, write_scalar
from amd.emulator.waves import EXEC, Waves

ORDER: dict[str, Callable[[Array, Array], Array]] = {
    "F": lambda a, b: np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b)), bool),
    "T": lambda a, b: np.ones(np.broadcast_shapes(np.shape(a), np.shape(b)), bool),
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "LG": lambda a, b: (a < b) | (a > b),
    "O": lambda a, b: (a == a) & (b == b),
    "U": lambda a, b: (a != a) | (b != b),
    "NEQ": np.not_equal,
    "NLG": lambda a, b: ~((a < b) | (a > b)),
    "NLT": lambda a, b: ~(a < b),
    "NLE": lambda a, b: ~(a <= b),
    "NGT": lambda a, b: ~(a > b),
    "NGE": lambda a, b: ~(a >= b),
}
ORDER["TRU"] = ORDER["T"]
"""Comparisons; those whose names begin with N and a letter more are true when an operand is NaN."""

COMPARED = {
    **{"F16": "h", "F32": "f", "F64": "d", "I16": "s", "U16": "w"},
    **{"I32": "i", "U32": "u", "I64": "I", "U64": "U"},
}
"""Operand types of comparisons."""


def float_class(a: Array, classes: Array) -> Array:
    """V_CMP_CLASS_F32: whether words `a` are of one of the ten classes whose bits are set.

    From bit 0: signalling NaN, quiet NaN, -inf, -normal, -subnormal, -0, +0, +subnormal, +normal, +inf.
    """
    magnitude = a & U(0x7FFFFFFF)
    minus, nan, quiet = a >> U(31) == 1, magnitude > 0x7F800000, a >> U(22) & U(1) == 1
    kinds = [
        magnitude == 0x7F800000,
        (magnitude >= 0x800000) & (magnitude < 0x7F800000),
        (magnitude > 0) & (magnitude < 0x800000),
        magnitude == 0,
    ]
    member = [nan & ~quiet, nan & quiet, *(kind & minus for kind in kinds), *(kind & ~minus for kind in kinds[::-1])]
    out = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(classes)), bool)
    for k, is_member in enumerate(member):
        out |= is_member & (classes >> U(k) & U(1) == 1)
    return out


def compare(x: Instruction, source: Source, d: int) -> Step:
    """V_CMP: bits of lanes that are off are 0. V_CMPX: the same, and EXEC becomes the result."""
    name = x.name.removeprefix("V_CMPX_").removeprefix("V_CMP_")
    order, _, typed = name.rpartition("_")
    test: Callable[[Array, Array], Array]
    if order == "CLASS" and typed == "F32":
        a, b, test = source(0, "u"), source(1, "u"), float_class
    elif order in ORDER and typed in COMPARED:
        kind = COMPARED[typed]
        a, b, test = source(0, kind), source(1, kind), ORDER[order]
    else:
        raise NotModelled(x.name)
    low, high = write_scalar(d), write_scalar(d + 1)
    also = (write_scalar(EXEC), write_scalar(EXEC + 1)) if x.name.startswith("V_CMPX") else None

    def step(w: Waves) -> None:
        result, on = test(a(w), b(w)), w.lanes()
        if on is not None:
            result = result & on
        words = pack_lanes(result if result.shape == (w.count, 64) else np.broadcast_to(result, (w.count, 64)))
        low(w, words[:, 0])
        high(w, words[:, 1])
        if also is not None:
            also[0](w, words[:, 0])
            also[1](w, words[:, 1])

    return step
