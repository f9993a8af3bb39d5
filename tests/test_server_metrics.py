"""Metrics by our names and by vLLM's, of several models at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines import small_settings, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llama_jax.engine.core import Core
from llama_jax.engine.snapshot import Snapshot
from llama_jax.errors import EngineFailed
from llama_jax.generation.outputs import CompletionOutput, RequestOutput, Timing
from llama_jax.generation.streams import Piece
from llama_jax.server import metrics as module
from llama_jax.server.metrics import NAMINGS, Metrics

# Of vLLM's own list (docs.vllm.ai, usage/metrics), without the endings of samples.
VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions"),
    *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "request_success"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"),
    *("request_decode_time_seconds", "request_time_per_output_token_seconds"),
    *("request_prompt_tokens", "request_generation_tokens"),
    *("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
}


def families(metrics: Metrics) -> dict[str, Any]:
    found = list(text_string_to_metric_families(metrics.text().decode()))
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


@pytest.fixture(scope="module")
def snapshot() -> Callable[[], Snapshot]:
    return Core(tiny_model(), small_settings()).snapshot


def values(family: Any, ending: str = "") -> dict[str, float]:
    """Values of a metric's samples by the model's name."""
    return {s.labels["model_name"]: s.value for s in family.samples if s.name == family.name + ending}


def test_names_of_vllm(snapshot: Callable[[], Snapshot]) -> None:
    ours, theirs = Metrics(), Metrics(NAMINGS["vllm"])
    for metrics in (ours, theirs):
        metrics.of("a", snapshot, lambda: 0)
        metrics.of("b", snapshot, lambda: 0)
    names = {name.removesuffix("_created") for name in families(theirs)}
    renamed = {name.partition(":")[2] for name in names if ":" in name}
    assert renamed == VLLM
    assert len(families(ours)) == len(families(theirs))
    assert all(name.startswith(("llama_jax_", "vllm:")) for name in families(theirs))
    for family in families(theirs).values():
        assert all(sample.labels["engine"] == "0" for sample in family.samples)
    assert set(values(families(theirs)["vllm:num_requests_running"])) == {"a", "b"}


def test_a_dead_engine_beside_another(snapshot: Callable[[], Snapshot]) -> None:
    def dead() -> Snapshot:
        raise EngineFailed("the device is lost")

    metrics = Metrics()
    metrics.of("a", dead, lambda: 3)
    metrics.of("b", snapshot, lambda: 0)
    found = families(metrics)
    assert values(found["llama_jax_engine_up"]) == {"a": 0, "b": 1}
    assert values(found["llama_jax_engine_restarts"], "_total") == {"a": 3, "b": 0}
    assert set(values(found["llama_jax_requests_running"])) == {"b"}
    metrics.forget("a")
    assert values(families(metrics)["llama_jax_engine_up"]) == {"b": 1}


def test_times_of_a_stream(monkeypatch: pytest.MonkeyPatch, snapshot: Callable[[], Snapshot]) -> None:
    """First token after 0.4 s, then two at once 0.2 s later, and the last after another 0.3 s."""
    clock = iter((10.0, 10.4, 10.6, 10.9))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    metrics = Metrics()
    completion = CompletionOutput(0, (1, 2, 3, 4), "abcd", "stop")
    output = RequestOutput((7,) * 30, (completion,), Timing(0.4, 75.0, 6.0))
    with metrics.of("a", snapshot, lambda: 0).request() as times:
        times.piece(Piece(0, "a", (1,)))
        times.piece(Piece(0, "bc", (2, 3)))
        times.piece(Piece(0, "d", (4,), finish_reason="stop", output=output))
    found = families(metrics)

    def of(name: str) -> tuple[float, float]:
        family = found[f"llama_jax_{name}"]
        return values(family, "_count")["a"], pytest.approx(values(family, "_sum")["a"])

    assert of("time_to_first_token_seconds") == (1, 0.4)
    assert of("inter_token_latency_seconds") == (3, 0.1 + 0.1 + 0.3)
    assert of("e2e_request_latency_seconds") == (1, 0.9)
    assert of("request_decode_time_seconds") == (1, 0.5)
    assert of("request_time_per_output_token_seconds") == (1, 0.5 / 3)
    assert of("request_prompt_tokens") == (1, 30)
    assert of("request_generation_tokens") == (1, 4)
    assert values(found["llama_jax_request_success"], "_total") == {"a": 1}


@given(st.lists(st.tuples(st.floats(0, 400), st.integers(1, 5)), max_size=20))
def test_intervals_are_the_histogram_of_the_library(observed: list[tuple[float, int]]) -> None:
    """The same samples as `prometheus_client.Histogram` has, at the bounds of buckets too."""
    metrics, registry = Metrics(NAMINGS["vllm"]), CollectorRegistry()
    labels = {"model_name": "a", "engine": "0"}
    name = "vllm:inter_token_latency_seconds"
    theirs = Histogram(name, "Between tokens.", list(labels), buckets=module.BUCKETS, registry=registry)
    counts, theirs = metrics.between.of(tuple(labels.values())), theirs.labels(**labels)
    for seconds, times in (*observed, *((bound, 1) for bound in module.BUCKETS)):
        counts.observe(seconds, times)
        for _ in range(times):
            theirs.observe(seconds / times)
    exposed = generate_latest(registry).decode().partition(f"# HELP {name}_created")[0]
    (expected,) = text_string_to_metric_families(exposed)
    ours = families(metrics)[name]
    assert [(s.name, s.labels) for s in ours.samples] == [(s.name, s.labels) for s in expected.samples]
    assert [s.value for s in ours.samples] == pytest.approx([s.value for s in expected.samples])
