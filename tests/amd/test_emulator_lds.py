"""Local memory, what the emulator finds wrong about accesses to it, and exchange between lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from amd.assembly import Machine, isa, s, v
from amd.emulator import Fault, NotModelled

LANES = np.arange(64)
BARRIER = isa.s_barrier()


def test_local_reads_and_writes() -> None:
    """One address, two addresses, steps of 64 elements, and 16 bytes at once."""
    m = Machine(vectors={1: LANES * 16, 2: LANES, 3: LANES + 100, 4: LANES + 200, 5: LANES + 300}, lds_bytes=8192)
    w = m.run(
        isa.ds_write_b128(addr=v[1], data0=v[2:5]),
        isa.ds_read2_b32(vdst=v[8:9], addr=v[1], offset0=3, offset1=1),
        isa.ds_read_b64(vdst=v[10:11], addr=v[1], offset0=8),
        isa.ds_write2st64_b32(addr=v[1], data0=v[2], data1=v[3], offset0=16, offset1=17),
        isa.ds_read_b32(vdst=v[12], addr=v[1], offset1=17),
        isa.ds_read_u16(vdst=v[13], addr=v[1], offset0=4),
    )
    for register, offset in ((8, 300), (9, 100), (10, 200), (11, 300), (12, 100), (13, 100)):
        np.testing.assert_array_equal(w.v[register, 0], LANES + offset)


def test_groups_have_memories_of_their_own() -> None:
    lanes = np.broadcast_to(np.arange(3)[:, None] * 1000 + LANES, (3, 64))
    m = Machine(vectors={1: LANES * 4, 2: lanes}, groups=3, lds_bytes=260)
    w = m.run(isa.ds_write_b32(addr=v[1], data0=v[2]), isa.ds_read_b32(vdst=v[8], addr=v[1]))
    np.testing.assert_array_equal(w.v[8], lanes)


def test_local_accesses_out_of_bounds() -> None:
    with pytest.raises(Fault, match="LDS access of 8 bytes at 252 of 256"):
        Machine(vectors={1: LANES * 4}, lds_bytes=256).run(isa.ds_write_b64(addr=v[1], data0=v[2:3]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_reads_of_what_nobody_wrote(size: int) -> None:
    write, read = {1: ("b8", "u8"), 2: ("b16", "u16"), 4: ("b32", "b32")}[size]
    code = (
        getattr(isa, f"ds_write_{write}")(addr=v[1], data0=v[2]),
        getattr(isa, f"ds_read_{read}")(vdst=v[8], addr=v[3]),
    )
    m = Machine(vectors={1: LANES * size, 2: LANES, 3: LANES * size}, lds_bytes=512)
    np.testing.assert_array_equal(m.run(*code).v[8, 0], LANES)
    m.vectors[3] = LANES * size + size
    with pytest.raises(Fault, match=f"LDS read at {64 * size} of what nobody wrote"):
        m.run(*code)


def exchange(*between: Any) -> tuple[Any, ...]:
    """Each wave writes its own 256 bytes and reads those of its neighbour."""
    return isa.ds_write_b32(addr=v[1], data0=v[2]), *between, isa.ds_read_b32(vdst=v[8], addr=v[3])


def neighbours(waves: int) -> dict[int, Any]:
    wave = np.arange(waves)[:, None]
    return {1: wave * 256 + LANES * 4, 2: wave * 100 + LANES, 3: (wave + 1) % waves * 256 + LANES * 4}


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_barriers(seed: int | None) -> None:
    m = Machine(vectors=neighbours(4), groups=1, per_group=4, lds_bytes=1024, seed=seed)
    w = m.run(*exchange(BARRIER))
    np.testing.assert_array_equal(w.v[8], (np.arange(4)[:, None] + 1) % 4 * 100 + LANES)


@pytest.mark.parametrize("seed", [None, 1])
def test_a_missing_barrier_is_a_race(seed: int | None) -> None:
    m = Machine(vectors=neighbours(4), per_group=4, lds_bytes=1024, seed=seed)
    with pytest.raises(Fault, match=r"LDS race at|of what nobody wrote"):
        m.run(*exchange())
    # A second round needs a second barrier: now a read comes before a write.
    with pytest.raises(Fault, match="overwrites what was read or written by wave"):
        m.run(*exchange(BARRIER), isa.v_add_u32_e32(v[2], 1, v[2]), isa.ds_write_b32(addr=v[1], data0=v[2]))
    m.run(*exchange(BARRIER), BARRIER, isa.v_add_u32_e32(v[2], 1, v[2]), isa.ds_write_b32(addr=v[1], data0=v[2]))


def test_shuffled_waves_show_a_missing_barrier_in_the_results() -> None:
    """Without the bookkeeping: in order all waves write before one reads, in other orders some read what was there."""
    m = Machine(vectors=neighbours(4), per_group=4, lds_bytes=1024, check_races=False)
    in_order = m.run(*exchange()).v[8].copy()
    m.seed = 1
    assert (m.run(*exchange()).v[8] != in_order).any()


@pytest.mark.parametrize("size", [1, 2])
def test_neighbouring_bytes_do_not_race(size: int) -> None:
    """Waves that write alternating bytes of the same words, and read their own."""
    wave = np.arange(4)[:, None]
    at = (LANES * 4 + wave) * size
    m = Machine(vectors={1: at, 2: at & 0xFF}, per_group=4, lds_bytes=1024)
    kind = {1: ("b8", "u8"), 2: ("b16", "u16")}[size]
    code = (
        getattr(isa, f"ds_write_{kind[0]}")(addr=v[1], data0=v[2]),
        getattr(isa, f"ds_read_{kind[1]}")(vdst=v[8], addr=v[1]),
    )
    np.testing.assert_array_equal(m.run(*code).v[8], at & 0xFF)
    m.vectors[1] = at // size // 4 * 4 * size  # now all four on one byte
    with pytest.raises(Fault, match="LDS race"):
        m.run(*code)


def test_equal_values_do_not_race() -> None:
    """Several waves may store the same result, and one of them read it; another wave may not."""
    m = Machine(vectors={1: LANES * 4, 2: LANES, 3: LANES * 4}, per_group=4, lds_bytes=256)
    w = m.run(*exchange())
    np.testing.assert_array_equal(w.v[8, 3], LANES)
    m.vectors[1] = np.where(np.arange(4)[:, None] < 3, LANES * 4, 256 + LANES * 4)
    m.lds_bytes = 512
    with pytest.raises(Fault, match=r"wave 3 reads what was written by wave 0, 1, 2|of what nobody wrote"):
        m.run(*exchange())


def test_lanes_that_collide() -> None:
    with pytest.raises(Fault, match="unlike values to one address"):
        Machine(vectors={1: LANES // 2 * 4, 2: LANES}, lds_bytes=256).run(isa.ds_write_b32(addr=v[1], data0=v[2]))


def test_barrier_of_a_group_does_not_wait_for_waves_that_ended() -> None:
    """Waves 2 and 3 leave early; the others still pass."""
    wave = np.broadcast_to(np.arange(4)[:, None], (4, 64))
    m = Machine(vectors={**neighbours(4), 5: wave}, per_group=4, lds_bytes=1024)
    w = m.run(
        isa.v_readfirstlane_b32_e32(v[0], v[5]),
        isa.ds_write_b32(addr=v[1], data0=v[2]),
        isa.s_cmp_ge_u32(s[0], 2),
        isa.s_cbranch_scc1(3),
        isa.s_barrier(),
        isa.ds_read_b32(vdst=v[8], addr=v[3]),
    )
    np.testing.assert_array_equal(w.v[8, :2], (np.arange(2)[:, None] + 1) * 100 + LANES)


def test_local_atomics() -> None:
    m = Machine(vectors={1: 0, 2: LANES, 3: LANES + 1}, lds_bytes=64, per_group=2)
    w = m.run(
        isa.v_mov_b32_e32(v[9], 0),
        isa.ds_write_b32(addr=v[9], data0=v[9]),
        BARRIER,
        isa.ds_add_u32(addr=v[9], data0=v[3]),
        BARRIER,
        isa.ds_read_b32(vdst=v[8], addr=v[9]),
    )
    assert (w.v[8] == 2 * 64 * 65 // 2).all()


# --- Exchange between lanes -------------------------------------------------------------------------------------------


def test_permutes() -> None:
    source = np.random.default_rng(1).permutation(64)
    m = Machine(vectors={1: source * 4, 2: LANES * 11})
    w = m.run(isa.ds_bpermute_b32(v[8], v[1], v[2]), isa.ds_permute_b32(v[9], v[1], v[2]))
    np.testing.assert_array_equal(w.v[8, 0], source * 11)
    np.testing.assert_array_equal(w.v[9, 0, source], LANES * 11)
    m.exec = (1 << 32) - 1
    got = m.run(isa.ds_bpermute_b32(v[8], v[1], v[2])).v[8, 0, :32]
    np.testing.assert_array_equal(got, np.where(source[:32] < 32, source[:32] * 11, 0))  # lanes off give 0


@pytest.mark.parametrize(
    ("offset", "source"),
    [
        (0x8000 | 0b01_00_11_10, lambda i: i & ~3 | (2, 3, 0, 1)[i & 3]),  # within four lanes
        (0x041F, lambda i: i ^ 1),  # xor 1
        (0x1F | 16 << 10, lambda i: i ^ 16),
        (0x0018, lambda i: i & 0b111000),  # the first of each eight
    ],
)
def test_swizzles(offset: int, source: Any) -> None:
    code = isa.ds_swizzle_b32(vdst=v[8], addr=v[1], offset0=offset & 255, offset1=offset >> 8)
    w = Machine(vectors={1: LANES + 500}).run(code)
    assert w.v[8, 0].tolist() == [source(i) + 500 for i in range(64)]


def test_transposed_reads() -> None:
    """gfx950: 16 lanes point to the rows of a tile of 16 x 4 halves, and get its columns."""
    tile = np.arange(4 * 16 * 4, dtype=np.uint16).reshape(4, 16, 4)  # four groups of lanes, rows, elements
    rows = tile.reshape(64, 4).view(np.uint32)
    m = Machine(vectors={1: LANES * 8, 2: rows[:, 0], 3: rows[:, 1]}, lds_bytes=512, arch="gfx950")
    w = m.run(isa.ds_write_b64(addr=v[1], data0=v[2:3]), isa.ds_read_b64_tr_b16(vdst=v[8:9], addr=v[1]))
    got = np.ascontiguousarray(w.v[8:10, 0].T).view(np.uint16).reshape(4, 16, 4)
    for group in range(4):
        # As a matrix of 4 rows of 16: lane t gets column t.
        matrix = tile[group].reshape(4, 16)
        np.testing.assert_array_equal(got[group], matrix.T)


def test_forms_that_are_not_known() -> None:
    with pytest.raises(NotModelled, match="swizzle 0xc000"):
        Machine().run(isa.ds_swizzle_b32(vdst=v[8], addr=v[1], offset1=0xC0))
    with pytest.raises(NotModelled, match="GLOBAL_LOAD_LDS_DWORD"):
        Machine().run(isa.global_load_lds_dword(addr=v[1], saddr=s[10:11]))
