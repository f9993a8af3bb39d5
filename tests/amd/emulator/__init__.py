"""An emulator of AMD's CDNA3 and CDNA4 chips (gfx942, gfx950) in numpy; see README.md beside this folder."""

from __future__ import annotations

from amd.emulator.code_object import KernelCode, load_kernel
from amd.emulator.errors import EmulatorError, Fault, NotModelled
from amd.emulator.launch import Kernel, Launch, Options
from amd.emulator.memory import Region

__all__ = [
    "EmulatorError",
    "Fault",
    "Kernel",
    "KernelCode",
    "Launch",
    "NotModelled",
    "Options",
    "Region",
    "load_kernel",
]
