"""A snapshot of an engine's state and counters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from llama_jax.engine.limits import Counts


@dataclass(frozen=True)
class Snapshot:
    """An engine's current state and its counts since the start.

    Attributes:
      counts: of the scheduler.
      tokens_in, tokens_out: prompt tokens computed or found, and tokens drawn, since the start.
      computed_tokens, padding_tokens: computed by steps; and in addition, only to fill their shapes.
      steps: dispatched since the start.
      late_compilations: compilations after the engine was ready: programs of its set, and anything else that jax
        compiled in its steps.
      drafted_tokens, accepted_tokens: draft tokens tried, and drawn.
      failed: sequences without a next token: their logits were not numbers, or their constraints allowed none.
      programs, programs_from_cache: compiled, and those of them found in jax's persistent cache before the engine was
        ready. programs_behind: still being compiled in the background of an engine that was ready early.
      ready_s: seconds until it was ready; None in an engine that compiles on demand.
      tokens_per_s: drawn, over the last second (or the last step, if that took longer).
      step_s: mean time of a step over the last second; 0 if there was none.
      mbu, mfu: over the last second, one device's necessary reads and writes of weights and cache, and necessary FLOPs,
        over its peak; None if that is unknown. peak: "measured", "data sheet" or None.
      kv_dtype: of keys and values in the cache.
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
    failed: int
    programs: int
    programs_from_cache: int
    programs_behind: int
    ready_s: float | None
    tokens_per_s: float
    step_s: float
    mbu: float | None
    mfu: float | None
    peak: str | None
    kv_dtype: str

    @property
    def padding_share(self) -> float:
        """Share of the computed tokens that only filled the steps' shapes."""
        return self.padding_tokens / max(1, self.computed_tokens + self.padding_tokens)

    @property
    def cache_use(self) -> float:
        """Share of the pages that running requests hold; pages only kept for later requests do not count."""
        counts = self.counts
        pages = counts.pages_used + counts.pages_free + counts.pages_cached + counts.pages_fenced
        return counts.pages_used / max(1, pages)

    @classmethod
    def of(cls, parts: Sequence[Snapshot]) -> Snapshot:
        """Several engines merged into one: sums, means of shares and times, and the longest start."""
        if len(parts) == 1:
            return parts[0]
        fields = [field.name for field in dataclasses.fields(cls)]
        means = ("step_s", "mbu", "mfu")
        summed = [name for name in fields if name not in (*means, "counts", "ready_s", "peak", "kv_dtype")]
        known = {name: _known([getattr(part, name) for part in parts]) for name in means}
        shares: dict[str, Any] = {name: sum(values) / len(values) if values else None for name, values in known.items()}
        return cls(
            counts=Counts(**_sums([dataclasses.asdict(part.counts) for part in parts])),
            ready_s=max(_known([part.ready_s for part in parts]), default=None),
            peak=parts[0].peak,
            kv_dtype=parts[0].kv_dtype,
            **_sums([{name: getattr(part, name) for name in summed} for part in parts]),
            **shares,
        )

    def to_json(self) -> dict[str, Any]:
        """All numbers, flat."""
        data = dataclasses.asdict(self)
        return data.pop("counts") | data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
          KeyError: a number is missing, as in a snapshot of another version.
        """
        counts = Counts(**{field.name: data[field.name] for field in dataclasses.fields(Counts)})
        names = (field.name for field in dataclasses.fields(cls) if field.name != "counts")
        return cls(counts=counts, **{name: data[name] for name in names})


def _sums(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: sum(numbers[name] for numbers in each) for name in each[0]}


def _known(values: Sequence[float | None]) -> list[float]:
    """The values, or none of them if any is unknown."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []
