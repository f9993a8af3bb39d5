"""Machine code to named fields. The bit positions and opcode numbers are tinygrad's tables of AMD's ISA documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinygrad.renderer.amd import decode_inst

from amd.emulator.errors import NotModelled


@dataclass(frozen=True)
class Instruction:
    """One decoded instruction.

    Attributes:
      pc: byte offset in the code object's image.
      format: the encoding ("SOP2", "VOP3", "DS", ...) without the variants below.
      variant: "", "LIT" (a literal follows), "DPP16", "SDWA", "SDST" (a scalar destination) or "MFMA".
      name: the opcode in capitals, without the suffix of its encoding: "V_ADD_F32".
      size: bytes.
      word: all its bits.
      text: how tinygrad writes it, for messages.
    """

    pc: int
    format: str
    variant: str
    name: str
    size: int
    word: int
    text: str
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


def decode(code: bytes, pc: int) -> Instruction:
    """The instruction at byte `pc`.

    Raises:
      NotModelled: the bits are no instruction that tinygrad knows.
    """
    raw = code[pc : pc + 16].ljust(16, b"\0")
    try:
        inst: Any = decode_inst(raw, "cdna")
        name = inst.op.name
    except (ValueError, AssertionError, AttributeError) as error:
        raise NotModelled(f"no known instruction at {pc:#x}: {raw[:8].hex()}") from error
    kind, _, variant = type(inst).__name__.partition("_")
    for suffix in ("_E32", "_E64"):
        name = name.removesuffix(suffix)
    fields = {key: (field.lo, field.mask) for key, field in type(inst)._fields}
    variant = variant.removesuffix("_SDST") if variant.startswith("SDWA") else variant
    return Instruction(pc, kind, variant, name, inst.size(), int.from_bytes(raw, "little"), repr(inst), fields)
