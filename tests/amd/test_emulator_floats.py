"""Vector instructions on floats and conversions, against exact arithmetic in Python or formulas of numpy."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from amd.assembly import VCC, Machine, isa, s, v
from amd.emulator import NotModelled
from amd.vector_operands import FLOATS, MASK, RNG, WORDS, run

LANES = np.arange(64)


def nearest(x: Fraction) -> np.float32:
    """The float32 nearest to a fraction, ties to even."""
    guess = np.float32(float(x))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda f: (abs(Fraction(float(f)) - x), int(f.view(np.uint32)) & 1))


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("v_add_f32_e32", lambda a, b: a + b),
        ("v_sub_f32_e32", lambda a, b: a - b),
        ("v_subrev_f32_e32", lambda a, b: b - a),
        ("v_mul_f32_e32", lambda a, b: a * b),
        ("v_fma_f32_e64", lambda a, b, c: a * b + c),
    ],
)
def test_float_arithmetic_is_rounded_once(name: str, fn: Any) -> None:
    operands = FLOATS[: fn.__code__.co_argcount, 3:]  # finite ones
    full = np.zeros((len(operands), 64), np.float32)
    full[:, 3:] = operands
    got = run(name, full)[0].view(np.float32)[3:]
    want = [nearest(Fraction(fn(*(Fraction(float(x)) for x in column)))) for column in operands.T]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("v_exp_f32_e32", np.exp2),
        ("v_log_f32_e32", np.log2),
        ("v_rcp_f32_e32", lambda a: 1 / a),
        ("v_rsq_f32_e32", lambda a: 1 / np.sqrt(a)),
        ("v_sqrt_f32_e32", np.sqrt),
        ("v_sin_f32_e32", lambda a: np.sin(2 * np.pi * a)),
        ("v_cos_f32_e32", lambda a: np.cos(2 * np.pi * a)),
        ("v_fract_f32_e32", lambda a: a - np.floor(a)),
        ("v_floor_f32_e32", np.floor),
        ("v_ceil_f32_e32", np.ceil),
        ("v_trunc_f32_e32", np.trunc),
        ("v_rndne_f32_e32", np.rint),
        ("v_frexp_mant_f32_e32", lambda a: np.frexp(a)[0]),
    ],
)
def test_float_functions(name: str, fn: Any) -> None:
    x = np.concatenate([[0.25, 0.5, 1.0, 2.5, 3.5], np.linspace(0.1, 20, 59)]).astype(np.float32)
    got = run(name, x[None])[0].view(np.float32)
    np.testing.assert_allclose(got, fn(x.astype(np.float64)), rtol=2e-7, atol=1e-7)


def test_special_floats() -> None:
    """NaN, infinities, zeros of both signs and denormals."""
    nan, tiny = np.float32("nan"), np.float32(1e-40)
    a = np.array([nan, np.inf, -np.inf, 0.0, -0.0, tiny, 1.0, nan] * 8, np.float32)
    b = np.array([1.0, nan, 5.0, -0.0, 2.0, tiny, nan, nan] * 8, np.float32)
    largest = run("v_max_f32_e32", np.stack([a, b]))[0].view(np.float32)[:8]
    np.testing.assert_array_equal(largest, [1.0, np.inf, 5.0, largest[3], 2.0, tiny, 1.0, nan])
    total = run("v_add_f32_e32", np.stack([a, b]))[0].view(np.float32)
    assert total[5] == tiny + tiny  # denormals are kept
    assert np.isnan(total[[0, 1, 6]]).all()
    third = run("v_maximum3_f32", np.stack([a, b, b]))[0].view(np.float32)
    assert np.isnan(third[[0, 1, 6, 7]]).all()
    # From bit 0: NaN, signalling or quiet, -inf, -normal, -denormal, -0, 0, denormal, normal, inf.
    w = Machine(vectors={1: a, 2: 0b10_1100_0011}).run(isa.v_cmp_class_f32_e64(VCC, v[1], v[2]))
    assert f"{w.s[VCC.offset, 0] & 0xFF:08b}"[::-1] == "11010101"


def test_modifiers() -> None:
    """|x|, -x, clamp, output modifiers."""
    a, b = FLOATS[:2]
    got = run("v_add_f32_e64", FLOATS[:2], abs=1, neg=2)[0].view(np.float32)
    np.testing.assert_array_equal(got, np.abs(a) - b)
    got = run("v_mul_f32_e64", FLOATS[:2], omod=1)[0].view(np.float32)
    np.testing.assert_array_equal(got, a * b * np.float32(2))
    got = run("v_mul_f32_e64", FLOATS[:2, 3:].repeat(2, 1)[:, :64], clmp=1)[0].view(np.float32)
    np.testing.assert_array_equal(got, np.clip(FLOATS[0, 3:] * FLOATS[1, 3:], 0, 1).repeat(2)[:64])
    with pytest.raises(NotModelled, match="clamp"):
        run("v_min_u32_e64", WORDS[:2], clmp=1)


def test_conversions() -> None:
    x = np.array([0.0, 1.5, -1.5, 2.5, 3e9, -3e9, np.nan, 1e20] * 8, np.float32)

    def words(name: str) -> list[int]:
        return run(name, x[None])[0][:8].tolist()

    assert words("v_cvt_i32_f32_e32") == [0, 1, MASK, 2, 2**31 - 1, 2**31, 0, 2**31 - 1]
    assert words("v_cvt_u32_f32_e32") == [0, 1, 0, 2, 3_000_000_000, 0, 0, MASK]
    np.testing.assert_array_equal(
        run("v_cvt_f32_i32_e32", WORDS[:1])[0].view(np.float32), WORDS[0].view(np.int32).astype(np.float32)
    )
    np.testing.assert_array_equal(run("v_cvt_f32_ubyte2_e32", WORDS[:1])[0].view(np.float32), WORDS[0] >> 16 & 255)
    halves = (FLOATS[0, 3:].repeat(2)[:64] / 1e4).astype(np.float16)
    got = run("v_cvt_f32_f16_e32", halves.view(np.uint16)[None])[0].view(np.float32)
    np.testing.assert_array_equal(got, halves.astype(np.float32))


def test_bfloat16_and_float16_pairs() -> None:
    a, b = FLOATS[:2]
    got = run("v_cvt_pk_bf16_f32", FLOATS[:2])[0].view(ml_dtypes.bfloat16).reshape(64, 2)
    np.testing.assert_array_equal(got, np.stack([a, b], 1).astype(ml_dtypes.bfloat16))
    x = np.clip(FLOATS[:2], -6e4, 6e4)
    got = run("v_cvt_pkrtz_f16_f32", x)[0].view(np.float16).reshape(64, 2).astype(np.float64)
    exact = np.stack([x[0], x[1]], 1).astype(np.float64)
    assert (np.abs(got) <= np.abs(exact)).all()  # towards zero
    assert (np.abs(got - exact) <= np.maximum(np.abs(exact) * 2.0**-10, 2.0**-24)).all()


@pytest.mark.parametrize(
    ("arch", "kind", "dtype"),
    [
        ("gfx942", "fp8", ml_dtypes.float8_e4m3fnuz),
        ("gfx942", "bf8", ml_dtypes.float8_e5m2fnuz),
        ("gfx950", "fp8", ml_dtypes.float8_e4m3fn),
        ("gfx950", "bf8", ml_dtypes.float8_e5m2),
    ],
)
def test_float8(arch: str, kind: str, dtype: Any) -> None:
    """All 256 bytes, from each of a word's places, and back again."""
    everything = np.arange(256, dtype=np.uint8)
    w = Machine(vectors={1: everything.view(np.uint32)}, arch=arch).run(
        getattr(isa, f"v_cvt_f32_{kind}_e32")(v[8], v[1]),
        getattr(isa, f"v_cvt_pk_f32_{kind}_e32")(v[10:11], v[1]),
        getattr(isa, f"v_cvt_pk_{kind}_f32")(v[12], v[10], v[11]),
    )
    want = everything.view(dtype).astype(np.float32).reshape(64, 4)
    np.testing.assert_array_equal(w.f[8, 0], want[:, 0])
    np.testing.assert_array_equal(w.f[10:12, 0].T, want[:, :2])
    again = (w.v[12, 0] & 0xFFFF).astype(np.uint16).view(dtype).astype(np.float32).reshape(64, 2)
    np.testing.assert_array_equal(again, want[:, :2])
    assert (w.v[12, 0] >> 16 == 0x7FC0).all()  # the upper half stays as it was


