"""Vector instructions: rows of `vector_table`, and those that are more than a function of one lane.

An encoding says how operands are read (`Source`) and results stored (`Store`, both in `encodings`); what is computed in
between is the same for all of them. CDNA3 ISA, chapter 6.
"""

from __future__ import annotations

import numpy as np

from amd.emulator.comparison import compare
from amd.emulator.encodings import Source, Store, plain_store, short, vop3_source, vop3_store
from amd.emulator.errors import NotModelled
from amd.emulator.float8 import FLOAT8_OPS
from amd.emulator.instruction import Instruction
from amd.emulator.lane_exchange import LANE_OPS
from amd.emulator.numerics import I64, U64, U, ternary_logic
from amd.emulator.operands import (
    Reader,
    Registers,
    Step,
    read_lanes,
    vector,
    write_lanes,
)
from amd.emulator.vector_table import OPS, Op, saturated
from amd.emulator.waves import VCC, Waves


def vop1(x: Instruction, registers: Registers, arch: str) -> Step | None:
    """One operand."""
    if x.name == "V_NOP":
        return None
    if x.name in LANE_OPS:
        return LANE_OPS[x.name](x, registers)
    if x.name == "V_ACCVGPR_MOV_B32":
        source = registers.index(x.field("src0") - 256, accumulation=True)
        d = registers.index(x.field("vdst"), accumulation=True)
        return lambda w: w.write(d, w.v[source])
    return _with_vcc(x, registers, arch, *short(x, registers))


def vop2(x: Instruction, registers: Registers, arch: str) -> Step:
    """Two operands, the second one a vector register."""
    source, store = short(x, registers)
    if x.name in ("V_FMAMK_F32", "V_FMAAK_F32"):  # a literal is a third operand
        literal, fma = vector(255, "f", registers, x.literal), OPS["V_FMA_F32"]
        order = [source(0, "f"), literal, source(1, "f")] if x.name == "V_FMAMK_F32" else None
        return compute(fma, order or [source(0, "f"), source(1, "f"), literal], store)
    return _with_vcc(x, registers, arch, source, store)


def vopc(x: Instruction, registers: Registers) -> Step:
    """Comparisons to VCC; SDWA may name another pair."""
    source, _ = short(x, registers)
    return compare(x, source, x.field("sdst") if x.field("sd", 0) else VCC)


def _with_vcc(x: Instruction, registers: Registers, arch: str, source: Source, store: Store) -> Step:
    """VOP1 and VOP2: a carry or condition is VCC."""
    if x.name == "V_CNDMASK_B32":
        return select(source, store, VCC)
    if "_CO_" in x.name:
        return carry(x.name, source, store, VCC, VCC)
    op = _op(x, arch)
    return compute(op, _readers(op, x, registers, source), store)


def _op(x: Instruction, arch: str) -> Op:
    op = OPS.get(x.name) or FLOAT8_OPS[arch].get(x.name)
    if op is None:
        raise NotModelled(x.name)
    return op


def _readers(op: Op, x: Instruction, registers: Registers, source: Source) -> list[Reader]:
    count = len(op.sources) - op.accumulate
    readers = [source(k, op.sources[k]) for k in range(count)]
    if op.accumulate:
        readers.append(vector(256 + x.field("vdst"), op.sources[-1], registers))
    return readers


def compute(op: Op, readers: list[Reader], store: Store) -> Step:
    """A row of the table."""
    fn, put = op.fn, store(op.result)
    if len(readers) == 1:
        (a,) = readers
        return lambda w: put(w, fn(a(w)))
    if len(readers) == 2:
        a, b = readers
        return lambda w: put(w, fn(a(w), b(w)))
    a, b, c = readers
    return lambda w: put(w, fn(a(w), b(w), c(w)))


