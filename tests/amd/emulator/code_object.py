"""A kernel's description in an AMDGPU code object (an ELF file).

Layout of the kernel descriptor: LLVM, "User Guide for AMDGPU Backend", section "Kernel Descriptor".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from amd.emulator.errors import NotModelled
from amd.emulator.operands import Registers

_LOAD, _RELA, _DYNSYM = 1, 4, 11
_KERNARG_POINTER = 8
"""Bit of kernel_code_properties: the first two scalar registers point to the arguments."""


@dataclass(frozen=True)
class KernelCode:
    """A kernel as it lies in its code object.

    Attributes:
      image: the loaded segments; `entry` is a byte offset in it.
      lds_bytes: fixed local memory; more may be asked for at launch.
      scratch_bytes: private memory of each lane.
      kernarg_bytes: size of the arguments.
      group_ids: which of x, y, z of the work-group's place are handed over, in scalar registers from `first_id`.
      flushes_denormals: the kernel asks for float32 denormals to be flushed, which is not emulated.
    """

    name: str
    image: bytes
    entry: int
    registers: Registers
    lds_bytes: int
    scratch_bytes: int
    kernarg_bytes: int
    group_ids: tuple[bool, bool, bool]
    first_id: int
    flushes_denormals: bool


def load_kernel(elf: bytes, name: str) -> KernelCode:
    """The kernel of that name.

    Raises:
      NotModelled: it wants registers set up in a way that is not emulated, or has relocations.
    """
    image, symbols = _load(elf)
    if f"{name}.kd" not in symbols:
        raise NotModelled(f"no kernel {name} in this code object")
    at = symbols[f"{name}.kd"]
    lds, scratch, kernarg, _, entry = struct.unpack_from("<IIIIq", image, at)
    rsrc3, rsrc1, rsrc2 = struct.unpack_from("<III", image, at + 44)
    # Arguments that the chip could load before the kernel starts are loaded by the kernel's first instructions too, for
    # firmware that does not ("Preloaded Kernel Arguments"): it is run as by such.
    properties = struct.unpack_from("<H", image, at + 56)[0]
    if properties & ~_KERNARG_POINTER:
        raise NotModelled(f"kernel {name}: set-up of registers {properties:#x}")
    if not properties & _KERNARG_POINTER:
        raise NotModelled(f"kernel {name} has no pointer to its arguments")
    # Granules of 8 registers, both kinds together; the accumulation registers start at accum_offset.
    total, vectors = 8 * ((rsrc1 & 63) + 1), 4 * ((rsrc3 & 63) + 1)
    vectors = min(vectors, total)
    return KernelCode(
        name,
        image,
        at + entry,
        Registers(vectors, total - vectors),
        lds,
        scratch,
        kernarg,
        (bool(rsrc2 >> 7 & 1), bool(rsrc2 >> 8 & 1), bool(rsrc2 >> 9 & 1)),
        rsrc2 >> 1 & 31,
        flushes_denormals=rsrc1 >> 16 & 3 != 3,
    )


def _load(elf: bytes) -> tuple[bytes, dict[str, int]]:
    """The image and the dynamic symbols' addresses."""
    program, sections = struct.unpack_from("<QQ", elf, 32)
    programs, _, count = struct.unpack_from("<HHH", elf, 56)
    segments = [struct.unpack_from("<IIQQQQQQ", elf, program + 56 * k) for k in range(programs)]
    loads = [s for s in segments if s[0] == _LOAD]
    # Some bytes more: decoding looks 16 bytes ahead.
    image = bytearray(max(s[3] + s[6] for s in loads) + 64)
    for s in loads:
        image[s[3] : s[3] + s[5]] = elf[s[2] : s[2] + s[5]]
    heads = [struct.unpack_from("<IIQQQQIIQQ", elf, sections + 64 * k) for k in range(count)]
    symbols = {}
    for head in heads:
        if head[1] == _RELA and head[5]:
            raise NotModelled("code object with relocations")
        if head[1] == _DYNSYM:
            strings = heads[head[6]][4]
            for at in range(head[4], head[4] + head[5], 24):
                offset, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", elf, at)
                start = strings + offset
                symbols[elf[start : elf.index(b"\0", start)].decode()] = value
    return bytes(image), symbols
