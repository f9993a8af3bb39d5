"""Checks the installed ROCm, the jax plugin that matches it, and the settings that AMD recommends."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from llama_jax.doctor.probe import Probe
from llama_jax.doctor.report import Check
from llama_jax.errors import NoDevice
from llama_jax.targets import hardware
from llama_jax.targets.hardware import Rocm
from llama_jax.targets.rocm import DOCS, JAX, NEWEST, PLUGINS, Plugin, fits, of_generation, release


def check_rocm(found: tuple[hardware.Gpu, ...], rocm: Rocm | None, versions: Mapping[str, str | None]) -> list[Check]:
    """Returns whether there is an AMD GPU, and one plugin, of the generation of the ROCm that is installed."""
    plugins = [plugin for plugin in PLUGINS if versions.get(plugin.pjrt)]
    if not any(gpu.vendor == "amd" for gpu in found):
        detail = "no AMD GPU was found" + (f", though ROCm {rocm.version} is installed" if rocm else "")
        if plugins:
            detail += f"; {plugins[-1].pjrt} compiles for one all the same (llama-jax compile)"
        return [Check("AMD", "ok", detail)]
    if len(plugins) > 1:
        keep = (of_generation(rocm.number[0]) if rocm else None) or plugins[-1]
        others = [name for plugin in plugins if plugin is not keep for name in (plugin.plugin, plugin.pjrt)]
        names = " and ".join(f"{plugin.pjrt} {versions[plugin.pjrt]}" for plugin in plugins)
        detail = f"{names} are both installed, and jax starts the one that it happens to see first"
        return [Check("AMD", "problem", detail, f"pip uninstall -y {' '.join(others)}", NoDevice.exit_code)]
    if rocm is None:
        return []
    detail = f"ROCm {rocm.version} in {rocm.libraries.parent}"
    if (
        plugins and rocm.number[0] != plugins[0].generation
    ):  # where that keeps jax from the GPU, `check_devices` says so
        detail += f", but {plugins[0].pjrt} is for ROCm {plugins[0].generation}"
    return [Check("AMD", "ok", detail)]


def install_fix(rocm: Rocm | None, versions: Mapping[str, str | None]) -> str:
    """The commands that install what jax needs for the ROCm that is there, or for the newest one."""
    plugin = of_generation(rocm.number[0]) if rocm else NEWEST
    if plugin is None:
        assert rocm is not None
        return (
            f"jax has no plugin for ROCm {rocm.version}: install ROCm {NEWEST.generation} ({DOCS}), then "
            f"{_pip(NEWEST, versions)}"
        )
    others = [name for p in PLUGINS if p is not plugin for name in (p.plugin, p.pjrt) if versions.get(name)]
    steps = [f"pip uninstall -y {' '.join(others)}"] if others else []
    line = " && ".join([*steps, _pip(plugin, versions)])
    return line if rocm else f"install ROCm {plugin.generation} ({DOCS}), then {line}"


def is_complete(plugin: Plugin, versions: Mapping[str, str | None]) -> bool:
    """Returns whether both packages of a plugin are installed, of jaxlib's release."""
    jaxlib = versions.get("jaxlib") or ""
    return all((v := versions.get(name)) is not None and fits(v, jaxlib) for name in (plugin.plugin, plugin.pjrt))


def _pip(plugin: Plugin, versions: Mapping[str, str | None]) -> str:
    """The command for the installed jax, if there is a plugin for it, else for the version that is tested most."""
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib") or ""
    known = jax == jaxlib and release(jaxlib) in plugin.built_with
    requirements = plugin.requirements(release(jaxlib), jax) if known else plugin.requirements(JAX)
    return "pip install " + " ".join(requirements)


@dataclass(frozen=True)
class Workaround:
    """A variable that AMD tells its users to set.

    Attributes:
      detail: what happens without it.
      separator: between this value and what the variable holds already; empty if it takes one value.
    """

    variable: str
    value: str
    detail: str
    separator: str = ""


def check_workarounds(
    environ: Mapping[str, str], found: tuple[hardware.Gpu, ...], probe: Probe, rocm: Rocm | None
) -> list[Check]:
    """Variables that this machine needs and that are not set.

    Args:
      found: the machine's GPUs.
      probe: what jax answered.
    """
    usable = {gpu.name for gpu in found if gpu.vendor == "amd" and gpu.driver}
    checks = []
    for needed in _needed(usable, probe, rocm) if usable else ():
        before = environ.get(needed.variable, "")
        if needed.value not in before:
            kept = f"{needed.separator}{before}" if needed.separator and before else ""
            fix = f"export {needed.variable}={shlex.quote(needed.value + kept)}"
            checks.append(Check("environment", "warning", needed.detail, fix))
    return checks


def _needed(architectures: set[str], probe: Probe, rocm: Rocm | None) -> Iterator[Workaround]:
    """Advice from AMD's documents and jax's issues for these AMD GPUs."""
    failed = probe.result is None
    version, of = (rocm.number, f"ROCm {rocm.version}") if rocm else (None, "an older ROCm")
    # https://github.com/ROCm/jax/issues/800: minutes without a word; ROCm's compiler shares its symbols with XLA's.
    if "gfx950" in architectures and (version < (7, 13) if version else failed):
        detail = f"with {of}, jax may hang for minutes when it starts on gfx950, unless AMD_COMGR_NAMESPACE=1 is set"
        yield Workaround("AMD_COMGR_NAMESPACE", "1", detail)
    # https://rocm.docs.amd.com/en/7.12.0-preview/rocm-for-ai/jax.html: on every GPU.
    elif version == (7, 12):
        detail = f"with {of}, jax may fail to start, unless AMD_COMGR_NAMESPACE=1 is set"
        yield Workaround("AMD_COMGR_NAMESPACE", "1", detail)
    # The same page: libraries of the wheels that the plugin does not find by itself.
    if rocm and rocm.wheels and (probe.result is None or probe.result["backend"] == "cpu"):
        detail = f"{of} came as Python packages, and jax does not see the GPU: it may not find their libraries"
        yield Workaround("LD_LIBRARY_PATH", str(rocm.libraries), detail, separator=":")
    # https://rocm.docs.amd.com/en/7.13.0-preview/frameworks/jax/install.html and, for replays that crash,
    # https://github.com/openxla/xla/issues/46952.
    if (version is not None and version < (7, 14)) or (failed and f"exit status {-signal.SIGSEGV})" in probe.error):
        detail = f"with {of}, programs may crash when they replay a HIP graph, unless XLA makes none"
        yield Workaround("XLA_FLAGS", "--xla_gpu_enable_command_buffer=", detail, separator=" ")
