"""`llama-jax bench serve`: requests that arrive over time, at an engine in this process or at a server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import click

from llama_jax import __version__
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
from llama_jax.cli.server_options import ServerOptions, server_options
from llama_jax.measure.workloads import FIRST_ID, renamed
from llama_jax.remote import Remote

if TYPE_CHECKING:
    from llama_jax.measure.serving import Served


def _limits(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """Milliseconds by name, from "ttft:200 tpot:50" in one value or in several."""
    limits = {}
    for pair in " ".join(values).replace(",", " ").split():
        name, _, limit = pair.partition(":")
        try:
            limits[name] = float(limit)
        except ValueError:
            raise click.BadParameter(f"{pair!r} is not a NAME:MILLISECONDS, as in ttft:200", ctx, param) from None
    return limits


@click.command(
    name="serve",
    short_help="The engine, or a server, with requests that arrive over time.",
    epilog=examples(
        "llama-jax bench serve --mix chat --rate 1 --requests 16 --scale 0.2",
        "llama-jax bench serve --preset llama-3.1-8b --mix chat --requests 128 --rate 8 --json out.json",
        'llama-jax bench serve --mix chat --rate 4 --goodput "ttft:200 tpot:50"',
        "llama-jax bench serve --url http://127.0.0.1:8000 --mix chat --rate 4 --requests 64",
    ),
)
@request_options
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), metavar="R", help="Arrivals per second. [default: all at once]"
)
@click.option(
    "--goodput",
    "limits",
    multiple=True,
    metavar="NAME:MS",
    callback=_limits,
    help="Limits that a good request must meet, on ttft, tpot or e2el.",
)
@rounds_option(1)
@server_options
@click.option(
    "--vocab",
    type=click.IntRange(FIRST_ID + 1),
    default=32_000,
    show_default=True,
    help="Prompts for a server use token ids below this.",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Processes that send requests to a server; one reads some 10,000 tokens per second.",
)
@subject_options
def command(
    requests: Requests,
    rate: float | None,
    limits: Mapping[str, float],
    rounds: int,
    server: ServerOptions,
    vocab: int,
    processes: int,
    subject: Subject,
) -> None:
    """Measure how long callers wait while requests arrive at random (Poisson) at an engine in this process.

    With --url the engine is behind a server: any with OpenAI's completions that accepts token ids and ignore_eos, such
    as vLLM's and SGLang's. Times are taken where a caller reads the tokens. The printed block and the fields of the
    JSON object are those of vLLM's `bench serve`.
    """
    from llama_jax.measure.serving import block, check_limits
    from llama_jax.measure.throughput import medians

    check_limits(limits)
    rate = rate or math.inf
    of_engines = {field.name for field in fields(Subject)} - {"quiet", "out"}
    if (remote := server.remote(of_engines, ("vocab", "processes"))) is None:
        result, served = _engine(requests, rate, limits, rounds, subject)
    else:
        result, served = _server(remote, server.name, vocab, processes, requests, rate, limits, rounds, subject)
    result |= {"request_rate": "inf" if rate == math.inf else rate, "goodput_limits_ms": dict(limits)}
    numbers = medians([one.summary for one in served])
    result |= {"ready_s": served[0].ready_s, **numbers, "rounds": [asdict(one) for one in served]}
    subject.show(*block(numbers))
    subject.write(result)


Result = tuple[dict[str, Any], "list[Served]"]
"""The conditions of the numbers, and the runs."""


def _engine(requests: Requests, rate: float, limits: Mapping[str, float], rounds: int, subject: Subject) -> Result:
    """An engine of this process."""
    from llama_jax.measure.bench import measure_ceilings
    from llama_jax.measure.serving import serve

    model = subject.load()
    works = requests.make(model.config.vocab_size, model.config.context_length, rate)
    draft = subject.load_draft(model)
    settings = subject.settings(model, longest_of(works), draft)
    ceilings = measure_ceilings(model.dtype)
    result = subject.about(model, settings, ceilings)
    result["workload"] = requests.about(works, subject)
    each = [renamed(works, i, model.config.vocab_size) for i in range(rounds)]
    with subject.compiling() as compiling:
        served = serve(model, settings, each, limits, draft=draft, peak=ceilings.peak, compiling=compiling)
    subject.show(f"ready in {served[0].ready_s:.1f} s", counts_text(served[0].counts or {}))
    return result, served


def _server(
    remote: Remote,
    name: str | None,
    vocab: int,
    processes: int,
    requests: Requests,
    rate: float,
    limits: Mapping[str, float],
    rounds: int,
    subject: Subject,
) -> Result:
    """A server."""
    from llama_jax.measure.serving import serve_remote

    model = asyncio.run(_described(remote, name))
    works = requests.make(vocab, model.get("max_model_len"), rate)
    result: dict[str, Any] = {"url": remote.url, "model": model["id"], "llama_jax": __version__, "processes": processes}
    subject.show("  ".join(f"{name}={value}" for name, value in result.items()))
    result["workload"] = requests.about(works, subject)
    each = [renamed(works, i, vocab) for i in range(rounds)]
    return result, serve_remote(remote, model["id"], each, limits, processes=processes)


async def _described(remote: Remote, name: str | None) -> dict[str, Any]:
    """The server's description of a model."""
    async with remote:
        return await remote.model(name)
