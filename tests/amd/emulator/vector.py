"""Vector instructions: rows of `vector_table`, and those that are more than a function of one lane.

An encoding says how operands are read (`Source`) and results stored (`Store`); what is computed in between is the same
for all of them. CDNA3 ISA, chapter 6; SDWA and DPP: sections 6.6 and 6.7.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amd.emulator.errors import NotModelled
from amd.emulator.float8 import FLOAT8_OPS
from amd.emulator.instruction import Instruction
from amd.emulator.lane_exchange import LANE_OPS, dpp_source
from amd.emulator.numerics import I64, U64, Array, F, U, pack_lanes, ternary_logic
from amd.emulator.operands import (
    AS,
    FROM,
    WIDE,
    Reader,
    Registers,
    Step,
    is_vector,
    read_lanes,
    vector,
    write_lanes,
    write_scalar,
)
from amd.emulator.vector_table import COMPARED, OPS, ORDER, Op, float_class, saturated
from amd.emulator.waves import EXEC, VCC, Waves

type Source = Callable[[int, str], Reader]
"""Operand number and type to a reader of its values, modifiers applied."""
type Store = Callable[[str], Callable[[Waves, Array], None]]
"""Result type to a function that stores values in the lanes that are on."""


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
    return _with_vcc(x, registers, arch, *_short(x, registers))


def vop2(x: Instruction, registers: Registers, arch: str) -> Step:
    """Two operands, the second one a vector register."""
    source, store = _short(x, registers)
    if x.name in ("V_FMAMK_F32", "V_FMAAK_F32"):  # a literal is a third operand
        literal, fma = vector(255, "f", registers, x.literal), OPS["V_FMA_F32"]
        order = [source(0, "f"), literal, source(1, "f")] if x.name == "V_FMAMK_F32" else None
        return compute(fma, order or [source(0, "f"), source(1, "f"), literal], store)
    return _with_vcc(x, registers, arch, source, store)


def vopc(x: Instruction, registers: Registers) -> Step:
    """Comparisons to VCC; SDWA may name another pair."""
    source, _ = _short(x, registers)
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


# --- Encodings --------------------------------------------------------------------------------------------------------


def _modified(read: Reader, kind: str, absolute: int, negative: int) -> Reader:
    """|x| and -x, on the sign bit."""
    if not absolute and not negative:
        return read
    if kind not in "fhdu":
        raise NotModelled(f"absolute or negated operand of type {kind}")

    def modified(w: Waves) -> Array:
        value = read(w)
        if kind == "u":
            value = value & U(0x7FFFFFFF) if absolute else value
            return value ^ U(0x80000000) if negative else value
        value = np.abs(value) if absolute else value
        return np.negative(value) if negative else value

    return modified


def plain_store(d: int, registers: Registers) -> Store:
    """To vector register number d."""

    def store(kind: str) -> Callable[[Waves, Array], None]:
        row = registers.index(d, 2 if kind in WIDE else 1)
        if kind in WIDE:
            return lambda w, value: w.write64(row, np.broadcast_to(FROM[kind](value), (w.count, 64)))
        if kind == "f":

            def put_float(w: Waves, value: Array) -> None:
                lanes = w.lanes()
                if lanes is None:
                    w.f[row] = value
                else:
                    np.copyto(w.f[row], value, where=lanes, casting="same_kind")

            return put_float
        if kind == "u":
            return lambda w, value: w.put(row, value, w.lanes())
        return lambda w, value: w.put(row, FROM[kind](np.asarray(value)), w.lanes())

    return store


def _short(x: Instruction, registers: Registers) -> tuple[Source, Store]:
    """VOP1, VOP2 and VOPC in their 32-bit form, with a literal, SDWA or DPP."""
    second = 256 + x.field("vsrc1", 0)

    if x.variant == "SDWA":
        return _sdwa_source(x, registers), _sdwa_store(x, registers)
    if x.variant == "DPP16":
        moved, lanes = dpp_source(x, registers)

        def dpp(k: int, kind: str) -> Reader:
            read: Reader = (lambda w: AS[kind](moved(w))) if k == 0 else vector(second, kind, registers)
            return _modified(read, kind, x.field(f"src{k}_abs"), x.field(f"src{k}_neg"))

        d = registers.index(x.field("vdst"))

        def store(kind: str) -> Callable[[Waves, Array], None]:
            if kind in WIDE:
                raise NotModelled("DPP with a 64-bit result")
            return lambda w, value: w.put(d, FROM[kind](np.asarray(value)), lanes(w))

        return dpp, store
    if x.variant not in ("", "LIT"):
        raise NotModelled(f"{x.format}_{x.variant}")
    first = x.field("src0")

    def source(k: int, kind: str) -> Reader:
        return vector(first if k == 0 else second, kind, registers, x.literal)

    return source, plain_store(x.field("vdst", 0), registers)


def _part(x: Array, select_: int, signed: int) -> Array:
    """SDWA: a byte (0 to 3) or half (4, 5) of a word, or the word (6)."""
    if select_ > 5:
        return x
    bits, at = (8, 8 * select_) if select_ < 4 else (16, 16 * (select_ - 4))
    x = x >> U(at) & U((1 << bits) - 1)
    return (x ^ U(1 << bits - 1)) - U(1 << bits - 1) if signed else x


def _sdwa_source(x: Instruction, registers: Registers) -> Source:
    def source(k: int, kind: str) -> Reader:
        number, is_scalar = x.field("vsrc0" if k == 0 else "vsrc1"), x.field(f"s{k}")
        raw = vector(number if is_scalar else 256 + number, "u", registers)
        which, signed = x.field(f"src{k}_sel"), x.field(f"src{k}_sext")

        def read(w: Waves) -> Array:
            return AS[kind](_part(raw(w), which, signed))

        return _modified(read, kind, x.field(f"src{k}_abs"), x.field(f"src{k}_neg"))

    return source


def _sdwa_store(x: Instruction, registers: Registers) -> Store:
    if "dst_sel" not in x.fields:
        return plain_store(0, registers)  # a comparison
    d, which, unused = registers.index(x.field("vdst")), x.field("dst_sel"), x.field("dst_unused")
    if x.field("clmp") or x.field("omod") or unused == 1:
        raise NotModelled("SDWA with clamp, output modifier or sign extension")

    def store(kind: str) -> Callable[[Waves, Array], None]:
        def put(w: Waves, value: Array) -> None:
            word = FROM[kind](np.asarray(value))
            if which < 6:
                bits, at = (8, 8 * which) if which < 4 else (16, 16 * (which - 4))
                field = U(((1 << bits) - 1) << at)
                word = word << U(at) & field
                if unused == 2:
                    word = word | w.v[d] & ~field
            w.put(d, word, w.lanes())

        return put

    return store


def vop3_source(x: Instruction, registers: Registers) -> Source:
    """The 64-bit encoding: sign modifiers, and the upper half of 16-bit operands."""
    absolute, negative, upper = x.field("abs", 0), x.field("neg"), x.field("opsel", 0)

    def source(k: int, kind: str) -> Reader:
        code = x.field(f"src{k}")
        if upper >> k & 1:
            if kind not in "hws" or not is_vector(code):
                raise NotModelled(f"upper half of operand {k}")
            raw = vector(code, "u", registers)
            read: Reader = lambda w: AS[kind](raw(w) >> U(16))  # noqa: E731
        else:
            read = vector(code, kind, registers)
        return _modified(read, kind, absolute >> k & 1, negative >> k & 1)

    return source


def _vop3_store(x: Instruction, registers: Registers, op: Op | None) -> Store:
    plain = plain_store(x.field("vdst"), registers)
    clamp, scale = x.field("clmp", 0), {0: None, 1: 2.0, 2: 4.0, 3: 0.5}[x.field("omod", 0)]
    to_high = x.field("opsel", 0) >> 3 & 1
    d = x.field("vdst")

    def store(kind: str) -> Callable[[Waves, Array], None]:
        if kind in "hws" and (to_high or (op is not None and op.keeps_high)):
            return _half_store(registers.index(d), kind, bool(to_high), clamp or scale)
        if not clamp and scale is None:
            return plain(kind)
        if kind != "f":
            raise NotModelled(f"clamp or output modifier on a result of type {kind}")
        put = plain(kind)

        def modified(w: Waves, value: Array) -> None:
            value = np.asarray(value, F) if scale is None else np.asarray(value, F) * F(scale)
            put(w, np.nan_to_num(value, nan=0.0, posinf=np.inf, neginf=-np.inf).clip(0, 1) if clamp else value)

        return modified

    return store


def _half_store(row: int, kind: str, high: bool, modifiers: object) -> Callable[[Waves, Array], None]:
    if modifiers:
        raise NotModelled("clamp or output modifier on half a register")

    def put(w: Waves, value: Array) -> None:
        word, old = FROM[kind](np.asarray(value)), w.v[row]
        w.put(row, old & U(0xFFFF) | word << U(16) if high else old & U(0xFFFF0000) | word, w.lanes())

    return put


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
    store = _vop3_store(x, registers, OPS.get(x.name) or FLOAT8_OPS[arch].get(x.name))
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


def compare(x: Instruction, source: Source, d: int) -> Step:
    """V_CMP: bits of lanes that are off are 0. V_CMPX: the same, and EXEC becomes the result."""
    name = x.name.removeprefix("V_CMPX_").removeprefix("V_CMP_")
    order, _, typed = name.rpartition("_")
    test: Callable[[Array, Array], Array]
    if order == "CLASS" and typed == "F32":
        a, b, test = source(0, "u"), source(1, "u"), float_class
    elif order in ORDER and typed in COMPARED:
        kind = COMPARED[typed]
        a, b, test = source(0, kind), source(1, kind), ORDER[order]
    else:
        raise NotModelled(x.name)
    low, high = write_scalar(d), write_scalar(d + 1)
    also = (write_scalar(EXEC), write_scalar(EXEC + 1)) if x.name.startswith("V_CMPX") else None

    def step(w: Waves) -> None:
        result, on = test(a(w), b(w)), w.lanes()
        if on is not None:
            result = result & on
        words = pack_lanes(result if result.shape == (w.count, 64) else np.broadcast_to(result, (w.count, 64)))
        low(w, words[:, 0])
        high(w, words[:, 1])
        if also is not None:
            also[0](w, words[:, 0])
            also[1](w, words[:, 1])

    return step
