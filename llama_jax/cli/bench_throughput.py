"""`llama-jax bench throughput`: all requests at once, compared with the ideal schedule."""

from __future__ import annotations

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


@click.command(
    name="throughput",
    short_help="The engine with many requests at once.",
    epilog=examples(
        "llama-jax bench throughput --mix mixed",
        "llama-jax bench throughput --preset llama-3.1-8b --mix sharegpt --requests 256 --json out.json",
        "llama-jax bench throughput --preset llama-3.1-8b --mix prefix --rounds 1",
        "llama-jax bench throughput --scale 0.1 --requests 32 --static 8",
    ),
)
@request_options
@click.option("--static", type=click.IntRange(1), metavar="N", help="Also run batch_generate, N at a time.")
@rounds_option(3)
@subject_options
def command(requests: Requests, static: int | None, rounds: int, subject: Subject) -> None:
    """Measure how long an engine takes for requests that all arrive at once.

    Its programs are compiled, and each has run once, before the clock starts. The result is compared with the ideal
    schedule: prompt tokens at the rate of static prefill, and for each token of the longest answer a static decode step
    with as many rows as are unfinished if all start together; measured in the same run.
    """
    from llama_jax.measure.bench import measure_ceilings
    from llama_jax.measure.ideal import every_other, measure_steady
    from llama_jax.measure.throughput import Run, make_ready, median, run_job, run_static, shares
    from llama_jax.measure.workloads import MIXES, renamed

    model, mix = subject.load(), MIXES[requests.mix]
    works = requests.make(model.config.vocab_size, model.config.context_length)
    draft = subject.load_draft(model)
    settings = subject.settings(model, longest_of(works), draft)
    ceilings = measure_ceilings(model.dtype)
    result = {**subject.about(model, settings, ceilings), "workload": requests.about(works, subject)}

    # Whatever needs its own caches runs before the engine, which takes the memory.
    steady = measure_steady(model, ceilings, works, every_other(settings.decode_rows))
    result["steady"] = [asdict(r) for r in steady.results]
    for r in steady.results:
        rates = f"prefill {r.prefill_tps:.0f} tok/s, decode {r.decode_tps:.1f} tok/s, step {r.step_s * 1e3:.3f} ms"
        subject.show(f"static batch of {r.batch}, prompt {r.prompt}: {rates}")
    if static is not None:
        result["static"] = {"batch": static, **asdict(run_static(model, works, static))}
        subject.show(f"static batches of {static}: {_rates(result['static'])}")

    with subject.compiling() as compiling:
        llm, result["ready_s"] = make_ready(model, settings, ceilings, compiling, draft)
    subject.show(f"ready in {result['ready_s']:.1f} s")
    passes: dict[str, list[Run]] = {"cold": [], "again": []} if mix.shared else {"cold": []}
    for number in range(rounds):
        # Other ids in each round, so that no round finds cached tokens of an earlier one.
        given = renamed(works, number, model.config.vocab_size)
        for runs in passes.values():
            runs.append(run_job(llm, given))
    for name, runs in passes.items():
        numbers = asdict(median(runs)) | shares(median(runs), works, steady, settings.rows)
        result[name] = {**numbers, "elapsed_times": [run.elapsed_time for run in runs]}
        subject.show(f"engine, {name}: {_rates(numbers)}", *_details(numbers))
    if mix.steady_target is not None:
        result |= _target(result["cold"], result["ready_s"], mix.steady_target)
        subject.show(
            f"  with the start of the engine {result['steady_share_with_start']:.1%} by all tokens; the target is "
            f"{mix.steady_target:.0%}"
        )
    subject.write(result)


def _rates(numbers: Mapping[str, Any]) -> str:
    return (
        f"{numbers['elapsed_time']:.3f} s, {numbers['output_tokens_per_second']:.1f} output tok/s, "
        f"{numbers['tokens_per_second']:.1f} total tok/s, {numbers['requests_per_second']:.2f} requests/s"
    )


def _details(numbers: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"  {counts_text(numbers)}",
        f"  {numbers['ideal_share']:.1%} of the ideal schedule ({numbers['ideal_s']:.3f} s)",
        f"  {numbers['steady_share']:.1%} of steady decoding ({numbers['steady_tps']:.1f} tok/s) by all tokens, "
        f"{numbers['steady_output_share']:.1%} by output tokens alone",
    )


def _target(cold: Mapping[str, Any], ready_s: float, target: float) -> dict[str, float]:
    """A job's share of steady decoding if it must wait for the engine to start, and the target."""
    waited = cold["elapsed_time"] / (cold["elapsed_time"] + ready_s)
    return {"steady_target": target, "steady_share_with_start": cold["steady_share"] * waited}
