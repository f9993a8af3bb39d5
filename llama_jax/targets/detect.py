"""Finds the target a program is traced for, and the targets of this machine.

Devices are told apart by their product name, and where that is missing or new by architecture, number of compute units
and memory: gfx942 alone may be an MI300X, an MI325X or an MI300A.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.targets import kfd
from llama_jax.targets.table import CPU, TARGETS, added_targets
from llama_jax.targets.target import Rates, Target, Vendor

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True)
class Facts:
    """A device's description of itself; "" or 0 where it gives none.

    Attributes:
      name: product name, e.g. "AMD Instinct MI300X".
      arch: "gfx942", "sm_90".
    """

    vendor: Vendor
    name: str = ""
    arch: str = ""
    compute_units: int = 0
    memory: int = 0


def current() -> Target:
    """The target of the program that is being traced: the abstract device of the mesh in use (compilation for another
    machine), else the default device. Imports jax, and starts its backend where no mesh is in use.

    The abstract mesh is part of jit's cache key, so a program traced for one target is never reused for another. A
    device that is not in the table gets a target made of what it reports (see `identify`).
    """
    import jax

    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return _tracing_for().value or identify(_abstract_facts(device))
    return of_device(default_device())


def default_device() -> jax.Device:
    """The device where jax puts arrays by default. Imports jax, and starts its backend."""
    import jax

    chosen: Any = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        chosen = jax.local_devices(backend=chosen)[0]
    device: jax.Device = chosen
    return device


def of_device(device: jax.Device) -> Target:
    """The target of a device that jax computes on."""
    return identify(_device_facts(device))


@contextmanager
def abstract_device(target: Target, mesh: jax.sharding.Mesh | None = None) -> Iterator[None]:
    """Everything traced inside is traced for `target`, whatever device this process has: `current` gives it, and Pallas
    lowers for it. Imports jax.

    Args:
      mesh: what `jax.sharding.get_abstract_mesh` gives inside, but for its device; an empty one by default.
    """
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    platform = "cpu" if target.vendor == "cpu" else "gpu"
    # Pallas takes the kind of an AMD device for its architecture.
    kind = target.arch if target.vendor == "amd" else target.label or target.arch
    device = AbstractDevice(device_kind=kind, num_cores=target.compute_units or None, platform=platform)
    # One device is no mesh: its axes would only be in the way.
    sizes, names, kinds = (
        (mesh.axis_sizes, mesh.axis_names, mesh.axis_types) if mesh and mesh.size > 1 else ((), (), ())
    )
    in_use = AbstractMesh(sizes, names, axis_types=kinds, abstract_device=device)
    with _tracing_for()(target), use_abstract_mesh(in_use):
        yield


@functools.cache
def _tracing_for() -> Any:
    """The target named by `abstract_device`: part of jit's cache key. Architecture and compute units alone would not
    tell an MI325X from an MI300X."""
    import jax

    return jax.make_user_context(None)


def detected(root: Path = kfd.ROOT) -> tuple[Target, ...]:
    """The target of each AMD GPU of this machine, from the kernel driver's files: neither jax nor ROCm is asked.

    Args:
      root: where these files are.
    """
    return tuple(identify(Facts("amd", "", g.arch, g.compute_units, g.memory)) for g in kfd.gpus(root))


@functools.cache
def identify(facts: Facts) -> Target:
    """The table's target for a device: by its product's name, else by architecture, compute units and memory.

    A known model with fewer compute units (a partition, a slice of a shared card) is that model scaled down. Of an
    unknown model only what it reports is known, and waves and local memory of its architecture.
    """
    if facts.vendor == "cpu":
        return CPU
    known = [target for target in (*TARGETS, *added_targets()) if target.vendor == facts.vendor]
    if named := [target for target in known if _names(target.label, facts.name)]:
        best = max(named, key=lambda target: len(target.label))
        if facts.compute_units in (0, best.compute_units):
            return best
        return _part(best, facts) if facts.compute_units < best.compute_units else _unknown(facts, best)
    alike = [target for target in known if target.arch == facts.arch]
    same = [target for target in alike if facts.compute_units in (0, target.compute_units)]
    # A driver keeps some memory for itself: compared as a share. The first one where nothing tells them apart.
    nearest = min(
        same, key=lambda t: abs(facts.memory / t.memory - 1) if facts.memory and t.memory else 0, default=None
    )
    return nearest or _unknown(facts, alike[0] if alike else None)


def _names(label: str, name: str) -> bool:
    """Returns whether a device's name holds a product's label as whole words, makers and series left out."""
    makers = {"amd", "nvidia", "instinct", "radeon", "geforce", "pro"}
    wanted, given = ([w for w in re.findall("[a-z0-9]+", s.lower()) if w not in makers] for s in (label, name))
    return bool(wanted) and any(given[i : i + len(wanted)] == wanted for i in range(len(given)))


def _part(whole: Target, facts: Facts) -> Target:
    """A target with a part of its compute units; memory and its bandwidth shrink with the memory that is left."""
    share = facts.compute_units / whole.compute_units
    memory = facts.memory or whole.memory
    rates = {name: value * share for name, value in dataclasses.asdict(whole.rates).items() if name != "fp8_flavour"}
    return dataclasses.replace(
        whole,
        name=f"{whole.name}-{facts.compute_units}cu",
        compute_units=facts.compute_units,
        memory=memory,
        bandwidth=whole.bandwidth * min(1.0, memory / (0.9 * whole.memory)),
        bus=None,
        rates=Rates(fp8_flavour=whole.rates.fp8_flavour, **rates),
        sources=(),
    )


def _unknown(facts: Facts, like: Target | None) -> Target:
    """A target of what a device reports; LDS and waves as its architecture has them, or the least of its vendor's."""
    cdna = facts.arch.startswith("gfx9")
    wave_size, lds_bytes = (64 if cdna else 32), ((64 if facts.vendor == "amd" else 48) << 10)
    if like:
        wave_size, lds_bytes = like.wave_size, like.lds_bytes
    return Target(
        name=re.sub(r"[^a-z0-9]+", "-", (facts.name or facts.arch or "unknown").lower()).strip("-"),
        vendor=facts.vendor,
        arch=facts.arch or "unknown",
        compute_units=facts.compute_units,
        wave_size=wave_size,
        lds_bytes=lds_bytes,
        label=facts.name,
        memory=facts.memory,
    )


