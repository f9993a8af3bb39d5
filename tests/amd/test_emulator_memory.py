"""Global memory and scratch, and what the emulator finds wrong about accesses to them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from amd.assembly import FIRST_BUFFER, Machine, isa, rows, s, v, without_base
from amd.emulator import Fault

LANES = np.arange(64)
DATA = np.random.default_rng(3).integers(0, 256, 2048).astype(np.uint8)


def words(data: np.ndarray) -> np.ndarray:
    return data.view(np.uint32)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("form", ["scalar base", "vector pair"])
def test_wide_loads_and_stores(count: int, form: str) -> None:
    size = 4 * count
    out = np.zeros(2048, np.uint8)
    suffix = {1: "dword"}.get(count, f"dwordx{count}")
    d = rows(8, count)
    vectors = {1: LANES * size, 2: FIRST_BUFFER, 3: LANES * size, 4: FIRST_BUFFER + 1}
    scalars = {10: 0, 11: FIRST_BUFFER, 12: 0, 13: FIRST_BUFFER + 1}
    load, store = getattr(isa, f"global_load_{suffix}"), getattr(isa, f"global_store_{suffix}")
    if form == "scalar base":
        code = [load(vdst=d, addr=v[1], saddr=s[10:11], offset=16), store(addr=v[1], data=d, saddr=s[12:13])]
    else:
        code = [without_base(load(vdst=d, addr=v[1:2], offset=16)), without_base(store(addr=v[3:4], data=d))]
    w = Machine(vectors=vectors, scalars=scalars, buffers=(DATA, out)).run(*code)
    want = words(DATA[16 : 16 + 64 * size]).reshape(64, count)
    np.testing.assert_array_equal(w.v[8 : 8 + count, 0].T, want)
    np.testing.assert_array_equal(words(out)[: 64 * count], want.reshape(-1))


@pytest.mark.parametrize(
    ("name", "of", "keeps"),
    [
        ("global_load_ubyte", np.uint8, 0),
        ("global_load_sbyte", np.int8, 0),
        ("global_load_ushort", np.uint16, 0),
        ("global_load_sshort", np.int16, 0),
        ("global_load_short_d16", np.uint16, 0xFFFF0000),
        ("global_load_short_d16_hi", np.uint16, 0xFFFF),
        ("global_load_ubyte_d16", np.uint8, 0xFFFF0000),
    ],
)
def test_narrow_loads(name: str, of: Any, keeps: int) -> None:
    """Also from odd addresses."""
    at = LANES * 3 + 1
    m = Machine(vectors={1: at, 8: 0x12345678}, scalars={10: 0, 11: FIRST_BUFFER}, buffers=(DATA,))
    w = m.run(getattr(isa, name)(vdst=v[8], addr=v[1], saddr=s[10:11]))
    size = np.dtype(of).itemsize
    value = np.array([int(DATA[a : a + size].view(of)[0]) & 0xFFFFFFFF for a in at], np.uint32)
    if keeps:
        value = (value << 16 if name.endswith("_hi") else value) | (0x12345678 & keeps)
    np.testing.assert_array_equal(w.v[8, 0], value)


def test_narrow_stores_and_masks() -> None:
    out = np.zeros(256, np.uint8)
    m = Machine(vectors={1: LANES * 4, 2: 0xAABBCCDD}, scalars={10: 0, 11: FIRST_BUFFER}, exec=0x0F, buffers=(out,))
    m.run(
        isa.global_store_short(addr=v[1], data=v[2], saddr=s[10:11]),
        isa.global_store_byte_d16_hi(addr=v[1], data=v[2], saddr=s[10:11], offset=3),
    )
    assert words(out).tolist() == [0xBB00CCDD] * 4 + [0] * 60


@pytest.mark.parametrize(
    ("offset", "error"),
    [
        (2044, "load of 4 bytes at offset 2048 of buffer 0, 2048 bytes long"),
        (-4, "load of 4 bytes at offset 4294967292 of"),
    ],
)
def test_accesses_out_of_bounds(offset: int, error: str) -> None:
    """One byte behind, or before the start, of the smallest kind."""
    m = Machine(vectors={1: np.where(LANES == 5, 4, 0)}, scalars={10: 0, 11: FIRST_BUFFER}, buffers=(DATA,))
    code = isa.global_load_dword(vdst=v[8], addr=v[1], saddr=s[10:11], offset=offset & 0x1FFF if offset < 0 else 0)
    base = isa.s_add_u32(s[10], s[10], max(offset, 0))
    with pytest.raises(Fault, match=error) as caught:
        m.run(base, code)
    assert re.search(r"kernel test, pc 0x[48]: global_load_dword\(v\[8\], v\[1\]", str(caught.value))
    m.exec = ~(1 << 5) & (1 << 64) - 1
    if offset > 0:
        m.run(base, code)  # the lane that would go astray is off


def test_stores_to_code_are_refused() -> None:
    with pytest.raises(Fault, match="store to the code"):
        Machine(vectors={1: 0}, scalars={10: 0, 11: 1}).run(isa.global_store_byte(addr=v[1], data=v[1], saddr=s[10:11]))


def test_poison_is_no_address() -> None:
    """Registers that nobody wrote lead nowhere."""
    with pytest.raises(Fault, match="in no buffer"):
        Machine(buffers=(DATA,)).run(isa.global_load_dword(vdst=v[8], addr=v[1], saddr=s[10:11]))


@pytest.mark.parametrize("same", [True, False], ids=["one address", "many"])
def test_atomics(same: bool) -> None:
    memory = np.zeros(64, np.uint32)
    at = np.zeros(64, int) if same else LANES * 4
    m = Machine(vectors={1: at, 2: LANES + 1}, scalars={10: 0, 11: FIRST_BUFFER}, buffers=(memory.view(np.uint8),))
    w = m.run(isa.global_atomic_add(vdst=v[8], addr=v[1], data=v[2], saddr=s[10:11], sc0=1))
    assert memory.sum() == 64 * 65 // 2
    before = np.cumsum(LANES + 1) - (LANES + 1) if same else np.zeros(64, int)
    np.testing.assert_array_equal(w.v[8, 0], before)
    memory[:] = 5
    m.vectors = {1: at, 2: 9, 3: 5}
    w = m.run(isa.global_atomic_cmpswap(vdst=v[8], addr=v[1], data=v[2:3], saddr=s[10:11], sc0=1))
    assert w.v[8, 0].tolist() == ([5] + [9] * 63 if same else [5] * 64)
    assert memory.tolist() == ([9] + [5] * 63 if same else [9] * 64)


def test_float_atomics() -> None:
    memory = np.zeros(4, np.float32)
    m = Machine(vectors={1: LANES % 4 * 4, 2: 0.5}, scalars={10: 0, 11: FIRST_BUFFER}, buffers=(memory.view(np.uint8),))
    m.run(isa.global_atomic_add_f32(addr=v[1], data=v[2], saddr=s[10:11]))
    assert memory.tolist() == [8.0] * 4


def test_buffer_descriptors() -> None:
    """Beyond the descriptor's size loads give 0 and stores do nothing; each word of an access for itself."""
    limit = 64 * 8 - 12
    scalars = {12: 0, 13: FIRST_BUFFER, 14: limit, 15: 0, 16: 0}
    m = Machine(vectors={1: LANES * 8}, scalars=scalars, buffers=(DATA.copy(),))
    w = m.run(isa.buffer_load_dwordx2(vdata=v[8:9], vaddr=v[1], srsrc=s[12:15], soffset=s[16], offen=1))
    want = words(DATA[:512]).copy()
    want[limit // 4 :] = 0
    np.testing.assert_array_equal(w.v[8:10, 0].T.reshape(-1), want)
    with pytest.raises(Fault, match="load of 8 bytes at offset 2048"):  # a descriptor larger than its buffer
        Machine(vectors={1: 2048}, scalars=scalars | {14: 4096}, buffers=(DATA,)).run(
            isa.buffer_load_dwordx2(vdata=v[8:9], vaddr=v[1], srsrc=s[12:15], soffset=s[16], offen=1)
        )


def test_scalar_loads() -> None:
    m = Machine(scalars={2: 8, 3: FIRST_BUFFER, 6: 32}, buffers=(DATA,))
    w = m.run(
        isa.s_load_dwordx4(s[8:11], s[2:3], offset=16, imm=1), isa.s_load_dword(s[12], s[2:3], s[6], soffset_en=1)
    )
    np.testing.assert_array_equal(w.s[8:12, 0], words(DATA)[6:10])
    assert w.s[12, 0] == words(DATA)[10]


def test_scratch() -> None:
    """Each lane has bytes of its own; more of them than were declared are refused."""
    m = Machine(vectors={1: LANES, 2: LANES * 7}, scalars={4: 8}, scratch_bytes=16, groups=2)
    w = m.run(
        isa.scratch_store_dwordx2(addr=v[0], data=v[1:2], saddr=s[4]),
        without_base(isa.scratch_load_dword(vdst=v[8], addr=v[0], offset=12)),
    )
    np.testing.assert_array_equal(w.v[8, 1], LANES * 7)
    with pytest.raises(Fault, match=r"scratch access at 16\.\.16 of 16 bytes"):
        m.run(without_base(isa.scratch_load_dword(vdst=v[8], addr=v[0], offset=16)))
