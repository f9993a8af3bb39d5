"""Writes the table of docs/plan.md: large models on 1 to 64 AMD GPUs, all of it predicted.

    python scripts/plan_table.py             # the table, with the collectives that have been counted before
    python scripts/plan_table.py --compile   # first compiles what has not been counted; needs the extra rocm-aot

Collectives of a decode step are counted in the HLO that XLA compiles for the target; the counts are kept in
docs/plan_collectives.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax.config import preset
from llama_jax.plan import Plan, Workload, make_plan, smallest_mesh
from llama_jax.targets import Collective, find

DOCS = Path(__file__).parent.parent / "docs"
PAGE, COUNTED = DOCS / "plan.md", DOCS / "plan_collectives.json"
BEGIN, END = "<!-- plan_table.py begins -->\n", "<!-- plan_table.py ends -->\n"

MODELS = ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "llama-4-scout", "llama-4-maverick")
TARGETS = ("mi300x", "mi355x")
DEVICES = (1, 2, 4, 8, 16, 32, 64)
WORKLOAD = Workload(batch=64, context=8192, prompt=2048)

Counts = dict[str, list[dict[str, Any]]]


def plans() -> Iterator[tuple[str, Plan]]:
    """Every model on every number of devices, with the smallest tensor parallelism that fits."""
    for model in MODELS:
        for name in TARGETS:
            for devices in DEVICES:
                config, target = preset(model), find(name)
                sizes = smallest_mesh(config, target, WORKLOAD, devices=devices)
                yield model, make_plan(config, target, sizes, WORKLOAD)


def key(model: str, plan: Plan) -> str:
    return f"{model} {plan.target.name} tensor={plan.sizes.get('tensor', 1)}"


def count(model: str, plan: Plan) -> list[dict[str, Any]]:
    """The collectives of the compiled decode step, by kind."""
    from llama_jax.aot import compile_for, device_mesh
    from llama_jax.aot.programs import decode_program

    config = preset(model)
    mesh = device_mesh(plan.target, {"tensor": plan.sizes["tensor"]})
    program = decode_program(config, mesh, batch=8, capacity=1024, dtype=WORKLOAD.dtype)
    compilation = compile_for(plan.target, program.function, program.args, mesh=mesh, kwargs=program.static)
    totals: dict[str, int] = {}
    for collective in compilation.collectives:
        totals[collective.kind] = totals.get(collective.kind, 0) + collective.count
    return [{"kind": kind, "count": number} for kind, number in sorted(totals.items())]


def line(model: str, plan: Plan, counted: Counts) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.sizes.items()) or "one device"
    alone = make_plan(preset(model), plan.target, plan.sizes, Workload(1, WORKLOAD.context, WORKLOAD.prompt))
    assert plan.decode.seconds is not None
    assert alone.first_token_s is not None
    one, first = f"{alone.tokens_per_s:,.0f}", f"{alone.first_token_s * 1e3:,.0f} ms"
    cells = [
        model,
        f"{plan.devices} x {plan.target.label.removeprefix('AMD Instinct ')}",
        mesh,
        f"{plan.needs.weights / 1e9:.1f}",
        f"{plan.needs.peak / 1e9:.1f}{'' if plan.fits else ' (too much)'}",
        str(plan.largest_batch),
        *((one, first) if alone.fits else ("", "")),
        f"{plan.tokens_per_s:,.0f}, {plan.decode.bound}" if plan.fits else "",
        exchanged(key(model, plan), plan.decode.collectives, counted),
    ]
    return f"| {' | '.join(cells)} |"


def exchanged(name: str, predicted: tuple[Collective, ...], counted: Counts) -> str:
    if not predicted:
        return "none"
    if name not in counted:
        return ", ".join(f"{c.count} {c.kind}" for c in predicted) + " (predicted)"
    return ", ".join(f"{c['count']} {c['kind']}" for c in counted[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="count the collectives that have not been counted yet")
    arguments = parser.parse_args()
    counted: Counts = json.loads(COUNTED.read_text()) if COUNTED.exists() else {}
    rows = list(plans())
    for model, plan in rows:
        if arguments.compile and plan.fits and plan.decode.collectives and key(model, plan) not in counted:
            print(f"compiling {key(model, plan)}", flush=True)
            counted[key(model, plan)] = count(model, plan)
            COUNTED.write_text(json.dumps(counted, indent=1, sort_keys=True) + "\n")
    header = (
        "| model | devices | mesh | weights, GB each | peak, GB each | largest batch | tok/s, batch 1 "
        "| first token, batch 1 | tok/s, batch 64, bound by | collectives of a step |"
    )
    table = [header, "|" + " --- |" * 10, *(line(model, plan, counted) for model, plan in rows)]
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(table) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
