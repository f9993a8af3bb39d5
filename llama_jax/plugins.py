"""What other packages can add, by entry points: the names of the groups, and how they are loaded.

https://packaging.python.org/en/latest/specifications/entry-points/
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from llama_jax.errors import PluginError

TARGETS = "llama_jax.targets"
"""Group of device models: each entry point is a `llama_jax.targets.Target`, or a tuple of them."""


def load(group: str) -> tuple[tuple[str, Any], ...]:
    """Name and object of every entry point of a group, in the order of the names.

    Raises:
      PluginError: one of them cannot be imported; names it and its package.
    """
    found = []
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        try:
            found.append((point.name, point.load()))
        except Exception as error:  # other people's code: anything may come
            package = point.dist.name if point.dist else "an unknown package"
            raise PluginError(
                f"entry point {point.name!r} of {group} ({package}) cannot be loaded: {type(error).__name__}: {error}",
                hint=f"update or uninstall {package}",
            ) from error
    return tuple(found)
