"""`llama-jax plan`: does a model fit, and how fast could it be, before anything is downloaded."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.options import DTYPES, examples, json_option, mesh_options
from llama_jax.cli.terminal import print_json, printable, size_text
from llama_jax.errors import DoesNotFit, RequestError

if TYPE_CHECKING:
    from llama_jax.config import LlamaConfig
    from llama_jax.model_compilation import ModelCompilation
    from llama_jax.plan import Bytes, Floor, Plan, Workload
    from llama_jax.targets import Collective, Target

_FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_AUTO = "auto"


@click.command(
    name="plan",
    epilog=examples(
        "llama-jax plan llama-3.1-8b --target mi300x",
        "llama-jax plan llama-3.1-70b --target mi300x --devices 8 --mesh auto --batch 32 --context 8192",
        "llama-jax plan llama-3.1-405b --target mi355x --tp 8 --compile",
        "llama-jax plan ./config-folder --target h200 --json",
    ),
)
@click.argument("model")
@click.option("--target", metavar="NAME", help="A device, such as mi300x, h200 or gfx942. [default: this machine's]")
@click.option("--devices", type=click.IntRange(1), metavar="N", help="How many there are. [default: as the mesh has]")
@mesh_options
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Texts at a time.")
@click.option(
    "--context", type=click.IntRange(1), metavar="N", help="Tokens of a text. [default: 4096, or the model's]"
)
@click.option("--prompt", type=click.IntRange(1), metavar="N", help="Of these, the prompt's. [default: 512, or all]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of weights and cache. [default: bfloat16; float32 on a CPU]")
@click.option(
    "--memory-fraction",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="F",
    help="Of a device's memory, what jax may use. [default: XLA_PYTHON_CLIENT_MEM_FRACTION, or 0.75 as jax has it]",
)
@click.option(
    "--latency",
    type=click.FloatRange(0),
    default=0.0,
    metavar="US",
    help="Microseconds that each collective takes too.",
)
@click.option("--compile", "compiled", is_flag=True, help="Also compile it, for AMD GPUs, and show XLA's own numbers.")
@json_option
def command(
    model: str,
    target: str | None,
    devices: int | None,
    tp: int | None,
    mesh: str | None,
    batch: int,
    context: int | None,
    prompt: int | None,
    dtype: str | None,
    memory_fraction: float | None,
    latency: float,
    compiled: bool,
    as_json: bool,
) -> None:
    """Say whether MODEL fits a number of devices, and the least time that it could take there.

    MODEL is a preset such as llama-3.1-8b, or anything that `show` takes; only its configuration is read. `--mesh auto`
    takes the smallest tensor parallelism that fits. Bytes of weights and cache are exact; times follow from data
    sheets: predictions that nothing can beat, and no measurements.

    Exits with 6 if it does not fit.
    """
    from llama_jax.models.configs import find_config
    from llama_jax.plan import Workload, make_plan

    chosen = _target(target)
    config = find_config(model)
    context = min(4096, config.context_length) if context is None else context
    prompt = min(512, context) if prompt is None else prompt
    workload = Workload(batch, context, prompt, dtype or ("float32" if chosen.vendor == "cpu" else "bfloat16"))
    workload.check(config)
    fraction = _fraction() if memory_fraction is None else memory_fraction
    sizes = _sizes(config, chosen, workload, mesh, tp, devices, fraction)
    plan = make_plan(config, chosen, sizes, workload, memory_fraction=fraction, latency_s=latency * 1e-6)
    xla = _compile(config, plan, quiet=as_json) if compiled else None
    if as_json:
        print_json(_facts(model, config, plan, xla))
    else:
        click.echo(
            printable("\n".join([*_report(model, plan), *([] if xla is None else _compared(config, plan, xla))]))
        )
    raise click.exceptions.Exit(DoesNotFit.exit_code if plan.fits is False else 0)


def _target(name: str | None) -> Target:
    from llama_jax.targets import current, detected, find

    if name is not None:
        return find(name)
    here = detected()
    return here[0] if here else current()


def _fraction() -> float:
    """What the environment says, or jax's default."""
    from llama_jax.plan import MEMORY_FRACTION

    name = next((name for name in _FRACTION_VARIABLES if os.environ.get(name)), None)
    if name is None:
        return MEMORY_FRACTION
    try:
        return float(os.environ[name])
    except ValueError:
        raise RequestError(f"{name}={os.environ[name]!r} is no number", param=name, hint="e.g. 0.9") from None


