"""DS instructions: local memory, and exchange between the lanes of a wave. CDNA3 ISA, chapter 11."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amd.emulator.access import Access, spread
from amd.emulator.errors import Fault, NotModelled
from amd.emulator.global_memory import apply_in_order, compare_swap
from amd.emulator.instruction import Instruction
from amd.emulator.numerics import LANES, Array, F, I, U
from amd.emulator.operands import Registers, Step
from amd.emulator.waves import Waves

ATOMICS: dict[str, Callable[[Array, Array], Array]] = {
    "ADD_U32": lambda old, new: old + new,
    "SUB_U32": lambda old, new: old - new,
    "MIN_U32": np.minimum,
    "MAX_U32": np.maximum,
    "MIN_I32": lambda old, new: np.minimum(old.view(I), new.view(I)).view(U),
    "MAX_I32": lambda old, new: np.maximum(old.view(I), new.view(I)).view(U),
    "AND_B32": lambda old, new: old & new,
    "OR_B32": lambda old, new: old | new,
    "XOR_B32": lambda old, new: old ^ new,
    "WRXCHG_B32": lambda old, new: new,
    "ADD_F32": lambda old, new: (old.view(F) + new.view(F)).view(U),
    "MIN_F32": lambda old, new: np.fmin(old.view(F), new.view(F)).view(U),
    "MAX_F32": lambda old, new: np.fmax(old.view(F), new.view(F)).view(U),
}
EXCHANGES = ("DS_BPERMUTE_B32", "DS_PERMUTE_B32", "DS_SWIZZLE_B32")
TRANSPOSED = ("DS_READ_B64_TR_B16", "DS_READ_B64_TR_B8")


def ds(x: Instruction, registers: Registers) -> Step:
    """Any DS instruction."""
    if x.field("gds"):
        raise NotModelled("global data share")
    if x.name == "DS_SWIZZLE_B32":
        return swizzle(x, registers)
    if x.name in EXCHANGES:
        return permute(x, registers)
    if x.name in TRANSPOSED:
        return read_transposed(x, registers)
    if x.name.startswith(("DS_READ", "DS_WRITE")) and "ADDTID" not in x.name and "_TR_" not in x.name:
        return read_or_write(x, registers)
    return atomic(x, registers)


def _offset(x: Instruction) -> int:
    return x.field("offset0") | x.field("offset1") << 8


def read_or_write(x: Instruction, registers: Registers) -> Step:
    """Reads and writes of 1 to 16 bytes a lane, or of two such things at offsets of their own."""
    store, access = x.name.startswith("DS_WRITE"), Access.of(x.name)
    accumulation, count = bool(x.field("acc")), len(access.pieces)

    def register(name: str, skip: int = 0) -> int:
        return registers.index(x.field(name) + skip, count, accumulation=accumulation)

    if x.name.startswith(("DS_READ2", "DS_WRITE2")):
        scale = access.size * (64 if "ST64" in x.name else 1)
        second = register("data1") if store else register("vdst", count)
        first = register("data0") if store else register("vdst")
        parts = [(x.field("offset0") * scale, first), (x.field("offset1") * scale, second)]
    else:
        parts = [(_offset(x), register("data0" if store else "vdst"))]
    address = registers.index(x.field("addr"))

    def step(w: Waves) -> None:
        mask = w.lanes()
        loaded = []
        for offset, at in parts:
            start = w.lds.index(w, w.v[address], offset, access.size, mask)
            if not store:
                loaded += [(at + k, value) for k, value in enumerate(w.lds.read(w, start, access.size, mask))]
                continue
            for k, (piece, size) in enumerate(access.pieces):
                value = w.v[at + k]
                w.lds.write(w, start + piece, access.to_store(value if mask is None else value[mask]), size, mask)
        # Only now: a destination may be the address.
        for at, value in loaded:
            access.extend(w, at, spread(value, mask), mask)

    return step


def atomic(x: Instruction, registers: Registers) -> Step:
    """Read-modify-write of a word; the RTN forms return the old one."""
    name = x.name.removeprefix("DS_").replace("_RTN", "")
    swap = name == "CMPST_B32"
    if not swap and name not in ATOMICS:
        raise NotModelled(x.name)
    returns = "_RTN_" in x.name
    accumulation = bool(x.field("acc"))
    data = [registers.index(x.field(f"data{k}"), accumulation=accumulation) for k in range(1 + swap)]
    d = registers.index(x.field("vdst"), accumulation=accumulation) if returns else 0
    address, offset = registers.index(x.field("addr")), _offset(x)
    # CMPST names the expected value first, unlike global memory's CMPSWAP.
    update = (lambda old, expected, new: compare_swap(old, new, expected)) if swap else ATOMICS[name]

    def step(w: Waves) -> None:
        mask = w.mask()
        if not mask.any():
            return
        at = w.lds.index(w, w.v[address], offset, 4, mask)
        if (at & 3).any():
            raise Fault("LDS atomic that is not aligned")
        # Atomics do not race with one another, so they leave no marks.
        old = apply_in_order(
            lambda a: w.lds.words[a >> 2],
            lambda a, value: w.lds.words.__setitem__(a >> 2, value),
            at,
            [w.v[r][mask] for r in data],
            update,
        )
        if returns:
            w.put(d, spread(old, mask), mask)

    return step


def permute(x: Instruction, registers: Registers) -> Step:
    """BPERMUTE: each lane names the lane that it reads. PERMUTE: the lane that it writes."""
    address, data = registers.index(x.field("addr")), registers.index(x.field("data0"))
    d, offset, backward = registers.index(x.field("vdst")), _offset(x), x.name == "DS_BPERMUTE_B32"

    def step(w: Waves) -> None:
        lane = ((w.v[address] + U(offset)) >> U(2) & U(63)).astype(np.intp)
        value, lanes = w.v[data], w.lanes()
        if backward:
            moved = np.take_along_axis(value, lane, 1)
            if lanes is not None:  # lanes that are off give 0
                moved = np.where(np.take_along_axis(lanes, lane, 1), moved, U(0))
        else:
            moved, on = np.zeros_like(value), w.mask()
            rows = np.broadcast_to(np.arange(w.count)[:, None], value.shape)
            moved[rows[on], lane[on]] = value[on]
        w.put(d, moved, lanes)

    return step


def swizzle(x: Instruction, registers: Registers) -> Step:
    """A fixed exchange, within four lanes or by masks within 32."""
    data, d, offset = registers.index(x.field("addr")), registers.index(x.field("vdst")), _offset(x)
    if offset >= 0xC000:
        raise NotModelled(f"swizzle {offset:#x}")
    if offset >> 15:
        source = LANES & ~3 | offset >> 2 * (LANES & 3) & 3
    else:
        source = LANES & 32 | ((LANES & 31 & offset) | offset >> 5 & 31) ^ offset >> 10 & 31

    def step(w: Waves) -> None:
        moved, lanes = w.v[data][:, source], w.lanes()
        if lanes is not None:
            moved = np.where(lanes[:, source], moved, U(0))
        w.put(d, moved, lanes)

    return step


def read_transposed(x: Instruction, registers: Registers) -> Step:
    """gfx950: 16 lanes hold the addresses of a tile by rows, and get it by columns. CDNA4 ISA, section 11.4."""
    size = int(x.name.rsplit("B", 1)[1]) // 8
    per_word, elements = 4 // size, 8 // size
    address, d, offset = registers.index(x.field("addr")), registers.index(x.field("vdst"), 2), _offset(x)
    place, element = LANES % 16, np.arange(elements)[:, None]
    source = LANES // 16 * 16 + 2 * size * element + place // elements
    column = np.broadcast_to(place % elements, source.shape)

    def step(w: Waves) -> None:
        if w.lanes() is not None:
            raise Fault("transposed LDS read with lanes off")
        at = w.lds.index(w, w.v[address], offset, 8, None)
        rows = np.stack([w.lds.read(w, at + size * k, size, None)[0] for k in range(elements)], 2)
        columns = rows[:, source, column]  # [waves, element, lane]
        for k in range(2):
            word = columns[:, k * per_word].copy()
            for n in range(1, per_word):
                word |= columns[:, k * per_word + n] << U(8 * size * n)
            w.put(d + k, word, None)

    return step
