"""Operations, and the choice among their backends."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import KernelError
from llama_jax.kernels.dispatch.backend import Backend
from llama_jax.kernels.dispatch.cases import Case
from llama_jax.kernels.dispatch.extra import extra
from llama_jax.kernels.dispatch.record import Choice, Recorder
from llama_jax.kernels.dispatch.tables import Rule, shipped_rules
from llama_jax.kernels.dispatch.user_table import user_rules
from llama_jax.kernels.registry import VARIABLE, parse_backends
from llama_jax.targets import Target, current

REFERENCE = "reference"

recorder = Recorder()
"""The choices made in this process; only reports read it."""


def _no_cases() -> Sequence[Case]:
    return ()


def _no_models(numbers: Mapping[str, Any] | None) -> Sequence[Case]:
    return ()


def _any_shape(*args: Any, **kwargs: Any) -> str:
    return "any"


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation and its implementations by name; "reference", the contract, is always among them.

    Attributes:
      name: its key in tables, in `using` and in LLAMA_JAX_KERNELS.
      backends: those of this package.
      shape: takes the operation's arguments; a short text that is equal for arguments which want the same backend and
        tiles. Tables match patterns against it.
      cases: small arguments to check the backends with.
      models: arguments as real models have them, to tune and to compile the backends with. Takes a model's numbers
        ("heads", "kv_heads", "head_dim", "experts", "top_k", "hidden", "intermediate", "scaled"), or None for those of
        common models; a model that does not use the operation has no cases.
    """

    name: str
    backends: Mapping[str, Backend]
    shape: Callable[..., str] = _any_shape
    cases: Callable[[], Sequence[Case]] = _no_cases
    models: Callable[[Mapping[str, Any] | None], Sequence[Case]] = _no_models

    def __call__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        """Runs the backend of that name, or the best one known for the target.

        Raises:
          KernelError: no backend of that name exists, or it cannot run these arguments on this target.
        """
        choice = choose(self, current(), backend, *args, **kwargs)
        recorder.add(choice)
        return runner(self, choice.backend, dict(choice.tiles))(*args, **kwargs)

    def all_backends(self) -> Mapping[str, Backend]:
        """The backends of this package and of plugins."""
        return {**extra().backends.get(self.name, {}), **self.backends}


# Both are part of jit's cache key: programs traced under another choice are traced again.
_preferred = jax.make_user_context(())
_disabled = jax.make_user_context(())


@contextmanager
def using(**backends: str) -> Iterator[None]:
    """Names the backend of operations for everything traced inside: `with using(flash_attention="reference"): ...`"""
    merged = dict(_preferred.value) | backends
    with _preferred(tuple(sorted(merged.items()))):
        yield


def disable(operation: str, backend: str, reason: str) -> None:
    """Disables a backend in this process: `auto` skips it, choosing it by name raises."""
    _disabled.set_global(tuple(sorted({**disabled(), (operation, backend): reason}.items())))


def disabled() -> dict[tuple[str, str], str]:
    """(operation, backend) to the reason why it may not be chosen."""
    return dict(_disabled.get_global() or ())


def runner(op: Operation, backend: str, tiles: Mapping[str, int]) -> Callable[..., Any]:
    """The function behind a choice. Tiles become the backend's own dataclass."""
    chosen = op.all_backends()[backend]
    if not tiles:
        return chosen.run
    assert chosen.tiles is not None
    return partial(chosen.run, tiles=chosen.tiles(**tiles))


def choose(op: Operation, target: Target, name: str, /, *args: Any, **kwargs: Any) -> Choice:
    """Chooses what to run on `target` for these arguments, which may be shapes only.

    Args:
      name: a backend's name, or "auto": the one that `using` or LLAMA_JAX_KERNELS names, else the first rule of the
        user's table and of the shipped one whose backend can run this, else the reference.

    Raises:
      KernelError: the named backend does not exist, is disabled, or cannot run this.
      RequestError: LLAMA_JAX_KERNELS cannot be understood.
    """
    dtype = next((jnp.dtype(x.dtype).name for x in _leaves(args, kwargs) if hasattr(x, "dtype")), "")
    shape = op.shape(*args, **kwargs)
    choice = partial(Choice, op.name, target.name, dtype, shape)
    name, who = _named(op.name, name)
    if name != "auto":
        _check_named(op, target, name, who, *args, **kwargs)
        return choice(name, reason=who)
    rules, notes = user_rules(op.name, target)
    passed_over = list(notes)
    for rule in (*rules, *shipped_rules(op.name, target)):
        if not rule.applies(dtype, shape):
            continue
        if not (why := _cannot(op, target, rule, *args, **kwargs)):
            return choice(rule.backend, rule.tiles, rule.source, rule.measured, tuple(passed_over))
        passed_over.append((rule.backend, why))
    return choice(REFERENCE, reason="no rule for this", passed_over=tuple(passed_over))