def _abstract_facts(device: jax.sharding.AbstractDevice) -> Facts:
    kind, units = device.device_kind, device.num_cores or 0
    if kind.startswith("gfx"):
        return Facts("amd", "", kind.split(":")[0], units)
    if device.platform not in ("gpu", "cuda", "rocm"):
        return Facts("cpu")
    return Facts(_vendor(kind), kind, "", units)


def _device_facts(device: Any) -> Facts:
    """Facts of a `jax.Device`; attributes that a backend does not know are left out. Whatever is no GPU counts as a
    CPU: the reference implementations run there."""
    if device.platform not in ("gpu", "cuda", "rocm"):
        return Facts("cpu")
    capability = str(getattr(device, "compute_capability", ""))
    kind = device.device_kind
    vendor = "amd" if capability.startswith("gfx") else _vendor(kind)
    arch = capability.split(":")[0] if vendor == "amd" else f"sm_{capability.replace('.', '')}"
    units = int(getattr(device, "core_count", 0))
    # jax states what it may use, by default three quarters: 192 of 256 GB. The driver states all.
    memory = next((g.memory for g in _driver_gpus() if (g.arch, g.compute_units) == (arch, units)), 0)
    return Facts(vendor, kind, arch, units, memory)


@functools.cache
def _driver_gpus() -> tuple[kfd.KfdGpu, ...]:
    """Read once: `current` is called for every operation that is traced."""
    return kfd.gpus()


def _vendor(kind: str) -> Vendor:
    return "nvidia" if re.search("nvidia|geforce|tesla|quadro", kind, re.IGNORECASE) else "amd"
