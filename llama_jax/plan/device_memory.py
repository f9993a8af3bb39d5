"""The memory of a device that a model may use: as jax reports it, or a share of the table's figure."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence

import jax

from llama_jax.errors import RequestError
from llama_jax.targets import Target

MEMORY_FRACTION = 0.75
"""Share of a GPU's memory that jax takes unless XLA_CLIENT_MEM_FRACTION says otherwise
(https://docs.jax.dev/en/latest/gpu_memory_allocation.html). Code, the libraries' own buffers and the display have the
rest."""

ENGINE_FRACTION = 0.9
"""The fraction taken by a command that runs only an engine on a GPU."""

_FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def claim_memory(environment: MutableMapping[str, str], *, started: bool) -> bool:
    """Lets jax take `ENGINE_FRACTION` of a GPU's memory; returns whether it did.

    Args:
      environment: of this process. A fraction that is set there already is left alone.
      started: whether jax's backend has: it has taken the memory then.
    """
    if started or any(environment.get(name) for name in _FRACTION_VARIABLES):
        return False
    environment[_FRACTION_VARIABLES[0]] = str(ENGINE_FRACTION)
    return True


def more_memory_hint(fraction: float) -> str:
    """A hint about more room for an engine, if jax may use less of a GPU's memory than it could; else empty."""
    if fraction >= ENGINE_FRACTION:
        return ""
    return (
        f"jax took {fraction:.0%} of the GPU's memory when it started: "
        f"{_FRACTION_VARIABLES[0]}={ENGINE_FRACTION} in the environment, before, makes more room"
    )


def memory_fraction(default: float = MEMORY_FRACTION) -> float:
    """The fraction from the environment, or jax's default.

    Raises:
      RequestError: the variable holds no number.
    """
    name = next((name for name in _FRACTION_VARIABLES if os.environ.get(name)), None)
    if name is None:
        return default
    try:
        return float(os.environ[name])
    except ValueError:
        raise RequestError(f"{name}={os.environ[name]!r} is not a number", param=name, hint="e.g. 0.9") from None


def usable_bytes(target: Target, fraction: float) -> int | None:
    """Bytes of a device that jax may use; None where the table has no memory for the target."""
    return int(target.memory * fraction) if target.memory else None


def free_bytes(devices: Sequence[jax.Device], target: Target) -> int | None:
    """Bytes that are free on each of these devices, by the one that has least: of what jax may use, less what this
    process has there already. Other processes' memory is not seen. None where it is not known, as on a CPU.

    Args:
      devices: which are all of the kind `target`.
    """
    known = [_free(device) for device in devices]
    found = [usable_bytes(target, memory_fraction()) if free is None else free for free in known]
    each = [free for free in found if free is not None]
    return min(each) if each and len(each) == len(found) else None


def _free(device: jax.Device) -> int | None:
    """By the device's own allocator; None for one that keeps no account, such as a CPU's, or "platform" on a GPU."""
    try:
        stats = device.memory_stats() or {}
    except RuntimeError:
        return None
    limit = stats.get("bytes_limit")
    return None if not limit else max(0, limit - stats.get("bytes_in_use", 0))
