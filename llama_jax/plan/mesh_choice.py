"""The default mesh of a workload: the rule behind `mesh="auto"` and `--mesh auto`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.layout import check
from llama_jax.plan.device_memory import MEMORY_FRACTION, usable_bytes
from llama_jax.plan.memory import DeviceShare, needs_of
from llama_jax.plan.workload import Workload
from llama_jax.targets import Target


@dataclass(frozen=True)
class Candidate:
    """A mesh that was considered.

    Attributes:
      sizes: of its axes by name; empty for one device.
      peak: bytes that the workload needs on each device; None where they were not counted.
    """

    sizes: Mapping[str, int]
    peak: int | None

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    def fits(self, usable: int | None) -> bool | None:
        """None if the memory needed or available is not known."""
        return None if usable is None or self.peak is None else self.peak <= usable


@dataclass(frozen=True)
class MeshChoice:
    """The choice, and the alternatives.

    Attributes:
      chosen: the first mesh that fits, or the last that was possible.
      rejected: those before it, which need too much.
      usable: bytes of each device; None where that is not known.
    """

    chosen: Candidate
    rejected: tuple[Candidate, ...]
    usable: int | None

    @property
    def fits(self) -> bool | None:
        return self.chosen.fits(self.usable)


def choose_mesh(
    config: LlamaConfig, target: Target, workload: Workload, *, devices: int | None = None, usable: int | None = None
) -> MeshChoice:
    """The smallest "tensor" with which a workload fits: less splitting means less communication.

    The devices that "tensor" leaves hold further copies of the model and share the batch as "data", as many as it has
    rows (filled up to a power of two, as `generate` does it). What is left then has nothing to do.

    Args:
      devices: how many there are; by default as few as it takes.
      usable: bytes of a device that the model may take. None if it is not known: then the first mesh is taken, and
        nothing is counted.
    """
    tried: list[Candidate] = []
    for sizes in _possible(config, target, workload, devices):
        peak = None
        if usable is not None:
            share = DeviceShare(config, target, sizes, workload.itemsize, workload.kv_dtype)
            peak = needs_of(share, workload).peak
        tried.append(Candidate(sizes, peak))
        if tried[-1].fits(usable) is not False:
            break
    return MeshChoice(tried[-1], tuple(tried[:-1]), usable)


def smallest_mesh(
    config: LlamaConfig,
    target: Target,
    workload: Workload,
    *,
    devices: int | None = None,
    memory_fraction: float = MEMORY_FRACTION,
) -> dict[str, int]:
    """Sizes of the mesh that `choose_mesh` chooses for a target's devices, which this machine may lack.

    Args:
      memory_fraction: of each device's memory that jax may use.
    """
    usable = usable_bytes(target, memory_fraction)
    return dict(choose_mesh(config, target, workload, devices=devices, usable=usable).chosen.sizes)


def _possible(
    config: LlamaConfig, target: Target, workload: Workload, devices: int | None
) -> Iterator[Mapping[str, int]]:
    """Meshes in the order of "tensor": a power of two, or what leaves none of the devices out."""
    most = target.links.host_devices if devices is None else min(target.links.host_devices, devices)
    copies = 1 << (workload.batch - 1).bit_length()
    for ways in range(1, most + 1):
        if ways & (ways - 1) and (devices is None or devices % ways):
            continue
        data = 1 if devices is None else min(devices // ways, copies)
        sizes = {name: size for name, size in (("data", data), ("tensor", ways)) if size > 1}
        try:
            check(config, sizes)
        except RequestError:
            continue
        yield sizes