def vop3(x: Instruction, registers: Registers, arch: str) -> Step | None:
    """Everything in the 64-bit encoding, also the short instructions."""
    if x.name == "V_NOP":
        return None
    if x.name in ("V_BITOP3_B32", "V_BITOP3_B16"):
        return _bitop3(x, registers)
    if x.name in LANE_OPS:
        return LANE_OPS[x.name](x, registers)
    source = vop3_source(x, registers)
    if x.name.startswith(("V_CMP_", "V_CMPX_")):
        return compare(x, source, x.field("vdst"))
    if x.field("clmp") and (op := saturated(x.name)):
        return compute(op, _readers(op, x, registers, source), plain_store(x.field("vdst"), registers))
    store = vop3_store(x, registers, OPS.get(x.name) or FLOAT8_OPS[arch].get(x.name))
    if x.name == "V_CNDMASK_B32":
        return select(source, store, x.field("src2"))
    if x.name in ("V_MAD_U64_U32", "V_MAD_I64_I32"):
        return _mad64(x, source, store)
    if x.name in ("V_DIV_SCALE_F32", "V_DIV_SCALE_F64"):
        kind = "f" if x.name.endswith("F32") else "d"
        read, put, flag = source(0, kind), store(kind), write_lanes(x.field("sdst"))

        def unscaled(w: Waves) -> None:
            put(w, read(w))
            flag(w, np.zeros((w.count, 64), bool))

        return unscaled
    if "_CO_" in x.name:
        return carry(x.name, source, store, x.field("sdst"), x.field("src2"))
    op = _op(x, arch)
    return compute(op, _readers(op, x, registers, source), store)


# --- More than a function of one lane's operands ----------------------------------------------------------------------


def _bitop3(x: Instruction, registers: Registers) -> Step:
    if x.name.endswith("B16") and x.field("opsel"):
        raise NotModelled("V_BITOP3_B16 with op_sel")
    table = x.field("omod") << 6 | x.field("abs") << 3 | x.field("neg")  # spread over the modifier fields
    a, b, c = (vector(x.field(f"src{k}"), "u", registers) for k in range(3))
    put = plain_store(x.field("vdst"), registers)("w" if x.name.endswith("B16") else "u")
    return lambda w: put(w, ternary_logic(np.asarray(a(w)), np.asarray(b(w)), np.asarray(c(w)), table))


def select(source: Source, store: Store, condition: int) -> Step:
    """V_CNDMASK_B32."""
    a, b, lanes, put = source(0, "u"), source(1, "u"), read_lanes(condition), store("u")
    return lambda w: put(w, np.where(lanes(w), b(w), a(w)))


def carry(name: str, source: Source, store: Store, out: int, into: int) -> Step:
    """Additions and subtractions with carry out, some with carry in; carries of lanes that are off are 0."""
    a, b, put, flag = source(0, "u"), source(1, "u"), store("u"), write_lanes(out)
    lanes = read_lanes(into) if name.startswith(("V_ADDC", "V_SUBB")) else None
    add, reverse = name.startswith("V_ADD"), "REV" in name

    def step(w: Waves) -> None:
        left, right = a(w).astype(I64), b(w).astype(I64)
        left, right = (right, left) if reverse else (left, right)
        extra = 0 if lanes is None else lanes(w)
        total = left + right + extra if add else left - right - extra
        over = np.broadcast_to((total > 0xFFFFFFFF) | (total < 0), (w.count, 64))
        on = w.lanes()
        put(w, total.astype(U))
        flag(w, over if on is None else over & on)

    return step


def _mad64(x: Instruction, source: Source, store: Store) -> Step:
    signed = x.name == "V_MAD_I64_I32"
    kind = "i" if signed else "u"
    a, b, c = source(0, kind), source(1, kind), source(2, "U")
    put, flag = store("U"), write_lanes(x.field("sdst"))

    def step(w: Waves) -> None:
        wide = I64 if signed else U64
        product = np.asarray(a(w).astype(wide) * b(w).astype(wide)).view(U64)
        total = np.broadcast_to(product + c(w), (w.count, 64))
        put(w, total)
        flag(w, (total < product) & w.mask())

    return step
