"""Runs all checks in turn."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_jax import targets
from llama_jax.doctor.devices import check_devices
from llama_jax.doctor.environment import check_environment, shown
from llama_jax.doctor.kernels import check_choices, check_graphs, check_native, check_numerics
from llama_jax.doctor.links import check_links, check_shared_memory
from llama_jax.doctor.packages import check_packages, check_plugins, installed_versions
from llama_jax.doctor.probe import PROBE_DEADLINE_S, Probe, probe_jax
from llama_jax.doctor.report import Check, Report
from llama_jax.doctor.rocm import check_rocm, check_workarounds
from llama_jax.doctor.storage import check_cache, known_cache
from llama_jax.doctor.visibility import check_visibility
from llama_jax.kernels.checking.child import Numerics, check_kernels
from llama_jax.targets import hardware


def doctor(
    *,
    root: Path = hardware.ROOT,
    environ: Mapping[str, str] | None = None,
    deadline_s: float = PROBE_DEADLINE_S,
    numerics: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Looks at the machine and at this installation; starts one child process and changes nothing.

    Args:
      root: where the kernel's files are.
      environ: the environment; that of this process when None.
      deadline_s: seconds that jax has to name its devices.
      numerics: also compare every kernel with the reference on the device, in child processes; the result is kept, and
        kernels that fail are not chosen any more.
      progress: called with a line for each of these comparisons as it ends, and while they are compiled.
    """
    environ = os.environ if environ is None else environ
    found, rocm = hardware.gpus(root), hardware.rocm(root)
    versions = installed_versions()
    probe = probe_jax(environ, deadline_s=deadline_s)
    result = probe.result or {}
    checks = [
        *check_packages(versions),
        *check_plugins(versions),
        *check_rocm(found, rocm, versions),
        *check_devices(found, probe, versions, environ, root, rocm),
        *check_environment(environ, found),
        *check_workarounds(environ, found, probe, rocm),
        *check_visibility(environ, found),
        *check_several(environ, found, probe, root),
        *check_choices(probe.kernels),
        *check_native(probe.kernels.get("native")),
        *check_graphs(probe.kernels.get("graphs", ())),
        *check_cache(),
    ]
    found_numerics = Numerics(())
    if numerics and probe.result is not None:
        found_numerics = check_kernels(environ, progress=progress)
        checks += check_numerics(found_numerics)
    return Report(
        checks=tuple(checks),
        system=_system(root, found, rocm, environ),
        versions=versions,
        environment=shown(environ),
        backend=result.get("backend"),
        devices=tuple(result.get("devices", ())),
        kernels=tuple(probe.kernels.get("choices", ())),
        numerics=found_numerics.checks,
    )


def _system(
    root: Path, found: tuple[hardware.Gpu, ...], rocm: hardware.Rocm | None, environ: Mapping[str, str]
) -> dict[str, Any]:
    cache = known_cache()
    processor, (total, available) = hardware.cpu(root), _memory(root)
    return {
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_version()} ({sys.executable})",
        "cpu": processor.name,
        "cpu_cores": processor.cores,
        "cpu_features": list(processor.features),
        "memory_total": total,
        "memory_available": available,
        "gpus": [{"vendor": g.vendor, "name": g.name, "memory": g.memory, "driver": g.driver} for g in found],
        "targets": [target.name for target in targets.detected(root)],
        "drivers": hardware.driver_versions(root) | ({"rocm": rocm.version} if rocm else {}),
        "cache": None if cache is None else str(cache),
        "compilation_cache": environ.get("JAX_COMPILATION_CACHE_DIR")
        or (None if cache is None else str(cache / "xla")),
    }


def _memory(root: Path) -> tuple[int | None, int | None]:
    """Bytes in all and available to this process; None where psutil is missing, which is a separate finding."""
    try:
        import psutil
    except ImportError:
        return None, None
    memory, limit = psutil.virtual_memory(), hardware.memory_limit(root) or sys.maxsize
    return min(memory.total, limit), min(memory.available, limit)


def gpus_in_use(found: tuple[hardware.Gpu, ...], probe: Probe) -> int:
    """GPUs that programs here compute on together: those that jax sees, or if it sees none those with a driver."""
    if probe.result is not None and probe.result["backend"] != "cpu":
        return len(probe.result["devices"])
    return sum(gpu.driver for gpu in found)


def check_several(
    environ: Mapping[str, str], found: tuple[hardware.Gpu, ...], probe: Probe, root: Path = hardware.ROOT
) -> list[Check]:
    """Additional checks for a machine with several GPUs; nothing to say on others."""
    if gpus_in_use(found, probe) < 2:
        return []
    return [*check_shared_memory(root), *check_links(environ, found, root)]
