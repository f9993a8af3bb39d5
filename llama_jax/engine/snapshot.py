"""The engine in numbers, at one moment."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.engine.limits import Counts

WINDOW_S = 1.0
"""Over how long rates are taken."""


@dataclass(frozen=True)
class Snapshot:
    """An engine's present state and its counts since the start.

    Attributes:
      counts: of the scheduler.
      tokens_in, tokens_out: prompt tokens computed or found, and tokens drawn, since the start.
      computed_tokens, padding_tokens: that steps have computed, and besides to fill up their shapes.
      steps: dispatched since the start; late_compilations: programs that were compiled after the engine was ready.
      drafted_tokens, accepted_tokens: of drafts, tried and drawn.
      tokens_per_s: drawn, over the last second.
      step_s: mean time of a step over the last second; 0 if there was none.
    """

    counts: Counts
    tokens_in: int
    tokens_out: int
    computed_tokens: int
    padding_tokens: int
    steps: int
    late_compilations: int
    drafted_tokens: int
    accepted_tokens: int
    tokens_per_s: float
    step_s: float

    @classmethod
    def of(cls, parts: Sequence[Snapshot]) -> Snapshot:
        """Several engines as one: sums, and the mean time of a step."""
        if len(parts) == 1:
            return parts[0]

        each = [dataclasses.asdict(part) for part in parts]
        counts = Counts(**_sums([numbers.pop("counts") for numbers in each]))
        sums = _sums(each)
        return cls(counts, **(sums | {"step_s": sums["step_s"] / len(parts)}))

    def to_json(self) -> dict[str, Any]:
        """All numbers, flat."""
        data = dataclasses.asdict(self)
        return data.pop("counts") | data


def _sums(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: sum(numbers[name] for numbers in each) for name in each[0]}


class Meter:
    """Counts what a core does."""

    def __init__(self) -> None:
        self.tokens_out = self.computed = self.padding = self.steps = self.drafted = self.accepted = 0
        self._recent: deque[tuple[float, int]] = deque()

    def dispatched(self, tokens: int, size: int) -> None:
        """A step of `tokens` tokens was given to a program of `size`."""
        self.steps += 1
        self.computed += tokens
        self.padding += size - tokens

    def ended(self, drawn: int) -> None:
        """A step has ended that drew N tokens."""
        self.tokens_out += drawn
        now = time.monotonic()
        self._recent.append((now, drawn))
        while self._recent and now - self._recent[0][0] > WINDOW_S:
            self._recent.popleft()

    def rates(self) -> tuple[float, float]:
        """Tokens a second and seconds a step, lately."""
        recent = [(at, n) for at, n in self._recent if time.monotonic() - at <= WINDOW_S]
        if len(recent) < 2:
            return 0.0, 0.0
        span = recent[-1][0] - recent[0][0]
        if not span:
            return 0.0, 0.0
        return sum(n for _, n in recent[1:]) / span, span / (len(recent) - 1)
