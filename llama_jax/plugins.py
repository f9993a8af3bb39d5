"""Groups of entry points through which other packages extend this one."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

KERNELS = "llama_jax.kernels"
"""A backend's name to a mapping from operation to `llama_jax.kernels.dispatch.Backend`."""


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


def load_plugins(group: str) -> tuple[Plugin, ...]:
    """Every entry point of a group, imported. What a plugin raises becomes its `problem`, so that one broken plugin
    does not take the others with it."""
    found = []
    for point in entry_points(group=group):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown package"
        origin = f"{package} ({point.value})"
        try:
            found.append(Plugin(point.name, origin, point.load()))
        except Exception as error:  # other people's code: anything may come
            found.append(Plugin(point.name, origin, problem=f"{type(error).__name__}: {error}"))
    return tuple(found)
