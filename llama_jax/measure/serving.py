"""Serving benchmark: requests that arrive over time, at an engine of this process or at a server. Reports each caller's
waiting times, with the field names of vLLM's benchmark."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np

from llama_jax.engine.settings import EngineSettings
from llama_jax.engine.snapshot import Snapshot
from llama_jax.errors import EngineFailed, LlamaJaxError, Overloaded, RequestError
from llama_jax.generation.engine import Engine
from llama_jax.generation.streams import Request
from llama_jax.measure.caller import Caller
from llama_jax.measure.throughput import asked, meanwhile
from llama_jax.measure.warming import warm_up
from llama_jax.measure.workloads import Work
from llama_jax.model.loaded import Model
from llama_jax.remote import Remote

TIMES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
"""Times in milliseconds, with the names that vLLM prints: to the first token, per token after it, between updates,
to the last token."""
LIMITED = ("ttft", "tpot", "e2el")
"""Times that a request has only one of, so that goodput can be based on them."""
PERCENTILES = (50, 95, 99)
_START_S, _LEAD_S = 120.0, 0.5
"""Longest wait for calling processes to start; delay before the first request of a run."""
_COUNTS = {
    "completed": "Successful requests:",
    "failed": "Failed requests:",
    "duration": "Benchmark duration (s):",
    "total_input_tokens": "Total input tokens:",
    "total_output_tokens": "Total generated tokens:",
    "request_throughput": "Request throughput (req/s):",
    "request_goodput": "Request goodput (req/s):",
    "output_throughput": "Output token throughput (tok/s):",
    "total_token_throughput": "Total token throughput (tok/s):",
}


@dataclass
class Record:
    """History of one request; times in seconds on one clock.

    Attributes:
      sent: when it was sent; news: when tokens arrived, possibly several at once.
      tokens: total number received.
      refused: why it got no answer, if so: the queue was full, its logits were not numbers, ...
    """

    prompt_tokens: int
    sent: float
    news: list[float] = field(default_factory=list)
    tokens: int = 0
    refused: str | None = None

    def times_ms(self) -> dict[str, list[float]]:
        """Each of `TIMES`; a request has at most one, but many of `itl`."""
        first, last = self.news[0], self.news[-1]
        each = [(last - first) / (self.tokens - 1)] if self.tokens > 1 else []
        gaps = np.diff(self.news).tolist()
        seconds = {"ttft": [first - self.sent], "tpot": each, "itl": gaps, "e2el": [last - self.sent]}
        return {name: [1e3 * value for value in values] for name, values in seconds.items()}


def check_limits(limits: Mapping[str, float]) -> None:
    """Refuses invalid limits.

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
    """Summary of a run, with the field names of vLLM's `bench serve`.

    Args:
      duration: seconds of the whole run.
      limits: milliseconds by name (`LIMITED`): a request that meets all of them counts for goodput.

    Returns:
      Counts and rates, and of each of `TIMES` mean_*_ms, median_*_ms, std_*_ms and the percentiles p50_*_ms, ...; None
      if no request has that time. request_goodput is None without limits.
    """
    done = [record for record in records if record.news and record.refused is None]
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


def block(found: Mapping[str, Any]) -> list[str]:
    """A `summary` as vLLM's `bench serve` prints it, line by line."""

    def line(name: str, value: float) -> str:
        return f"{name:<40} {value:<10}" if isinstance(value, int) else f"{name:<40} {value:<10.2f}"

    lines = ["{:=^50}".format(" Serving Benchmark Result ")]
    lines += [line(title, found[name]) for name, title in _COUNTS.items() if found[name] is not None]
    for name, (title, short) in TIMES.items():
        lines.append(f"{title:-^50}")
        for how in ("mean", "median", *(f"p{q}" for q in PERCENTILES if q != 50)):
            if (value := found[f"{how}_{name}_ms"]) is not None:
                lines.append(line(f"{how.upper() if how[0] == 'p' else how.title()} {short} (ms):", value))
    return [*lines, "=" * 50]


@dataclass(frozen=True)
class Served:
    """One run.

    Attributes:
      ready_s: seconds until the engine could take requests; the same for all runs of one engine. None for a server.
      counts: the engine's counts during the run (`throughput.meanwhile`); None for a server.
    """

    summary: dict[str, Any]
    counts: dict[str, Any] | None = None
    ready_s: float | None = None


