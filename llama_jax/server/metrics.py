"""Prometheus metrics: numbers that the engine is asked for, and the times that requests took for their clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama_jax.engine.snapshot import Snapshot
from llama_jax.errors import EngineFailed
from llama_jax.generation.outputs import RequestOutput
from llama_jax.generation.streams import Piece

BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 20, 50, 100, 300)
"""Seconds. A dashboard can tell no less than the first."""

_GAUGES: dict[str, tuple[str, Callable[[Snapshot], float | None]]] = {
    "requests_running": ("Sequences that have a row.", lambda s: s.counts.running),
    "requests_waiting": ("Sequences that wait for a row.", lambda s: s.counts.waiting),
    "pages_used": ("Pages of the cache that running requests hold.", lambda s: s.counts.pages_used),
    "pages_cached": ("Pages kept for later requests.", lambda s: s.counts.pages_cached),
    "pages_free": ("Pages that hold nothing.", lambda s: s.counts.pages_free + s.counts.pages_fenced),
    "cache_use_ratio": ("Part of the pages that running requests hold.", lambda s: s.cache_use),
    "generation_tokens_per_second": ("Drawn over the last second.", lambda s: s.tokens_per_s),
    "step_seconds": ("Mean time of a step over the last second.", lambda s: s.step_s),
    "bucket_padding_waste_ratio": ("Part of the computed tokens that fill up shapes.", lambda s: s.padding_share),
    "mbu_ratio": ("Bytes read and written, of the device's bandwidth.", lambda s: s.mbu),
    "mfu_ratio": ("FLOPs of the device's peak.", lambda s: s.mfu),
}
_COUNTERS: dict[str, tuple[str, Callable[[Snapshot], float]]] = {
    "prompt_tokens": ("Prompt tokens computed or found.", lambda s: s.tokens_in),
    "generation_tokens": ("Tokens drawn.", lambda s: s.tokens_out),
    "prefix_cache_queries": ("Prompt tokens that were looked up.", lambda s: s.counts.prompt_tokens),
    "prefix_cache_hits": ("Prompt tokens that were found.", lambda s: s.counts.prefix_hit_tokens),
    "preemptions": ("Sequences that lost their row for a while.", lambda s: s.counts.preemptions),
    "steps": ("Steps of the engine.", lambda s: s.steps),
    "compiles_after_ready": ("Programs compiled after the engine was ready.", lambda s: s.late_compilations),
    "drafted_tokens": ("Tokens of drafts that were tried.", lambda s: s.drafted_tokens),
    "accepted_tokens": ("Tokens of drafts that were drawn.", lambda s: s.accepted_tokens),
}
PREFIX = "llama_jax_"


class Metrics:
    """The metrics of one server."""

    def __init__(self, model: str, snapshot: Callable[[], Snapshot], restarts: Callable[[], int]):
        """Make the metrics of no request yet.

        Args:
          model: the label "model_name" of each.
          snapshot: of the engine; raises EngineFailed where it is dead.
          restarts: how often it has been made anew.
        """
        self._registry, self._model = CollectorRegistry(), model

        def histogram(name: str, about: str) -> Histogram:
            made = Histogram(PREFIX + name, about, ["model_name"], buckets=BUCKETS, registry=self._registry)
            return made.labels(model)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, about, ["model_name", *labels], registry=self._registry)

        self.first = histogram("time_to_first_token_seconds", "From a request to its first token.")
        self.between = histogram("inter_token_latency_seconds", "Between tokens of a stream.")
        self.whole = histogram("e2e_request_latency_seconds", "From a request to its last token.")
        self._ended = counter("request_success", "Continuations that have ended, by reason.", "finished_reason")
        self._cancelled = counter("cancelled", "Requests whose client left.").labels(model)
        self._answers = counter("http_requests", "HTTP requests, by route and status.", "route", "status")
        self._registry.register(_OfEngine(model, snapshot, restarts))

    def text(self) -> bytes:
        """Return all of them in Prometheus's text format."""
        return generate_latest(self._registry)

    def answered(self, route: str, status: int) -> None:
        """Count an answer."""
        self._answers.labels(self._model, route, str(status)).inc()

    def finished(self, reason: str) -> None:
        """Count a continuation."""
        self._ended.labels(self._model, reason).inc()

    @contextmanager
    def request(self) -> Iterator[Times]:
        """The times of a request of the engine; one whose client leaves before its end counts as cancelled."""
        try:
            yield Times(self)
        except (asyncio.CancelledError, GeneratorExit):
            self._cancelled.inc()
            raise


class Times:
    """Times of a request's tokens."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._begun = metrics, time.perf_counter()
        self._last: dict[int, float] = {}

    def piece(self, piece: Piece) -> None:
        """Take the time of a piece of a stream."""
        now = time.perf_counter()
        if piece.token_ids:
            if not self._last:
                self._metrics.first.observe(now - self._begun)
            if piece.index in self._last:
                self._metrics.between.observe((now - self._last[piece.index]) / len(piece.token_ids))
            self._last[piece.index] = now
        if piece.output is not None:
            self._end(piece.output, now)

    def output(self, output: RequestOutput) -> None:
        """Take the times of a whole answer."""
        self._metrics.first.observe(output.timing.ttft_s)
        self._end(output, time.perf_counter())

    def _end(self, output: RequestOutput, now: float) -> None:
        self._metrics.whole.observe(now - self._begun)
        for completion in output.outputs:
            self._metrics.finished(completion.finish_reason)


class _OfEngine(Collector):
    """Metrics that are read off the engine when somebody asks."""

    def __init__(self, model: str, snapshot: Callable[[], Snapshot], restarts: Callable[[], int]):
        self._model, self._snapshot, self._restarts = model, snapshot, restarts

    def describe(self) -> list[Metric]:
        """Nothing: the registry would ask the engine for it."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics of a snapshot; of a dead engine only that it is dead, and how often it was made anew."""
        try:
            snapshot: Snapshot | None = self._snapshot()
        except EngineFailed:
            snapshot = None
        yield self._gauge("engine_up", "Whether the engine works.", float(snapshot is not None))
        yield self._counter("engine_restarts", "Attempts to make the engine anew.", self._restarts())
        if snapshot is None:
            return
        for name, (about, value) in _GAUGES.items():
            if (found := value(snapshot)) is not None:
                yield self._gauge(name, about, found)
        for name, (about, count) in _COUNTERS.items():
            yield self._counter(name, about, count(snapshot))

    def _counter(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, about, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, about, labels=["model_name"])
        family.add_metric([self._model], value)
        return family
