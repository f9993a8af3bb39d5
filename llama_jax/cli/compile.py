"""`llama-jax compile`: a model compiled for a GPU that is not there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.options import DTYPES, examples, json_option, memory_fraction_option, quiet_option
from llama_jax.cli.terminal import flops_text, ms_text, pairs_text, print_json, printable, size_text
from llama_jax.cli.verdict import GLOSSARY, memory_lines, verdict_facts, verdict_lines
from llama_jax.errors import DoesNotFit, RequestError

if TYPE_CHECKING:
    from llama_jax.aot.model import ModelCompilation, Phase
    from llama_jax.targets import Target

_KERNELS = 5
"""Kernels of each phase that the report shows."""

_NOTE = """\
XLA measures tiles of its own matrix products on the card; here it cannot, and takes its default ones.
In prefill the last layer attends for each row's last token alone, by the kernel of decode: its own runs once less."""


@click.command(
    name="compile",
    epilog=examples(
        "llama-jax compile llama-3.1-8b --target mi300x",
        "llama-jax compile llama-3.1-70b --target mi300x --tp 8 --batch 32 --context 8192",
        "llama-jax compile ./config-folder --target rx7900xtx --json",
        more=GLOSSARY,
    ),
)
@click.argument("model")
@click.option("--target", metavar="NAME", help="An AMD GPU, such as mi300x or gfx942. [default: this machine's]")
@click.option("--tp", type=click.IntRange(1), metavar="N", help="Split the model over N devices.")
@click.option("--mesh", metavar="AXIS=N,...", help="Devices by axis; `tensor` splits the model, others repeat it.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows.")
@click.option(
    "--context", type=click.IntRange(1), metavar="N", help="Tokens of a text. [default: 4096, or the model's]"
)
@click.option("--prompt", type=click.IntRange(1), help="Prompt tokens of a row. [default: 512, or the context]")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of weights and cache.")
@memory_fraction_option
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
    memory_fraction: float | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compile prefill and a decode step of MODEL for an AMD GPU, which this machine need not have.

    MODEL is a preset such as llama-3.1-8b, or anything that `show` takes; only its configuration is read. Needs
    the extra `rocm-aot` on x86-64 Linux. Says whether it fits, what the devices exchange, the kernels'
    registers, and the least time of a step by the data sheet, which is a prediction and not a measurement.

    Exits with 6 if it does not fit, 5 if the compiler is missing.
    """
    if tp and mesh:
        raise click.UsageError("--tp N is short for --mesh tensor=N: give one of them")
    chosen = _target(target)
    mesh_shape = _mesh_shape(mesh) if mesh else {"tensor": tp} if tp and tp > 1 else {}
    from llama_jax.aot.model import compile_model
    from llama_jax.library.configs import find_config
    from llama_jax.plan import memory_fraction as usual_fraction
    from llama_jax.plan import remedies

    config = find_config(model)
    fraction = usual_fraction() if memory_fraction is None else memory_fraction
    began = time.monotonic()

    def say(line: str) -> None:
        if not quiet and not as_json:
            click.echo(f"[{time.monotonic() - began:5.1f} s] {line}", err=True)

    result = compile_model(
        config,
        chosen,
        mesh_shape,
        batch=batch,
        context=context,
        prompt=prompt,
        dtype=dtype,
        memory_fraction=fraction,
        progress=say,
    )
    would = () if result.fits else remedies(config, result.plan)
    if as_json:
        print_json(_facts(model, result, would))
    else:
        click.echo(printable(_report(model, result, would)))
    raise click.exceptions.Exit(DoesNotFit.exit_code if result.fits is False else 0)


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


def _facts(model: str, result: ModelCompilation, remedies: Sequence[str]) -> dict[str, Any]:
    """The report as JSON."""
    target, plan = result.target, result.plan
    return {
        "model": model,
        "target": target.name,
        "arch": target.arch,
        "devices": result.prefill.compilation.devices,
        "mesh": dict(plan.sizes),
        "dtype": plan.workload.dtype,
        "batch": result.batch,
        "context": plan.workload.context,
        "prompt_chunk": result.chunk,
        **verdict_facts(result.verdict, remedies),
        "device_bytes": target.memory,
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
        "capacity": phase.capacity,
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


def _report(model: str, result: ModelCompilation, remedies: Sequence[str]) -> str:
    target, devices, w = result.target, result.prefill.compilation.devices, result.plan.workload
    mesh = pairs_text(result.plan.sizes) or "one device"
    lines = [
        f"{model} compiled for {devices} x {target.label or target.name} ({target.arch}), {mesh}; not run",
        f"{w.dtype}, batch {w.batch} ({result.batch} rows), prompt {w.prompt}, context {w.context}",
        "",
        "memory of each device: prefill and decode as XLA reports them, the others as planned",
        *memory_lines(result.verdict, target),
        *verdict_lines(result.verdict, remedies),
    ]
    for phase in (result.prefill, result.decode):
        lines += ["", *_phase_lines(phase, result.chunk)]
    return "\n".join([*lines, "", _NOTE])


def _phase_lines(phase: Phase, chunk: int) -> list[str]:
    c, m = phase.compilation, phase.compilation.memory
    title = f"prefill of {chunk} tokens a row" if phase.name == "prefill" else "decode step"
    title += f", with {phase.capacity} slots a row"
    lines = [
        f"{title} (traced in {c.trace_s:.1f} s, compiled in {c.compile_s:.1f} s)",
        f"  memory       {size_text(m.total)}: arguments {size_text(m.arguments)}, outputs {size_text(m.outputs)} "
        f"({size_text(m.aliased)} in place), temporary {size_text(m.temporary)}, code {size_text(m.code)}",
        f"  XLA counts   {flops_text(c.flops)}, and {size_text(round(c.bytes_accessed))} that its operations read and "
        "write, some of it in caches",
    ]
    for x in c.collectives:
        unknown = ", some in loops of unknown length" if x.unknown_trips else ""
        lines.append(f"  exchange     {x.count} x {x.kind} of {size_text(x.bytes)} over {x.devices} devices{unknown}")
    floor = phase.floor
    lines.append(
        f"  predicted    at least {ms_text(floor.seconds)}, by peak rates of the data sheet: arithmetic "
        f"{ms_text(floor.compute_s)}, reading the {size_text(floor.read_bytes)} that have to be read "
        f"{ms_text(floor.memory_s)}, exchange {ms_text(floor.links_s)}"
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
