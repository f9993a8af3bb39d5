"""AMD devices to compile for that do not exist: XLA's plugin for ROCm, loaded beside whatever jax runs on.

The plugin is not registered as a backend of jax, so that `jax.devices()` stays what it is. These interfaces of jax are
private and belong to its version, which the extra `rocm-aot` pins. Which plugin it is: `llama_jax.targets.rocm`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.aot.compiler import libraries
from llama_jax.errors import CompilerUnavailable
from llama_jax.targets import rocm
from llama_jax.targets.target import Target

if TYPE_CHECKING:
    import jax

GENERATION = "LLAMA_JAX_ROCM"
"""Environment variable: the generation of ROCm to compile with, where plugins for several are installed."""

# What the driver reports beside the architecture: memory with error correction, no retry of page faults.
_FEATURES = {"gfx90a": ":sramecc+:xnack-", "gfx942": ":sramecc+:xnack-", "gfx950": ":sramecc+:xnack-"}


def devices(target: Target, count: int = 1) -> list[jax.Device]:
    """Devices of an AMD target, all on one host, for which programs can be compiled but not run.

    Raises:
      CompilerUnavailable: the plugin is missing, does not load, or refuses the target.
    """
    if target.vendor != "amd":
        raise CompilerUnavailable(
            f"there is no compiler for {target.name} here: programs are compiled ahead for AMD GPUs only",
            hint="choose an AMD target, such as mi300x",
        )
    if count < 1:
        raise CompilerUnavailable(f"{count} devices", hint="compile for at least one")
    make = _topology_maker()
    try:
        topology = make("", target_config=target_config(target), topology=f"1x1x{count}")
        return topology._make_compile_only_devices()
    except Exception as error:  # of jax's runtime, under several names
        raise CompilerUnavailable(
            f"XLA's plugin for ROCm has no topology of {count} x {target.name}: {error}",
            hint="install it again, of jaxlib's release",
        ) from error


@functools.cache
def _topology_maker() -> Any:
    """The function of the plugin that makes topologies. Loaded once a process; the library stays."""
    from jax._src import xla_bridge
    from jaxlib import xla_client

    library = plugin_library()
    # Registers what is installed without starting it. On a machine with an AMD GPU the plugin is among that.
    xla_bridge._discover_and_register_pjrt_plugins()
    if registered := xla_bridge._topology_factories.get("rocm"):
        return registered
    keep = libraries.load(library)
    api = xla_client.load_pjrt_plugin_dynamically("rocm", str(library))

    def make(name: str, _libraries: object = keep, **options: str) -> Any:
        return xla_client.make_c_api_device_topology(api, name, **options)

    return make


def compiler() -> tuple[rocm.Plugin, str]:
    """The plugin that compiles here and the version of its package: of those that go with jaxlib the newest generation,
    or the one that LLAMA_JAX_ROCM names.

    Raises:
      CompilerUnavailable: none is installed, or none goes with jaxlib.
    """
    wanted, jaxlib = os.environ.get(GENERATION, ""), importlib.metadata.version("jaxlib")
    found = [(plugin, version) for plugin, version in rocm.installed() if wanted in ("", str(plugin.generation))]
    if not found:
        generations = " or ".join(str(plugin.generation) for plugin in rocm.PLUGINS)
        which = f" of ROCm {wanted}, which {GENERATION} names," if wanted else ""
        choice = f"unset {GENERATION}, or name {generations} and install it"
        raise CompilerUnavailable(
            f"XLA's compiler for AMD GPUs{which} is not installed", hint=choice if wanted else _pip(rocm.NEWEST, jaxlib)
        )
    for plugin, version in found:
        if rocm.fits(version, jaxlib):
            return plugin, version
    plugin, version = found[0]
    raise CompilerUnavailable(
        f"{plugin.pjrt} is {version}, jaxlib {jaxlib}: they have to be of one release", hint=_pip(plugin, jaxlib)
    )


def _pip(plugin: rocm.Plugin, jaxlib: str) -> str:
    return f"pip install {' '.join(plugin.compiler(jaxlib))}"


def plugin_library() -> Path:
    """The shared library of `compiler`.

    Raises:
      CompilerUnavailable: as `compiler` does, or the package is not whole.
    """
    plugin, version = compiler()
    try:
        spec = importlib.util.find_spec(plugin.module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise CompilerUnavailable(
            f"{plugin.pjrt} {version} is installed without its module {plugin.module}",
            hint=f"pip install --force-reinstall --no-deps {plugin.pjrt}=={version}",
        )
    return Path(spec.origin).parent / rocm.LIBRARY


def target_config(target: Target) -> str:
    """The text of XLA's GpuTargetConfigProto, from which its cost model and its limits come.

    https://github.com/openxla/xla/blob/main/xla/stream_executor/device_description.proto
    """
    arch = target.arch + _FEATURES.get(target.arch, "")
    registers = target.register_bytes // 4
    l2 = target.l2.size if target.l2 else 0
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: {target.wave_size} threads_per_core_limit: 2048
  shared_memory_per_block: {target.lds_bytes} shared_memory_per_block_optin: {target.lds_bytes}
  shared_memory_per_core: {target.lds_bytes}
  core_count: {target.compute_units} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65536 block_dim_limit_z: 65536
  memory_bandwidth: {round(target.bandwidth)} l2_cache_size: {l2} clock_rate_ghz: {target.clock_hz / 1e9:g}
  device_memory_size: {target.memory} registers_per_core_limit: {registers} registers_per_block_limit: {registers}
  rocm_compute_capability {{ gcn_arch_name: "{arch}" }}
}}
platform_name: "ROCM"
dnn_version_info {{ }}
device_description_str: "{target.label or target.name}"
"""
