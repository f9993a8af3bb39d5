"""`llama-jax bench`: speed of prefill and decode, compared with the device's measured ceilings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from llama_jax.cli import bench_latency, bench_serve, bench_throughput
from llama_jax.cli.bench_options import measured_model, preset_option
from llama_jax.cli.command_line import Group
from llama_jax.cli.options import (
    LoadOptions,
    examples,
    json_option,
    load_options,
    model_option,
    page_sizes,
    quiet_option,
    requested_mesh,
)
from llama_jax.cli.terminal import pairs_text, print_json, share_text

if TYPE_CHECKING:
    from llama_jax.measure.profiling import ProgramTime

_VOID = "the ceiling was measured too low, as on a busy machine: run it again when nothing else runs"
SHOWN_KERNELS = 8
SHOWN_SHARE = 0.01
"""Programs with a smaller share of the device's time are omitted from a profile."""


@click.group(
    name="bench",
    cls=Group,
    invoke_without_command=True,
    epilog=examples(
        "llama-jax bench",
        "llama-jax bench --batch 1 --batch 8 --prompt 128 --new 64 --json",
        "llama-jax bench --preset llama-3.1-8b --batch 1 --batch 32",
        "llama-jax bench --preset llama-3.1-70b --tp 8",
        "llama-jax bench throughput --preset llama-3.1-8b --mix sharegpt",
    ),
)
@model_option
@preset_option
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 8), show_default=True)
@click.option("--prompt", type=click.IntRange(1), default=128, show_default=True, help="Prompt tokens per row.")
@click.option("--new", type=click.IntRange(2), default=64, show_default=True, help="Generated tokens per row.")
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed rounds, of which medians are taken."
)
@click.option(
    "--page-size",
    type=page_sizes,
    help="Keep keys and values in pages of this many tokens. [default: not paged]",
)
@load_options
@quiet_option
@click.option("--profile", is_flag=True, help="Also show how the time divides among kernels. Needs a GPU.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
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

    One warm-up run per shape, then medians. MBU is the rate at which decode steps read weights and cache, MFU the rate
    of arithmetic in prefill, as shares of the read and matrix-product rates measured in the same run. On a mesh, all of
    these are per device. The subcommands measure the engine; their options follow their names.
    """
    if ctx.invoked_subcommand is not None:
        _refuse_options(ctx)
        return
    from llama_jax.kernels import report
    from llama_jax.measure.bench import bench, environment, measure_ceilings, profile_generation

    devices = requested_mesh(loading.mesh, loading.tp, batch=max(batches), context=prompt + new, prompt=prompt)
    loaded = measured_model(model, preset, loading, devices, quiet=quiet or as_json)
    ceilings = measure_ceilings(loaded.dtype)
    about = {
        **environment(loaded.dtype, loaded.mesh),
        "model": loaded.name,
        "random_weights": preset is not None,
        "page_size": page_size,
        "kv_dtype": loaded.cache_dtype,
        "activations": loaded.config.activations or loaded.dtype.name,
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
                f"{r.batch:5d} {r.prompt:6d} {r.new:4d} {r.prefill_tps:13.0f} {share_text(r.mfu)} "
                f"{r.prefill_s * 1e3:8.1f} {r.decode_tps:12.1f} {r.step_s * 1e3:8.3f} {share_text(r.mbu)} "
                f"{r.spread:6.2f}"
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


def _refuse_options(ctx: click.Context) -> None:
    """Refuses options before the name of a subcommand, where they would have no effect."""
    named = (option for option in ctx.command.params if option.name and option.expose_value)
    before = [option for option in named if ctx.get_parameter_source(option.name or "") == ParameterSource.COMMANDLINE]
    if before:
        name = ctx.invoked_subcommand
        raise click.UsageError(f"{before[0].opts[-1]} stands before {name}, whose options follow its name", ctx)


for _further in (bench_throughput, bench_latency, bench_serve):
    command.add_command(_further.command)


def _print_profile(found: Sequence[ProgramTime]) -> None:
    """Prints the first device's programs, their time by kind of kernel, and the longest kernels."""
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