def serve(
    model: Model,
    settings: EngineSettings,
    rounds: Sequence[Sequence[Work]],
    limits: Mapping[str, float],
    **options: Any,
) -> list[Served]:
    """Sends requests to an `Engine` in this process at their arrival times, and reads all streams to their ends.

    Args:
      rounds: the requests of consecutive runs, through one engine.
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
        await warm(engine)
        for works in rounds:
            before: Snapshot = engine.snapshot()
            found = await measured(engine, works, limits)
            served.append(Served(found, meanwhile(before, engine.snapshot()), ready_s))
    return served


async def warm(engine: Engine) -> None:
    """Runs each program for greedy requests once."""
    for first in warm_up(engine.settings, engine.model.config.vocab_size):
        await _send(partial(_ask, engine), first)


async def measured(engine: Engine, works: Sequence[Work], limits: Mapping[str, float]) -> dict[str, Any]:
    """One run of `serve` through a running engine; returns its `summary`.

    Raises:
      EngineFailed: no request was answered.
    """
    start = time.perf_counter()
    return _summed(await _send(partial(_ask, engine), works), start, limits)


async def _ask(engine: Engine, work: Work, record: Record) -> None:
    async for piece in engine.stream(Request(list(work.prompt), asked(work))):
        if piece.token_ids:
            record.news.append(time.perf_counter())
            record.tokens += len(piece.token_ids)
        if piece.finish_reason == "error":
            record.refused = "its logits were not finite"


def serve_remote(
    remote: Remote,
    model: str,
    rounds: Sequence[Sequence[Work]],
    limits: Mapping[str, float],
    *,
    processes: int = 1,
) -> list[Served]:
    """`serve` for a server with OpenAI's completions: token ids in, greedy tokens out, end-of-text ignored.

    Args:
      model: its name on the server.
      processes: number of processes that send requests in turn, besides this one, which then sends none.

    Raises:
      NetworkError: the server cannot be reached.
      RequestError: it rejects the first request, which is sent once before the others.
      EngineFailed: it answers no request of a run.
    """
    check_limits(limits)

    async def first() -> None:
        async with Caller(remote) as caller:
            await _ask_remote(caller, model, rounds[0][0], Record(0, 0.0))

    asyncio.run(first())
    with _callers(processes) as callers:
        return [Served(_remote_run(callers, processes, remote, model, works, limits)) for works in rounds]


@contextmanager
def _callers(processes: int) -> Iterator[Executor]:
    """Started processes to send requests from; a thread if there is only one."""
    if processes == 1:
        with ThreadPoolExecutor(1) as thread:
            yield thread
        return
    context = multiprocessing.get_context("spawn")
    started = context.Barrier(processes + 1)
    with ProcessPoolExecutor(processes, context, _started, (started,)) as pool:
        for _ in range(processes):  # each task starts one while none is idle
            pool.submit(int)
        started.wait(_START_S)
        yield pool


def _started(all_have: Barrier) -> None:
    all_have.wait(_START_S)


def _remote_run(
    callers: Executor, processes: int, remote: Remote, model: str, works: Sequence[Work], limits: Mapping[str, float]
) -> dict[str, Any]:
    """One run of `serve_remote`. On Linux processes share the clock."""
    start = time.perf_counter() + _LEAD_S
    shares = [works[i::processes] for i in range(processes)]
    parts = [callers.submit(_call, remote, model, share, start) for share in shares]
    return _summed([record for part in parts for record in part.result()], start, limits)


def _call(remote: Remote, model: str, works: Sequence[Work], start: float) -> list[Record]:
    async def run() -> list[Record]:
        async with Caller(remote) as caller:
            if works:  # so that no measured request is the first of its process: one token behind one
                brief = replace(works[0], prompt=works[0].prompt[:1], output_tokens=1)
                with suppress(LlamaJaxError):
                    await _ask_remote(caller, model, brief, Record(0, 0.0))
            return await _send(partial(_ask_remote, caller, model), works, LlamaJaxError, start)

    return asyncio.run(run())


async def _ask_remote(caller: Caller, model: str, work: Work, record: Record) -> None:
    body = {
        "model": model,
        "prompt": list(work.prompt),
        "max_tokens": work.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True},
    }
    async for event in caller.events("/v1/completions", body):
        if any(choice.get("text") or not choice.get("finish_reason") for choice in event.get("choices", ())):
            record.news.append(time.perf_counter())
        if usage := event.get("usage"):
            record.tokens = usage["completion_tokens"]


type Ask = Callable[[Work, Record], Awaitable[None]]
"""Sends a request, and records its updates as they come."""


def _summed(records: Sequence[Record], start: float, limits: Mapping[str, float]) -> dict[str, Any]:
    """The `summary` of a run that has just ended."""
    found = summary(records, time.perf_counter() - start, limits)
    if not found["completed"]:
        why = next(filter(None, (record.refused for record in records)), "no token came")
        raise EngineFailed(f"no request was answered: {why}", hint="lower --rate, or try --dtype float32")
    return found


async def _send(
    ask: Ask, works: Sequence[Work], lost: type[LlamaJaxError] = Overloaded, start: float | None = None
) -> list[Record]:
    """Sends requests at their times.

    Args:
      lost: errors that cost only one request; others end the run.
      start: origin of their times, by `time.perf_counter`; None for now.
    """
    begun = time.perf_counter() if start is None else start

    async def one(work: Work) -> Record:
        await asyncio.sleep(begun + work.arrival_s - time.perf_counter())
        record = Record(len(work.prompt), time.perf_counter())
        try:
            await ask(work, record)
        except lost as error:
            record.refused = str(error)
        return record

    return await asyncio.gather(*map(one, works))
