"""Vector instructions that move values between lanes or to scalar registers, and DPP."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amd.emulator.errors import NotModelled
from amd.emulator.instruction import Instruction
from amd.emulator.numerics import LANES, Array, U
from amd.emulator.operands import Reader, Registers, Step, scalar, write_scalar
from amd.emulator.waves import Waves


def read_first_lane(x: Instruction, registers: Registers) -> Step:
    """V_READFIRSTLANE_B32: the first lane that is on, lane 0 if none is."""
    source, write = registers.index(x.field("src0") - 256), write_scalar(x.field("vdst"))

    def step(w: Waves) -> None:
        lanes = w.lanes()
        if lanes is None:
            write(w, w.v[source][:, 0])
        else:
            write(w, np.take_along_axis(w.v[source], lanes.argmax(1)[:, None], 1)[:, 0])

    return step


def read_lane(x: Instruction, registers: Registers) -> Step:
    """V_READLANE_B32."""
    source, lane = registers.index(x.field("src0") - 256), scalar(x.field("src1"), "u")
    write = write_scalar(x.field("vdst"))

    def step(w: Waves) -> None:
        which = np.broadcast_to(lane(w) & U(63), (w.count,)).astype(np.intp)
        write(w, np.take_along_axis(w.v[source], which[:, None], 1)[:, 0])

    return step


def write_lane(x: Instruction, registers: Registers) -> Step:
    """V_WRITELANE_B32, whether the lane is on or not."""
    d, value, lane = registers.index(x.field("vdst")), scalar(x.field("src0"), "u"), scalar(x.field("src1"), "u")

    def step(w: Waves) -> None:
        which = np.broadcast_to(lane(w) & U(63), (w.count,)).astype(np.intp)
        w.v[d][np.arange(w.count), which] = value(w)

    return step


def swap_rows(x: Instruction, registers: Registers) -> Step:
    """V_PERMLANE16_SWAP, V_PERMLANE32_SWAP: odd rows of one register for even rows of the other."""
    n = 16 if "16" in x.name else 32
    d, source = registers.index(x.field("vdst")), registers.index(x.field("src0") - 256)
    if x.format == "VOP3" and (x.field("abs") or x.field("opsel")):
        raise NotModelled(f"{x.name} that fetches lanes that are off")

    def step(w: Waves) -> None:
        a, b = (w.v[r].reshape(-1, 32 // n, 2, n).copy() for r in (d, source))
        a[:, :, 1], b[:, :, 0] = b[:, :, 0].copy(), a[:, :, 1].copy()
        w.write(d, a.reshape(-1, 64))
        w.write(source, b.reshape(-1, 64))

    return step


def swap(x: Instruction, registers: Registers) -> Step:
    """V_SWAP_B32."""
    d, source = registers.index(x.field("vdst")), registers.index(x.field("src0") - 256)

    def step(w: Waves) -> None:
        old = w.v[d].copy()
        w.write(d, w.v[source])
        w.write(source, old)

    return step


LANE_OPS: dict[str, Callable[[Instruction, Registers], Step]] = {
    "V_READFIRSTLANE_B32": read_first_lane,
    "V_READLANE_B32": read_lane,
    "V_WRITELANE_B32": write_lane,
    "V_PERMLANE16_SWAP_B32": swap_rows,
    "V_PERMLANE32_SWAP_B32": swap_rows,
    "V_SWAP_B32": swap,
}


def dpp_lanes(control: int) -> tuple[Array, Array]:
    """For each lane the one it reads, and whether there is one (CDNA3 ISA, section 6.7.1)."""
    place, always = LANES & 15, np.ones(64, bool)
    shift = control & 15
    if control < 0x100:  # any of the four lanes of a quad
        return LANES & ~3 | control >> 2 * (LANES & 3) & 3, always
    if 0x100 < control < 0x110:
        return LANES + shift, place + shift < 16
    if 0x110 < control < 0x120:
        return LANES - shift, place >= shift
    if 0x120 < control < 0x130:
        return LANES & ~15 | (place - shift) & 15, always
    if control in (0x130, 0x134):  # the whole wave by one lane: shift, rotate
        return (LANES + 1) & 63, (LANES < 63) | (control == 0x134)
    if control in (0x138, 0x13C):
        return (LANES - 1) & 63, (LANES > 0) | (control == 0x13C)
    if control == 0x140:
        return LANES & ~15 | 15 - place, always
    if control == 0x141:
        return LANES & ~7 | 7 - (LANES & 7), always
    if control == 0x142:  # lane 15 of each row to the row after it
        return (LANES & ~15) - 1, LANES >= 16
    if control == 0x143:
        return np.full(64, 31), LANES >= 32
    if 0x150 <= control < 0x160:  # one lane of each row to all of it
        return LANES & ~15 | shift, always
    raise NotModelled(f"DPP control {control:#x}")


def dpp_source(x: Instruction, registers: Registers) -> tuple[Reader, Callable[[Waves], Array | None]]:
    """Operand 0 of a DPP instruction as words, and the lanes that it writes."""
    source, ok = dpp_lanes(x.field("dpp"))
    source = np.clip(source, 0, 63)
    r, zero_fill = registers.index(x.field("vsrc0")), x.field("bc")
    rows = x.field("row_mask") >> (LANES >> 4) & 1
    banks = x.field("bank_mask") >> (LANES >> 2 & 3) & 1
    enabled = (rows & banks) > 0
    everything = bool(ok.all() and enabled.all())

    def value(w: Waves) -> Array:
        lanes = w.lanes()
        moved = w.v[r][:, source]
        if lanes is None and ok.all():
            return moved
        return np.where(ok if lanes is None else ok & lanes[:, source], moved, U(0))

    def mask(w: Waves) -> Array | None:
        lanes = w.lanes()
        if lanes is None and everything:
            return None
        on = np.broadcast_to(enabled, (w.count, 64)) if lanes is None else lanes & enabled
        if zero_fill:
            return on
        return on & ok if lanes is None else on & ok & lanes[:, source]

    return value, mask
