"""The number of a kernel's waves that fit on a SIMD, from its registers and local memory.

Sources: LLVM, llvm/lib/Target/AMDGPU/Utils/AMDGPUBaseInfo.cpp (`getNumWavesPerEUWithNumVGPRs`, `getTotalNumVGPRs`,
`getVGPRAllocGranule`, `getMaxWavesPerEU`, `getOccupancyWithNumSGPRs`) and AMDGPUSubtarget.cpp
(`getOccupancyWithWorkGroupSizes`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class _Limits:
    """Of one architecture, for its own wave size.

    Attributes:
      registers, granule: vector registers of a SIMD lane, and the steps that they are allocated in.
      waves: the most of a SIMD.
      lds_bytes, simds: local memory that the work-groups of a compute unit share (RDNA: of a pair of them, which work
        as one), and its SIMDs.
      scalar_registers: that the waves of a SIMD share; 0 where each wave has its own full set.
    """

    registers: int
    granule: int
    waves: int
    lds_bytes: int
    simds: int
    scalar_registers: int = 0


_CDNA = _Limits(512, 8, 8, 64 << 10, 4, 800)
_RDNA = _Limits(1536, 24, 16, 128 << 10, 4)
_SMALL_RDNA = _Limits(1024, 16, 16, 128 << 10, 4)
_ARCHITECTURES = {
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": _Limits(512, 8, 8, 160 << 10, 4, 800),
    "gfx1100": _RDNA,
    "gfx1101": _RDNA,
    "gfx1102": _SMALL_RDNA,
    "gfx1103": _SMALL_RDNA,
    "gfx1150": _SMALL_RDNA,
    "gfx1151": _RDNA,
    "gfx1152": _SMALL_RDNA,
    "gfx1200": _RDNA,
    "gfx1201": _RDNA,
}


def occupancy(arch: str, *, vgpr: int, sgpr: int, lds_bytes: int, threads: int, wave_size: int) -> int | None:
    """Waves of a kernel that can be on one SIMD at a time; None for an architecture whose limits are not known here.

    Args:
      vgpr: vector registers of a lane; on CDNA 2 and later accumulation registers count too.
      sgpr: scalar registers of a wave.
      lds_bytes: of a work-group, static and dynamic.
      threads: of a work-group.
      wave_size: that the kernel was compiled for; 64 on RDNA takes twice the registers.
    """
    limits = _ARCHITECTURES.get(arch.split(":")[0])
    if limits is None:
        return None
    registers, granule = limits.registers, limits.granule
    if wave_size == 64 and not limits.scalar_registers:
        registers, granule = registers // 2, granule // 2
    waves = min(limits.waves, registers // max(granule, _up(vgpr, granule)))
    if limits.scalar_registers and sgpr:
        waves = min(waves, limits.scalar_registers // max(16, _up(sgpr, 16)))
    if lds_bytes:
        per_group = -(-threads // wave_size)
        resident = limits.lds_bytes // lds_bytes * per_group
        waves = min(waves, max(1, resident // limits.simds) if resident else 0)
    return waves


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
