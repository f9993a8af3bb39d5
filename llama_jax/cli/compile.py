"""`llama-jax compile`: a model compiled for a GPU that is not there."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.options import DTYPES, examples, json_option, quiet_option
from llama_jax.cli.terminal import ms_text, pairs_text, print_json, printable, size_text
from llama_jax.errors import DoesNotFit, RequestError

if TYPE_CHECKING:
    from llama_jax.aot.model import ModelCompilation, Phase
    from llama_jax.targets import Target

_KERNELS = 5
"""Kernels of each phase that the report shows."""

_NOTE = "XLA measures tiles of its own matrix products on the card; here it cannot, and takes its default ones."


@click.command(
    name="compile",
    epilog=examples(
        "llama-jax compile llama-3.1-8b --target mi300x",
        "llama-jax compile llama-3.1-70b --target mi300x --tp 8 --batch 32 --context 8192",
        "llama-jax compile ./config-folder --target rx7900xtx --json",
    ),
)
@click.argument("model")
@click.option("--target", metavar="NAME", help="An AMD GPU, such as mi300x or gfx942. [default: this machine's]")
@click.option("--tp", type=click.IntRange(1), metavar="N", help="Split the model over N devices.")
@click.option("--mesh", metavar="AXIS=N,...", help="Devices by axis; `tensor` splits the model, others repeat it.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows.")
@click.option(
    "--context", type=click.IntRange(1), help="Tokens that a row's cache holds. [default: 4096, or the model's]"
)
@click.option("--prompt", type=click.IntRange(1), help="Prompt tokens of a row. [default: 512, or the context]")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of weights and cache.")
@quiet_option
@json_option
def command(
    model: str,
    target: str | None,
    tp: int | None,
    mesh: str | None,
    batch: int,
    context: int | None,
    prompt: int | None,
    dtype: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile prefill and a decode step of MODEL for an AMD GPU, which this machine need not have.

    MODEL is a preset such as llama-3.1-8b, or anything that `show` takes; only its configuration is read. Needs
    `pip install 'llama-jax[rocm-aot]'` on x86-64 Linux. Says whether it fits, what the devices exchange, the kernels'
    registers, and the least time of a step by the data sheet, which is a prediction and not a measurement.

    Exits with 6 if it does not fit, 5 if the compiler is missing.
    """
    if tp and mesh:
        raise click.UsageError("--tp N is short for --mesh tensor=N: give one of them")
    chosen = _target(target)
    mesh_shape = _mesh_shape(mesh) if mesh else {"tensor": tp} if tp and tp > 1 else {}
    from llama_jax.aot.model import compile_model
    from llama_jax.library.configs import find_config

    config = find_config(model)
    began = time.monotonic()

    def say(line: str) -> None:
        if not quiet and not as_json:
            click.echo(f"[{time.monotonic() - began:5.1f} s] {line}", err=True)

    result = compile_model(
        config, chosen, mesh_shape, batch=batch, context=context, prompt=prompt, dtype=dtype, progress=say
    )
    if as_json:
        print_json(_facts(model, result))
    else:
        click.echo(printable(_report(model, result)))
    raise click.exceptions.Exit(0 if result.fits else DoesNotFit.exit_code)


def _target(name: str | None) -> Target:
    from llama_jax.targets import detected, find

    if name is not None:
        return find(name)
    if here := detected():
        return here[0]
    raise RequestError("this machine has no AMD GPU to compile for", param="target", hint="add --target mi300x")


def _mesh_shape(text: str) -> dict[str, int]:
    shape = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not axis.isidentifier() or not size.isdecimal() or int(size) < 1 or axis in shape:
            raise click.BadParameter(f"{text!r} is not a list such as tensor=4,data=2", param_hint="--mesh")
        shape[axis] = int(size)
    return shape


def _facts(model: str, result: ModelCompilation) -> dict[str, Any]:
    """The report as JSON."""
    target = result.target
    return {
        "model": model,
        "target": target.name,
        "arch": target.arch,
        "devices": result.prefill.compilation.devices,
        "mesh": dict(result.mesh_shape),
        "dtype": result.dtype,
        "batch": result.batch,
        "capacity": result.capacity,
        "prompt_chunk": result.chunk,
        "fits": result.fits,
        "needed_bytes": result.needed_bytes,
        "memory_bytes": target.memory,
        "phases": {phase.name: _phase_facts(phase) for phase in (result.prefill, result.decode)},
    }


def _phase_facts(phase: Phase) -> dict[str, Any]:
    c = phase.compilation
    kernels = [
        {f.name: getattr(k, f.name) for f in dataclasses.fields(k) if f.name != "elf"} | {"waves": k.waves}
        for k in c.kernels
    ]
    return {
        "tokens": phase.tokens,
        "trace_s": round(c.trace_s, 3),
        "compile_s": round(c.compile_s, 3),
        "memory": dataclasses.asdict(c.memory) | {"total": c.memory.total},
        "collectives": [dataclasses.asdict(x) | {"traffic": x.traffic} for x in c.collectives],
        "flops": c.flops,
        "bytes_accessed": c.bytes_accessed,
        "read_bytes": phase.floor.read_bytes,
        "predicted": {
            "compute_s": phase.floor.compute_s,
            "memory_s": phase.floor.memory_s,
            "links_s": phase.floor.links_s,
            "floor_s": phase.floor.seconds,
        },
        "library_calls": dict(c.library_calls),
        "kernels": kernels,
    }


def _report(model: str, result: ModelCompilation) -> str:
    target, devices = result.target, result.prefill.compilation.devices
    mesh = pairs_text(result.mesh_shape) or "one device"
    memory = f"{size_text(result.needed_bytes)} of {size_text(target.memory)} on each device"
    lines = [
        f"{model} compiled for {devices} x {target.label or target.name} ({target.arch}), {mesh}; not run",
        f"{result.dtype}, {result.batch} rows, cache of {result.capacity} tokens a row",
        f"fits: {memory}" if result.fits else f"DOES NOT FIT: needs {memory}",
    ]
    for phase in (result.prefill, result.decode):
        lines += ["", *_phase_lines(phase, result.chunk)]
    return "\n".join([*lines, "", _NOTE])


def _phase_lines(phase: Phase, chunk: int) -> list[str]:
    c, m = phase.compilation, phase.compilation.memory
    title = f"prefill of {chunk} tokens a row" if phase.name == "prefill" else "decode step"
    lines = [
        f"{title} (traced in {c.trace_s:.1f} s, compiled in {c.compile_s:.1f} s)",
        f"  memory       {size_text(m.total)}: arguments {size_text(m.arguments)}, outputs {size_text(m.outputs)} "
        f"({size_text(m.aliased)} in place), temporary {size_text(m.temporary)}, code {size_text(m.code)}",
        f"  arithmetic   {'unknown' if c.flops is None else f'{c.flops / 1e9:,.1f} GFLOP'} and "
        f"{size_text(round(c.bytes_accessed))} moved, by XLA's count, on each device",
    ]
    for x in c.collectives:
        unknown = ", some in loops of unknown length" if x.unknown_trips else ""
        lines.append(f"  exchange     {x.count} x {x.kind} of {size_text(x.bytes)} over {x.devices} devices{unknown}")
    floor = phase.floor
    lines.append(
        f"  predicted    at least {ms_text(floor.seconds)} (peak rates of the data sheet: arithmetic "
        f"{ms_text(floor.compute_s)}, reading {size_text(floor.read_bytes)} {ms_text(floor.memory_s)}, exchange "
        f"{ms_text(floor.links_s)})"
    )
    calls = ", ".join(
        f"{n} x {name}" for name, n in c.library_calls.items() if name not in {x.kind for x in c.collectives}
    )
    lines += [f"  libraries    {calls}"] if calls else []
    shown = sorted(c.kernels, key=lambda k: (-k.spills, -k.vgpr))[:_KERNELS]
    lines.append(f"  kernels      {len(c.kernels)}, those with most spills and registers:")
    lines.append(f"    {'name':40} {'times':>5} {'vgpr':>4} {'spill':>5} {'lds':>8} {'waves/SIMD':>10} {'matrix':>6}")
    for k in shown:
        occupancy, matrix = ("?" if v is None else v for v in (k.occupancy, k.matrix_instructions))
        lines.append(
            f"    {k.name[:40]:40} {k.launches:5} {k.vgpr:4} {k.spills:5} {size_text(k.lds_bytes):>8} "
            f"{occupancy:>10} {matrix:>6}"
        )
    return lines
