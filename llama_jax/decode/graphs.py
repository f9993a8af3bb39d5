"""How XLA compiles programs into graphs of the GPU, where its defaults lose time.

XLA replays the kernels of a step as a CUDA graph, and asks the host after each whether there is another one. A graph
can loop by itself: a step of Llama-3.2-1B on an H100 took 1.21 ms instead of 1.30, one of 8B 3 % less.

A step of a split model passes through two small sums a layer. XLA's own kernel for small sums cannot be part of a
graph: a step of Llama-3.1-8B on two H100s became 66 graphs with a sum between each two, and lost 0.55 of its 4.5 ms
waiting for launches. NCCL's sums can be, so that a step is one graph (docs/sharding.md has the profile). In a graph
that loops they can be only if NCCL was told, before it first connected the GPUs, that nothing runs beside it
(`make_mesh` does), which cannot be known here: on several devices it is one graph a step.

A step with prompts that begins when the device is idle is one graph by default, which the host makes ready as a whole,
and again whenever one of its arrays lies elsewhere, before the first kernel runs: 4 to 6 ms of an H200's 8 for 256
tokens of Llama-3.1-8B. With products outside of graphs the first kernels run while the host makes the rest ready.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from llama_jax.sharding import in_use
from llama_jax.targets import current

_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL"
"""What is part of graphs by XLA's defaults in jax 0.11.2."""

_ONE_DEVICE = {"xla_gpu_enable_command_buffer": f"{_COMMANDS},WHILE"}

_EARLY = {"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL,DYNAMIC_SLICE_FUSION"}
"""Graphs of the few kernels between two products."""

_SEVERAL_DEVICES = {
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
    return "WHILE" in graph_options(several=several).get("xla_gpu_enable_command_buffer", "")


def graph_options(*, several: bool | None = None) -> dict[str, str]:
    """Compiler options for a program that runs many steps a dispatch.

    Empty on AMD GPUs, where nothing of this has been measured. A flag that the user has set in XLA_FLAGS is left to the
    user. Making such a graph ready takes some milliseconds a dispatch, so it is not for single steps.

    Args:
      several: whether the model is split over devices; by default whether a mesh is in use.
    """
    return _for_nvidia(_SEVERAL_DEVICES if (in_use() if several is None else several) else _ONE_DEVICE)


def prompt_options() -> dict[str, str]:
    """Compiler options for a step with prompts, under the same conditions; empty where a mesh is in use."""
    return {} if in_use() else _for_nvidia(_EARLY)


def _for_nvidia(options: Mapping[str, str]) -> dict[str, str]:
    if current().vendor != "nvidia":
        return {}
    set_by_user = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in options.items() if name not in set_by_user}
