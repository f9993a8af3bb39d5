"""Record of what was chosen, and why: written while programs are traced, read only by reports."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """The backend of an operation for arguments of one kind.

    Attributes:
      operation, target: names.
      dtype: of the operation's first array.
      shape: the operation's own word for arguments of this kind, e.g. "d128 long".
      backend: the one that runs.
      tiles: names and numbers given to it; empty where it chooses by itself.
      reason: who chose: the caller, `using`, LLAMA_JAX_KERNELS, or a rule of a table with its source.
      measured: whether the rule comes from a measurement on such a device.
      passed_over: (backend, why not) of those that had come first.
    """

    operation: str
    target: str
    dtype: str
    shape: str
    backend: str
    tiles: tuple[tuple[str, int], ...] = ()
    reason: str = ""
    measured: bool = False
    passed_over: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        passed_over = [{"backend": name, "reason": why} for name, why in self.passed_over]
        return asdict(self) | {"tiles": dict(self.tiles), "passed_over": passed_over}


class Recorder:
    """Counts choices; any thread may write. Nothing that computes reads it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[Choice] = Counter()

    def add(self, choice: Choice) -> None:
        with self._lock:
            self._counts[choice] += 1

    def counts(self) -> dict[Choice, int]:
        """Each choice and how many times it was made, the first one first. A program that is traced once counts once,
        however often it runs; equal layers of a model share one trace."""
        with self._lock:
            return dict(self._counts)

    def clear(self) -> None:
        with self._lock:
            self._counts.clear()
