"""Which implementation of an operation runs. A backend named by the caller works or raises; nothing falls back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llama_jax.errors import KernelError

Backend = Callable[..., Any]


def choose(op: str, backends: Mapping[str, Backend], name: str = "auto") -> Backend:
    """The implementation of `op` to run.

    Args:
      op: name of the operation, for the error message.
      backends: implementations by name; "reference" is always among them.
      name: a backend's name, or "auto" for the best one known for this device (today: the reference).

    Raises:
      KernelError: no backend of that name exists for this operation.
    """
    if name == "auto":
        name = "reference"
    if name not in backends:
        raise KernelError(
            f"operation {op!r} has no backend {name!r}",
            hint=f"choose one of: auto, {', '.join(sorted(backends))}",
        )
    return backends[name]
