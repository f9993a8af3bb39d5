"""Backends that other packages add, through the entry points of `llama_jax.plugins.KERNELS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llama_jax.kernels.dispatch.backend import Backend
from llama_jax.kernels.registry import OPERATIONS, operation
from llama_jax.plugins import KERNELS, Plugin, load, sound


@dataclass(frozen=True)
class Extra:
    """The kernel backends that plugins provide, and problems with them.

    Attributes:
      backends: operation to backends by name.
      problems: plugin's name to what is wrong with it.
      origins: the package, version and object of each plugin that works.
    """

    backends: Mapping[str, Mapping[str, Backend]]
    problems: Mapping[str, str]
    origins: tuple[str, ...] = ()


def extra() -> Extra:
    """Backends of sound plugins. A broken one is an error when its backend is named."""
    backends: dict[str, dict[str, Backend]] = {}
    for plugin in sound(KERNELS):
        for name, backend in plugin.value.items():
            backends.setdefault(name, {})[plugin.name] = backend
    problems = {plugin.name: plugin.report for plugin in load(KERNELS) if plugin.problem}
    return Extra(backends, problems, tuple(sorted(plugin.origin for plugin in sound(KERNELS))))


def plugin_problem(plugin: Plugin, earlier: Sequence[Plugin]) -> str:
    """Describes the fault of a plugin that should add backends; "" if it has none."""
    value = plugin.value
    if not isinstance(value, Mapping) or not value or not all(isinstance(b, Backend) for b in value.values()):
        return "it is not a mapping from operations to llama_jax.kernels.dispatch.Backend"
    if unknown := [name for name in value if name not in OPERATIONS]:
        return f"there is no operation {unknown[0]!r}; known: {', '.join(OPERATIONS)}"
    taken = [name for p in earlier if p.name == plugin.name for name in p.value]
    if twice := [name for name in value if name in taken or plugin.name in operation(name).backends]:
        return f"{twice[0]!r} has another backend of this name"
    return ""
