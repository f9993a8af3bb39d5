"""Operations with more than one implementation: one folder an operation, the pure jnp reference is the contract.

`llama_jax.kernels` knows nothing of the model: it sees arrays and the numbers that describe them. README.md beside this
file says how to add an operation or a backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.kernels.dispatch import Choice


def report() -> dict[Choice, int]:
    """The backend of each operation in the programs traced by this process, why, and how often; imports jax."""
    from llama_jax.kernels.dispatch.operation import recorder

    return recorder.counts()


def choices() -> tuple[Choice, ...]:
    """The choices of `auto` on this device for the small cases of every operation; imports jax, computes nothing."""
    from llama_jax.kernels.dispatch.operation import choose
    from llama_jax.kernels.registry import OPERATIONS, operation
    from llama_jax.targets import current

    chosen: dict[Choice, None] = {}
    for op in map(operation, OPERATIONS):
        for case in op.cases():
            choice = choose(op, current(), "auto", **case.arguments())
            chosen[choice] = None
    return tuple(chosen)
