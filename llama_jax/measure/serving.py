"""An engine under arrivals: each caller's waiting times, in the field names of vLLM's benchmark."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.snapshot import Snapshot
from llama_jax.errors import EngineFailed, Overloaded, RequestError
from llama_jax.generation.engine import Engine
from llama_jax.generation.streams import Request
from llama_jax.measure.throughput import asked, meanwhile
from llama_jax.measure.warming import warm_up
from llama_jax.measure.workloads import Work
from llama_jax.model.loaded import Model

TIMES = ("ttft", "tpot", "itl", "e2el")
"""Times in milliseconds: to the first token, per token behind it, between news of tokens, to the last token."""
LIMITED = ("ttft", "tpot", "e2el")
"""Those that a request has one of, so that goodput can be counted by them."""
PERCENTILES = (50, 95, 99)


@dataclass
class Record:
    """History of one request; times in seconds on one clock.

    Attributes:
      sent: when it was handed over; news: when tokens arrived, several of them at once perhaps.
      tokens: that it got in all.
      refused: the engine had no room for it in its queue, or its logits were no numbers.
    """

    prompt_tokens: int
    sent: float
    news: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: bool = False

    def times_ms(self) -> dict[str, list[float]]:
        """Each of `TIMES`; a request has one or none, but of `itl` many."""
        first, last = self.news[0], self.news[-1]
        each = [(last - first) / (self.tokens - 1)] if self.tokens > 1 else []
        gaps = np.diff(self.news).tolist()
        seconds = {"ttft": [first - self.sent], "tpot": each, "itl": gaps, "e2el": [last - self.sent]}
        return {name: [1e3 * value for value in values] for name, values in seconds.items()}


def check_limits(limits: Mapping[str, float]) -> None:
    """Refuses limits that no request can be held to.

    Raises:
      RequestError: a name is unknown, or a limit is not positive.
    """
    for name, limit in limits.items():
        if name not in LIMITED or not limit > 0:
            raise RequestError(
                f"goodput cannot be counted by {name}:{limit:g}",
                param="goodput",
                hint=f"names are {', '.join(LIMITED)}, limits are milliseconds, e.g. ttft:200 tpot:50",
            )


def summary(records: Sequence[Record], duration: float, limits: Mapping[str, float]) -> dict[str, Any]:
    """A run in the field names of vLLM's `bench serve`.

    Args:
      duration: seconds of the whole run.
      limits: milliseconds by name (`LIMITED`): a request that keeps all of them counts for goodput.

    Returns:
      Counts and rates, and of each of `TIMES` mean_*_ms, median_*_ms, std_*_ms and the percentiles p50_*_ms, ...; None
      where no request has such a time. request_goodput is None without limits.
    """
    done = [record for record in records if record.news and not record.refused]
    times = [record.times_ms() for record in done]
    good = sum(all(value <= limits[name] for name in limits for value in each[name]) for each in times)
    tokens_in, tokens_out = sum(r.prompt_tokens for r in done), sum(r.tokens for r in done)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / duration,
        "request_goodput": good / duration if limits else None,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
    }
    for name in TIMES:
        values = np.asarray([value for each in times for value in each[name]])
        numbers: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median, "std": np.std}
        numbers |= {f"p{q}": partial(np.percentile, q=q) for q in PERCENTILES}
        found |= {f"{how}_{name}_ms": float(f(values)) if values.size else None for how, f in numbers.items()}
    return found


@dataclass(frozen=True)
class Served:
    """One run.

    Attributes:
      ready_s: seconds until the engine could take requests; the same for all runs of one engine.
      counts: what the engine did meanwhile (`throughput.meanwhile`).
    """

    summary: dict[str, Any]
    counts: dict[str, Any]
    ready_s: float


def serve(
    model: Model,
    settings: EngineSettings,
    rounds: Sequence[Sequence[Work]],
    limits: Mapping[str, float],
    **options: Any,
) -> list[Served]:
    """Sends requests to an `Engine` in this process at their times of arrival, and reads all streams to their ends.

    Args:
      rounds: the requests of one run after the other, through one engine.
      options: of `Engine`.

    Raises:
      EngineFailed: the device failed.
    """
    check_limits(limits)
    return asyncio.run(_serve(Engine(model, settings=settings, **options), rounds, limits))


async def _serve(made: Engine, rounds: Sequence[Sequence[Work]], limits: Mapping[str, float]) -> list[Served]:
    start, served = time.perf_counter(), []
    async with made as engine:
        ready_s = time.perf_counter() - start
        for first in warm_up(engine.settings, engine.model.config.vocab_size):
            await _send(engine, first)
        for works in rounds:
            before: Snapshot = engine.snapshot()
            start = time.perf_counter()
            records = await _send(engine, works)
            duration = time.perf_counter() - start
            found = summary(records, duration, limits)
            if not found["completed"]:
                raise EngineFailed("no request was answered", hint="lower --rate, or try --dtype float32")
            served.append(Served(found, meanwhile(before, engine.snapshot()), ready_s))
    return served


async def _send(engine: Engine, works: Sequence[Work]) -> list[Record]:
    start = time.perf_counter()
    return await asyncio.gather(*(_one(engine, work, start) for work in works))


async def _one(engine: Engine, work: Work, start: float) -> Record:
    await asyncio.sleep(start + work.arrival_s - time.perf_counter())
    record = Record(len(work.prompt), time.perf_counter())
    try:
        async for piece in engine.stream(Request(list(work.prompt), asked(work))):
            if piece.token_ids:
                record.news.append(time.perf_counter())
                record.tokens += len(piece.token_ids)
            record.refused |= piece.finish_reason == "error"
    except Overloaded:
        record.refused = True
    return record
