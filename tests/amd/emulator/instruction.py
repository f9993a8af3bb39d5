"""Machine code to named fields. Opcode numbers and bit positions are tinygrad's tables of AMD's ISA documents.

tinygrad can decode by itself, but looks through all encodings for each instruction; here the leading bits choose
(CDNA3 ISA, chapter 13), which takes a tenth of the time. A test holds the two equal.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from tinygrad.renderer.amd import decode_inst
from tinygrad.runtime.autogen.amd.cdna import ins

from amd.emulator.errors import NotModelled

# (mask, bits, encodings): the first row that fits the first word counts.
_ENCODINGS: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (0x80000000, 0x00000000, ("VOP1", "VOPC", "VOP2", "VOP2_LIT")),
    (0xFF800000, 0xBE800000, ("SOP1",)),
    (0xFF800000, 0xBF000000, ("SOPC",)),
    (0xFF800000, 0xBF800000, ("SOPP",)),
    (0xF0000000, 0xB0000000, ("SOPK", "SOPK_LIT")),
    (0xC0000000, 0x80000000, ("SOP2",)),
    (0xFC000000, 0xC0000000, ("SMEM",)),
    (0xFF800000, 0xD3800000, ("VOP3P_MFMA", "VOP3P")),
    (0xFC000000, 0xD0000000, ("VOP3SD", "VOP3_SDST", "VOP3")),
    (0xFC000000, 0xD8000000, ("DS",)),
    (0xFC00C000, 0xDC000000, ("FLAT",)),
    (0xFC00C000, 0xDC004000, ("SCRATCH",)),
    (0xFC00C000, 0xDC008000, ("GLOBAL",)),
    (0xFC000000, 0xE0000000, ("MUBUF",)),
)
_LITERAL, _SDWA, _DPP = 255, 249, 250


@dataclass(frozen=True)
class _Encoding:
    """One of tinygrad's instruction classes.

    Attributes:
      operations: opcode number to name.
      fields: name to (lowest bit, mask).
    """

    format: str
    variant: str
    size: int
    operations: dict[int, str]
    fields: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Instruction:
    """One decoded instruction.

    Attributes:
      pc: byte offset in the code object's image.
      format: the encoding ("SOP2", "VOP3", "DS", ...) without the variants below.
      variant: "", "LIT" (a literal follows), "DPP16", "SDWA", "SDST" (a scalar destination) or "MFMA".
      name: the opcode in capitals, without the suffix of its encoding: "V_ADD_F32".
      size: bytes.
      raw: its bytes and some of those that follow.
    """

    pc: int
    format: str
    variant: str
    name: str
    size: int
    raw: bytes
    word: int
    fields: dict[str, tuple[int, int]]

    def field(self, name: str, default: int | None = None) -> int:
        """The bits of a field as an unsigned number; `default` where this encoding has no such field."""
        if name not in self.fields:
            if default is None:
                raise NotModelled(f"{self.format} has no field {name}")
            return default
        low, mask = self.fields[name]
        return self.word >> low & mask

    def signed(self, name: str) -> int:
        """The bits of a field as a two's complement number."""
        value, mask = self.field(name), self.fields[name][1]
        return value - (mask + 1) if value > mask >> 1 else value

    @property
    def literal(self) -> int:
        """The 32 bits after a 4-byte encoding."""
        return self.word >> 32 & 0xFFFFFFFF

    @property
    def text(self) -> str:
        """How tinygrad writes it, for messages."""
        try:
            return repr(decode_inst(self.raw, "cdna"))
        except (ValueError, AssertionError, RuntimeError):
            return f"{self.name.lower()} ({self.raw[: self.size].hex()})"


def decode(code: bytes, pc: int) -> Instruction:
    """The instruction at byte `pc`.

    Raises:
      NotModelled: the bits are no instruction that is known.
    """
    raw = code[pc : pc + 16].ljust(16, b"\0")
    word = int.from_bytes(raw, "little")
    encoding = _encoding_of(word)
    if encoding is None:
        raise NotModelled(f"no known instruction at {pc:#x}: {raw[:8].hex()}")
    low, mask = encoding.fields["op"]
    name = encoding.operations[word >> low & mask]
    return Instruction(pc, encoding.format, encoding.variant, name, encoding.size, raw, word, encoding.fields)


def _encoding_of(word: int) -> _Encoding | None:
    for mask, bits, names in _ENCODINGS:
        if word & mask != bits:
            continue
        for name in names:
            encoding = _encoding(name)
            assert encoding is not None
            low, field = encoding.fields["op"]
            if _fits(name, word) and word >> low & field in encoding.operations:
                return _encoding(name + suffix) if (suffix := _suffix(name, word)) else encoding
        return None
    return None


def _fits(name: str, word: int) -> bool:
    """VOP1 and VOPC are what would be opcodes 63 and 62 of VOP2."""
    leading = word >> 25 & 127
    return {"VOP1": leading == 63, "VOPC": leading == 62}.get(name, not name.startswith("VOP2") or leading < 62)


def _suffix(name: str, word: int) -> str:
    """The words that follow, as the operand fields announce them."""
    if name in ("VOP1", "VOP2", "VOPC"):
        variants = {_LITERAL: "_LIT", _DPP: "_DPP16", _SDWA: "_SDWA_SDST" if name == "VOPC" else "_SDWA"}
        return variants.get(word & 511, "")
    if name in ("SOP1", "SOP2", "SOPC"):
        second = word >> 8 & 255 if name != "SOP1" else 0
        return "_LIT" if _LITERAL in (word & 255, second) else ""
    return ""


@functools.cache
def _encoding(name: str) -> _Encoding | None:
    of: Any = getattr(ins, name, None)
    if of is None:
        return None
    fields = dict(of._fields)
    operations = {}
    allowed = set(fields["op"].allowed or fields["op"]._enum)
    if name == "VOP3P_MFMA":  # tinygrad puts those of one chip alone (xfloat32) elsewhere
        allowed |= {op for op in ins.VOP3P.op.allowed if "MFMA" in op.name}
    for op in allowed:
        operations[int(op.value)] = op.name.removesuffix("_E32").removesuffix("_E64")
    kind, _, variant = name.partition("_")
    variant = "SDWA" if variant.startswith("SDWA") else variant
    positions = {key: (field.lo, field.mask) for key, field in fields.items()}
    return _Encoding(kind, variant, of._base_size, operations, positions)
