"""Vector instructions on integers and bits, and between lanes, against exact arithmetic in Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tinygrad.renderer.amd.dsl import DPP16, SDWA

from amd.assembly import VCC, Machine, isa, s, v
from amd.vector_operands import MASK, RNG, WORDS, run

LANES = np.arange(64)


def signed(x: int, width: int = 32) -> int:
    x &= (1 << width) - 1
    return x - (1 << width) if x >> width - 1 else x


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
    "v_ffbh_i32_e32": lambda a: next((i for i in range(1, 32) if a >> (31 - i) & 1 != a >> 31), -1),
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
    w = m.run(isa.v_sub_co_u32(v[8], s[10:11], v[1], v[3]), isa.v_subb_co_u32(v[9], s[12:13], v[2], v[4], s[10:11]))
    assert (w.v[8, 0].astype(object) | w.v[9, 0].astype(object) << 32).tolist() == ((x - y) % 2**64).tolist()


def test_saturation() -> None:
    a, b = WORDS[:2].astype(object)
    assert run("v_sub_u32_e64", WORDS[:2], clmp=1)[0].tolist() == np.maximum(a - b, 0).tolist()
    assert run("v_add_u32_e64", WORDS[:2], clmp=1)[0].tolist() == np.minimum(a + b, MASK).tolist()


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


def test_bit_operation_by_table() -> None:
    """V_BITOP3: the table's bits are in omod, abs and neg."""
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
            isa.VOP2Op.V_ADD_U32_E32,
            v[8],
            src0=SDWA,
            vsrc0=v[1],
            vsrc1=v[2],
            src0_sel=2,
            src0_sext=1,
            src1_sel=5,
            dst_sel=place[0],
            dst_unused=2,
        )
    )
    for lane in range(64):
        a, b, old = WORDS[:, lane].tolist()
        total = signed(a >> 16 & 255, 8) + (b >> 16)
        field = ((1 << place[1]) - 1) << place[2]
        assert int(w.v[8, 0, lane]) == total << place[2] & field | old & ~field


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
