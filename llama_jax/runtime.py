"""Settings of the JAX runtime that every entry point shares."""

from __future__ import annotations

import functools
import gc
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from llama_jax.folders import cache_dir

PROGRAMS_VARIABLE = "LLAMA_JAX_STORED_PROGRAMS"

if TYPE_CHECKING:
    from llama_jax.sharding import DeviceMesh


def default_dtype() -> jnp.dtype:
    """Default compute dtype: float32 on a CPU, bfloat16 on a GPU."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def device_name(device: jax.Device | None = None, mesh: DeviceMesh | None = None) -> str:
    """The display name of a device or a mesh, e.g. "cpu (TFRT_CPU_0)", "4 x cpu (data=2, tensor=2)"."""
    if mesh is not None:
        kinds = " and ".join(sorted({d.device_kind for d in mesh.devices.flat}))
        return f"{mesh.size} x {kinds} ({', '.join(f'{name}={size}' for name, size in mesh.shape.items())})"
    device = device or jax.devices()[0]
    return f"{device.device_kind} ({device})"


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next process need not compile them again.

    A folder that the user has chosen (JAX_COMPILATION_CACHE_DIR or jax.config) is left alone; setting
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    # By default jax skips programs that compile in under a second; here many small ones add up at start-up.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def programs_dir(platform: str) -> Path | None:
    """The folder of programs that are found without tracing (`aot.stored`), beside jax's own; None if jax's cache is
    off.

    Args:
      platform: of the devices; on a CPU there is none unless LLAMA_JAX_STORED_PROGRAMS=1, elsewhere unless it is 0.
    """
    folder = jax.config.jax_compilation_cache_dir
    wanted = os.environ.get(PROGRAMS_VARIABLE) or ("0" if platform == "cpu" else "1")
    kept = jax.config.jax_enable_compilation_cache and wanted != "0"
    return Path(folder) / "programs" if kept and folder and "://" not in folder else None


class Compilations(threading.local):
    """Programs that jax has compiled on this thread since the first call of `count_compilations`.

    Attributes:
      count: programs, those from the persistent cache included; from_cache: those.
      last: name of the last one, as jax has it.
    """

    count: int = 0
    from_cache: int = 0
    last: str = ""


@functools.cache
def count_compilations() -> Compilations:
    """Starts counting, once for the process; a thread reads its own counts."""
    found = Compilations()

    def compiled(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.count += 1
            found.last = str(kwargs.get("fun_name", ""))

    def happened(event: str, **kwargs: str | int) -> None:
        found.from_cache += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(compiled)
    jax.monitoring.register_event_listener(happened)
    return found


def freeze_live_objects() -> None:
    """Excludes all live objects from Python's garbage collection, which would now and then delay an engine for
    several steps: 0.1 s for the 100,000 objects that jax creates.

    For a process that only runs engines: objects alive now that become cyclic garbage are kept until the
    next call.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
