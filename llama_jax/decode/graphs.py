"""Compiler options for GPU graphs, where XLA's defaults lose time.

XLA replays the kernels of a step as a CUDA graph, and asks the host after each step whether there is another. A graph
can loop by itself: a step of Llama-3.2-1B on an H100 took 1.21 ms instead of 1.30, one of 8B 3 % less.

A step of a split model has two small all-reduces per layer. XLA's own kernel for small all-reduces cannot be captured
in a graph: a step of Llama-3.1-8B on two H100s became 66 graphs with an all-reduce between each two, and lost 0.55 of
its 4.5 ms waiting for launches. NCCL's all-reduces can be captured, so that a step is one graph (docs/sharding.md has
the profile). In a looping graph they can be only if NCCL was told, before it first connected the GPUs, that nothing
runs concurrently (`make_mesh` does this), which cannot be known here: on several devices there is one graph per step.

A graph holds addresses. When a program's temporary memory has moved since the last launch, the host has to update
every node before the first kernel runs: 2 to 5 ms for a step of Llama-3.1-8B on an H200. Temporaries move when small
arrays, which come and go with every dispatch, take their place (`small_places`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping

import jax
import numpy as np

from llama_jax.sharding import in_use
from llama_jax.targets import current

CompilerOptions = dict[str, str | bool]
"""Compiler options of `jax.jit`, by the names of XLA's flags; jax accepts a switch only as a bool."""

_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL"
"""Commands captured in graphs by XLA's defaults in jax 0.11.2."""

_ONE_DEVICE: Mapping[str, str | bool] = {"xla_gpu_enable_command_buffer": f"{_COMMANDS},WHILE"}

SMALL, EACH = tuple(1 << n for n in range(8, 21)), 4
"""Sizes of small arrays (256 bytes to 1 MiB), and how many of each size may exist at once."""

_SEVERAL_DEVICES: Mapping[str, str | bool] = {
    "xla_gpu_experimental_use_collective_kernels": "",
    "xla_gpu_enable_command_buffer": f"{_COMMANDS},COLLECTIVES",
    "xla_gpu_disable_async_collectives": "ALLREDUCE",
}
"""NCCL for every all-reduce, all-reduces in graphs, and nothing overlapped with them."""


def loops_in_graphs(*, several: bool) -> bool:
    """Whether a GPU runs several steps without asking the host between them.

    Args:
      several: whether the model is split over devices.
    """
    return "WHILE" in str(graph_options(several=several).get("xla_gpu_enable_command_buffer", ""))


def graph_options(*, several: bool | None = None) -> CompilerOptions:
    """Compiler options for a program that runs many steps per dispatch.

    Empty on AMD GPUs, where none of this has been measured. Flags that the user has set in XLA_FLAGS are left alone.
    Preparing such a graph takes some milliseconds per dispatch, so it is not for single steps.

    Args:
      several: whether the model is split over devices; by default whether a mesh is in use.
    """
    if current().vendor != "nvidia":
        return {}
    return unless_set(_SEVERAL_DEVICES if (in_use() if several is None else several) else _ONE_DEVICE)


def unless_set(options: Mapping[str, str | bool]) -> CompilerOptions:
    """The compiler options that the user has not set in XLA_FLAGS."""
    set_by_user = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in options.items() if name not in set_by_user}


@functools.cache
def small_places(devices: tuple[jax.Device, ...]) -> list[jax.Array]:
    """Makes room for small arrays in GPU memory, apart from the free memory that holds temporaries; once per process.

    jax's allocator is best-fit. Of adjacent arrays of each size, every other one is freed: the holes cannot be merged
    again.

    Returns:
      The arrays between them, 10 MB per device, which are kept for the life of the process; none on a CPU.
    """
    kept = []
    for device in devices:
        if device.platform == "cpu":
            continue
        for size in SMALL:
            arrays = [jax.device_put(np.zeros(size, np.uint8), device) for _ in range(2 * EACH + 1)]
            jax.block_until_ready(arrays)
            kept += arrays[::2]
            for array in arrays[1::2]:
                array.delete()
    return kept
