"""Compilation for devices that this machine lacks: AMD GPUs from any x86-64 Linux machine.

compiled = compile_for(find("mi300x"), f, (jax.ShapeDtypeStruct((8, 4096), "bfloat16"),))
print(compiled.memory, compiled.kernels)
"""

from __future__ import annotations

from llama_jax.aot.compilation import Compilation, compile_for, device_mesh

__all__ = ["Compilation", "compile_for", "device_mesh"]
