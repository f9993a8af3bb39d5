"""Prometheus metrics: numbers read from the engine, and the times of requests as clients see them."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from llama_jax.engine.snapshot import Snapshot
from llama_jax.errors import EngineFailed
from llama_jax.generation.outputs import RequestOutput
from llama_jax.generation.streams import Piece

PREFIX = "llama_jax_"
BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 20, 50, 100, 300)
"""Seconds. A dashboard cannot resolve less than the first."""
_BOUNDS = (*(floatToGoString(bound) for bound in BUCKETS), "+Inf")
TOKENS = tuple(mantissa * 10**power for power in range(6) for mantissa in (1, 2, 5))
"""Numbers of tokens."""

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


@dataclass(frozen=True)
class Naming:
    """Naming scheme of metrics.

    Attributes:
      names: full names that replace `PREFIX` and ours; labels: extra labels of each metric.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, name: str) -> str:
        """Return the name of one of our metrics."""
        return self.names.get(name, PREFIX + name)


_SAME = (
    *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "request_success"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_decode_time_seconds", "request_time_per_output_token_seconds"),
    *("request_prompt_tokens", "request_generation_tokens"),
)
_VLLM = {
    "requests_running": "num_requests_running",
    "requests_waiting": "num_requests_waiting",
    "cache_use_ratio": "kv_cache_usage_perc",
    "preemptions": "num_preemptions",
    "drafted_tokens": "spec_decode_num_draft_tokens",
    "accepted_tokens": "spec_decode_num_accepted_tokens",
    **dict(zip(_SAME, _SAME, strict=True)),
}
NAMINGS = {
    "llama_jax": Naming(),
    "vllm": Naming({ours: f"vllm:{theirs}" for ours, theirs in _VLLM.items()}, {"engine": "0"}),
}
"""Naming schemes by the names that `serve --metrics-names` takes. Metrics that vLLM lacks keep our names
(https://docs.vllm.ai/en/latest/usage/metrics/)."""


