"""Environment variables that change what runs where."""

from __future__ import annotations

from collections.abc import Mapping

from llama_jax.doctor.report import Check
from llama_jax.targets import hardware

ENVIRONMENT = (
    "JAX_PLATFORMS",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_COMPILATION_CACHE",
    "XLA_FLAGS",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "AMD_COMGR_NAMESPACE",
    "LD_LIBRARY_PATH",
    "LLAMA_JAX_CACHE",
    "LLAMA_JAX_KERNELS",
    "LLAMA_JAX_ROCM",
    "LLAMA_JAX_SELF_CHECK",
    "LLAMA_JAX_OFFLINE",
    "LLAMA_JAX_YES",
    "HF_HUB_OFFLINE",
)
"""Variables that change what runs where, and are shown if they are set."""
PREFIXES = ("NCCL_", "RCCL_", "HSA_")
"""So are all that begin so: settings of the libraries that GPUs exchange data with, and of AMD's runtime."""

_SLOW = {
    "NCCL_P2P_DISABLE": "GPUs do not copy to one another, but through the host's memory",
    "NCCL_SHM_DISABLE": "GPUs that cannot copy to one another exchange data through network sockets",
}


def shown(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of interest that are set."""
    prefixed = sorted(name for name in environ if name.startswith(PREFIXES))
    return {name: environ[name] for name in (*ENVIRONMENT, *prefixed) if name in environ}


def check_environment(environ: Mapping[str, str], found: tuple[hardware.Gpu, ...] = ()) -> list[Check]:
    """Variables that make GPUs fail in ways that look like something else, or slow.

    Args:
      found: the machine's GPUs.
    """
    checks = []
    if value := environ.get("HSA_OVERRIDE_GFX_VERSION"):
        detail = f"HSA_OVERRIDE_GFX_VERSION={value} makes ROCm run code of another GPU: wrong results, or crashes"
        checks.append(Check("environment", "warning", detail, "unset HSA_OVERRIDE_GFX_VERSION"))
    if len(found) > 1:
        for name, effect in _SLOW.items():
            if environ.get(name, "0") not in ("", "0"):
                fix = f"unset {name}, unless exchange hangs without it"
                checks.append(Check("environment", "warning", f"{name}={environ[name]}: {effect}", fix))
    return checks