def _leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arrays and static arguments of a call, out of their records, in the order in which they are given."""
    return jax.tree.leaves([*args, *kwargs.values()])


def _named(operation: str, name: str) -> tuple[str, str]:
    """The backend that somebody has named, and who it was."""
    if name != "auto":
        return name, "named by the caller"
    if (preferred := dict(_preferred.value).get(operation, "auto")) != "auto":
        return preferred, "named by using() or load(kernels=)"
    return _named_for_the_process().get(operation, "auto"), f"named by {VARIABLE}"


@functools.cache
def _named_for_the_process() -> Mapping[str, str]:
    """LLAMA_JAX_KERNELS as it stood when the first program was traced: a program that is compiled already would not
    follow a later change, which `using` is for."""
    return parse_backends(os.environ.get(VARIABLE, ""))


def find_backend(op: Operation, name: str, who: str) -> Backend:
    """The backend of that name.

    Args:
      who: has named it, for messages.

    Raises:
      KernelError: there is none.
    """
    backends = op.all_backends()
    if name not in backends:
        broken = extra().problems.get(name)
        raise KernelError(
            f"operation {op.name!r} has no backend {name!r} ({who})" + (f": {broken}" if broken else ""),
            hint=f"choose one of: auto, {', '.join(sorted(backends))}",
        )
    return backends[name]


def _check_named(op: Operation, target: Target, name: str, who: str, /, *args: Any, **kwargs: Any) -> None:
    backend = find_backend(op, name, who)
    if reason := disabled().get((op.name, name)):
        raise KernelError(
            f"backend {name!r} of {op.name!r} ({who}) is disabled: {reason}",
            hint="leave the choice to auto; LLAMA_JAX_SELF_CHECK=0 runs it all the same",
        )
    reason = backend.unsupported(target, *args, **kwargs)
    if reason := reason or (None if name == REFERENCE else _split(args, kwargs)):
        raise KernelError(
            f"backend {name!r} of {op.name!r} ({who}) cannot run this on {target.name}: {reason}",
            hint="name another backend, or leave the choice to auto",
        )


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The reason a kernel that XLA cannot split must not run: the arrays may be split over the axes of a mesh. Inside
    `jax.shard_map` they are whole on each device. XLA splits references, which are plain operations, by itself."""
    for x in _leaves(args, kwargs):
        array = isinstance(x, jax.Array)
        mesh = getattr(jax.typeof(x).sharding if array else getattr(x, "sharding", None), "mesh", None)
        if mesh is None:
            continue
        axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if split := [name for name, size, kind in axes if size > 1 and kind != jax.sharding.AxisType.Manual]:
            return (
                f"the program is split over {', '.join(map(str, split))}, and XLA would gather all of a kernel's arrays"
            )
    return None


def _cannot(op: Operation, target: Target, rule: Rule, /, *args: Any, **kwargs: Any) -> str | None:
    """The reason the backend of a rule cannot be taken; None if it can."""
    backend = op.all_backends().get(rule.backend)
    if backend is None:
        return "there is no such backend here"
    if reason := disabled().get((op.name, rule.backend)):
        return f"disabled: {reason}"
    if (reason := _split(args, kwargs)) and rule.backend != REFERENCE:
        return reason
    if rule.tiles:
        try:
            if backend.tiles is None:
                return "it takes no tiles, though the table has some"
            backend.tiles(**dict(rule.tiles))
        except TypeError as error:
            return f"the table's tiles are not its own: {error}"
    return backend.unsupported(target, *args, **kwargs)
