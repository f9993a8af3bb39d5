"""AMD GPUs as the kernel's compute driver (amdkfd) reports them: no library is loaded.

Source: https://github.com/torvalds/linux/blob/master/drivers/gpu/drm/amd/amdkfd/kfd_topology.c
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_NODES = "sys/class/kfd/kfd/topology/nodes"


@dataclass(frozen=True)
class KfdGpu:
    """One GPU of the driver's topology.

    Attributes:
      arch: the compiler's name, e.g. "gfx942".
      compute_units: those that are enabled.
      wave_size, lds_bytes: threads that run in step; local memory of a work-group.
      memory: bytes of its own memory, 0 if unknown.
    """

    arch: str
    compute_units: int
    wave_size: int
    lds_bytes: int
    memory: int


def gpus(root: Path = ROOT) -> tuple[KfdGpu, ...]:
    """Every AMD GPU that the driver has taken, in its order; none where there is no such driver."""
    found = []
    for node in sorted((root / _NODES).glob("*"), key=lambda path: (len(path.name), path.name)):
        facts = _properties(node / "properties")
        if version := facts.get("gfx_target_version", 0):  # 0 is a processor
            banks = node.glob("mem_banks/*/properties")
            memory = max((_properties(bank).get("size_in_bytes", 0) for bank in banks), default=0)
            simds, per_unit = facts.get("simd_count", 0), facts.get("simd_per_cu", 0)
            units = simds // per_unit if per_unit else 0
            wave_size, lds_kib = facts.get("wave_front_size", 0), facts.get("lds_size_in_kb", 0)
            found.append(KfdGpu(gfx_name(version), units, wave_size, lds_kib << 10, memory))
    return tuple(found)


def gfx_name(version: int) -> str:
    """The compiler's target of KFD's number: 90402 is gfx942, 90010 is gfx90a, 110501 is gfx1151."""
    major, minor, step = version // 10000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{step:x}"


def _properties(path: Path) -> dict[str, int]:
    """A topology file: a name and a number on each line; empty if it cannot be read."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
