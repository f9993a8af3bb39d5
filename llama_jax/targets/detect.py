"""Which target a program is traced for."""

from __future__ import annotations

from llama_jax.targets.table import Target, find


def current() -> Target:
    """The target of the program that is being traced: the abstract device of the mesh in use (compilation for another
    machine), else the default device. Imports jax.

    The abstract mesh is part of jit's cache key, so a program traced for one target is never reused for another.

    Raises:
      RequestError: the device is not in the table.
    """
    import jax

    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return find(device.device_kind)
    backend = jax.default_backend()
    if backend == "cpu":
        return find("cpu")
    real = jax.devices()[0]
    return find(getattr(real, "compute_capability", real.device_kind) if backend == "rocm" else "h100")
