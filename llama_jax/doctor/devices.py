"""The devices jax computes on, compared with those of the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from llama_jax.doctor.probe import Probe
from llama_jax.doctor.report import Check
from llama_jax.doctor.rocm import install_fix, is_complete
from llama_jax.errors import NoDevice
from llama_jax.targets import hardware
from llama_jax.targets.rocm import DOCS, JAX, PLUGINS, of_generation


def check_devices(
    found: tuple[hardware.Gpu, ...],
    probe: Probe,
    versions: Mapping[str, str | None],
    environ: Mapping[str, str],
    root: Path = hardware.ROOT,
    rocm: hardware.Rocm | None = None,
) -> list[Check]:
    """The devices jax computes on, compared with those of the machine.

    Args:
      root: where the kernel's files are.
      rocm: the ROCm that was found.
    """
    code = NoDevice.exit_code
    checks = []
    for vendor in dict.fromkeys(gpu.vendor for gpu in found if not gpu.driver):
        driver = "amdgpu (with /dev/kfd)" if vendor == "amd" else "nvidia"
        these = hardware.names(gpu for gpu in found if gpu.vendor == vendor)
        fix = f"install the kernel driver {driver}; in a container, pass its device files on"
        checks.append(Check("driver", "warning", f"{these}: no driver for computing has taken it", fix))
    kfd = root / hardware.KFD
    if any(gpu.vendor == "amd" and gpu.driver for gpu in found) and not os.access(kfd, os.R_OK | os.W_OK):
        if kfd.exists():
            fix = "sudo usermod -aG render,video $USER, then log in again"
        else:
            fix = "in a container: docker run --device /dev/kfd --device /dev/dri"
        checks.append(Check("permission", "problem", f"/{hardware.KFD} cannot be opened", fix, code))
    if probe.result is None:
        if wanted := environ.get("JAX_PLATFORMS", "").replace("cpu", ""):
            fix = f"unset JAX_PLATFORMS (it is {wanted}), or install what it asks for"
        elif found:
            fix = f"{_plugin_fix(found[0].vendor, versions, rocm)}; JAX_PLATFORMS=cpu goes on without a GPU"
        else:
            fix = "pip install --force-reinstall jax jaxlib"
        return [*checks, Check("device", "problem", probe.error, fix, code)]
    backend, devices = probe.result["backend"], probe.result["devices"]
    kinds = [device["kind"] for device in devices]
    named = ", ".join(f"{kinds.count(k)}x {k}" if kinds.count(k) > 1 else k for k in dict.fromkeys(kinds))
    usable = tuple(gpu for gpu in found if gpu.driver)
    if backend != "cpu" or not usable:
        return [*checks, Check("device", "ok", f"jax computes on {named} (backend {backend})")]
    detail = f"{hardware.names(usable)} found, but jax computes on the CPU"
    if "cpu" in environ.get("JAX_PLATFORMS", "").split(","):
        fix = "unset JAX_PLATFORMS to use the GPU"
        return [*checks, Check("device", "warning", f"{detail}, since JAX_PLATFORMS says so", fix)]
    said = next((line for line in probe.said.splitlines() if "rror" in line or "Unable" in line), "")
    detail += f" ({said[:300]})" if said else ""
    return [*checks, Check("device", "problem", detail, _plugin_fix(usable[0].vendor, versions, rocm), code)]


def _plugin_fix(vendor: hardware.Vendor, versions: Mapping[str, str | None], rocm: hardware.Rocm | None) -> str:
    """The command that installs jax for a GPU, or what is left to look at where that has been done."""
    if vendor == "amd":
        return _amd_fix(versions, rocm)
    if versions.get("jax-cuda13-plugin") and versions.get("jax-cuda13-pjrt"):
        return "the plugin is installed: check `nvidia-smi`; CUDA 13 needs driver 580 or newer"
    return f"pip install 'jax[cuda13]=={versions.get('jax') or JAX}'"


def _amd_fix(versions: Mapping[str, str | None], rocm: hardware.Rocm | None) -> str:
    if rocm is None:
        complete = next((plugin for plugin in reversed(PLUGINS) if is_complete(plugin, versions)), None)
        if complete:
            return f"the plugin is installed: install ROCm {complete.generation} ({DOCS}), whose libraries it loads"
    else:
        plugin = of_generation(rocm.number[0])
        if plugin and is_complete(plugin, versions):
            return (
                f"the plugin and ROCm {rocm.version} are installed: `JAX_PLATFORMS=rocm python -c 'import jax; "
                "jax.devices()'` shows what fails"
            )
    return install_fix(rocm, versions)
