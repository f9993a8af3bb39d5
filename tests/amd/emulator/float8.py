"""8-bit floats, which are of another kind on each chip, and the conversions between them and float32."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from amd.emulator.numerics import Array, F, I, U, join, to_bf16, to_half
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


def _exponent(scale: Array) -> Array:
    """2 to the scale's exponent; its sign and mantissa do not count."""
    return np.ldexp(F(1), (scale.view(U) >> U(23) & U(255)).astype(I) - 127)


def _scaled(of: type, pack: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """gfx950: two numbers times a power of two, in another format."""
    one = _widen(of)
    return lambda a, scale: pack(one(a) * _exponent(scale), one(a >> U(8)) * _exponent(scale))


def _unscaled(of: type) -> Callable[[Array, Array, Array], Array]:
    narrow = _narrow_two(of)
    return lambda a, b, scale: narrow(a / _exponent(scale), b / _exponent(scale))


def _pack_f32(low: Array, high: Array) -> Array:
    return join(low.view(U), high.view(U))


def _pack_bf16(low: Array, high: Array) -> Array:
    return to_bf16(low) | to_bf16(high) << U(16)


def _pack_f16(low: Array, high: Array) -> Array:
    return to_half(low) | to_half(high) << U(16)


def _rows(kind: str, of: type) -> dict[str, Op]:
    return {
        f"V_CVT_F32_{kind}": Op(_widen(of), "u", "f"),
        f"V_CVT_PK_F32_{kind}": Op(_widen_two(of), "u", "U"),
        # What does not fit becomes NaN (or infinity), as long as the mode bit FP16_OVFL is off.
        f"V_CVT_PK_{kind}_F32": Op(_narrow_two(of), "ff", "w", keeps_high=True),
    }


def _scaled_rows(kind: str, of: type) -> dict[str, Op]:
    return {
        f"V_CVT_SCALEF32_PK_F32_{kind}": Op(_scaled(of, _pack_f32), "wf", "U"),
        f"V_CVT_SCALEF32_PK_BF16_{kind}": Op(_scaled(of, _pack_bf16), "wf", "u"),
        f"V_CVT_SCALEF32_PK_F16_{kind}": Op(_scaled(of, _pack_f16), "wf", "u"),
        f"V_CVT_SCALEF32_PK_{kind}_F32": Op(_unscaled(of), "fff", "w", keeps_high=True),
    }


FLOAT8_OPS: dict[str, dict[str, Op]] = {
    arch: {
        name: op
        for kind, of in kinds.items()
        for name, op in (_rows(kind, of) | (_scaled_rows(kind, of) if arch == "gfx950" else {})).items()
    }
    for arch, kinds in FLOAT8.items()
}
"""Rows as in `vector_table`, by chip."""
