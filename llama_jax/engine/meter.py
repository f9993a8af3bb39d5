"""A core's counters and rates, at almost no cost: the cost of a step is computed only on request."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llama_jax.engine.limits import Counts
from llama_jax.engine.snapshot import Snapshot
from llama_jax.engine.steps import Step
from llama_jax.plan.step_costs import Load, Peak, StepCosts

if TYPE_CHECKING:
    from llama_jax.engine.compiled import Programs

WINDOW_S = 1.0
"""Window over which rates are measured."""


class _Ended(NamedTuple):
    """A finished dispatch: when the device began and ended it, and what it drew."""

    begun: float
    ended: float
    drawn: int
    load: Load


@dataclass(frozen=True)
class Rates:
    """Rates of the last second, or of the last step if it took longer; 0 if nothing ran.

    Attributes:
      step_s: mean time of a dispatch.
      mbu, mfu: one device's bytes moved and FLOPs, each over the peak; None if there is no peak.
    """

    tokens_per_s: float
    step_s: float
    mbu: float | None
    mfu: float | None


class Meter:
    """Counts what a core does. One thread counts, any thread may read.

    Attributes:
      ready_s: seconds until every program was compiled; None before.
      peak: peak rates of the device.
    """

    def __init__(self, costs: StepCosts, peak: Peak | None) -> None:
        self.tokens_out = self.computed = self.padding = self.steps = self.drafted = self.accepted = self.failed = 0
        self.ready_s: float | None = None
        self.peak = peak
        self._costs = costs
        self._begun = time.monotonic()
        self._flying: deque[tuple[float, Load]] = deque()
        self._ended: deque[_Ended] = deque()

    def ready(self) -> None:
        """Records that the engine is ready."""
        self.ready_s = time.monotonic() - self._begun

    def dispatched(self, step: Step, size: int) -> None:
        """Records a step dispatched to a program for `size` tokens."""
        drafts = [(s.computed - 1 - draft.length, 1 + draft.length, True) for s, draft in step.drafts.items()]
        load = Load(
            step.steps,
            [sequence.computed for sequence in step.decoding if sequence not in step.drafts],
            [*((chunk.start, chunk.count, chunk.draws) for chunk in step.chunks), *drafts],
        )
        tokens = load.tokens
        self.steps += 1
        self.computed += tokens * step.steps
        self.padding += (size - tokens) * step.steps
        self._flying.append((time.monotonic(), load))

    def ended(self, drawn: int) -> None:
        """Records that the earliest step in flight has ended, and drew N tokens."""
        self.tokens_out += drawn
        now = time.monotonic()
        begun, load = self._flying.popleft()
        if self._ended:
            begun = max(begun, self._ended[-1].ended)
        self._ended.append(_Ended(begun, now, drawn, load))
        while now - self._ended[0].ended > WINDOW_S:
            self._ended.popleft()

    def snapshot(self, counts: Counts, programs: Programs, kv_dtype: str) -> Snapshot:
        """The core's full snapshot; `kv_dtype` is its cache's."""
        rates = self.rates()
        return Snapshot(
            counts=counts,
            tokens_in=counts.prompt_tokens,
            tokens_out=self.tokens_out,
            computed_tokens=self.computed,
            padding_tokens=self.padding,
            steps=self.steps,
            late_compilations=programs.late,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            failed=self.failed,
            programs=programs.count,
            programs_from_cache=programs.from_cache,
            programs_behind=programs.behind,
            ready_s=self.ready_s,
            tokens_per_s=rates.tokens_per_s,
            step_s=rates.step_s,
            mbu=rates.mbu,
            mfu=rates.mfu,
            peak=None if self.peak is None else self.peak.source,
            kv_dtype=kv_dtype,
        )

    def rates(self) -> Rates:
        """Current rates."""
        now, ended = time.monotonic(), list(self._ended)
        last = ended[-1:] if self._flying else []  # a step longer than the window still counts
        recent = [step for step in ended if now - step.ended <= WINDOW_S] or last
        peak = self.peak or Peak(None, None)
        if not recent:
            return Rates(0.0, 0.0, peak.bytes_per_s and 0.0, peak.flops_per_s and 0.0)
        span = max(recent[-1].ended - recent[0].begun, 1e-9)
        moved, flops = self._costs.total(step.load for step in recent)
        return Rates(
            tokens_per_s=sum(step.drawn for step in recent) / span,
            step_s=sum(step.ended - step.begun for step in recent) / len(recent),
            mbu=peak.bytes_per_s and moved / span / peak.bytes_per_s,
            mfu=peak.flops_per_s and flops / span / peak.flops_per_s,
        )
