"""The ideal schedule of a job: the time of static batches on this device if no row ever waited for another.

    ideal = prompt tokens / prefill rate + sum over k = 1, 2, ... of step(n_k)

n_k is the number of requests with more than k output tokens, i.e. of rows unfinished at decode step k if all start
together (prompts draw the first token). step(n) is the measured time of a static decode step of n rows, interpolated
between the sizes that were measured. More rows than the largest of them, M, take turns: step(n) = n / M * step(M).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.decode.buckets import prompt_bucket
from llama_jax.engine.sizing import free_memory
from llama_jax.measure.bench import BenchResult, Ceilings, bench
from llama_jax.measure.workloads import Work
from llama_jax.model.loaded import Model
from llama_jax.plan.memory import cache_bytes

NEW = 32
"""Number of timed decode steps."""


@dataclass(frozen=True)
class Steady:
    """Measured static batches of the functional loop.

    Attributes:
      results: by ascending batch.
    """

    results: tuple[BenchResult, ...]

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens per second: the best of all sizes."""
        return max(result.prefill_tps for result in self.results)

    def step_s(self, rows: int) -> float:
        """Seconds of a decode step of N rows."""
        batches = [result.batch for result in self.results]
        turns = max(1.0, rows / batches[-1])
        return turns * float(np.interp(rows, batches, [result.step_s for result in self.results]))

    def decode_tps(self, rows: int) -> float:
        """Tokens per second of steady decoding."""
        return rows / self.step_s(rows)

    def ideal_s(self, prompt_tokens: int, outputs: Sequence[int]) -> float:
        """Seconds of the ideal schedule.

        Args:
          prompt_tokens: number of tokens to compute.
          outputs: tokens of each request.
        """
        return prompt_tokens / self.prefill_tps + sum(self.step_s(rows) for rows in unfinished(outputs))


def unfinished(outputs: Sequence[int]) -> list[int]:
    """n_1, n_2, ...: rows of each decode step, as above."""
    ends = np.bincount(np.maximum(np.asarray(outputs, int) - 1, 0))
    return (len(outputs) - np.cumsum(ends))[:-1].tolist()


def measure_steady(
    model: Model, ceilings: Ceilings, works: Sequence[Work], sizes: Iterable[int], *, repeats: int = 3
) -> Steady:
    """Times static batches whose cache is as long as the mean over the requests' decode steps.

    Args:
      sizes: of batches, ascending; those that do not fit into memory are skipped.
    """
    new = min(NEW, model.config.context_length // 2)
    cached = _cached(works)
    prompt = min(_nearest_bucket(max(1, cached - new // 2)), model.config.context_length - new)
    results = [
        bench(model, ceilings, batch=rows, prompt=prompt, new=new, repeats=repeats)
        for rows in _that_fit(model, sizes, prompt + new)
    ]
    return Steady(tuple(results))


def every_other(sizes: Sequence[int]) -> list[int]:
    """Every other one of ascending sizes, counted from the largest, and the smallest. Each costs two programs."""
    return sorted({sizes[0], *sizes[::-2]})


def _cached(works: Sequence[Work]) -> int:
    """Mean number of tokens in a row's cache over all decode steps."""
    steps = sum(work.output_tokens - 1 for work in works)
    if not steps:
        return sum(len(work.prompt) for work in works) // len(works)
    seen = sum((work.output_tokens - 1) * (len(work.prompt) + work.output_tokens / 2) for work in works)
    return round(seen / steps)


def _nearest_bucket(length: int) -> int:
    """A length close to the given one that prefill does not pad."""
    return min(prompt_bucket(length), prompt_bucket(max(1, length * 2 // 3)), key=lambda size: abs(size - length))


def _that_fit(model: Model, sizes: Iterable[int], length: int) -> list[int]:
    """Batches whose dense caches take at most half of the free memory; the smallest in any case."""
    free = free_memory(model)
    smallest, *larger = sizes
    each = cache_bytes(model.config, model.mesh, model.dtype.itemsize, length, model.kv_dtype)
    return [smallest, *(rows for rows in larger if free is None or 2 * rows * each <= free)]
