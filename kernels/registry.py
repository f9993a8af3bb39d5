"""All operations by name, and the backends that other packages add to them.

Nothing here imports jax before an operation is requested, so that the command line can check names cheaply.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llama_jax.errors import RequestError

if TYPE_CHECKING:
    from llama_jax.kernels.dispatch import Operation

OPERATIONS = {
    "flash_attention": "llama_jax.kernels.attention.flash:flash_attention",
    "decode_attention": "llama_jax.kernels.attention.decode:decode_attention",
    "moe": "llama_jax.kernels.moe:routed_experts_op",
    "quantized_matmul": "llama_jax.kernels.quantized_matmul:quantized_matmul_op",
    "fused_matmul": "llama_jax.kernels.quantized_matmul.fused:fused_matmul_op",
    "integer_matmul": "llama_jax.kernels.integer_matmul:integer_matmul_op",
    "quantized_moe": "llama_jax.kernels.quantized_moe:quantized_moe_op",
    "add_rms_norm": "llama_jax.kernels.norm:add_rms_norm_op",
    "rope_and_store": "llama_jax.kernels.rope:rope_and_store_op",
    "add_lora": "llama_jax.kernels.lora:add_lora_op",
}
"""Name of each operation, and its module."""

VARIABLE = "LLAMA_JAX_KERNELS"
"""Names the backend of operations for a whole process: "flash_attention=reference,moe=pallas_triton"."""


def operation(name: str) -> Operation:
    """The operation of that name. Imports jax.

    Raises:
      RequestError: there is none.
    """
    if name not in OPERATIONS:
        raise RequestError(f"no operation {name!r}", param="op", hint=f"known: {', '.join(OPERATIONS)}")
    module, _, attribute = OPERATIONS[name].partition(":")
    found: Operation = getattr(importlib.import_module(module), attribute)
    return found


def parse_backends(named: str | Mapping[str, str], param: str = VARIABLE) -> dict[str, str]:
    """Operation to backend from "op=backend,op=backend", or from a mapping. Whether a backend exists is not looked at.

    Args:
      param: what is read, for messages.

    Raises:
      RequestError: an item is not of this form, or an operation is unknown or named twice.
    """
    if isinstance(named, str):
        items = [part.partition("=") for part in named.split(",") if part.strip()]
    else:
        items = [(name, "=", backend) for name, backend in named.items()]
    found: dict[str, str] = {}
    for item in items:
        name, equals, backend = (part.strip() if isinstance(part, str) else "" for part in item)
        if not equals or not backend:
            problem = f"{''.join(map(str, item)).strip()!r} is not of the form operation=backend"
        elif name not in OPERATIONS:
            problem = f"there is no operation {name!r}"
        elif name in found:
            problem = f"{name!r} is named twice"
        else:
            found[name] = backend
            continue
        raise RequestError(
            f"{param}: {problem}",
            param=param,
            hint=f"for example flash_attention=reference; operations: {', '.join(OPERATIONS)}",
        )
    return found


def checked_backends(named: str | Mapping[str, str] | None) -> dict[str, str]:
    """Operation to backend, as `load(kernels=)` takes them; every backend exists. Imports jax.

    Raises:
      RequestError: as `parse_backends` says.
      KernelError: an operation has no backend of that name.
    """
    from llama_jax.kernels.dispatch.operation import find_backend

    found = parse_backends(named or {}, "kernels")
    for name, backend in found.items():
        if backend != "auto":
            find_backend(operation(name), backend, "named by load(kernels=)")
    return found