@pytest.mark.parametrize("upper", [0, 1])
def test_scaled_float8(upper: int) -> None:
    """gfx950: two bytes times the power of two of a float32's exponent, and back."""
    everything = np.arange(256, dtype=np.uint8)
    finite = np.where((everything & 0x7F) == 0x7F, 0, everything).astype(np.uint8)  # 0x7f and 0xff are NaN
    w = Machine(vectors={1: finite.view(np.uint32), 2: -6.5}, arch="gfx950").run(
        isa.v_cvt_scalef32_pk_f32_fp8(v[8:9], v[1], v[2], opsel=upper),
        isa.v_cvt_scalef32_pk_bf16_fp8(v[10], v[1], v[2], opsel=upper),
        isa.v_cvt_scalef32_pk_fp8_f32(v[12], v[8], v[9], v[2], opsel=8 * upper),
    )
    of = ml_dtypes.float8_e4m3fn
    want = finite.view(of).astype(np.float32).reshape(64, 2, 2)[:, upper] * 4
    np.testing.assert_array_equal(w.f[8:10, 0].T, want)
    np.testing.assert_array_equal(w.v[10, 0].view(ml_dtypes.bfloat16).reshape(64, 2).astype(np.float32), want)
    again = (w.v[12, 0] >> 16 * upper & 0xFFFF).astype(np.uint16).view(of).reshape(64, 2).astype(np.float32)
    np.testing.assert_array_equal(again, want / 4)


