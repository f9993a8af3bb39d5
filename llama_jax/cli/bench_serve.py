"""`llama-jax bench serve`: requests that arrive over time, at an engine in this process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from llama_jax.cli.bench_options import (
    Requests,
    Subject,
    counts_text,
    longest_of,
    request_options,
    rounds_option,
    subject_options,
)
from llama_jax.cli.options import examples

_NAMES = {"ttft": "first token", "tpot": "each token behind", "itl": "between tokens", "e2el": "whole answer"}


def _limits(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """Milliseconds by name, from "ttft:200 tpot:50" in one value or in several."""
    limits = {}
    for pair in " ".join(values).replace(",", " ").split():
        name, _, limit = pair.partition(":")
        try:
            limits[name] = float(limit)
        except ValueError:
            raise click.BadParameter(f"{pair!r} is no NAME:MILLISECONDS, as in ttft:200", ctx, param) from None
    return limits


@click.command(
    name="serve",
    short_help="The engine with requests that arrive over time.",
    epilog=examples(
        "llama-jax bench serve --mix chat --rate 1 --requests 16 --scale 0.2",
        "llama-jax bench serve --preset llama-3.1-8b --mix chat --requests 128 --rate 8 --json out.json",
        'llama-jax bench serve --mix chat --rate 4 --goodput "ttft:200 tpot:50"',
    ),
)
@request_options
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), metavar="R", help="Arrivals a second. [default: all at once]"
)
@click.option(
    "--goodput",
    "limits",
    multiple=True,
    metavar="NAME:MS",
    callback=_limits,
    help="Limits that a request has to keep to count as good: of ttft, tpot, e2el.",
)
@rounds_option(1)
@subject_options
def command(requests: Requests, rate: float | None, limits: Mapping[str, float], rounds: int, subject: Subject) -> None:
    """Measure what callers wait for while requests arrive at random (Poisson) at an engine in this process.

    Times are taken where a caller reads the tokens. The JSON object has the field names of vLLM's `bench serve`.
    """
    from llama_jax.measure.bench import measure_ceilings
    from llama_jax.measure.serving import TIMES, check_limits, serve
    from llama_jax.measure.throughput import medians
    from llama_jax.measure.workloads import renamed

    check_limits(limits)
    model = subject.load()
    works = requests.make(model, rate or math.inf)
    draft = subject.load_draft(model)
    settings = subject.settings(model, longest_of(works), draft)
    ceilings = measure_ceilings(model.dtype)
    result = subject.about(model, settings, ceilings)
    result["workload"] = requests.about(works, subject)
    result |= {"request_rate": rate or "inf", "goodput_limits_ms": dict(limits)}
    each = [renamed(works, i, model.config.vocab_size) for i in range(rounds)]
    with subject.compiling() as compiling:
        served = serve(model, settings, each, limits, draft=draft, peak=ceilings.peak, compiling=compiling)
    numbers = medians([one.summary for one in served])
    result |= {"ready_s": served[0].ready_s, **numbers, "rounds": [asdict(one) for one in served]}
    subject.show(f"ready in {served[0].ready_s:.1f} s", *_counts(numbers, served[0].counts))
    subject.show(f"{'ms':<18} {'mean':>9} {'p50':>9} {'p95':>9} {'p99':>9}")
    for name in TIMES:
        times = (numbers[f"{how}_{name}_ms"] for how in ("mean", "p50", "p95", "p99"))
        subject.show(f"{_NAMES[name]:<18} " + " ".join(f"{'-' if t is None else f'{t:.2f}':>9}" for t in times))
    subject.write(result)


def _counts(numbers: Mapping[str, Any], counts: Mapping[str, Any]) -> tuple[str, ...]:
    good = numbers["request_goodput"]
    return (
        f"{numbers['completed']} answered, {numbers['failed']} failed, in {numbers['duration']:.2f} s",
        f"{numbers['output_throughput']:.1f} output tok/s, {numbers['total_token_throughput']:.1f} total tok/s, "
        f"{numbers['request_throughput']:.2f} requests/s" + ("" if good is None else f", {good:.2f} of them good"),
        counts_text(counts),
    )
