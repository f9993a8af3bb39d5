"""8-bit floats, which are of another kind on each chip, and the conversions between them and float32."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from amd.emulator.numerics import Array, F, U, join
from amd.emulator.vector_table import Op

# gfx942: without negative zero and infinities. gfx950: those of the Open Compute Project.
FLOAT8: dict[str, dict[str, type]] = {
    "gfx942": {"FP8": ml_dtypes.float8_e4m3fnuz, "BF8": ml_dtypes.float8_e5m2fnuz},
    "gfx950": {"FP8": ml_dtypes.float8_e4m3fn, "BF8": ml_dtypes.float8_e5m2},
}


def _widen(of: type) -> Callable[[Array], Array]:
    return lambda a: a.astype(np.uint8).view(of).astype(F)


def _widen_two(of: type) -> Callable[[Array], Array]:
    one = _widen(of)
    return lambda a: join(one(a).view(U), one(a >> U(8)).view(U))


def _narrow_two(of: type) -> Callable[[Array, Array], Array]:
    def one(a: Array) -> Array:
        return np.asarray(a, F).astype(of).view(np.uint8).astype(U)

    return lambda a, b: one(a) | one(b) << U(8)


FLOAT8_OPS: dict[str, dict[str, Op]] = {
    arch: {
        name: op
        for kind, of in kinds.items()
        for name, op in {
            f"V_CVT_F32_{kind}": Op(_widen(of), "u", "f"),
            f"V_CVT_PK_F32_{kind}": Op(_widen_two(of), "u", "U"),
            # What does not fit becomes NaN (or infinity), as long as the mode bit FP16_OVFL is off.
            f"V_CVT_PK_{kind}_F32": Op(_narrow_two(of), "ff", "w", keeps_high=True),
        }.items()
    }
    for arch, kinds in FLOAT8.items()
}
"""Rows as in `vector_table`, by chip."""
