"""How XLA runs programs as graphs of the GPU, where its defaults lose time.

XLA replays the kernels of a step as a CUDA graph, and asks the host after each whether there is another one. A graph
can loop by itself: a step of Llama-3.2-1B on an H100 took 1.21 ms instead of 1.30, one of 8B 3 % less.

A step of a split model passes through two small sums a layer. XLA's own kernel for small sums cannot be part of a
graph: a step of Llama-3.1-8B on two H100s became 66 graphs with a sum between each two, and lost 0.55 of its 4.5 ms
waiting for launches. NCCL's sums can be, so that a step is one graph (docs/sharding.md has the profile). In a graph
that loops they can be only if NCCL was told, before it first connected the GPUs, that nothing runs beside it
(`make_mesh` does), which cannot be known here: on several devices it is one graph a step.

A graph holds addresses. When a program's temporary memory lies elsewhere than the last time, the host has to change
every node before the first kernel runs: 2 to 5 ms for a step of Llama-3.1-8B on an H200. Temporaries move when small
arrays, which come and go with every dispatch, are put where they were (`small_places`).
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
"""Of `jax.jit`, by the names of XLA's flags; jax takes a switch as a bool alone."""

_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL"
"""What is part of graphs by XLA's defaults in jax 0.11.2."""

_ONE_DEVICE: Mapping[str, str | bool] = {"xla_gpu_enable_command_buffer": f"{_COMMANDS},WHILE"}

SMALL, EACH = tuple(1 << n for n in range(8, 21)), 4
"""Bytes of small arrays, and how many of each size may be there at once: 256 bytes to 1 MiB."""

_SEVERAL_DEVICES: Mapping[str, str | bool] = {
    "xla_gpu_experimental_use_collective_kernels": "",
    "xla_gpu_enable_command_buffer": f"{_COMMANDS},COLLECTIVES",
    "xla_gpu_disable_async_collectives": "ALLREDUCE",
}
"""NCCL for every sum, sums in graphs, and nothing beside them to overlap with."""


def loops_in_graphs(*, several: bool) -> bool:
    """Whether a GPU runs several steps without asking the host between them.

    Args:
      several: whether the model is split over devices.
    """
    return "WHILE" in str(graph_options(several=several).get("xla_gpu_enable_command_buffer", ""))


def graph_options(*, several: bool | None = None) -> CompilerOptions:
    """Compiler options for a program that runs many steps a dispatch.

    Empty on AMD GPUs, where nothing of this has been measured. A flag that the user has set in XLA_FLAGS is left to the
    user. Making such a graph ready takes some milliseconds a dispatch, so it is not for single steps.

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
    """Makes places for small arrays in the memory of GPUs, apart from the free memory where temporaries lie; once for
    the process.

    jax's allocator takes the smallest free place that is large enough. Of arrays of each size that lie side by side,
    every other one is given back: their places cannot grow together again.

    Returns:
      The arrays between them, 10 MB a device, which are kept as long as the process lasts; none on a CPU.
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
