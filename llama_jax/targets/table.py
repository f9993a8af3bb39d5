"""The table of targets, with those that other packages add."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llama_jax import plugins
from llama_jax.errors import RequestError, did_you_mean
from llama_jax.targets import amd, nvidia
from llama_jax.targets.target import Target

CPU = Target("cpu", "cpu", "cpu", 0, 0, 0)

TARGETS = (*amd.TARGETS, *nvidia.TARGETS, CPU)
"""Every target of this package. The first of several with one architecture represents it."""


def added_targets() -> tuple[Target, ...]:
    """Targets of other packages (`llama_jax.plugins.TARGETS`)."""
    return tuple(target for plugin in plugins.sound(plugins.TARGETS) for target in _as_tuple(plugin.value))


def plugin_problem(plugin: plugins.Plugin, earlier: Sequence[plugins.Plugin]) -> str:
    """The fault of a plugin that is to add targets; "" if none."""
    targets = _as_tuple(plugin.value)
    if not isinstance(targets, tuple | list) or not all(isinstance(target, Target) for target in targets):
        return "it is neither a llama_jax.targets.Target nor a tuple of them"
    names = [target.name for target in (*TARGETS, *(t for p in earlier for t in _as_tuple(p.value)), *targets)]
    twice = next((target.name for target in targets if names.count(target.name) > 1), None)
    return "" if twice is None else f"there is another target {twice!r}"


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, Target) else value


def find(name: str) -> Target:
    """The target of that name, product name or architecture.

    Spaces, hyphens, upper case, makers' names and compiler features after a colon do not matter: "MI300X",
    "AMD Instinct MI300X", "rx-7900-xtx" and "gfx942:sramecc+:xnack-" are found. A name comes before an architecture,
    this package's targets before those of others.

    Raises:
      RequestError: there is none.
    """
    key = normalised(name)
    match = _match(key, TARGETS) or _match(key, added_targets())
    if match is None:
        names = [target.name for target in (*TARGETS, *added_targets())]
        near = did_you_mean(key, names)
        hint = f"{near} known: {', '.join(names)}{plugins.reports(plugins.TARGETS)}".lstrip()
        raise RequestError(f"unknown target {name!r}", param="target", hint=hint)
    return match


def _match(key: str, targets: tuple[Target, ...]) -> Target | None:
    named = (t for t in targets if key and key in (t.name, normalised(t.label)))
    return next(named, None) or next((t for t in targets if key == t.arch), None)


def normalised(name: str) -> str:
    """A product's name without what people leave out or write in several ways."""
    name = name.split(":")[0].lower()
    return re.sub(r"\b(amd|nvidia|instinct|geforce|radeon(?= (rx|pro))|pro)\b|[^a-z0-9_]", "", name)
