"""Counts instructions in AMD machine code: just enough decoding to walk from one instruction to the next.

Encodings: the ISA documents of CDNA 2, 3 and 4, RDNA 3 and 4, chapter "Microcode formats"
(https://gpuopen.com/amd-gpu-architecture-programming-documentation/).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_LITERAL, _SDWA, _DPP = 255, 249, 250
_DPP8 = (233, 234)
# v_accvgpr_read, _write and _mov move registers, and stand among the matrix instructions of gfx9.
_ACCVGPR = (0x58, 0x59)
# By opcode: v_mfma_f32_32x32x2_f32, _16x16x4_f32, _32x32x8_f16, _16x16x16_f16, _32x32x8_bf16, _16x16x16_bf16. Cycles
# follow from the rated peak: 64 (float32) and 512 (16 bits) operations a cycle and SIMD.
_GFX942_CYCLES = {68: 64, 69: 32, 76: 32, 77: 16, 96: 32, 97: 16}


@dataclass(frozen=True)
class Loop:
    """An innermost loop of a kernel.

    Attributes:
      instructions: in its body, and `matrix` of them MFMA.
      matrix_cycles: that these take on gfx942 at the rate of its matrix units; 0 where that is not known.
      loads: of global memory, and `wide_loads` of them of 16 bytes a lane.
    """

    instructions: int
    matrix: int
    matrix_cycles: int
    loads: int
    wide_loads: int


def matrix_instructions(arch: str, code: bytes) -> int | None:
    """Number of MFMA (gfx9) or WMMA (gfx11, gfx12) instructions in a kernel's code.

    Returns:
      None for an architecture that is not known here, and for code that ends within an instruction.
    """
    words = _walk(arch, code)
    if words is None:
        return None
    is_matrix = _is_mfma if arch.startswith("gfx9") else _is_wmma
    return sum(is_matrix(word) for _, word in words)


def main_loop(arch: str, code: bytes) -> Loop | None:
    """Of a gfx9 kernel's innermost loops the one with the most matrix instructions, then the most loads.

    Returns:
      None for other architectures, for code that cannot be read, and where there is no loop.
    """
    words = _walk(arch, code)
    if words is None or not arch.startswith("gfx9"):
        return None
    # A loop is what lies between a branch backwards and its target.
    spans = [(at + 1 + _offset(word), at) for at, word in words if _is_branch_gfx9(word) and _offset(word) < 0]
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    loops = []
    for start, end in inner:
        body = [word for at, word in words if start <= at <= end]
        loads = [
            word >> 18 & 127 for word in body if word >> 26 in (0b110111, 0b111000) and 16 <= word >> 18 & 127 <= 23
        ]
        products = [word >> 16 & 127 for word in body if _is_mfma(word)]
        cycles = sum(_GFX942_CYCLES[op] for op in products) if _GFX942_CYCLES.keys() >= set(products) else 0
        loops.append(Loop(len(body), len(products), cycles if arch == "gfx942" else 0, len(loads), loads.count(23)))
    return max(loops, key=lambda loop: (loop.matrix, loop.loads, loop.instructions), default=None)


def _walk(arch: str, code: bytes) -> list[tuple[int, int]] | None:
    """Position, in words, and first word of each instruction; None where the code cannot be read."""
    family = next((f for f in ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12") if arch.startswith(f)), None)
    if family is None:
        return None
    words = struct.unpack(f"<{len(code) // 4}I", code[: len(code) // 4 * 4])
    found = []
    at = 0
    while at < len(words):
        word, following = words[at], words[at + 1] if at + 1 < len(words) else 0
        found.append((at, word))
        at += _size_gfx9(word) if family.startswith("gfx9") else _size_rdna(word, following, gfx12=family == "gfx12")
    return found if at == len(words) else None


def _is_branch_gfx9(word: int) -> bool:
    """s_branch or s_cbranch_*."""
    return word >> 23 == 0b101111111 and word >> 16 & 127 in (2, 4, 5, 6, 7, 8, 9)


def _offset(word: int) -> int:
    """Words that a branch jumps, counted from the next instruction."""
    return (word & 0xFFFF) - (word >> 15 & 1) * 0x10000


def _is_mfma(word: int) -> bool:
    op = word >> 16 & 127
    # Below 0x40: packed arithmetic and dot products, among which CDNA 4 has put its wider products.
    return word >> 23 == 0b110100111 and (
        (op >= 0x40 and op not in _ACCVGPR) or op in (0x2D, 0x2E) or 0x34 <= op <= 0x3F
    )


def _is_wmma(word: int) -> bool:
    return word >> 24 == 0b11001100 and 0x40 <= word >> 16 & 127 <= 0x5F


def _size_gfx9(word: int) -> int:
    """Words of the instruction that begins with this one."""
    if word >> 31 == 0:  # VOP1, VOP2, VOPC
        is_vop2 = word >> 26 != 0b011111
        has_constant = is_vop2 and word >> 25 & 63 in (23, 24, 36, 37)  # v_fmamk, v_fmaak, v_madmk, v_madak
        return 1 + (has_constant or word & 511 in (_LITERAL, _SDWA, _DPP))
    if word >> 30 == 0b10:
        return _size_scalar(word, setreg=20, fmaak=())
    return 2


def _size_rdna(word: int, following: int, *, gfx12: bool) -> int:
    if word >> 31 == 0:
        is_vop2 = word >> 26 != 0b011111
        has_constant = is_vop2 and word >> 25 & 63 in (44, 45, 55, 56)  # v_fmamk, v_fmaak
        return 1 + (has_constant or word & 511 in (_LITERAL, _DPP, *_DPP8))
    if word >> 30 == 0b10:
        return _size_scalar(word, setreg=19, fmaak=(69, 70))
    if word >> 24 == 0b11001110:  # reads of parameters from local memory
        return 1
    if word >> 26 == 0b110010 and word >> 24 != 0b11001101 and word >> 24 != 0b11001100:  # two in one (VOPD)
        has_constant = word >> 22 & 15 in (1, 2) or word >> 17 & 31 in (1, 2)
        return 2 + (has_constant or _LITERAL in (word & 511, following & 511))
    if word >> 26 == 0b110101 or word >> 24 == 0b11001100:  # VOP3, VOP3P
        sources = (following & 511, following >> 9 & 511, following >> 18 & 511)
        return 2 + (_LITERAL in sources or sources[0] in (_DPP, *_DPP8))
    if gfx12 and (word >> 26 in (0b110001, 0b110100, 0b111001) or word >> 26 == 0b111011):  # buffers, images, flat
        return 3
    if not gfx12 and word >> 26 == 0b111100:  # images, with further addresses
        return 2 + (word & 1)
    return 2


def _size_scalar(word: int, *, setreg: int, fmaak: tuple[int, ...]) -> int:
    top = word >> 23
    if top == 0b101111111:  # SOPP
        return 1
    if top == 0b101111101:  # SOP1
        return 1 + (word & 255 == _LITERAL)
    if top == 0b101111110:  # SOPC
        return 1 + (_LITERAL in (word & 255, word >> 8 & 255))
    if word >> 28 == 0b1011:  # SOPK
        return 1 + (word >> 23 & 31 == setreg)
    return 1 + (_LITERAL in (word & 255, word >> 8 & 255) or word >> 23 & 127 in fmaak)
