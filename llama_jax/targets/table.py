"""The table of targets, with those that other packages add."""

from __future__ import annotations

import functools
import re

from llama_jax import plugins
from llama_jax.errors import PluginError, RequestError
from llama_jax.targets import amd, nvidia
from llama_jax.targets.target import Target

CPU = Target("cpu", "cpu", "cpu", 0, 0, 0)

TARGETS = (*amd.TARGETS, *nvidia.TARGETS, CPU)
"""Every target of this package. Of several with one architecture the first stands for it."""


@functools.cache
def added_targets() -> tuple[Target, ...]:
    """Targets of other packages: entry points of the group `llama_jax.plugins.TARGETS`, each a `Target` or several.

    Raises:
      PluginError: one cannot be loaded, or is something else.
    """
    found: list[Target] = []
    for name, value in plugins.load(plugins.TARGETS):
        targets = (value,) if isinstance(value, Target) else value
        if not isinstance(targets, tuple | list) or not all(isinstance(target, Target) for target in targets):
            raise PluginError(
                f"entry point {name!r} of {plugins.TARGETS} is neither a Target nor a tuple of them",
                hint="correct or uninstall the package that has it",
            )
        found += targets
    return tuple(found)


def find(name: str) -> Target:
    """The target of that name, product name or architecture.

    Spaces, hyphens, upper case, makers' names and compiler features after a colon do not matter: "MI300X",
    "AMD Instinct MI300X", "rx-7900-xtx" and "gfx942:sramecc+:xnack-" are found. A name comes before an architecture,
    this package's targets before those of others.

    Raises:
      RequestError: there is none.
      PluginError: there is none, and a package that adds targets cannot be loaded.
    """
    key = normalised(name)
    match = _match(key, TARGETS) or _match(key, added_targets())
    if match is None:
        names = ", ".join(target.name for target in (*TARGETS, *added_targets()))
        raise RequestError(f"unknown target {name!r}", param="target", hint=f"known: {names}")
    return match


def _match(key: str, targets: tuple[Target, ...]) -> Target | None:
    named = (t for t in targets if key and key in (t.name, normalised(t.label)))
    return next(named, None) or next((t for t in targets if key == t.arch), None)


def normalised(name: str) -> str:
    """A product's name without what people leave out or write in several ways."""
    name = name.split(":")[0].lower()
    return re.sub(r"\b(amd|nvidia|instinct|geforce|radeon(?= (rx|pro))|pro)\b|[^a-z0-9_]", "", name)
