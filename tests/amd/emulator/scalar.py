"""Scalar instructions: one value a wave. CDNA3 ISA, chapter 5; section 12.1 to 12.6 for each opcode."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amd.emulator.control import NO_OPS
from amd.emulator.errors import NotModelled
from amd.emulator.instruction import Instruction
from amd.emulator.numerics import (
    I64,
    U64,
    Array,
    I,
    U,
    bit_field,
    join,
    leading_zeros,
    reverse_bits,
    signed_bit_field,
    trailing_zeros,
)
from amd.emulator.operands import Step, scalar, write_scalar, write_scalar64
from amd.emulator.waves import EXEC, Waves

type Result = tuple[Array, Array | None]


def _nonzero(r: Array) -> Result:
    return r, r != 0


def _i(x: Array) -> Array:
    return x.view(I)


def _bits64(x: Array, control: Array) -> Array:
    offset, width = control & U(63), control >> U(16) & U(127)
    return x >> offset.astype(U64) & (U64(1) << width.astype(U64)) - U64(1)


# name -> (operand types, function of two operands and SCC: result and new SCC, None where it stays)
BINARY: dict[str, tuple[str, Callable[[Array, Array, Array], Result]]] = {
    "S_ADD_U32": ("uu", lambda a, b, c: (a + b, a.astype(U64) + b > 0xFFFFFFFF)),
    "S_SUB_U32": ("uu", lambda a, b, c: (a - b, b > a)),
    "S_ADD_I32": ("uu", lambda a, b, c: (a + b, _i((a ^ ~b) & (a ^ (a + b))) < 0)),
    "S_SUB_I32": ("uu", lambda a, b, c: (a - b, _i((a ^ b) & (a ^ (a - b))) < 0)),
    "S_ADDC_U32": ("uu", lambda a, b, c: ((a + b + c).astype(U), a.astype(U64) + b + c > 0xFFFFFFFF)),
    "S_SUBB_U32": ("uu", lambda a, b, c: ((a - b - c).astype(U), b.astype(U64) + c > a)),
    "S_ABSDIFF_I32": ("ii", lambda a, b, c: _nonzero(np.abs(a - b).view(U))),
    "S_MUL_I32": ("uu", lambda a, b, c: (a * b, None)),
    "S_MUL_HI_U32": ("uu", lambda a, b, c: ((a.astype(U64) * b >> U64(32)).astype(U), None)),
    "S_MUL_HI_I32": ("ii", lambda a, b, c: ((a.astype(I64) * b >> 32).astype(I).view(U), None)),
    "S_MIN_U32": ("uu", lambda a, b, c: (np.minimum(a, b), a <= b)),
    "S_MAX_U32": ("uu", lambda a, b, c: (np.maximum(a, b), a >= b)),
    "S_MIN_I32": ("ii", lambda a, b, c: (np.minimum(a, b).view(U), a <= b)),
    "S_MAX_I32": ("ii", lambda a, b, c: (np.maximum(a, b).view(U), a >= b)),
    "S_LSHL_B32": ("uu", lambda a, b, c: _nonzero(a << (b & U(31)))),
    "S_LSHR_B32": ("uu", lambda a, b, c: _nonzero(a >> (b & U(31)))),
    "S_ASHR_I32": ("iu", lambda a, b, c: _nonzero((a >> (b & U(31)).astype(I)).view(U))),
    "S_LSHL_B64": ("Uu", lambda a, b, c: _nonzero(a << (b & U(63)).astype(U64))),
    "S_LSHR_B64": ("Uu", lambda a, b, c: _nonzero(a >> (b & U(63)).astype(U64))),
    "S_ASHR_I64": ("Iu", lambda a, b, c: _nonzero((a >> (b & U(63)).astype(I64)).view(U64))),
    "S_BFM_B32": ("uu", lambda a, b, c: (((U(1) << (a & U(31))) - U(1)) << (b & U(31)), None)),
    "S_BFE_U32": ("uu", lambda a, b, c: _nonzero(bit_field(a, b, b >> U(16)))),
    "S_BFE_I32": ("uu", lambda a, b, c: _nonzero(signed_bit_field(a, b, b >> U(16)))),
    "S_BFE_U64": ("Uu", lambda a, b, c: _nonzero(_bits64(a, b))),
    "S_PACK_LL_B32_B16": ("uu", lambda a, b, c: (a & U(0xFFFF) | b << U(16), None)),
    "S_PACK_LH_B32_B16": ("uu", lambda a, b, c: (a & U(0xFFFF) | b & U(0xFFFF0000), None)),
    "S_PACK_HH_B32_B16": ("uu", lambda a, b, c: (a >> U(16) | b & U(0xFFFF0000), None)),
}
for _n in range(1, 5):
    BINARY[f"S_LSHL{_n}_ADD_U32"] = (
        "uu",
        lambda a, b, c, n=_n: ((a << U(n)) + b, (a.astype(U64) << U64(n)) + b > 0xFFFFFFFF),
    )
for _name, _logic in {
    "AND": lambda a, b: a & b,
    "OR": lambda a, b: a | b,
    "XOR": lambda a, b: a ^ b,
    "ANDN2": lambda a, b: a & ~b,
    "ORN2": lambda a, b: a | ~b,
    "NAND": lambda a, b: ~(a & b),
    "NOR": lambda a, b: ~(a | b),
    "XNOR": lambda a, b: ~(a ^ b),
}.items():
    BINARY[f"S_{_name}_B32"] = ("uu", lambda a, b, c, logic=_logic: _nonzero(logic(a, b)))
    BINARY[f"S_{_name}_B64"] = ("UU", lambda a, b, c, logic=_logic: _nonzero(logic(a, b)))
for _kind, _bits in (("u", "32"), ("U", "64")):
    BINARY[f"S_CSELECT_B{_bits}"] = (_kind * 2, lambda a, b, c: (np.where(c, a, b), None))


def _popcount(x: Array) -> Array:
    return np.bitwise_count(x).astype(U)


# name -> (operand type, whether the result has 64 bits, function, whether SCC says that the result is not 0)
UNARY: dict[str, tuple[str, bool, Callable[[Array], Array], bool]] = {
    "S_MOV_B32": ("u", False, lambda a: a, False),
    "S_MOV_B64": ("U", True, lambda a: a, False),
    "S_NOT_B32": ("u", False, lambda a: ~a, True),
    "S_NOT_B64": ("U", True, lambda a: ~a, True),
    "S_BREV_B32": ("u", False, reverse_bits, False),
    "S_ABS_I32": ("i", False, lambda a: np.abs(a).view(U), True),
    "S_SEXT_I32_I8": ("u", False, lambda a: a.astype(np.int8).astype(I).view(U), False),
    "S_SEXT_I32_I16": ("u", False, lambda a: a.astype(np.int16).astype(I).view(U), False),
    "S_BCNT1_I32_B32": ("u", False, _popcount, True),
    "S_BCNT1_I32_B64": ("U", False, _popcount, True),
    "S_FF1_I32_B32": ("u", False, trailing_zeros, False),
    "S_FLBIT_I32_B32": ("u", False, leading_zeros, False),
}
SAVE_EXEC: dict[str, Callable[[Array, Array], Array]] = {
    "AND": lambda x, e: x & e,
    "OR": lambda x, e: x | e,
    "XOR": lambda x, e: x ^ e,
    "ANDN1": lambda x, e: ~x & e,
    "ANDN2": lambda x, e: x & ~e,
    "ORN1": lambda x, e: ~x | e,
    "ORN2": lambda x, e: x | ~e,
    "NAND": lambda x, e: ~(x & e),
    "NOR": lambda x, e: ~(x | e),
    "XNOR": lambda x, e: ~(x ^ e),
}
ORDER: dict[str, Callable[[Array, Array], Array]] = {
    "EQ": np.equal,
    "LG": np.not_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "LT": np.less,
    "LE": np.less_equal,
}


def sop2(x: Instruction) -> Step:
    """Two operands, one result."""
    if x.name not in BINARY:
        raise NotModelled(x.name)
    kinds, fn = BINARY[x.name]
    a, b = scalar(x.field("ssrc0"), kinds[0], x.literal), scalar(x.field("ssrc1"), kinds[1], x.literal)
    write = (write_scalar64 if x.name.endswith("64") else write_scalar)(x.field("sdst"))

    def step(w: Waves) -> None:
        # One of the operands as an array [waves]: numpy scalars of two constants would not broadcast to SCC.
        value, scc = fn(np.asarray(a(w)), np.asarray(b(w)), w.scc)
        write(w, value)
        if scc is not None:
            w.scc[...] = scc

    return step


def sop1(x: Instruction) -> Step:
    """One operand, one result."""
    source, d = x.field("ssrc0"), x.field("sdst")
    if x.name in UNARY:
        kind, wide, fn, sets = UNARY[x.name]
        read = scalar(source, kind, x.literal)
        write = (write_scalar64 if wide else write_scalar)(d)

        def step(w: Waves) -> None:
            value = fn(np.asarray(read(w)))
            write(w, value)
            if sets:
                w.scc[...] = value != 0

        return step
    if x.name.endswith("_SAVEEXEC_B64"):
        logic = SAVE_EXEC[x.name.split("_")[1]]
        read, save, to_exec = scalar(source, "U", x.literal), write_scalar64(d), write_scalar64(EXEC)

        def save_exec(w: Waves) -> None:
            value, old = read(w), join(w.s[EXEC], w.s[EXEC + 1])
            new = logic(value, old)
            save(w, old)
            to_exec(w, new)
            w.scc[...] = new != 0

        return save_exec
    if x.name in ("S_BITSET0_B32", "S_BITSET1_B32"):
        read, write = scalar(source, "u", x.literal), write_scalar(d)

        def bit_set(w: Waves) -> None:
            bit = U(1) << (read(w) & U(31))
            write(w, w.s[d] | bit if x.name == "S_BITSET1_B32" else w.s[d] & ~bit)

        return bit_set
    if x.name in ("S_CMOV_B32", "S_CMOV_B64"):
        wide = x.name.endswith("64")
        read, write = scalar(source, "U" if wide else "u", x.literal), (write_scalar64 if wide else write_scalar)(d)
        current = scalar(d, "U" if wide else "u")
        return lambda w: write(w, np.where(w.scc, read(w), current(w)))
    if x.name == "S_GETPC_B64":
        from amd.emulator.memory import CODE

        write, after = write_scalar64(d), np.asarray((CODE << 32) + x.pc + x.size, U64)
        return lambda w: write(w, after)
    raise NotModelled(x.name)


def sopc(x: Instruction) -> Step:
    """A comparison to SCC."""
    _, first, *rest = x.name.split("_")
    a, b = x.field("ssrc0"), x.field("ssrc1")
    if first in ("BITCMP0", "BITCMP1") and rest == ["B32"]:
        read, bit, want = scalar(a, "u", x.literal), scalar(b, "u", x.literal), int(first[-1])

        def test_bit(w: Waves) -> None:
            w.scc[...] = (read(w) >> (bit(w) & U(31)) & U(1)) == want

        return test_bit
    if first != "CMP":
        raise NotModelled(x.name)
    kind = {"I32": "i", "U32": "u", "U64": "U"}[rest[1]]
    compare, left, right = ORDER[rest[0]], scalar(a, kind, x.literal), scalar(b, kind, x.literal)

    def step(w: Waves) -> None:
        w.scc[...] = compare(left(w), right(w))

    return step


def sopk(x: Instruction) -> Step:
    """An operation with a 16-bit immediate."""
    d, k = x.field("sdst"), x.signed("simm16")
    value = np.asarray(k & 0xFFFFFFFF, U)
    _, first, *rest = x.name.split("_")
    if x.name == "S_MOVK_I32":
        write = write_scalar(d)
        return lambda w: write(w, value)
    if x.name == "S_CMOVK_I32":
        write = write_scalar(d)
        return lambda w: write(w, np.where(w.scc, value, w.s[d]))
    if x.name in ("S_ADDK_I32", "S_MULK_I32"):
        write, add = write_scalar(d), x.name == "S_ADDK_I32"

        def step(w: Waves) -> None:
            old = w.s[d].copy()
            write(w, old + value if add else old * value)
            if add:
                w.scc[...] = _i((old ^ ~value) & (old ^ (old + value))) < 0

        return step
    if first == "CMPK":
        kind = "i" if rest[1] == "I32" else "u"
        compare, left = ORDER[rest[0]], scalar(d, kind)
        right = np.asarray(k, I) if kind == "i" else np.asarray(x.field("simm16"), U)

        def test(w: Waves) -> None:
            w.scc[...] = compare(left(w), right)

        return test
    raise NotModelled(x.name)


def smem(x: Instruction) -> Step | None:
    """Loads of 1 to 16 words to scalar registers."""
    if x.name in NO_OPS:
        return None
    words = x.name.removeprefix("S_LOAD_DWORD")
    if words == x.name:
        raise NotModelled(x.name)
    count = int(words.removeprefix("X") or 1)
    base, d = scalar(x.field("sbase") * 2, "U"), x.field("sdata")
    immediate = x.signed("offset") if x.field("imm") else 0
    # An offset register comes beside the immediate (soffset_en) or in its place.
    register = x.field("soffset") if x.field("soffset_en") else None if x.field("imm") else x.field("offset") & 127
    writes = [write_scalar(d + k) for k in range(count)]
    span = 4 * np.arange(count)

    def step(w: Waves) -> None:
        address = base(w).view(I64) + immediate
        if register is not None:
            address = address + w.s[register].astype(I64)
        (values,) = w.memory.load((address & ~3)[:, None] + span, 4)
        for k, write in enumerate(writes):
            write(w, values[:, k])

    return step
