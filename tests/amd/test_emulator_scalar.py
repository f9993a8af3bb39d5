"""Scalar instructions, branches and EXEC."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from amd.assembly import EXEC, VCC, Machine, isa, s, v
from amd.emulator import Fault, NotModelled

A, B = 0x89ABCDEF, 0x7FFFFFF3
WIDE = 0xFEDCBA9876543210


def signed(x: int, width: int = 32) -> int:
    return x - (1 << width) if x >> width - 1 & 1 else x


def test_a_literal_of_64_bits_is_extended_by_zeros() -> None:
    w = Machine().run(isa.s_mov_b64(s[2:3], 0x80000001))
    assert (w.s[2, 0], w.s[3, 0]) == (0x80000001, 0)


@pytest.mark.parametrize(
    ("name", "result", "scc"),
    [
        ("s_add_u32", A + B, True),
        ("s_sub_u32", A - B, False),
        ("s_add_i32", A + B, False),
        ("s_sub_i32", A - B, True),
        ("s_mul_i32", A * B, None),
        ("s_mul_hi_u32", A * B >> 32, None),
        ("s_mul_hi_i32", signed(A) * signed(B) >> 32, None),
        ("s_absdiff_i32", abs(signed(signed(A) - signed(B) & 0xFFFFFFFF)), True),
        ("s_min_u32", B, False),
        ("s_max_u32", A, True),
        ("s_min_i32", A, True),
        ("s_max_i32", B, False),
        ("s_and_b32", A & B, True),
        ("s_or_b32", A | B, True),
        ("s_xor_b32", A ^ B, True),
        ("s_andn2_b32", A & ~B, True),
        ("s_orn2_b32", A | ~B, True),
        ("s_nand_b32", ~(A & B), True),
        ("s_nor_b32", ~(A | B), False),
        ("s_xnor_b32", ~(A ^ B), True),
        ("s_lshl_b32", A << (B & 31), True),
        ("s_lshr_b32", A >> (B & 31), True),
        ("s_ashr_i32", signed(A) >> (B & 31), True),
        ("s_bfm_b32", ((1 << (A & 31)) - 1) << (B & 31), None),
        ("s_lshl2_add_u32", (A << 2) + B, True),
        ("s_pack_ll_b32_b16", A & 0xFFFF | B << 16, None),
        ("s_pack_lh_b32_b16", A & 0xFFFF | B & 0xFFFF0000, None),
        ("s_pack_hh_b32_b16", A >> 16 | B & 0xFFFF0000, None),
    ],
)
def test_two_words(name: str, result: int, scc: bool | None) -> None:
    w = Machine(scalars={1: A, 2: B}).run(isa.s_cmp_eq_u32(s[1], s[1]), getattr(isa, name)(s[0], s[1], s[2]))
    assert w.s[0, 0] == result & 0xFFFFFFFF
    if name == "s_nor_b32":
        scc = ~(A | B) & 0xFFFFFFFF != 0
    assert bool(w.scc[0]) == (True if scc is None else scc)


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("s_and_b64", WIDE & A << 32),
        ("s_or_b64", WIDE | A << 32),
        ("s_xor_b64", WIDE ^ A << 32),
        ("s_andn2_b64", WIDE & ~(A << 32)),
    ],
)
def test_two_double_words(name: str, result: int) -> None:
    code = getattr(isa, name)(s[0:1], s[2:3], s[4:5])
    w = Machine(scalars={2: WIDE, 3: WIDE >> 32, 4: 0, 5: A}).run(code)
    assert int(w.s[0, 0]) | int(w.s[1, 0]) << 32 == result & (1 << 64) - 1


@pytest.mark.parametrize(
    ("name", "result"),
    [("s_lshl_b64", WIDE << 12), ("s_lshr_b64", WIDE >> 12), ("s_ashr_i64", signed(WIDE, 64) >> 12)],
)
def test_shifts_of_double_words(name: str, result: int) -> None:
    w = Machine(scalars={2: WIDE, 3: WIDE >> 32}).run(getattr(isa, name)(s[0:1], s[2:3], 12))
    assert int(w.s[0, 0]) | int(w.s[1, 0]) << 32 == result & (1 << 64) - 1


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("s_mov_b32", A),
        ("s_not_b32", ~A),
        ("s_brev_b32", int(f"{A:032b}"[::-1], 2)),
        ("s_abs_i32", abs(signed(A))),
        ("s_sext_i32_i8", signed(A & 0xFF, 8)),
        ("s_sext_i32_i16", signed(A & 0xFFFF, 16)),
        ("s_bcnt1_i32_b32", A.bit_count()),
        ("s_ff1_i32_b32", (A & -A).bit_length() - 1),
        ("s_flbit_i32_b32", 32 - A.bit_length()),
    ],
)
def test_one_word(name: str, result: int) -> None:
    assert Machine(scalars={1: A}).run(getattr(isa, name)(s[0], s[1])).s[0, 0] == result & 0xFFFFFFFF


def test_carry_chain() -> None:
    """A 64-bit sum and difference of words."""
    x, y = 0x00000001_FFFFFFFF, 0x7FFFFFFF_00000002
    m = Machine(scalars={0: x, 1: x >> 32, 2: y, 3: y >> 32})
    w = m.run(isa.s_add_u32(s[4], s[0], s[2]), isa.s_addc_u32(s[5], s[1], s[3]))
    assert int(w.s[4, 0]) | int(w.s[5, 0]) << 32 == x + y
    w = m.run(isa.s_sub_u32(s[4], s[2], s[0]), isa.s_subb_u32(s[5], s[3], s[1]))
    assert int(w.s[4, 0]) | int(w.s[5, 0]) << 32 == y - x


def test_bit_fields() -> None:
    control = 5 | 11 << 16
    field = A >> 5 & (1 << 11) - 1
    w = Machine(scalars={1: A, 2: control}).run(isa.s_bfe_u32(s[0], s[1], s[2]), isa.s_bfe_i32(s[3], s[1], s[2]))
    assert w.s[0, 0] == field
    assert w.s[3, 0] == signed(field, 11) & 0xFFFFFFFF


def test_immediates() -> None:
    """Inline constants, literals and 16-bit immediates."""
    w = Machine(scalars={5: 10}).run(
        isa.s_mov_b32(s[0], -16),
        isa.s_mov_b32(s[1], 0.5),
        isa.s_mov_b32(s[2], 0x12345678),
        isa.s_movk_i32(s[3], -2),
        isa.s_addk_i32(s[5], -3),
        isa.s_mulk_i32(s[5], 7),
        isa.s_cmpk_eq_u32(s[5], 49),
        isa.s_cselect_b32(s[6], 1, 2),
        isa.s_bitset1_b32(s[5], 10),
    )
    assert [hex(x) for x in w.s[:4, 0]] == ["0xfffffff0", "0x3f000000", "0x12345678", "0xfffffffe"]
    assert (w.s[5, 0], w.s[6, 0]) == (49 | 1 << 10, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("s_cmp_lt_i32", True), ("s_cmp_lt_u32", False), ("s_cmp_lg_u32", True), ("s_cmp_ge_i32", False)],
)
def test_comparisons(name: str, expected: bool) -> None:
    assert Machine(scalars={0: A, 1: B}).run(getattr(isa, name)(s[0], s[1])).scc[0] == expected


def test_loop_and_counters() -> None:
    """Each wave counts down from a number of its own; the waves part and meet again."""
    start = np.arange(1, 9)
    m = Machine(groups=8)
    m.vectors = {0: np.broadcast_to(start[:, None], (8, 64))}
    w = m.run(
        isa.v_readfirstlane_b32_e32(v[0], v[0]),  # to s[0]: tinygrad names every destination here v
        isa.s_mov_b32(s[1], 0),
        isa.s_add_u32(s[1], s[1], s[0]),  # the loop
        isa.s_sub_u32(s[0], s[0], 1),
        isa.s_cmp_lg_u32(s[0], 0),
        isa.s_cbranch_scc1(0xFFFF & -4),
        isa.s_mov_b32(s[2], 77),
    )
    assert w.s[1].tolist() == (start * (start + 1) // 2).tolist()
    assert (w.s[2] == 77).all()
    assert m.executed == 2 * 8 + 4 * int(start.sum()) + 2 * 8


def test_exec_mask() -> None:
    """Lanes that are off keep their registers; S_AND_SAVEEXEC and V_CMPX change EXEC."""
    lanes = np.arange(64)
    mask = 0xF0F0_0000_FFFF_0001
    w = Machine(vectors={0: lanes, 1: 5}, scalars={2: mask, 3: mask >> 32}).run(
        isa.s_and_saveexec_b64(s[4:5], s[2:3]),
        isa.v_add_u32_e32(v[1], v[0], v[0]),
        isa.s_mov_b64(EXEC, s[4:5]),
        isa.v_mov_b32_e32(v[2], 1),
        isa.v_cmpx_gt_u32_e32(10, v[0]),
        isa.v_mov_b32_e32(v[2], 2),
    )
    on = (mask >> lanes.astype(object) & 1).astype(bool)
    np.testing.assert_array_equal(w.v[1, 0], np.where(on, 2 * lanes, 5))
    np.testing.assert_array_equal(w.v[2, 0], np.where(lanes < 10, 2, 1))
    assert (w.s[4, 0], w.s[5, 0]) == (0xFFFFFFFF, 0xFFFFFFFF)
    assert w.s[VCC.offset, 0] == 0x3FF


@pytest.mark.parametrize(
    ("branch", "set_up", "jumps"),
    [
        ("s_cbranch_execz", isa.s_mov_b64(EXEC, 0), True),
        ("s_cbranch_execnz", isa.s_mov_b64(EXEC, 0), False),
        ("s_cbranch_vccz", isa.s_mov_b64(VCC, 0), True),
        ("s_cbranch_vccnz", isa.s_mov_b64(VCC, 4), True),
        ("s_cbranch_scc0", isa.s_cmp_eq_u32(1, 1), False),
        ("s_branch", isa.s_nop(0), True),
    ],
)
def test_branches(branch: str, set_up: Any, jumps: bool) -> None:
    w = Machine(scalars={0: 0}).run(set_up, getattr(isa, branch)(1), isa.s_mov_b32(s[0], 1), isa.s_mov_b32(s[1], 2))
    assert (w.s[0, 0], w.s[1, 0]) == (0 if jumps else 1, 2)


def test_what_is_not_known_is_named() -> None:
    with pytest.raises(NotModelled) as caught:
        Machine().run(isa.s_mov_b32(s[0], 1), isa.s_setreg_b32(s[0], 3))
    text = str(caught.value)
    assert "S_SETREG_B32" in text
    assert "kernel test, pc 0x4: s_setreg_b32(s[0], 3)" in text
    with pytest.raises(NotModelled, match="no known instruction at 0x0: ffffffff"):
        Machine().run(b"\xff\xff\xff\xff")


def test_endless_loops_end() -> None:
    with pytest.raises(Fault, match="more than 1000 wave instructions"):
        Machine(limit=1000).run(isa.s_branch(0xFFFF))


def test_undeclared_registers() -> None:
    with pytest.raises(Fault, match=r"v\[64:64\] used, but the kernel declares 64"):
        Machine().run(isa.v_mov_b32_e32(v[64], 0))
