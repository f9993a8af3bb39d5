"""What a device is: the numbers that kernels, plans and reports are made from, and compilation for AMD GPUs from any
machine.

    target = find("mi300x")
    compiled = compile_for(target, f, (jax.ShapeDtypeStruct((8, 4096), "bfloat16"),))
    print(compiled.memory, compiled.kernels)

Importing this package does not import jax.
"""

from __future__ import annotations

from llama_jax.targets.compilation import Compilation, compile_for, device_mesh
from llama_jax.targets.compiler.hlo import Collective
from llama_jax.targets.detect import abstract_device, current, default_device, detected, of_device
from llama_jax.targets.table import TARGETS, added_targets, find
from llama_jax.targets.target import Cache, Links, Rates, Source, Target

__all__ = [
    "TARGETS",
    "Cache",
    "Collective",
    "Compilation",
    "Links",
    "Rates",
    "Source",
    "Target",
    "abstract_device",
    "added_targets",
    "compile_for",
    "current",
    "default_device",
    "detected",
    "device_mesh",
    "find",
    "of_device",
]
