"""Reports of `llama-jax compile`, as JSON and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.cli.terminal import dtypes_text, flops_text, ms_text, pairs_text, size_text, table
from llama_jax.cli.verdict import memory_lines, verdict_facts, verdict_lines

if TYPE_CHECKING:
    from llama_jax.aot import Compilation
    from llama_jax.aot.compiler.executable import Kernel
    from llama_jax.aot.model import ModelCompilation, Phase
    from llama_jax.engine.ahead import EngineCompilation

_KERNELS = 5
"""Kernels that a table shows."""

_TILES = "XLA measures tiles of its own matrix products on the card; here it cannot, and takes its default ones."
_LAST_LAYER = """\
In prefill the last layer attends for each row's last token alone, by the kernel of decode: its own runs once less."""


def model_facts(model: str, result: ModelCompilation, remedies: Sequence[str]) -> dict[str, Any]:
    """The report on prefill and a decode step as JSON."""
    target, plan = result.target, result.plan
    return {
        "model": model,
        "target": target.name,
        "arch": target.arch,
        "devices": result.prefill.compilation.devices,
        "mesh": dict(plan.sizes),
        "dtype": plan.workload.dtype,
        "kv_dtype": plan.workload.kv_dtype,
        "batch": result.batch,
        "context": plan.workload.context,
        "prompt_chunk": result.chunk,
        **verdict_facts(result.verdict, remedies),
        "device_bytes": target.memory,
        "phases": {phase.name: _phase_facts(phase) for phase in (result.prefill, result.decode)},
    }


def _phase_facts(phase: Phase) -> dict[str, Any]:
    floor = phase.floor
    return {"tokens": phase.tokens, "capacity": phase.capacity, "read_bytes": floor.read_bytes} | {
        "predicted": {
            "flops": floor.flops,
            "compute_s": floor.compute_s,
            "memory_s": floor.memory_s,
            "links_s": floor.links_s,
            "floor_s": floor.seconds,
        },
        **_facts(phase.compilation),
    }


def _facts(c: Compilation) -> dict[str, Any]:
    kernels = [
        {f.name: getattr(k, f.name) for f in dataclasses.fields(k) if f.name != "elf"}
        | {"waves": k.waves, "spills": k.spills}
        for k in c.kernels
    ]
    return {
        "trace_s": round(c.trace_s, 3),
        "compile_s": round(c.compile_s, 3),
        "memory": dataclasses.asdict(c.memory) | {"total": c.memory.total},
        "collectives": [dataclasses.asdict(x) | {"traffic": x.traffic} for x in c.collectives],
        "flops": c.flops,
        "bytes_accessed": c.bytes_accessed,
        "library_calls": dict(c.library_calls),
        "kernels": kernels,
    }


def model_report(model: str, result: ModelCompilation, remedies: Sequence[str]) -> str:
    """The report on prefill and a decode step as text."""
    target, devices, w = result.target, result.prefill.compilation.devices, result.plan.workload
    mesh = pairs_text(result.plan.sizes) or "one device"
    lines = [
        f"{model} compiled for {devices} x {target.label or target.name} ({target.arch}), {mesh}; not run",
        f"{dtypes_text(w.dtype, w.kv_dtype)}, batch {w.batch} ({result.batch} rows), prompt {w.prompt}, "
        f"context {w.context}",
        "",
        "memory of each device: prefill and decode as XLA reports them, the others as planned",
        *memory_lines(result.verdict, target),
        *verdict_lines(result.verdict, remedies),
    ]
    for phase in (result.prefill, result.decode):
        lines += ["", *_phase_lines(phase, result.chunk)]
    return "\n".join([*lines, "", _TILES, _LAST_LAYER])


def _phase_lines(phase: Phase, chunk: int) -> list[str]:
    c, m = phase.compilation, phase.compilation.memory
    title = f"prefill of {chunk} tokens a row" if phase.name == "prefill" else "decode step"
    title += f", with {phase.capacity} slots a row"
    lines = [
        f"{title} (traced in {c.trace_s:.1f} s, compiled in {c.compile_s:.1f} s)",
        f"  memory       {size_text(m.total)}: arguments {size_text(m.arguments)}, outputs {size_text(m.outputs)} "
        f"({size_text(m.aliased)} in place), temporary {size_text(m.temporary)}, code {size_text(m.code)}",
        f"  XLA counts   {flops_text(c.flops)}, and {size_text(round(c.bytes_accessed))} that its operations read and "
        "write, some of it in caches; nothing of Pallas kernels",
    ]
    for x in c.collectives:
        unknown = ", some in loops of unknown length" if x.unknown_trips else ""
        lines.append(f"  exchange     {x.count} x {x.kind} of {size_text(x.bytes)} over {x.devices} devices{unknown}")
    floor = phase.floor
    lines.append(
        f"  predicted    at least {ms_text(floor.seconds)}, by peak rates of the data sheet: arithmetic of "
        f"{flops_text(floor.flops)} {ms_text(floor.compute_s)}, reading the {size_text(floor.read_bytes)} that have to "
        f"be read {ms_text(floor.memory_s)}, exchange {ms_text(floor.links_s)}"
    )
    calls = ", ".join(
        f"{n} x {name}" for name, n in c.library_calls.items() if name not in {x.kind for x in c.collectives}
    )
    lines += [f"  libraries    {calls}"] if calls else []
    lines.append(f"  kernels      {len(c.kernels)}, those with most spills and registers:")
    return [*lines, *(f"    {line}" for line in _kernel_table(c.kernels))]


