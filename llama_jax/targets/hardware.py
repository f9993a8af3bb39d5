"""The hardware of this machine, read from the kernel's own files: no driver library is loaded, and jax is
imported only where a function says so.

The files are those of Linux (https://docs.kernel.org/gpu/amdgpu; AMD's compute driver: `targets.kfd`). Where they are
absent nothing is found. Every function takes the root folder, so that another machine's files can be read as well.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama_jax.targets import kfd

ROOT = kfd.ROOT
KFD = "dev/kfd"
"""Device file of the AMD compute driver, below the root."""

Vendor = Literal["amd", "nvidia"]
_PCI_VENDORS: dict[str, Vendor] = {"0x1002": "amd", "0x10de": "nvidia"}
# Display controllers and processing accelerators (the Instinct cards), by PCI base class.
_PCI_CLASSES = ("0x03", "0x12")
_ROCM_WHEELS = {"_rocm_sdk_core": "rocm-sdk-core", "rocm": "amd-rocm-language-runtime-instinct"}
"""Folder among Python's packages to the package that brings it. jax's plugins look for ROCm there (their ELF run path),
and in /opt/rocm behind it."""
CPU_FEATURES = ("f16c", "fma", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "sve")


@dataclass(frozen=True)
class Gpu:
    """One GPU as the kernel reports it.

    Attributes:
      name: target such as "gfx942" for AMD, product name for NVIDIA; a PCI id where no driver knows it.
      memory: bytes of its own memory, 0 if unknown.
      driver: whether the driver that computing needs (amdkfd, nvidia) has taken it.
    """

    vendor: Vendor
    name: str
    memory: int = 0
    driver: bool = True


@dataclass(frozen=True)
class Rocm:
    """An installed ROCm.

    Attributes:
      version: e.g. "7.14.0".
      libraries: their folder.
      wheels: whether Python packages brought it.
    """

    version: str
    libraries: Path
    wheels: bool = False

    @property
    def number(self) -> tuple[int, int]:
        """Major and minor version; zeros where the text has none."""
        major, minor, *_ = *re.findall(r"\d+", self.version), "0", "0"
        return int(major), int(minor)


@dataclass(frozen=True)
class Cpu:
    """The processor.

    Attributes:
      cores: logical ones that this process may use.
      features: those of CPU_FEATURES that it has.
    """

    name: str
    cores: int
    features: tuple[str, ...]


def gpus(root: Path = ROOT) -> tuple[Gpu, ...]:
    """Every AMD and NVIDIA GPU; one without its driver is found on the PCI bus."""
    found = [*(Gpu("amd", gpu.arch, gpu.memory) for gpu in kfd.gpus(root)), *_nvidia(root)]
    with_driver = {gpu.vendor for gpu in found}
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor = _PCI_VENDORS.get(_read(device / "vendor"))
        if vendor and vendor not in with_driver and _read(device / "class").startswith(_PCI_CLASSES):
            found.append(Gpu(vendor, f"PCI {_read(device / 'vendor')}:{_read(device / 'device')}", driver=False))
    return tuple(found)


def names(found: Iterable[Gpu]) -> str:
    """GPUs in one line: "AMD gfx942, 2x NVIDIA H200"."""
    each = [f"{'AMD' if gpu.vendor == 'amd' else 'NVIDIA'} {gpu.name}" for gpu in found]
    return ", ".join(f"{each.count(n)}x {n}" if each.count(n) > 1 else n for n in dict.fromkeys(each))


def unused_gpu_warning(root: Path = ROOT) -> str | None:
    """One line if this machine has a GPU while jax computes on the CPU without being told to, else None.

    Cheap enough for every start: reads a few files of the kernel. Imports jax.
    """
    import jax

    if jax.default_backend() != "cpu" or "cpu" in (jax.config.jax_platforms or "").split(","):
        return None
    found = gpus(root)
    if not found:
        return None
    return (
        f"warning: {names(found)} found, but jax computes on the CPU; "
        "run `llama-jax doctor` for the reason, or set JAX_PLATFORMS=cpu if that is meant"
    )


def _nvidia(root: Path) -> list[Gpu]:
    found = []
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        model = re.search(r"^Model:\s*(.+)$", _read(folder / "information"), re.MULTILINE)
        found.append(Gpu("nvidia", model[1].strip() if model else "unknown model"))
    if not found and any((root / "dev").glob("nvidia[0-9]*")):
        # Some containers pass on the device files alone.
        found = [Gpu("nvidia", path.name) for path in sorted((root / "dev").glob("nvidia[0-9]*"))]
    return found


def driver_versions(root: Path = ROOT) -> dict[str, str]:
    """Versions of GPU drivers, by name; without those that are absent."""
    kernel = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d[\d.]+)", _read(root / "proc/driver/nvidia/version"))
    versions = {
        "nvidia": kernel[1] if kernel else "",
        "amdgpu": _read(root / "sys/module/amdgpu/version"),
    }
    return {name: version for name, version in versions.items() if version}


def rocm(root: Path = ROOT, packages: Sequence[str] | None = None) -> Rocm | None:
    """The ROCm that jax's plugin would find: that of Python packages, else that below /opt; None without any.

    Args:
      packages: folders of Python packages; sys.path when None.
    """
    for folder, package in _ROCM_WHEELS.items():
        for found in importlib.metadata.distributions(
            name=package, path=list(sys.path if packages is None else packages)
        ):
            libraries = Path(str(found.locate_file(folder))) / "lib"
            if libraries.is_dir():
                return Rocm(found.version, libraries, wheels=True)
    for file in sorted((root / "opt").glob("rocm*/.info/version")):
        if text := _read(file):
            return Rocm(text, file.parents[1] / "lib")
    return None


def cpu(root: Path = ROOT) -> Cpu:
    """The processor's name, its cores, and those of its features that matter here."""
    info = _read(root / "proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    return Cpu(name[1] if name else "unknown", _cores(), tuple(f for f in CPU_FEATURES if f in has))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes of memory that the container may use, None without such a limit."""
    for file in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(root / file)
        # Version 1 writes "no limit" as the largest multiple of the page size.
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _read(path: Path) -> str:
    """Contents without white space around them; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
