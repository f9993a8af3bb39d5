"""The table of targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llama_jax.errors import RequestError

Vendor = Literal["amd", "nvidia", "cpu"]


@dataclass(frozen=True)
class Target:
    """One device model.

    Attributes:
      name: how it is named on the command line, e.g. "mi300x".
      vendor: "amd", "nvidia" or "cpu".
      arch: the compiler's name of the architecture: "gfx942", "sm_90", "cpu".
      compute_units: CUs (AMD), SMs (NVIDIA), 0 for a CPU.
      wave_size: threads that run in step: 64 (CDNA), 32 (RDNA, NVIDIA), 0 for a CPU.
      lds_bytes: the most local (shared) memory of one work-group.
    """

    name: str
    vendor: Vendor
    arch: str
    compute_units: int
    wave_size: int
    lds_bytes: int


TARGETS = (
    Target("mi250x", "amd", "gfx90a", 110, 64, 64 << 10),
    Target("mi300x", "amd", "gfx942", 304, 64, 64 << 10),
    Target("mi355x", "amd", "gfx950", 256, 64, 160 << 10),
    Target("rx7900xtx", "amd", "gfx1100", 96, 32, 64 << 10),
    Target("radeon8060s", "amd", "gfx1151", 40, 32, 64 << 10),
    Target("rx9070xt", "amd", "gfx1201", 64, 32, 64 << 10),
    Target("h100", "nvidia", "sm_90", 132, 32, 227 << 10),
    Target("cpu", "cpu", "cpu", 0, 0, 0),
)


def find(name: str) -> Target:
    """The target of that name or architecture.

    Raises:
      RequestError: there is none.
    """
    key = name.lower().replace(" ", "").replace("-", "").split(":")[0]
    for target in TARGETS:
        if key in (target.name, target.arch):
            return target
    known = ", ".join(target.name for target in TARGETS)
    raise RequestError(f"unknown target {name!r}", param="target", hint=f"known: {known}")