class Metrics:
    """The metrics of one server."""

    def __init__(self, naming: Naming = NAMINGS["llama_jax"]):
        """Start without requests."""
        self.naming, self._registry = naming, CollectorRegistry()
        self._engines: dict[str, _Engine] = {}
        self.first = self._histogram("time_to_first_token_seconds", "From a request to its first token.")
        self.between = _Intervals(self.naming)
        self._registry.register(self.between)
        self.whole = self._histogram("e2e_request_latency_seconds", "From a request to its last token.")
        self.later = self._histogram("request_decode_time_seconds", "From a request's first token to its last.")
        self.each = self._histogram(
            "request_time_per_output_token_seconds", "Of each token of a request behind the first."
        )
        self.prompt = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", TOKENS)
        self.written = self._histogram("request_generation_tokens", "Tokens of a continuation.", TOKENS)
        self.ended = self._counter("request_success", "Continuations that have ended, by reason.", "finished_reason")
        self.cancelled = self._counter("cancelled", "Requests whose client left.")
        self._answers = self._counter("http_requests", "HTTP requests, by route and status.", "route", "status")
        self._loads = self._counter("model_loads", "Attempts to load a model, by how they ended.", "outcome")
        self._registry.register(_OfEngines(naming, self._engines))

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...] = BUCKETS) -> Histogram:
        names = ["model_name", *self.naming.labels]
        return Histogram(self.naming(name), about, names, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        names = ["model_name", *self.naming.labels, *labels]
        return Counter(self.naming(name), about, names, registry=self._registry)

    def text(self) -> bytes:
        """Return all of them in Prometheus's text format."""
        return generate_latest(self._registry)

    def answered(self, route: str, status: int, model: str = "") -> None:
        """Count an answer; `model`: the requested one, if any."""
        self._answers.labels(model, *self.naming.labels.values(), route, str(status)).inc()

    def loaded(self, model: str, outcome: str) -> None:
        """Count an attempt to load a model: "loaded", or the name of an error."""
        self._loads.labels(model, *self.naming.labels.values(), outcome).inc()

    def of(self, model: str, snapshot: Callable[[], Snapshot], restarts: Callable[[], int]) -> ModelMetrics:
        """Return the metrics of a model's requests; its engine's metrics are read from now on.

        Args:
          model: the label "model_name" of each.
          snapshot: of the engine; raises EngineFailed if it is dead.
          restarts: number of times it was rebuilt.
        """
        self._engines[model] = _Engine(snapshot, restarts)
        return ModelMetrics(self, model)

    def forget(self, model: str) -> None:
        """Stop reading the metrics of a model's engine."""
        self._engines.pop(model, None)


class ModelMetrics:
    """The metrics of one model's requests."""

    def __init__(self, metrics: Metrics, model: str):
        """See `Metrics.of`."""
        labels = (model, *metrics.naming.labels.values())
        times = (metrics.first, metrics.whole, metrics.later, metrics.each)
        self.first, self.whole, self.later, self.each = (one.labels(*labels) for one in times)
        self.between = metrics.between.of(labels)
        self.prompt, self.written = metrics.prompt.labels(*labels), metrics.written.labels(*labels)
        self._ended, self._labels, self._cancelled = metrics.ended, labels, metrics.cancelled.labels(*labels)

    def finished(self, reason: str) -> None:
        """Count a continuation."""
        self._ended.labels(*self._labels, reason).inc()

    @contextmanager
    def request(self) -> Iterator[Times]:
        """Record the times of an engine request; if the client leaves before its end, it counts as cancelled."""
        try:
            yield Times(self)
        except (asyncio.CancelledError, GeneratorExit):
            self._cancelled.inc()
            raise


class Times:
    """Times of a request's tokens."""

    def __init__(self, metrics: ModelMetrics):
        self._metrics, self._begun = metrics, time.perf_counter()
        self._last: dict[int, float] = {}

    def piece(self, piece: Piece) -> None:
        """Record the time of a stream's piece."""
        now = time.perf_counter()
        if piece.token_ids:
            if not self._last:
                self._metrics.first.observe(now - self._begun)
            if piece.index in self._last:  # a piece of several tokens, as slow readers get, counts once per token
                self._metrics.between.observe(now - self._last[piece.index], len(piece.token_ids))
            self._last[piece.index] = now
        if piece.output is not None:
            self._end(piece.output, now)

    def output(self, output: RequestOutput) -> None:
        """Record the times of a whole answer."""
        self._metrics.first.observe(output.timing.ttft_s)
        self._end(output, time.perf_counter())

    def _end(self, output: RequestOutput, now: float) -> None:
        metrics, whole = self._metrics, now - self._begun
        later = max(whole - output.timing.ttft_s, 0.0)
        metrics.whole.observe(whole)
        metrics.later.observe(later)
        metrics.prompt.observe(len(output.prompt_token_ids))
        behind = max((len(one.token_ids) for one in output.outputs), default=0) - 1
        if behind > 0:
            metrics.each.observe(later / behind)
        for completion in output.outputs:
            metrics.written.observe(len(completion.token_ids))
            metrics.finished(completion.finish_reason)


@dataclass(frozen=True)
class _Engine:
    snapshot: Callable[[], Snapshot]
    restarts: Callable[[], int]


class _Counts:
    """Numbers of intervals by bucket; `Histogram.observe` takes ten times as long, and it would be called for each
    token."""

    def __init__(self) -> None:
        self.counts, self.seconds = [0] * (len(BUCKETS) + 1), 0.0

    def observe(self, seconds: float, times: int) -> None:
        """Count some equal intervals that last this long together."""
        self.counts[bisect_left(BUCKETS, seconds / times)] += times
        self.seconds += seconds


class _Intervals(Collector):
    """The histogram of the time between tokens."""

    def __init__(self, naming: Naming):
        self._naming, self._of = naming, dict[tuple[str, ...], _Counts]()

    def of(self, labels: tuple[str, ...]) -> _Counts:
        """Return the counts of a model, for its labels."""
        return self._of.setdefault(labels, _Counts())

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram."""
        name, about = self._naming("inter_token_latency_seconds"), "Between tokens of a stream."
        made = HistogramMetricFamily(name, about, labels=["model_name", *self._naming.labels])
        for labels, found in list(self._of.items()):
            sums = map(float, accumulate(found.counts))
            made.add_metric(labels, list(zip(_BOUNDS, sums, strict=True)), found.seconds)
        yield made


class _OfEngines(Collector):
    """Metrics read from the engines on request."""

    def __init__(self, naming: Naming, engines: Mapping[str, _Engine]):
        self._naming, self._engines = naming, engines

    def describe(self) -> list[Metric]:
        """Return nothing: otherwise the registry would query the engines."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of snapshots; for a dead engine only that it is dead, and its number of restarts."""
        gauges, counters = dict[str, GaugeMetricFamily](), dict[str, CounterMetricFamily]()
        names = ["model_name", *self._naming.labels]

        def gauge(name: str, about: str) -> GaugeMetricFamily:
            return gauges.setdefault(name, GaugeMetricFamily(self._naming(name), about, labels=names))

        def counter(name: str, about: str) -> CounterMetricFamily:
            return counters.setdefault(name, CounterMetricFamily(self._naming(name), about, labels=names))

        for model, engine in list(self._engines.items()):
            labels = [model, *self._naming.labels.values()]
            try:
                snapshot: Snapshot | None = engine.snapshot()
            except EngineFailed:
                snapshot = None
            gauge("engine_up", "Whether the engine works.").add_metric(labels, float(snapshot is not None))
            restarts = counter("engine_restarts", "Attempts to restart the engine.")
            restarts.add_metric(labels, engine.restarts())
            if snapshot is None:
                continue
            for name, (about, value) in _GAUGES.items():
                if (found := value(snapshot)) is not None:
                    gauge(name, about).add_metric(labels, found)
            for name, (about, count) in _COUNTERS.items():
                counter(name, about).add_metric(labels, count(snapshot))
        yield from gauges.values()
        yield from counters.values()
