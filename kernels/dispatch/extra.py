"""Backends that other packages add, through the entry points of `llama_jax.plugins.KERNELS`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from llama_jax.kernels.dispatch.backend import Backend
from llama_jax.kernels.registry import OPERATIONS
from llama_jax.plugins import KERNELS, Plugin, load_each


@dataclass(frozen=True)
class Extra:
    """What the plugins gave.

    Attributes:
      backends: operation to backends by name.
      problems: plugin's name to what is wrong with it.
      origins: the package, version and object of each plugin that works.
    """

    backends: Mapping[str, Mapping[str, Backend]]
    problems: Mapping[str, str]
    origins: tuple[str, ...] = ()


@functools.cache
def extra() -> Extra:
    """Looked up once a process; each broken plugin gives one warning, and an error when its backend is named."""
    backends: dict[str, dict[str, Backend]] = {}
    problems: dict[str, str] = {}
    origins = []
    for plugin in load_each(KERNELS):
        if problem := plugin.problem or _problem(plugin, backends):
            problems[plugin.name] = f"the plugin {plugin.name!r} of {plugin.origin} is broken: {problem}"
            warnings.warn(f"llama_jax: {problems[plugin.name]}", RuntimeWarning, stacklevel=2)
            continue
        for operation, backend in plugin.value.items():
            backends.setdefault(operation, {})[plugin.name] = backend
        origins.append(plugin.origin)
    return Extra(backends, problems, tuple(sorted(origins)))


def _problem(plugin: Plugin, taken: Mapping[str, Mapping[str, Backend]]) -> str:
    """What is wrong with a plugin that could be imported; "" if nothing."""
    value = plugin.value
    if not isinstance(value, Mapping) or not value or not all(isinstance(b, Backend) for b in value.values()):
        return "it is not a mapping from operations to llama_jax.kernels.dispatch.Backend"
    if unknown := [name for name in value if name not in OPERATIONS]:
        return f"there is no operation {unknown[0]!r}; known: {', '.join(OPERATIONS)}"
    if twice := [name for name in value if plugin.name in taken.get(name, ())]:
        return f"another plugin has given {twice[0]!r} a backend of this name"
    return ""