def _sizes(
    config: LlamaConfig,
    target: Target,
    workload: Workload,
    mesh: str | None,
    tp: int | None,
    devices: int | None,
    fraction: float,
) -> dict[str, int]:
    """Sizes of the mesh's axes: as asked for, with devices beyond them as "data"; else the smallest that fits."""
    from llama_jax.plan import smallest_mesh
    from llama_jax.sharding import requested_axes

    asked = requested_axes(None if mesh == _AUTO else mesh, tp)
    if mesh == _AUTO and tp is not None:
        raise RequestError("--mesh auto chooses --tp by itself", param="mesh", hint="give one of them")
    if asked is None:
        if mesh == _AUTO or devices is not None:
            return smallest_mesh(config, target, workload, devices=devices, memory_fraction=fraction)
        return {}
    in_mesh = math.prod(asked.values())
    if devices is not None and devices % in_mesh:
        raise RequestError(
            f"a mesh of {in_mesh} devices does not divide {devices}",
            param="devices",
            hint=f"choose a multiple of {in_mesh}",
        )
    if devices is not None and devices > in_mesh:
        asked = {"data": asked.get("data", 1) * devices // in_mesh} | {k: n for k, n in asked.items() if k != "data"}
    return {axis: n for axis, n in asked.items() if n > 1}


def _compile(config: LlamaConfig, plan: Plan, *, quiet: bool) -> ModelCompilation:
    from llama_jax.model_compilation import compile_model

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    w = plan.workload
    return compile_model(
        config,
        plan.target,
        plan.sizes,
        batch=w.batch,
        context=w.context,
        prompt=w.prompt,
        dtype=w.dtype,
        progress=say,
    )


def _report(model: str, plan: Plan) -> list[str]:
    target, w, needs, shapes = plan.target, plan.workload, plan.needs, plan.shapes
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.sizes.items()) or "one device"
    dense, pages = size_text(needs.cache), size_text(needs.paged_cache)
    worst = max(needs.phases, key=lambda phase: needs.phases[phase])
    phases = ", ".join(f"{name} {size_text(size)}" for name, size in needs.phases.items() if size)
    arch = "" if target.arch == target.name else f" ({target.arch})"
    return [
        f"{model} on {plan.devices} x {target.label or target.name}{arch}, {mesh}: predicted, nothing was run",
        f"{w.dtype}, batch {w.batch}, prompt {w.prompt}, context {w.context}",
        "",
        f"memory of each device, which has {shapes.rows} of the rows",
        f"  weights      {size_text(needs.weights)}",
        f"  KV cache     {dense}, {shapes.capacities[-1]} slots a row; {pages} if it were in pages",
        f"  temporary    {size_text(needs.prefill.temporary)} in prefill, {shapes.chunk} tokens of a row at a time "
        f"({_backends(plan.prefill_backends)}); {size_text(needs.decode.temporary)} in decode "
        f"({_backends(plan.decode_backends)})",
        f"  peak         {size_text(needs.peak)} in {worst} ({phases})",
        f"  jax may use  {_usable(plan)}",
        _verdict(plan),
        "",
        "least times, predicted from peak rates of the data sheet",
        f"  {'':12} {'reading':>22} {'arithmetic':>24} {'exchange':>22} {'together':>10}  bound by",
        _floor("prefill", plan.prefill),
        _floor("decode step", plan.decode),
        f"  first token of every row after {_ms(plan.first_token_s)}, then {_rate(plan)} (predicted)",
        *(f"  exchange in {name}: {_exchanged(f.collectives)}" for name, f in _phases(plan) if f.collectives),
    ]


def _phases(plan: Plan) -> list[tuple[str, Floor]]:
    return [("prefill", plan.prefill), ("a decode step", plan.decode)]


def _backends(names: Any) -> str:
    return ", ".join(f"{op}: {name}" for op, name in dataclasses.asdict(names).items() if name)


def _usable(plan: Plan) -> str:
    if plan.usable is None:
        return "unknown: the table has no memory for this target"
    share = plan.usable / plan.target.memory
    return f"{size_text(plan.usable)}, {share:.0%} of {size_text(plan.target.memory)}; the rest is the runtime's"


def _verdict(plan: Plan) -> str:
    if plan.fits is None:
        return "whether it fits is not known"
    room = (
        f"largest batch with this context: {plan.largest_batch}; "
        f"largest context with this batch: {plan.largest_context}"
    )
    return f"{'fits' if plan.fits else 'DOES NOT FIT'}; {room}"


