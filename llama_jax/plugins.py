"""Extension by other packages, through entry points: the groups, and how they are loaded and checked (docs/plugins.md).

https://packaging.python.org/en/latest/specifications/entry-points/

A broken plugin is reported, once as a warning and in `llama-jax plugins`, and affects nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any


@dataclass(frozen=True)
class Group:
    """A group of entry points.

    Attributes:
      name: of the group, as packages write it.
      check: "module:function" of the room that owns the group. The function takes a plugin and the sound ones before it
        in the group, and returns what is wrong with it, "" if nothing.
    """

    name: str
    check: str

    def problem(self, plugin: Plugin, earlier: Sequence[Plugin]) -> str:
        """The fault of a plugin; "" if none."""
        module, _, function = self.check.partition(":")
        check: Callable[[Plugin, Sequence[Plugin]], str] = getattr(importlib.import_module(module), function)
        return check(plugin, earlier)


TARGETS = Group("llama_jax.targets", "llama_jax.targets.table:plugin_problem")
"""Device models: each entry point is a `llama_jax.targets.Target`, or a tuple of them."""
KERNELS = Group("llama_jax.kernels", "llama_jax.kernels.dispatch.extra:plugin_problem")
"""Backends: each entry point has a backend's name, and is a mapping from the names of operations to
`llama_jax.kernels.dispatch.Backend`."""
FAMILIES = Group("llama_jax.families", "llama_jax.config.families:plugin_problem")
"""Architectures: each entry point has the `model_type` of a config.json as its name, and is a
`llama_jax.config.families.Family`."""
LOGITS_PROCESSORS = Group("llama_jax.logits_processors", "llama_jax.sampling.constraints:plugin_problem")
"""Constraints on the next token: each entry point has the name that requests use, and is a
`llama_jax.sampling.constraints.LogitsProcessor`."""
TOOL_PARSERS = Group("llama_jax.tool_parsers", "llama_jax.text.tools.formats:plugin_problem")
"""Ways in which models write calls of tools: each entry point has the name that `serve --tool-parser` takes, and is a
`llama_jax.text.tools.ToolFormat`."""
ENDPOINTS = Group("llama_jax.endpoints", "llama_jax.server.extra:plugin_problem")
"""Routes of the server: each entry point is a `llama_jax.server.operations.Operation`, or a tuple of them."""
GROUPS = (TARGETS, KERNELS, FAMILIES, LOGITS_PROCESSORS, TOOL_PARSERS, ENDPOINTS)


@dataclass(frozen=True)
class Plugin:
    """One entry point of a group.

    Attributes:
      group: name of the group.
      name: as its package registers it.
      origin: package, version and object, for messages.
      value: the object; None if it cannot be imported.
      problem: why it cannot be used, or "".
    """

    group: str
    name: str
    origin: str
    value: Any = None
    problem: str = ""

    @property
    def state(self) -> str:
        """ "ok" or "broken"."""
        return "broken" if self.problem else "ok"

    @property
    def report(self) -> str:
        """One sentence about a broken plugin."""
        return f"the plugin {self.name!r} of {self.origin} is broken: {self.problem}"


@functools.cache
def load(group: Group) -> tuple[Plugin, ...]:
    """Every entry point of a group, in the order of the names, looked up once a process.

    What one of them raises, and what the group's check finds, becomes its `problem`, and a RuntimeWarning.
    """
    found: list[Plugin] = []
    for point in sorted(entry_points(group=group.name), key=lambda point: (point.name, point.value)):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
        plugin = Plugin(group.name, point.name, f"{package} ({point.value})")
        try:
            plugin = dataclasses.replace(plugin, value=point.load())
            problem = group.problem(plugin, [p for p in found if not p.problem])
        except (Exception, SystemExit) as error:  # other people's code: anything may come
            problem = f"{type(error).__name__}: {error}"
        found.append(dataclasses.replace(plugin, problem=problem))
        if problem:
            warnings.warn(f"llama_jax: {found[-1].report}", RuntimeWarning, stacklevel=2)
    return tuple(found)


def sound(group: Group) -> tuple[Plugin, ...]:
    """The plugins of a group that can be used."""
    return tuple(plugin for plugin in load(group) if not plugin.problem)


def reports(group: Group) -> str:
    """The faults of a group's broken plugins, to be added to a hint; "" if none."""
    return "".join(f"; {plugin.report}" for plugin in load(group) if plugin.problem)
