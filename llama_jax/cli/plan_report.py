"""Output of `llama-jax plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.cli.terminal import dtypes_text, flops_text, ms_text, pairs_text, size_text
from llama_jax.cli.verdict import memory_lines, verdict_facts, verdict_lines

if TYPE_CHECKING:
    from llama_jax.aot.model import ModelCompilation
    from llama_jax.config import LlamaConfig
    from llama_jax.plan import Bytes, Floor, Plan
    from llama_jax.plan.backends import Backends
    from llama_jax.targets import Collective


def report(model: str, plan: Plan, remedies: Sequence[str]) -> list[str]:
    """The plan in lines; `remedies` are those of `llama_jax.plan.remedies`."""
    target, w, needs, shapes = plan.target, plan.workload, plan.needs, plan.shapes
    mesh = pairs_text(plan.sizes) or "one device"
    arch = "" if target.arch == target.name else f" ({target.arch})"
    room = (
        f"; largest batch with this context: {plan.largest_batch}, "
        f"largest context with this batch: {plan.largest_context}"
    )
    return [
        f"{model} on {plan.devices} x {target.label or target.name}{arch}, {mesh}: predicted, nothing was run",
        f"{dtypes_text(w.dtype, w.kv_dtype)}, batch {w.batch}, prompt {w.prompt}, context {w.context}",
        "",
        f"memory of each device, for {shapes.rows} {'row' if shapes.rows == 1 else 'rows'} of the batch",
        f"  weights      {size_text(needs.weights)}",
        f"  KV cache     {_cache(plan)}",
        f"  temporary    {size_text(needs.prefill.temporary)} in prefill, {shapes.chunk} tokens of a row at a time "
        f"({_backends(plan.prefill_backends)}); {size_text(needs.decode.temporary)} in decode "
        f"({_backends(plan.decode_backends)})",
        *memory_lines(plan.verdict, target),
        *verdict_lines(plan.verdict, remedies, room),
        "",
        "lower bounds on times, predicted from peak rates of the data sheet",
        f"  {'':12} {'reading':>22} {'arithmetic':>24} {'exchange':>22} {'at least':>10}  bound by",
        _floor("prefill", plan.prefill),
        _floor("decode step", plan.decode),
        f"  first token of every row after {ms_text(plan.first_token_s)}, then {_rate(plan)} (predicted)",
        *(f"  exchange in {name}: {_exchanged(f.collectives)}" for name, f in _phases(plan) if f.collectives),
    ]


def _cache(plan: Plan) -> str:
    sizes, needs = plan.shapes.capacities, plan.needs
    grown = f", grown from {' to '.join(map(str, sizes))}" if len(sizes) > 1 else ""
    return (
        f"{size_text(needs.cache)}: {sizes[-1]} slots a row for {plan.workload.context} tokens{grown}; "
        f"{size_text(needs.paged_cache)} in pages"
    )


def _phases(plan: Plan) -> list[tuple[str, Floor]]:
    return [("prefill", plan.prefill), ("a decode step", plan.decode)]


def _backends(names: Backends) -> str:
    found = {"attention": " and ".join(names.attention), "moe": names.moe}
    return ", ".join(f"{op}: {name}" for op, name in found.items() if name)


def _floor(name: str, floor: Floor) -> str:
    read = f"{size_text(floor.read_bytes)} {ms_text(floor.memory_s)}"
    flops = f"{flops_text(floor.flops)} {ms_text(floor.compute_s)}"
    sent = f"{size_text(round(sum(c.traffic for c in floor.collectives)))} {ms_text(floor.links_s)}"
    least = ms_text(floor.seconds)
    return f"  {name:12} {read:>22} {flops:>24} {sent:>22} {least:>10}  {floor.bound or 'unknown'}"


def _exchanged(collectives: tuple[Collective, ...]) -> str:
    return ", ".join(f"{c.count} x {c.kind} of {size_text(c.bytes)} over {c.devices}" for c in collectives)


def _rate(plan: Plan) -> str:
    return "an unknown rate" if plan.tokens_per_s is None else f"at most {plan.tokens_per_s:,.0f} tokens/s, of all rows"


def _programs(config: LlamaConfig, plan: Plan, xla: ModelCompilation) -> dict[str, tuple[Bytes, Any]]:
    """For each program, the prediction for the compiled shapes, and its compilation."""
    from llama_jax.plan import DeviceShare
    from llama_jax.plan.costs import local_rows

    share = DeviceShare(config, plan.target, plan.sizes, plan.workload.itemsize, plan.workload.kv_dtype)
    rows = local_rows(xla.batch, plan.sizes)
    return {
        "prefill": (
            share.prefill(rows, xla.chunk, xla.prefill.capacity, plan.prefill_backends),
            xla.prefill.compilation,
        ),
        "decode": (share.decode(rows, xla.decode.capacity, plan.decode_backends), xla.decode.compilation),
    }


def compared(config: LlamaConfig, plan: Plan, xla: ModelCompilation) -> list[str]:
    """Lines that compare predicted bytes with those that XLA reports."""
    slots = f"{xla.prefill.capacity} slots a row in prefill, {xla.decode.capacity} in decode"
    lines = ["", f"compiled for a cache of {slots}: predicted bytes, and what XLA reports"]
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


def facts(
    model: str, config: LlamaConfig, plan: Plan, xla: ModelCompilation | None, remedies: Sequence[str]
) -> dict[str, Any]:
    """The report as JSON-compatible values."""

    def floor(f: Floor) -> dict[str, Any]:
        return dataclasses.asdict(f) | {"seconds": f.seconds, "bound": f.bound}

    found = {
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
        **verdict_facts(plan.verdict, remedies),
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
        found["compiled"] = {
            name: {
                "capacity": {"prefill": xla.prefill, "decode": xla.decode}[name].capacity,
                "predicted": dataclasses.asdict(predicted) | {"total": predicted.total},
                "xla": dataclasses.asdict(c.memory) | {"total": c.memory.total},
                "collectives": [dataclasses.asdict(x) for x in c.collectives],
            }
            for name, (predicted, c) in _programs(config, plan, xla).items()
        }
    return found
