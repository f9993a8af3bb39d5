"""How XLA compiles a decode step that is split over several GPUs, where its defaults lose time.

A step of a split model passes through two small sums a layer. XLA replays kernels as CUDA graphs, but its own kernel
for small sums cannot be part of one: a step of Llama-3.1-8B on two H100s became 66 graphs with a sum between each two,
and lost 0.55 of its 4.5 ms waiting for launches. NCCL's sums can be captured, so that a step is one graph: 4.0 ms
(docs/sharding.md has the profile).
"""

from __future__ import annotations

import os

from llama_jax.sharding.activations import in_use
from llama_jax.targets import current

_CAPTURED = {
    "xla_gpu_experimental_use_collective_kernels": "",
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,COLLECTIVES"
    ),
    "xla_gpu_disable_async_collectives": "ALLREDUCE",
}
"""XLA's defaults in jax 0.11.2, with NCCL for every sum, sums in graphs, and nothing beside them to overlap with."""


def capture_options() -> dict[str, str]:
    """Compiler options for a program that runs many steps a dispatch, on the mesh in use.

    Empty without a mesh, and on AMD GPUs, where nothing of this has been measured. A flag that the user has set in
    XLA_FLAGS is left to the user. Capturing sums takes some milliseconds a dispatch, so it is not for single steps.
    """
    if not in_use() or current().vendor != "nvidia":
        return {}
    set_by_user = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in _CAPTURED.items() if name not in set_by_user}
