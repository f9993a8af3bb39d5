"""Chooses the implementation of an operation. A backend named by the caller works or raises; no silent fallback.

The choice is made while a program is traced, from shapes, dtypes and the target (`llama_jax.targets.current`), so a
compiled program holds one implementation and costs nothing to choose. Who decides, the first that speaks: the argument
`backend`, `using`, the variable LLAMA_JAX_KERNELS (as the first choice of a process finds it), the user's tuned table,
the shipped table.
"""

from __future__ import annotations

from llama_jax.kernels.dispatch.backend import Backend
from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.dispatch.operation import REFERENCE, Operation, choose, disable, disabled, using
from llama_jax.kernels.dispatch.record import Choice

__all__ = ["REFERENCE", "Backend", "Case", "Choice", "Operation", "choose", "disable", "disabled", "using"]
