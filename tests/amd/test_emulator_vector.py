"""Vector instructions, against exact arithmetic in Python or formulas of numpy."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from amd.assembly import VCC, Machine, isa, s, v
from amd.emulator import NotModelled

LANES = np.arange(64)
RNG = np.random.default_rng(7)
WORDS = RNG.integers(0, 2**32, (3, 64), dtype=np.uint32)
WORDS[:, :4] = [0, 1, 0x80000000, 0xFFFFFFFF]
FLOATS = (RNG.standard_normal((3, 64)) * 10.0 ** RNG.integers(-6, 7, (3, 64))).astype(np.float32)
FLOATS[:, :3] = [[0.0, -0.0, np.inf], [1.5, 2.5, -1.0], [-0.5, 3.0, 7.0]]
MASK = (1 << 32) - 1


def signed(x: int, width: int = 32) -> int:
    x &= (1 << width) - 1
    return x - (1 << width) if x >> width - 1 else x


def run(name: str, operands: np.ndarray, *, count: int = 1, **modifiers: Any) -> np.ndarray:
    """Result words [count, 64] of an instruction on vector registers 1, 2, 3; the destination is register 8."""
    sources = [v[1], v[2], v[3]][: len(operands)]
    d = v[8] if count == 1 else v[8 : 8 + count - 1]
    machine = Machine(vectors={k + 1: x for k, x in enumerate(operands)})
    return machine.run(getattr(isa, name)(d, *sources, **modifiers)).v[8 : 8 + count, 0]


INTEGERS = {
    "v_add_u32_e32": lambda a, b: a + b,
    "v_sub_u32_e32": lambda a, b: a - b,
    "v_subrev_u32_e32": lambda a, b: b - a,
    "v_and_b32_e32": lambda a, b: a & b,
    "v_or_b32_e32": lambda a, b: a | b,
    "v_xor_b32_e32": lambda a, b: a ^ b,
    "v_lshlrev_b32_e32": lambda a, b: b << (a & 31),
    "v_lshrrev_b32_e32": lambda a, b: b >> (a & 31),
    "v_ashrrev_i32_e32": lambda a, b: signed(b) >> (a & 31),
    "v_mul_u32_u24_e32": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "v_mul_i32_i24_e32": lambda a, b: signed(a, 24) * signed(b, 24),
    "v_mul_hi_u32_u24_e32": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 32,
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_mul_hi_u32": lambda a, b: a * b >> 32,
    "v_mul_hi_i32": lambda a, b: signed(a) * signed(b) >> 32,
    "v_min_u32_e32": min,
    "v_max_u32_e32": max,
    "v_min_i32_e32": lambda a, b: min(signed(a), signed(b)),
    "v_max_i32_e32": lambda a, b: max(signed(a), signed(b)),
    "v_bcnt_u32_b32": lambda a, b: a.bit_count() + b,
    "v_bfm_b32": lambda a, b: ((1 << (a & 31)) - 1) << (b & 31),
    "v_add3_u32_e64": lambda a, b, c: a + b + c,
    "v_xad_u32_e64": lambda a, b, c: (a ^ b) + c,
    "v_lshl_add_u32_e64": lambda a, b, c: (a << (b & 31)) + c,
    "v_add_lshl_u32_e64": lambda a, b, c: (a + b & MASK) << (c & 31),
    "v_lshl_or_b32": lambda a, b, c: a << (b & 31) | c,
    "v_and_or_b32": lambda a, b, c: a & b | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_bfi_b32_e64": lambda a, b, c: a & b | ~a & c,
    "v_bfe_u32_e64": lambda a, b, c: a >> (b & 31) & (1 << (c & 31)) - 1,
    "v_bfe_i32_e64": lambda a, b, c: signed(a >> (b & 31), c & 31) if c & 31 else 0,
    "v_alignbit_b32_e64": lambda a, b, c: (a << 32 | b) >> (c & 31),
    "v_alignbyte_b32_e64": lambda a, b, c: (a << 32 | b) >> 8 * (c & 3),
    "v_mad_u32_u24_e64": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c,
    "v_min3_u32_e64": min,
    "v_max3_i32_e64": lambda *x: max(map(signed, x)),
    "v_med3_i32_e64": lambda *x: sorted(map(signed, x))[1],
    "v_med3_u32_e64": lambda *x: sorted(x)[1],
    "v_sad_u32_e64": lambda a, b, c: abs(a - b) + c,
    "v_perm_b32_e64": lambda a, b, c: sum(permuted(a << 32 | b, c >> 8 * k & 255) << 8 * k for k in range(4)),
    "v_not_b32_e32": lambda a: ~a,
    "v_bfrev_b32_e32": lambda a: int(f"{a:032b}"[::-1], 2),
    "v_ffbh_u32_e32": lambda a: 32 - a.bit_length() if a else -1,
    "v_ffbl_b32_e32": lambda a: (a & -a).bit_length() - 1,
}


def permuted(data: int, selector: int) -> int:
    """A byte of V_PERM_B32."""
    if selector > 12:
        return 255
    if selector == 12:
        return 0
    if selector >= 8:
        return 255 * (data >> (15, 31, 47, 63)[selector - 8] & 1)
    return data >> 8 * selector & 255


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    fn = INTEGERS[name]
    count = 3 if name in THREE else fn.__code__.co_argcount if hasattr(fn, "__code__") else 2
    words = WORDS[: count or 3]
    if name == "v_perm_b32_e64":
        words = words.copy()
        words[2] &= 0x0F0F0F0F
    got = run(name, words)[0]
    want = [fn(*column) & MASK for column in words.T.tolist()]
    np.testing.assert_array_equal(got, np.array(want, np.uint32))


THREE = ("v_min3_u32_e64", "v_max3_i32_e64", "v_med3_i32_e64", "v_med3_u32_e64")


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("v_lshl_add_u64", lambda a, b, c: (a << (b & 7)) + c),
        ("v_lshlrev_b64", lambda a, b: b << (a & 63)),
        ("v_lshrrev_b64", lambda a, b: b >> (a & 63)),
        ("v_ashrrev_i64", lambda a, b: signed(b, 64) >> (a & 63)),
    ],
)
def test_double_words(name: str, fn: Any) -> None:
    wide = RNG.integers(0, 2**63, (2, 64), dtype=np.int64).astype(object) * 2 + 1
    shift = RNG.integers(0, 100, 64)
    vectors = {2: shift}
    for k, x in enumerate(wide):
        vectors |= {10 + 2 * k: x & MASK, 11 + 2 * k: x >> 32}
    if name == "v_lshl_add_u64":
        code, operands = isa.v_lshl_add_u64(v[8:9], v[10:11], v[2], v[12:13]), (wide[0], shift, wide[1])
    else:
        code, operands = getattr(isa, name)(v[8:9], v[2], v[10:11]), (shift, wide[0])
    w = Machine(vectors=vectors).run(code)
    got = w.v[8, 0].astype(object) | w.v[9, 0].astype(object) << 32
    want = [fn(*(int(x) for x in column)) & (1 << 64) - 1 for column in zip(*operands, strict=True)]
    assert got.tolist() == want


def test_multiply_add_of_64_bits() -> None:
    a, b, c = (x.astype(object) for x in WORDS)
    w = Machine(vectors={1: a, 2: b, 4: c, 5: c >> 1}).run(isa.v_mad_u64_u32(v[8:9], VCC, v[1], v[2], v[4:5]))
    total = a * b + (c | c >> 1 << 32)
    assert (w.v[8, 0].astype(object) | w.v[9, 0].astype(object) << 32).tolist() == (total % 2**64).tolist()
    carries = int(w.s[VCC.offset, 0]) | int(w.s[VCC.offset + 1, 0]) << 32
    assert [carries >> lane & 1 for lane in LANES.tolist()] == (total // 2**64).tolist()


def test_carries() -> None:
    """A 64-bit sum in two halves, and a difference."""
    a, b = (x.astype(object) for x in WORDS[:2])
    m = Machine(vectors={1: a, 2: a >> 3, 3: b, 4: b >> 5})
    x, y = a | a >> 3 << 32, b | b >> 5 << 32
    w = m.run(isa.v_add_co_u32_e32(v[8], v[1], v[3]), isa.v_addc_co_u32_e32(v[9], v[2], v[4]))
    assert (w.v[8, 0].astype(object) | w.v[9, 0].astype(object) << 32).tolist() == ((x + y) % 2**64).tolist()
    w = m.run(
        isa.v_sub_co_u32(v[8], s[10:11], v[1], v[3]), isa.v_subb_co_u32(v[9], s[12:13], v[2], v[4], s[10:11])
    )
    assert (w.v[8, 0].astype(object) | w.v[9, 0].astype(object) << 32).tolist() == ((x - y) % 2**64).tolist()


def test_saturation() -> None:
    a, b = WORDS[:2].astype(object)
    assert run("v_sub_u32_e64", WORDS[:2], clmp=1)[0].tolist() == np.maximum(a - b, 0).tolist()
    assert run("v_add_u32_e64", WORDS[:2], clmp=1)[0].tolist() == np.minimum(a + b, MASK).tolist()


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


@pytest.mark.parametrize(
    ("name", "fn"),
    [
        ("v_add_u16_e32", lambda a, b: a + b),
        ("v_sub_u16_e32", lambda a, b: a - b),
        ("v_mul_lo_u16_e32", lambda a, b: a * b),
        ("v_lshlrev_b16_e32", lambda a, b: b << (a & 15)),
        ("v_lshrrev_b16_e32", lambda a, b: b >> (a & 15)),
        ("v_ashrrev_i16_e32", lambda a, b: signed(b, 16) >> (a & 15)),
        ("v_max_i16_e32", lambda a, b: max(signed(a, 16), signed(b, 16))),
        ("v_min_u16_e32", min),
    ],
)
def test_16_bit_integers(name: str, fn: Any) -> None:
    got = run(name, WORDS[:2])[0]
    want = [fn(a & 0xFFFF, b & 0xFFFF) & 0xFFFF for a, b in WORDS[:2].T.tolist()]
    assert got.tolist() == want


def test_packed_16_bit_halves_can_be_swapped() -> None:
    a, b = WORDS[:2].astype(object)
    got = run("v_pk_add_u16", WORDS[:2], opsel=0b01, opsel_hi=0b10)[0]
    low, high = (a >> 16) + (b & 0xFFFF) & 0xFFFF, (a & 0xFFFF) + (b >> 16) & 0xFFFF
    assert got.tolist() == (low | high << 16).tolist()


def test_packed_floats() -> None:
    pairs = RNG.standard_normal((4, 64)).astype(np.float32)
    m = Machine(vectors={10 + k: x for k, x in enumerate(pairs)})
    w = m.run(isa.v_pk_mul_f32(v[10:11], v[10:11], v[12:13], opsel_hi=3, neg_hi=1))
    np.testing.assert_array_equal(w.f[10:12, 0], [pairs[0] * pairs[2], -pairs[1] * pairs[3]])
    w = m.run(isa.v_pk_mov_b32(v[10:11], v[10:11], v[12:13], opsel=0b01))
    np.testing.assert_array_equal(w.f[10:12, 0], [pairs[1], pairs[2]])


def test_dot_products() -> None:
    bf = [x.astype(ml_dtypes.bfloat16) for x in RNG.standard_normal((4, 64))]
    words = [lo.view(np.uint16).astype(np.uint32) | hi.view(np.uint16).astype(np.uint32) << 16 for lo, hi in (bf[:2], bf[2:])]
    start = RNG.standard_normal(64).astype(np.float32)
    w = Machine(vectors={1: words[0], 2: words[1], 8: start}).run(isa.v_dot2c_f32_bf16_e32(v[8], v[1], v[2]))
    exact = bf[0].astype(np.float64) * bf[2].astype(np.float64) + bf[1].astype(np.float64) * bf[3].astype(np.float64)
    np.testing.assert_allclose(w.f[8, 0], exact + start, rtol=1e-6, atol=1e-6)
    w = Machine(vectors={1: WORDS[0], 2: WORDS[1], 8: WORDS[2]}).run(isa.v_dot4c_i32_i8_e32(v[8], v[1], v[2]))
    x, y = (x.view(np.int8).reshape(64, 4).astype(np.int64) for x in WORDS[:2])
    np.testing.assert_array_equal(w.v[8, 0].view(np.int32), ((x * y).sum(1) + WORDS[2].astype(np.int64)).astype(np.int32))


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


def test_bit_operation_by_table() -> None:
    """V_BITOP3: the table's bits stand in omod, abs and neg."""
    table = 0b1011_0010
    got = run("v_bitop3_b32", WORDS, omod=table >> 6, abs=table >> 3 & 7, neg=table & 7)[0]
    for lane in range(64):
        a, b, c = WORDS[:, lane].tolist()
        for bit in range(32):
            index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | c >> bit & 1
            assert int(got[lane]) >> bit & 1 == table >> index & 1