def _floor(name: str, floor: Floor) -> str:
    read = f"{size_text(floor.read_bytes)} {_ms(floor.memory_s)}"
    flops = f"{floor.flops / 1e12:,.3g} TFLOP {_ms(floor.compute_s)}"
    sent = f"{size_text(round(sum(c.traffic for c in floor.collectives)))} {_ms(floor.links_s)}"
    together = _ms(floor.seconds)
    return f"  {name:12} {read:>22} {flops:>24} {sent:>22} {together:>10}  {floor.bound or 'unknown'}"


def _exchanged(collectives: tuple[Collective, ...]) -> str:
    return ", ".join(f"{c.count} x {c.kind} of {size_text(c.bytes)} over {c.devices}" for c in collectives)


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e3:.3g} ms"


def _rate(plan: Plan) -> str:
    return "an unknown rate" if plan.tokens_per_s is None else f"at most {plan.tokens_per_s:,.0f} tokens/s together"


def _programs(config: LlamaConfig, plan: Plan, xla: ModelCompilation) -> dict[str, tuple[Bytes, Any]]:
    """Of each program what was predicted for the shapes that were compiled, and its compilation."""
    from llama_jax.costs import local_rows
    from llama_jax.plan import Place

    place = Place(config, plan.target, plan.sizes, plan.workload.itemsize)
    rows = local_rows(xla.batch, plan.sizes)
    return {
        "prefill": (
            place.prefill(rows, xla.chunk, xla.capacity, plan.prefill_backends),
            xla.prefill.compilation,
        ),
        "decode": (place.decode(rows, xla.capacity, plan.decode_backends), xla.decode.compilation),
    }


def _compared(config: LlamaConfig, plan: Plan, xla: ModelCompilation) -> list[str]:
    lines = ["", f"compiled for a cache of {xla.capacity} slots a row: predicted bytes, and what XLA reports"]
    for name, (predicted, compilation) in _programs(config, plan, xla).items():
        m = compilation.memory
        for part in ("arguments", "outputs", "aliased", "temporary"):
            lines.append(f"  {name:8} {part:10} {getattr(predicted, part):>16,} {getattr(m, part):>16,}")
        total = m.total - m.code
        lines.append(
            f"  {name:8} {'together':10} {predicted.total:>16,} {total:>16,}  {predicted.total / total - 1:+.2%}"
        )
        lines.append(f"  {name:8} exchange   {_exchanged(compilation.collectives) or 'none'}")
    return lines


def _facts(model: str, config: LlamaConfig, plan: Plan, xla: ModelCompilation | None) -> dict[str, Any]:
    def floor(f: Floor) -> dict[str, Any]:
        return dataclasses.asdict(f) | {"seconds": f.seconds, "bound": f.bound}

    facts = {
        "model": model,
        "target": plan.target.name,
        "arch": plan.target.arch,
        "devices": plan.devices,
        "mesh": dict(plan.sizes),
        **dataclasses.asdict(plan.workload),
        "rows_per_device": plan.shapes.rows,
        "prompt_chunk": plan.shapes.chunk,
        "cache_capacities": plan.shapes.capacities,
        "memory": dataclasses.asdict(plan.needs) | {"phases": dict(plan.needs.phases), "peak": plan.needs.peak},
        "device_bytes": plan.target.memory or None,
        "usable_bytes": plan.usable,
        "fits": plan.fits,
        "largest_batch": plan.largest_batch,
        "largest_context": plan.largest_context,
        "backends": {
            "prefill": dataclasses.asdict(plan.prefill_backends),
            "decode": dataclasses.asdict(plan.decode_backends),
        },
        "predicted": {
            "prefill": floor(plan.prefill),
            "decode": floor(plan.decode),
            "tokens_per_s": plan.tokens_per_s,
            "first_token_s": plan.first_token_s,
        },
    }
    if xla is not None:
        facts["compiled"] = {
            name: {
                "capacity": xla.capacity,
                "predicted": dataclasses.asdict(predicted) | {"total": predicted.total},
                "xla": dataclasses.asdict(c.memory) | {"total": c.memory.total},
                "collectives": [dataclasses.asdict(x) for x in c.collectives],
            }
            for name, (predicted, c) in _programs(config, plan, xla).items()
        }
    return facts
