"""Latency of one request at a time through an engine: the rows of llama-bench, and a caller's waiting times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.generation.llm import LLM
from llama_jax.measure.bench import Ceilings, sound_share
from llama_jax.measure.throughput import asked
from llama_jax.measure.workloads import FIRST_ID, Work
from llama_jax.plan.costs import prefill_flops, step_bytes


@dataclass(frozen=True)
class Row:
    """Medians of one test.

    Attributes:
      test: "pp512", a prompt of 512 tokens; "tg128 @ d4096", 128 tokens after a prompt of 4096 (without "@ d0": of 1).
      tokens_per_second: of the prompt until its first token, or of the output after its first token.
      ttft_ms: to the first token; itl_ms: median between updates; None for "pp".
      share: of the measured ceiling: MFU for "pp", MBU for "tg"; None if it came out above 1.
      spread: (slowest - fastest) / median.
    """

    test: str
    tokens_per_second: float
    ttft_ms: float
    itl_ms: float | None
    share: float | None
    spread: float


def latency_rows(
    llm: LLM,
    ceilings: Ceilings,
    *,
    prompts: Sequence[int],
    new: int,
    depths: Sequence[int] = (0,),
    rounds: int = 5,
    seed: int = 0,
) -> Iterator[Row]:
    """Times prompts of each length, and `new` >= 2 tokens after each depth; every request has new random ids.

    Raises:
      DoesNotFit: a request is longer than the engine's context.
    """
    rng, model = np.random.default_rng(seed), llm.model

    def times(length: int, new: int) -> list[list[float]]:
        ids = [tuple(rng.integers(FIRST_ID, model.config.vocab_size, length).tolist()) for _ in range(rounds)]
        return [_times(llm, Work(0, 0.0, prompt, new)) for prompt in ids]

    for length in prompts:
        firsts = [first for first, *_ in times(length, 1)]
        seconds = statistics.median(firsts)
        mfu = prefill_flops(model.config, 1, length, model.mesh) / seconds / ceilings.matmul_flops_per_s
        yield Row(f"pp{length}", length / seconds, seconds * 1e3, None, sound_share(mfu), _spread(firsts, seconds))
    for depth in depths:
        runs = times(max(1, depth), new)
        decodes = [last - first for first, *_, last in runs]
        seconds = statistics.median(decodes)
        read = step_bytes(model.config, model.dtype.itemsize, 1, max(1, depth) + new // 2, model.mesh, model.kv_dtype)
        mbu = read * (new - 1) / seconds / ceilings.read_bytes_per_s
        yield Row(
            f"tg{new}" + f" @ d{depth}" * bool(depth),
            (new - 1) / seconds,
            statistics.median(first for first, *_ in runs) * 1e3,
            statistics.median(gap for run in runs for gap in np.diff(run).tolist()) * 1e3,
            sound_share(mbu),
            _spread(decodes, seconds),
        )


def _times(llm: LLM, work: Work) -> list[float]:
    """Seconds from the call to each update."""
    start, times = time.perf_counter(), []

    for _ in llm.stream(list(work.prompt), asked(work)):
        times.append(time.perf_counter() - start)
    return times


def _spread(seconds: Sequence[float], middle: float) -> float:
    return (max(seconds) - min(seconds)) / middle