@pytest.mark.parametrize("destination", ["byte", "word"])
def test_sdwa(destination: str) -> None:
    """Parts of operands, sign-extended or not, to a part of the destination."""
    place = {"byte": (1, 8, 8), "word": (5, 16, 16)}[destination]
    m = Machine(vectors={1: WORDS[0], 2: WORDS[1], 8: WORDS[2]})
    w = m.run(
        isa.VOP2_SDWA(
            isa.VOP2Op.V_ADD_U32_E32, v[8], vsrc0=v[1], src0=isa_sdwa(), vsrc1=v[2], src0_sel=2, src0_sext=1, src1_sel=5,
            dst_sel=place[0], dst_unused=2,
        )
    )  # fmt: skip
    for lane in range(64):
        a, b, old = WORDS[:, lane].tolist()
        total = signed(a >> 16 & 255, 8) + (b >> 16)
        field = ((1 << place[1]) - 1) << place[2]
        assert int(w.v[8, 0, lane]) == total << place[2] & field | old & ~field


def isa_sdwa() -> Any:
    from tinygrad.renderer.amd.dsl import SDWA

    return SDWA


@pytest.mark.parametrize(
    ("control", "source"),
    [
        (0b00_01_10_11, lambda i: i & ~3 | 3 - (i & 3)),
        (0x101, lambda i: i + 1 if i % 16 < 15 else None),
        (0x114, lambda i: i - 4 if i % 16 >= 4 else None),
        (0x121, lambda i: i & ~15 | (i - 1) % 16),
        (0x138, lambda i: i - 1 if i else None),
        (0x140, lambda i: i & ~15 | 15 - i % 16),
        (0x141, lambda i: i & ~7 | 7 - i % 8),
        (0x142, lambda i: (i & ~15) - 1 if i >= 16 else None),
        (0x143, lambda i: 31 if i >= 32 else None),
        (0x153, lambda i: i & ~15 | 3),
    ],
)
@pytest.mark.parametrize("zeros", [0, 1])
def test_dpp(control: int, source: Any, zeros: int) -> None:
    """A lane without a source keeps its register, or reads 0 with bound_ctrl."""
    from tinygrad.renderer.amd.dsl import DPP16

    code = isa.VOP1_DPP16(
        isa.VOP1Op.V_MOV_B32_E32, v[8], src0=DPP16, vsrc0=v[1], dpp=control, bc=zeros, row_mask=0b1101, bank_mask=15
    )
    w = Machine(vectors={1: WORDS[0], 8: WORDS[1]}).run(code)
    for lane in range(64):
        old, from_ = WORDS[1, lane], source(lane)
        want = old if lane // 16 == 1 else WORDS[0, from_] if from_ is not None else 0 if zeros else old
        assert w.v[8, 0, lane] == want, lane


