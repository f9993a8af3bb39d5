"""Members of quantised leaves, which are made together and requested one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np

from llama_jax.params import ParamSpec

_KEPT = 8
"""Number of leaves whose members are kept for later requests, as some are never requested."""


class Members:
    """Makes the members of a leaf when the first is requested, and keeps the others until they are.

    May be used from several threads at once, which wait for one another if they request the same leaf.

    Args:
      make: of a leaf's dotted name, all of its members.
    """

    def __init__(self, make: Callable[[str], Mapping[str, np.ndarray]]):
        self._make = make
        self._lock = threading.Lock()
        self._leaves: dict[str, _Leaf] = {}

    def take(self, spec: ParamSpec) -> np.ndarray:
        """The member that a row of the table names."""
        with self._lock:
            leaf = self._leaves.setdefault(spec.leaf, _Leaf())
            while len(self._leaves) > _KEPT:
                self._leaves.pop(next(name for name in self._leaves if name != spec.leaf))
        with leaf.lock:
            if spec.path[-1] not in leaf.members:
                leaf.members = dict(self._make(spec.leaf))
            found = leaf.members.pop(spec.path[-1])
            empty = not leaf.members
        if empty:
            with self._lock:
                if self._leaves.get(spec.leaf) is leaf:
                    del self._leaves[spec.leaf]
        return found


class _Leaf:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.members: dict[str, np.ndarray] = {}