def test_half_operations() -> None:
    a, b, c = (FLOATS / 1e3).astype(np.float16)
    words = np.stack([a.view(np.uint16), b.view(np.uint16), c.view(np.uint16)]).astype(np.uint32)
    got = run("v_mul_f16_e32", words[:2])[0]
    np.testing.assert_array_equal(got, (a * b).view(np.uint16))  # zeros above
    upper = words << 16 | 0xABCD
    got = run("v_add_f16_e64", upper[:2], opsel=0b1011)[0]
    np.testing.assert_array_equal(got >> 16, (a + b).view(np.uint16))
    assert (got & 0xFFFF == 0x7FC0).all()
    got = run("v_pk_fma_f16", words | words << 16, opsel_hi=3, opsel_hi2=1)[0]
    exact = (a.astype(np.float64) * b + c).astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(got & 0xFFFF, exact)
    np.testing.assert_array_equal(got >> 16, exact)


def test_packed_floats() -> None:
    pairs = RNG.standard_normal((4, 64)).astype(np.float32)
    m = Machine(vectors={10 + k: x for k, x in enumerate(pairs)})
    w = m.run(isa.v_pk_mul_f32(v[10:11], v[10:11], v[12:13], opsel_hi=3, neg_hi=1))
    np.testing.assert_array_equal(w.f[10:12, 0], [pairs[0] * pairs[2], -pairs[1] * pairs[3]])
    w = m.run(isa.v_pk_mov_b32(v[10:11], v[10:11], v[12:13], opsel=0b01))
    np.testing.assert_array_equal(w.f[10:12, 0], [pairs[1], pairs[2]])


def test_dot_products() -> None:
    bf = [x.astype(ml_dtypes.bfloat16) for x in RNG.standard_normal((4, 64))]
    words = [
        lo.view(np.uint16).astype(np.uint32) | hi.view(np.uint16).astype(np.uint32) << 16 for lo, hi in (bf[:2], bf[2:])
    ]
    start = RNG.standard_normal(64).astype(np.float32)
    w = Machine(vectors={1: words[0], 2: words[1], 8: start}).run(isa.v_dot2c_f32_bf16_e32(v[8], v[1], v[2]))
    exact = bf[0].astype(np.float64) * bf[2].astype(np.float64) + bf[1].astype(np.float64) * bf[3].astype(np.float64)
    np.testing.assert_allclose(w.f[8, 0], exact + start, rtol=1e-6, atol=1e-6)
    w = Machine(vectors={1: WORDS[0], 2: WORDS[1], 8: WORDS[2]}).run(isa.v_dot4c_i32_i8_e32(v[8], v[1], v[2]))
    x, y = (x.view(np.int8).reshape(64, 4).astype(np.int64) for x in WORDS[:2])
    np.testing.assert_array_equal(
        w.v[8, 0].view(np.int32), ((x * y).sum(1) + WORDS[2].astype(np.int64)).astype(np.int32)
    )


def test_selection_and_comparison() -> None:
    a, b = FLOATS[:2]
    m = Machine(vectors={1: a, 2: b}, exec=(1 << 64) - 2)
    w = m.run(isa.v_cmp_lt_f32_e32(v[1], v[2]), isa.v_cndmask_b32_e32(v[8], v[2], v[1]))
    flags = int(w.s[VCC.offset, 0]) | int(w.s[VCC.offset + 1, 0]) << 32
    want = (a < b) & (LANES > 0)  # the lane that is off gives 0
    assert [flags >> lane & 1 for lane in LANES.tolist()] == want.astype(int).tolist()
    np.testing.assert_array_equal(w.f[8, 0, 1:], np.minimum(a, b)[1:])
    w = m.run(isa.v_cmp_nge_f32_e64(s[10:11], v[1], v[2]))
    assert (int(w.s[10, 0]) >> 5 & 1) == (not a[5] >= b[5])


def test_exact_division_of_floats() -> None:
    """The sequence that compilers emit gives the correctly rounded quotient."""
    a, b = FLOATS[0, 3:].repeat(2)[:64], FLOATS[1, 3:].repeat(2)[:64]
    w = Machine(vectors={1: a, 2: b}).run(
        isa.v_div_scale_f32(v[3], VCC, v[2], v[2], v[1]),
        isa.v_rcp_f32_e32(v[4], v[3]),
        isa.v_mul_f32_e32(v[5], v[1], v[4]),
        isa.v_div_fmas_f32_e64(v[5], v[5], 1.0, 0),
        isa.v_div_fixup_f32_e64(v[8], v[5], v[2], v[1]),
    )
    np.testing.assert_array_equal(w.f[8, 0], a / b)
    assert math.isfinite(w.f[8, 0, 0])
