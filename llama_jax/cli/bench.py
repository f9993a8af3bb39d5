"""`llama-jax bench`: speed of prefill and decode, beside the device's measured ceilings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from llama_jax.cli.options import (
    LoadOptions,
    examples,
    json_option,
    load_options,
    model_option,
    page_size_option,
    quiet_option,
    requested_mesh,
)
from llama_jax.cli.terminal import pairs_text, print_json

if TYPE_CHECKING:
    from llama_jax.measure.profiling import ProgramTime

_VOID = "the ceiling was measured too low, as on a busy machine: run it again when nothing else runs"
SHOWN_KERNELS = 8
SHOWN_SHARE = 0.01
"""Programs that take less of the device's time than this are left out of a profile."""


@click.command(
    name="bench",
    epilog=examples(
        "llama-jax bench",
        "llama-jax bench --batch 1 --batch 8 --prompt 128 --new 64 --json",
        "llama-jax bench --preset llama-3.1-8b --batch 1 --batch 32",
        "llama-jax bench --preset llama-3.1-70b --tp 8",
    ),
)
@model_option
@click.option("--preset", metavar="NAME", help="Random weights of a published shape, made on the device.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True)
@click.option("--prompt", type=click.IntRange(1), default=128, show_default=True, help="Prompt tokens per row.")
@click.option("--new", type=click.IntRange(2), default=64, show_default=True, help="Generated tokens per row.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="The medians are of these.")
@page_size_option
@load_options
@quiet_option
@click.option("--profile", is_flag=True, help="Also show which kernels the time goes to. Needs a GPU.")
@json_option
def command(
    model: str,
    preset: str | None,
    batches: tuple[int, ...],
    prompt: int,
    new: int,
    repeats: int,
    page_size: int | None,
    loading: LoadOptions,
    quiet: bool,
    profile: bool,
    as_json: bool,
) -> None:
    """Measure prefill and decode through the public generate functions, with random prompts.

    One warm-up run per shape, then medians. MBU is what a decode step must read (weights and cache) per second, MFU
    the arithmetic of prefill per second, as shares of the reads and the matrix product measured in the same run. On a
    mesh both are those of one device, and the ceilings too.
    """
    from llama_jax import runtime
    from llama_jax.cli.progress import Reporter
    from llama_jax.kernels import report
    from llama_jax.kernels.registry import checked_backends
    from llama_jax.measure.bench import bench, environment, measure_ceilings, profile_generation, random_model

    runtime.enable_compilation_cache()
    devices = requested_mesh(loading.mesh, loading.tp, batch=max(batches), context=prompt + new, prompt=prompt)
    with Reporter(quiet=quiet or as_json) as reporter:
        reporter.warn_of_unused_gpu()
        if preset is None:
            loaded, _ = loading.load(model, devices, reporter)
        else:
            named = checked_backends(loading.kernels)
            loaded = random_model(preset, loading.dtype or runtime.default_dtype(), devices, notify=reporter.notify)
            loaded = dataclasses.replace(loaded, kernels=named)
    ceilings = measure_ceilings(loaded.dtype)
    about = {
        **environment(loaded.dtype, loaded.mesh),
        "model": loaded.name,
        "random_weights": preset is not None,
        "page_size": page_size,
    }
    if not as_json:
        click.echo("  ".join(f"{name}={value}" for name, value in about.items()))
        click.echo(f"ceilings: {ceilings}")
        click.echo(f"{'batch':>5} {'prompt':>6} {'new':>4} {'prefill tok/s':>13} {'MFU':>5} {'first ms':>8} ", nl=False)
        click.echo(f"{'decode tok/s':>12} {'step ms':>8} {'MBU':>5} {'spread':>6}")
    results, profiles = [], []
    for batch in batches:
        r = bench(loaded, ceilings, batch=batch, prompt=prompt, new=new, repeats=repeats, page_size=page_size)
        results.append(dataclasses.asdict(r))
        if not as_json:
            click.echo(
                f"{r.batch:5d} {r.prompt:6d} {r.new:4d} {r.prefill_tps:13.0f} {_share(r.mfu)} {r.prefill_s * 1e3:8.1f} "
                f"{r.decode_tps:12.1f} {r.step_s * 1e3:8.3f} {_share(r.mbu)} {r.spread:6.2f}"
            )
            if r.void:
                click.echo(f"      void: {' and '.join(r.void).upper()} above 1; {_VOID}")
        if profile:
            found = profile_generation(loaded, batch=batch, prompt=prompt, new=new, page_size=page_size)
            profiles.append({"batch": batch, "programs": [dataclasses.asdict(program) for program in found]})
            if not as_json:
                _print_profile(found)
    if as_json:
        chosen = [{**choice.to_json(), "traced": count} for choice, count in report().items()]
        report_of = {**about, "ceilings": dataclasses.asdict(ceilings), "results": results, "kernels": chosen}
        print_json(report_of | ({"profiles": profiles} if profile else {}))
        return
    for choice, count in report().items():
        tiles = pairs_text(dict(choice.tiles))
        click.echo(
            f"kernel {choice.operation} {choice.dtype} {choice.shape}: {choice.backend} {tiles}"
            f"({choice.reason}{'' if choice.measured else ', not measured'}; traced {count}x)"
        )
        for name, why in choice.passed_over:
            click.echo(f"       not {name}: {why}")


def _share(share: float | None) -> str:
    return " void" if share is None else f"{share:5.2f}"


def _print_profile(found: Sequence[ProgramTime]) -> None:
    """The programs of the first device, what kinds of kernels take their time, and the longest of these."""
    first = min(program.device for program in found)
    here = [program for program in found if program.device == first]
    for program in here:
        if program.busy_s < SHOWN_SHARE * sum(p.busy_s for p in here):
            continue
        kinds = ", ".join(f"{kind} {s * 1e3:.3f}" for kind, s in program.by_kind().items())
        times = f"{program.busy_s * 1e3:.3f} ms in kernels, of {program.span_s * 1e3:.3f} from first to last"
        click.echo(f"      {program.program}: {times} ({kinds})")
        for kernel in program.kernels[:SHOWN_KERNELS]:
            each = kernel.seconds / kernel.calls * 1e6
            click.echo(
                f"        {kernel.seconds * 1e3:9.2f} ms = {kernel.calls:5d} x {each:8.2f} us  {kernel.name[:80]}"
            )
