"""FLAT, GLOBAL, SCRATCH and MUBUF instructions. CDNA3 ISA, chapters 9 and 10."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from amd.emulator.access import Access, spread
from amd.emulator.errors import Fault, NotModelled
from amd.emulator.instruction import Instruction
from amd.emulator.memory import as_int64
from amd.emulator.numerics import I64, U64, Array, F, I, U, half, join, to_half
from amd.emulator.operands import Reader, Registers, Step, scalar
from amd.emulator.waves import Waves

NO_ADDRESS = 0x7F
"""In the field of the scalar address: there is none."""


def _address(x: Instruction, registers: Registers) -> Reader:
    """int64 [waves, 64]."""
    # FLAT has no sign bit in its offset.
    offset = x.field("offset") if x.format == "FLAT" else x.signed("offset")
    vector, base = x.field("addr"), x.field("saddr")
    if x.format == "FLAT" or base == NO_ADDRESS:
        low = registers.index(vector, 2)
        return lambda w: as_int64(join(w.v[low], w.v[low + 1])) + offset
    low, base_of = registers.index(vector), scalar(base, "I")
    return lambda w: w.v[low] + (base_of(w) + offset)[:, None]


def flat(x: Instruction, registers: Registers) -> Step:
    """GLOBAL and FLAT (which here always means global memory: scratch and LDS apertures have no buffer)."""
    if "_LDS_" in x.name:
        raise NotModelled(x.name)
    if "ATOMIC" in x.name:
        return atomic(x, registers)
    store, access = "STORE" in x.name, Access.of(x.name)
    count = len(access.pieces)
    number = x.field("data") if store else x.field("vdst")
    register = registers.index(number, count, accumulation=bool(x.field("acc")))
    address = _address(x, registers)

    def step(w: Waves) -> None:
        mask = w.lanes()
        at = address(w)
        at = at if mask is None else at[mask]
        if not store:
            for k, value in enumerate(w.memory.load(at, access.size)):
                access.extend(w, register + k, spread(value, mask), mask)
            return
        for k, (offset, size) in enumerate(access.pieces):
            value = w.v[register + k]
            w.memory.store(at + offset, access.to_store(value if mask is None else value[mask]), size)

    return step


def _pk_add_f16(a: Array, b: Array) -> Array:
    return to_half(half(a) + half(b)) | to_half(half(a >> U(16)) + half(b >> U(16))) << U(16)


ATOMICS: dict[str, Callable[[Array, Array], Array]] = {
    "SWAP": lambda old, new: new,
    "ADD": lambda old, new: old + new,
    "SUB": lambda old, new: old - new,
    "UMIN": np.minimum,
    "UMAX": np.maximum,
    "SMIN": lambda old, new: np.minimum(old.view(I), new.view(I)).view(U),
    "SMAX": lambda old, new: np.maximum(old.view(I), new.view(I)).view(U),
    "AND": lambda old, new: old & new,
    "OR": lambda old, new: old | new,
    "XOR": lambda old, new: old ^ new,
    "ADD_F32": lambda old, new: (old.view(F) + new.view(F)).view(U),
    "PK_ADD_F16": _pk_add_f16,
}
"""Word in memory and operand to the new word in memory."""


def compare_swap(old: Array, new: Array, expected: Array) -> Array:
    """The new word where the old one is as expected."""
    return np.where(old == expected, new, old)


def apply_in_order(
    load: Callable[[Array], Array],
    store: Callable[[Array, Array], None],
    at: Array,
    operands: Sequence[Array],
    update: Callable[..., Array],
) -> Array:
    """Atomic updates at once where addresses are unlike, one after another where they repeat; returns the old words.

    The order of the latter is that of waves and lanes, which no hardware promises.
    """
    if np.unique(at).size == at.size:
        old = load(at)
        store(at, update(old, *operands))
        return old
    old = np.zeros(at.shape, U)
    for i in range(at.size):
        one = slice(i, i + 1)
        old[one] = load(at[one])
        store(at[one], update(old[one], *(operand[one] for operand in operands)))
    return old


def atomic(x: Instruction, registers: Registers) -> Step:
    """Read-modify-write of a word; sc0 asks for the old one."""
    name = x.name.split("ATOMIC_")[1]
    if name != "CMPSWAP" and name not in ATOMICS:
        raise NotModelled(x.name)
    accumulation = bool(x.field("acc"))
    data = registers.index(x.field("data"), 2 if name == "CMPSWAP" else 1, accumulation=accumulation)
    returns = x.field("sc0")
    d = registers.index(x.field("vdst"), accumulation=accumulation) if returns else 0
    address = _address(x, registers)

    compare_and_swap = name == "CMPSWAP"
    update = compare_swap if compare_and_swap else ATOMICS[name]

    def step(w: Waves) -> None:
        mask = w.mask()
        if not mask.any():
            return
        operands = [w.v[data + k][mask] for k in range(1 + compare_and_swap)]
        old = apply_in_order(
            lambda a: w.memory.load(a, 4)[0],
            lambda a, value: w.memory.store(a, value, 4),
            address(w)[mask],
            operands,
            update,
        )
        if returns:
            w.put(d, spread(old, mask), mask)

    return step


def mubuf(x: Instruction, registers: Registers) -> Step | None:
    """Loads and stores through a buffer descriptor of stride 0: beyond its size loads give 0 and stores do nothing."""
    if x.name in ("BUFFER_INV", "BUFFER_WBL2"):
        return None
    if "ATOMIC" in x.name or "FORMAT" in x.name or x.field("idxen") or x.field("lds"):
        raise NotModelled(f"{x.name} with idxen {x.field('idxen')}, lds {x.field('lds')}")
    store, access = "STORE" in x.name, Access.of(x.name)
    count = len(access.pieces)
    register = registers.index(x.field("vdata"), count, accumulation=bool(x.field("acc")))
    descriptor = x.field("srsrc") * 4
    base, limit = scalar(descriptor, "U"), scalar(descriptor + 2, "u")
    extra = scalar(x.field("soffset"), "u")
    vector = registers.index(x.field("vaddr")) if x.field("offen") else None
    immediate = x.field("offset")

    def step(w: Waves) -> None:
        word = base(w)
        if (word >> U64(48) & U64(0x3FFF)).any():
            raise NotModelled("buffer descriptor with a stride")
        start = (word & U64(0xFFFFFFFFFFFF)).view(I64) + np.asarray(extra(w)).astype(I64)
        offset = np.zeros((w.count, 64), I64) if vector is None else w.v[vector].astype(I64)
        offset = offset + immediate & 0xFFFFFFFF
        mask, size = w.lanes(), limit(w).astype(I64)[:, None]
        # An access is inside or outside as a whole, or else each of its words is.
        split = (offset + access.size > size) & (offset + min(4, access.size) <= size)
        parts = access.pieces if split.any() else [(0, access.size)]
        for start_of, width in parts:
            good = offset + (start_of + width) <= size
            good = good if mask is None else good & mask
            inside = None if good.all() else good
            at = offset + (start + start_of)[:, None]
            at = at if inside is None else at[good]
            first = register + start_of // 4
            if not store:
                for k, value in enumerate(w.memory.load(at, width)):
                    access.extend(w, first + k, spread(value, inside), mask)
                continue
            for k in range(0, width, 4):
                value = w.v[first + k // 4]
                value = access.to_store(value if inside is None else value[good])
                w.memory.store(at + k, value, min(4, width - k))

    return step


def scratch(x: Instruction, registers: Registers) -> Step:
    """Private memory of each lane, where spilled registers go."""
    if "_LDS_" in x.name:
        raise NotModelled(x.name)
    store, access = "STORE" in x.name, Access.of(x.name)
    count = len(access.pieces)
    number = x.field("data") if store else x.field("vdst")
    register = registers.index(number, count, accumulation=bool(x.field("acc")))
    base = None if x.field("saddr") == NO_ADDRESS else scalar(x.field("saddr"), "u")
    vector = registers.index(x.field("addr")) if x.field("sve") else None
    immediate = x.signed("offset")
    if access.size % 4:
        raise NotModelled(f"{x.name}: less than a word of scratch")

    def step(w: Waves) -> None:
        offset = np.full((w.count, 64), immediate, I64)
        if base is not None:
            offset += base(w).astype(I64)[:, None]
        if vector is not None:
            offset += w.v[vector]
        mask = w.lanes()
        touched = offset if mask is None else offset[mask]
        if not touched.size:
            return
        if touched.min() < 0 or touched.max() + access.size > w.scratch_bytes or (touched & 3).any():
            raise Fault(f"scratch access at {touched.min()}..{touched.max()} of {w.scratch_bytes} bytes a lane")
        lane = np.arange(w.all_group.size)[w.rows][:, None] * 64 + np.arange(64)
        at = (lane * w.scratch_bytes + offset >> 2) if mask is None else (lane * w.scratch_bytes + offset >> 2)[mask]
        for k in range(count):
            if store:
                value = w.v[register + k]
                w.scratch[at + k] = value if mask is None else value[mask]
            else:
                w.put(register + k, spread(w.scratch[at + k], mask), mask)

    return step
