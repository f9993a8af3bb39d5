"""What other packages can add, by entry points: the names of the groups, and how they are loaded.

https://packaging.python.org/en/latest/specifications/entry-points/
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from llama_jax.errors import PluginError

TARGETS = "llama_jax.targets"
"""Group of device models: each entry point is a `llama_jax.targets.Target`, or a tuple of them."""
KERNELS = "llama_jax.kernels"
"""Group of backends: each entry point has a backend's name, and is a mapping from the names of operations to
`llama_jax.kernels.dispatch.Backend`."""


@dataclass(frozen=True)
class Plugin:
    """One entry point of a group.

    Attributes:
      name: as its package registers it.
      origin: package, version and object, for messages.
      value: the object; None if it cannot be imported.
      problem: why it cannot be imported, or "".
    """

    name: str
    origin: str
    value: Any = None
    problem: str = ""


def load_each(group: str) -> tuple[Plugin, ...]:
    """Every entry point of a group, in the order of the names. What one of them raises becomes its `problem`."""
    found = []
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
        origin = f"{package} ({point.value})"
        try:
            found.append(Plugin(point.name, origin, point.load()))
        except Exception as error:  # other people's code: anything may come
            found.append(Plugin(point.name, origin, problem=f"{type(error).__name__}: {error}"))
    return tuple(found)


def load(group: str) -> tuple[tuple[str, Any], ...]:
    """Name and object of every entry point of a group, in the order of the names.

    Raises:
      PluginError: one of them cannot be imported; names it and its package.
    """
    found = load_each(group)
    for plugin in found:
        if plugin.problem:
            raise PluginError(
                f"entry point {plugin.name!r} of {group} in {plugin.origin} cannot be loaded: {plugin.problem}",
                hint="update or uninstall that package",
            )
    return tuple((plugin.name, plugin.value) for plugin in found)