def _kernel_table(kernels: Iterable[Kernel]) -> list[str]:
    """A heading, and the kernels with most spills and registers."""
    lines = [f"{'name':40} {'times':>5} {'vgpr':>4} {'spill':>5} {'lds':>8} {'waves/SIMD':>10} {'matrix':>6}"]
    for k in sorted(kernels, key=lambda k: (-k.spills, -k.vgpr))[:_KERNELS]:
        occupancy, matrix = ("?" if v is None else v for v in (k.occupancy, k.matrix_instructions))
        lines.append(
            f"{k.name[:40]:40} {k.launches:5} {k.vgpr:4} {k.spills:5} {size_text(k.lds_bytes):>8} "
            f"{occupancy:>10} {matrix:>6}"
        )
    return lines


def engine_facts(model: str, result: EngineCompilation) -> dict[str, Any]:
    """The report on an engine as JSON."""
    target = result.target
    return {
        "model": model,
        "target": target.name,
        "arch": target.arch,
        "devices": result.devices,
        "mesh": dict(result.sizes),
        "dtype": result.dtype,
        "kv_dtype": result.kv_dtype,
        "settings": dataclasses.asdict(result.settings),
        **verdict_facts(result.verdict, ()),
        "device_bytes": target.memory,
        "weights_bytes": result.weights,
        "programs": {name: _facts(compilation) for name, compilation in result.compilations.items()},
    }


def engine_report(model: str, result: EngineCompilation) -> str:
    """The report on an engine as text: a line for each program."""
    target, settings, compilations = result.target, result.settings, result.compilations
    mesh = pairs_text(result.sizes) or "one device"
    rows: list[tuple[str, ...]] = [
        ("program", "seconds", "arguments", "temporary", "total", "kernels", "vgpr", "spills", "exchange")
    ]
    for name, c in compilations.items():
        m = c.memory
        exchange = ", ".join(_exchange(c, kind) for kind in dict.fromkeys(x.kind for x in c.collectives)) or "-"
        numbers = (len(c.kernels), max((k.vgpr for k in c.kernels), default=0), sum(k.spills for k in c.kernels))
        sizes = (size_text(size) for size in (m.arguments, m.temporary, m.total))
        rows.append((name, f"{c.trace_s + c.compile_s:.1f}", *sizes, *map(str, numbers), exchange))
    alike = {(k.name, k.vgpr, k.spills, k.lds_bytes): k for c in compilations.values() for k in c.kernels}
    return "\n".join(
        [
            f"the engine of {model} compiled for {result.devices} x {target.label or target.name} ({target.arch}), "
            f"{mesh}; not run",
            f"{dtypes_text(result.dtype, result.kv_dtype)}, {settings.rows} rows, context {settings.context}, "
            f"{settings.pages} pages of {settings.page_size} tokens",
            "",
            "memory of each device: loading as planned, the others as XLA reports them",
            *memory_lines(result.verdict, target),
            *verdict_lines(result.verdict, ("fewer pages", "fewer rows", "more devices")),
            "",
            f"programs: {len(compilations)}, in {sum(c.trace_s + c.compile_s for c in compilations.values()):.0f} "
            "seconds, several at a time; memory of each device",
            *(f"  {line}" for line in table(rows)),
            "",
            "kernels of all programs with most spills and registers",
            *(f"  {line}" for line in _kernel_table(alike.values())),
            "",
            _TILES,
        ]
    )


def _exchange(c: Compilation, kind: str) -> str:
    """Number of exchanges of this kind between devices, and their total bytes."""
    each = [x for x in c.collectives if x.kind == kind]
    return f"{sum(x.count for x in each)} x {kind}, {size_text(sum(x.count * x.bytes for x in each))}"
