"""Which implementation of an operation runs. A backend named by the caller works or raises; nothing falls back.

The choice is made while a program is traced, from shapes, dtypes and the target (`llama_jax.targets.current`), so a
compiled program holds one implementation and costs nothing to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from llama_jax.errors import KernelError
from llama_jax.targets import Target, current


def _always(target: Target, *args: Any, **kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    Attributes:
      run: takes the operation's arguments, and returns what its reference returns.
      unsupported: takes the target and the operation's arguments; why this backend cannot run them there, or None.
    """

    run: Callable[..., Any]
    unsupported: Callable[..., str | None] = _always


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation and its implementations by name; "reference", the contract, is always among them."""

    name: str
    backends: Mapping[str, Backend]

    def __call__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        """Runs the backend of that name, or the best one known for the target.

        Raises:
          KernelError: no backend of that name exists, or it cannot run these arguments on this target.
        """
        target = current()
        return choose(self, target, backend, *args, **kwargs).run(*args, **kwargs)


# Part of jit's cache key: programs traced under another choice are traced anew.
_preferred = jax.make_user_context(())


@contextmanager
def using(**backends: str) -> Iterator[None]:
    """Names the backend of operations for everything traced inside: `with using(flash_attention="reference"): ...`"""
    merged = dict(_preferred.value) | backends
    with _preferred(tuple(sorted(merged.items()))):
        yield


def choose(op: Operation, target: Target, name: str, *args: Any, **kwargs: Any) -> Backend:
    """The implementation of `op` to run on `target` for these arguments.

    Args:
      name: a backend's name, or "auto": the one that `using` names, else the best one known for the target.

    Raises:
      KernelError: the backend named by the caller or by `using` does not exist or cannot run this.
    """
    if name == "auto":
        name = dict(_preferred.value).get(op.name, "reference")
    if name not in op.backends:
        raise KernelError(
            f"operation {op.name!r} has no backend {name!r}",
            hint=f"choose one of: auto, {', '.join(sorted(op.backends))}",
        )
    backend = op.backends[name]
    reason = backend.unsupported(target, *args, **kwargs)
    if reason:
        raise KernelError(
            f"backend {name!r} of {op.name!r} cannot run this on {target.name}: {reason}",
            hint="name another backend, or leave the choice to auto",
        )
    return backend