def test_lanes_and_scalars() -> None:
    m = Machine(vectors={1: WORDS[0], 8: 9}, scalars={4: 37, 5: 123}, exec=(1 << 64) - (1 << 20))
    w = m.run(
        isa.v_readlane_b32(v[0], v[1], s[4]),
        isa.v_readfirstlane_b32_e32(v[1], v[1]),
        isa.v_writelane_b32(v[8], s[5], s[4]),
        isa.v_mbcnt_lo_u32_b32(v[9], -1, 0),
        isa.v_mbcnt_hi_u32_b32(v[9], -1, v[9]),
    )
    assert (w.s[0, 0], w.s[1, 0]) == (WORDS[0, 37], WORDS[0, 20])
    assert w.v[8, 0].tolist() == [123 if lane == 37 else 9 for lane in range(64)]
    np.testing.assert_array_equal(w.v[9, 0, 20:], LANES[20:])


@pytest.mark.parametrize("rows", [16, 32])
def test_permlane_swap(rows: int) -> None:
    code = getattr(isa, f"v_permlane{rows}_swap_b32_e32")(v[1], v[2])
    w = Machine(vectors={1: LANES, 2: 100 + LANES}, arch="gfx950").run(code)
    odd = LANES // rows % 2 == 1
    np.testing.assert_array_equal(w.v[1, 0], np.where(odd, 100 + LANES - rows, LANES))
    np.testing.assert_array_equal(w.v[2, 0], np.where(odd, 100 + LANES, LANES + rows))


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
