"""Memory budget of several models on one server's devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import psutil
from jax.typing import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.engine.sizing import least_settings
from llama_jax.plan.device_memory import free_bytes
from llama_jax.plan.memory import DeviceShare, cache_bytes
from llama_jax.sharding import AnyMesh
from llama_jax.targets import default_device, of_device
from llama_jax.targets.hardware import memory_limit

Free = Callable[[], int | None]
"""Returns the free bytes on the device with the least; None if unknown."""


@dataclass(frozen=True)
class Footprint:
    """The least memory that a model needs on each device.

    Attributes:
      nbytes: of weights while they are loaded, of the largest step, and of the cache of one sequence.
      context: tokens of a sequence.
      step: bytes of the largest step alone, which are free between steps.
    """

    nbytes: int
    context: int
    step: int = 0


def footprint(
    config: LlamaConfig, dtype: DTypeLike, mesh: AnyMesh = None, *, kv_dtype: str | None = None, **options: Any
) -> Footprint:
    """Return a model's footprint.

    Args:
      config: with the schemes of its weights; dtype: in which it computes.
      options: of the engine: rows, context, pages, page_size.

    Raises:
      RequestError: an option does not fit the model.
    """
    target, itemsize = of_device(default_device()), jnp.dtype(dtype).itemsize
    share = DeviceShare(config, target, mesh, itemsize, kv_dtype)
    settings, beside = least_settings(share.config, dtype, mesh, on_cpu=target.vendor == "cpu", **options)
    cache = cache_bytes(share.config, mesh, itemsize, settings.pages * settings.page_size, kv_dtype)
    return Footprint(share.loading + beside + cache, min(settings.capacity, config.context_length), beside)


def reserve(free: int, need: int, others: Iterable[int]) -> int:
    """Return the bytes that a model must leave free for others to be loaded beside it.

    Models whose needs fit together share the rest evenly, so that each can cache many sequences. A model that does not
    fit beside this one and those before it is left out: it will have to wait for room.

    Args:
      free: bytes; need: of the model being loaded; others: needs of those not loaded, by precedence.
    """
    left, kept, sharers = free - need, 0, 1
    for other in others:
        if other <= left:
            left, kept, sharers = left - other, kept + other, sharers + 1
    return kept + max(left, 0) * (sharers - 1) // sharers


def free_here() -> int | None:
    """Return the free bytes on each device that jax would use; for a CPU those of the host."""
    device = default_device()
    alike = [one for one in device.client.local_devices() if one.device_kind == device.device_kind]
    free = free_bytes(alike, of_device(device))
    if free is not None or device.platform != "cpu":
        return free
    available, limit = psutil.virtual_memory().available, memory_limit()
    return available if limit is None else max(0, min(available, limit - psutil.Process().memory_info().rss))
