"""All operations by name, and the backends that other packages add to them.

Nothing here imports jax before an operation is asked for, so that the command line can check names cheaply.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from llama_jax.errors import RequestError

if TYPE_CHECKING:
    from llama_jax.kernels.dispatch import Operation

OPERATIONS = {
    "flash_attention": "llama_jax.kernels.attention.flash:flash_attention",
    "decode_attention": "llama_jax.kernels.attention.decode:decode_attention",
    "moe": "llama_jax.kernels.moe:grouped_experts",
    "add_rms_norm": "llama_jax.kernels.norm:add_rms_norm_op",
}
"""Name of each operation and where it stands."""

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


def parse_backends(text: str) -> dict[str, str]:
    """Operation to backend from "op=backend,op=backend"; "" is none. Whether a backend exists is not looked at.

    Raises:
      RequestError: an item is not of this form, or an operation is unknown or named twice.
    """
    named: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, backend = (part.strip() for part in item.partition("="))
        if not equals or not backend:
            problem = f"{item!r} is not of the form operation=backend"
        elif name not in OPERATIONS:
            problem = f"there is no operation {name!r}"
        elif name in named:
            problem = f"{name!r} is named twice"
        else:
            named[name] = backend
            continue
        raise RequestError(
            f"{VARIABLE}: {problem}",
            param=VARIABLE,
            hint=f"for example {VARIABLE}=flash_attention=reference; operations: {', '.join(OPERATIONS)}",
        )
    return named
