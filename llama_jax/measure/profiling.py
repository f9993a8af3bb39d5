"""Profile of a run on a GPU: kernel times by program, from JAX's own profiler."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from llama_jax.errors import NoDevice

KINDS = ("product", "attention", "experts", "communication", "copy", "other")
"""Kinds of kernels, derived from their names by `kind`."""

_SIGNS = {
    "communication": ("nccl", "rccl", "allreduce", "all-reduce", "all_reduce", "all-gather", "all_gather"),
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "experts": ("moe_",),
    "product": ("gemm", "cutlass", "nvjet", "cublas", "cijk", "splitk", "dot"),
    "copy": ("memcpy", "memset", "copy"),
}


@dataclass(frozen=True)
class KernelTime:
    """All runs of one kernel: their number and total seconds."""

    name: str
    calls: int
    seconds: float

    @property
    def kind(self) -> str:
        """The kernel's kind, one of KINDS."""
        name = self.name.lower()
        return next((kind for kind, signs in _SIGNS.items() if any(sign in name for sign in signs)), "other")


@dataclass(frozen=True)
class ProgramTime:
    """One device's work for one compiled program.

    Attributes:
      program: the name of the jitted function.
      busy_s: seconds during which at least one kernel ran. span_s: from the first kernel's start to the last one's end.
      kernels: longest first.
    """

    device: str
    program: str
    busy_s: float
    span_s: float
    kernels: tuple[KernelTime, ...]

    def by_kind(self) -> dict[str, float]:
        """Seconds of the kernels of each kind; kernels that overlap count both."""
        seconds = dict.fromkeys(KINDS, 0.0)
        for kernel in self.kernels:
            seconds[kernel.kind] += kernel.seconds
        return {kind: s for kind, s in seconds.items() if s}


def profile(run: Callable[[], Any]) -> tuple[ProgramTime, ...]:
    """Runs a function once under the profiler.

    Args:
      run: must have been run before, so that nothing is compiled now; waits for the device itself.

    Raises:
      NoDevice: the profiler saw no kernel of a GPU.
    """
    return tuple(found for data in _profiles(run) for found in programs(data))


def calls_of(run: Callable[[], Any]) -> dict[str, dict[str, list[float]]]:
    """Runs a function once under the profiler; returns the seconds of each call of each kernel, by program.

    Raises:
      NoDevice: as `profile` does.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for data in _profiles(run):
        for plane in _devices(data):
            for program, events in _kernels(plane).items():
                for start, end, name in events:
                    found.setdefault(program, {}).setdefault(name, []).append((end - start) / 1e9)
    return found


def _profiles(run: Callable[[], Any]) -> list[jax.profiler.ProfileData]:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="llama-jax-profile-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        found = [jax.profiler.ProfileData.from_file(str(file)) for file in files]
    if not any(_kernels(plane) for data in found for plane in _devices(data)):
        raise NoDevice(
            "the profiler saw no kernel",
            hint="profiles need a GPU and its profiling library (NVIDIA: CUPTI, AMD: rocprofiler-sdk)",
        )
    return found


def _devices(data: jax.profiler.ProfileData) -> Iterator[Any]:
    return (plane for plane in data.planes if "/device:" in plane.name and "CPU" not in plane.name)


def programs(data: jax.profiler.ProfileData) -> Iterator[ProgramTime]:
    """The programs in a profile, by device."""
    for plane in _devices(data):
        for program, events in sorted(_kernels(plane).items()):
            yield _summary(plane.name, program, events)


def _kernels(plane: Any) -> dict[str, list[tuple[float, float, str]]]:
    """Start, end and name of each kernel of a device, by program."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    with warnings.catch_warnings():  # jaxlib's type of an event's stats lacks a __module__
        warnings.filterwarnings("ignore", "builtin type .* has no __module__ attribute", DeprecationWarning)
        for line in plane.lines:
            # Other lines repeat the same kernels, grouped by operation and program.
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                program = str(dict(event.stats).get("hlo_module", "")).split("(")[0]
                found.setdefault(program, []).append((event.start_ns, event.start_ns + event.duration_ns, event.name))
    return found


def _summary(device: str, program: str, events: list[tuple[float, float, str]]) -> ProgramTime:
    totals: dict[str, tuple[int, float]] = {}
    for start, end, name in events:
        calls, seconds = totals.get(name, (0, 0.0))
        totals[name] = (calls + 1, seconds + (end - start) / 1e9)
    kernels = sorted((KernelTime(name, *total) for name, total in totals.items()), key=lambda k: -k.seconds)
    span = max(end for _, end, _ in events) - min(start for start, _, _ in events)
    return ProgramTime(device, program, _covered((s, e) for s, e, _ in events) / 1e9, span / 1e9, tuple(kernels))


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total
