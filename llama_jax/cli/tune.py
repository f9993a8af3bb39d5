"""`llama-jax tune`: the fastest kernels and tiles of this device, measured."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from llama_jax.cli.options import examples, json_option, quiet_option
from llama_jax.cli.terminal import pairs_text, print_json, printable
from llama_jax.kernels.registry import OPERATIONS

if TYPE_CHECKING:
    from llama_jax.kernels.tuning.tune import Candidate, Measurement


@click.command(
    name="tune",
    epilog=examples("llama-jax tune", "llama-jax tune --op moe", "llama-jax tune --model llama-3.1-8b --dry-run"),
)
@click.option("--op", "names", type=click.Choice(tuple(OPERATIONS)), multiple=True, help="Only this operation.")
@click.option("--model", metavar="PRESET", help="Shapes of this published model. [default: of common models]")
@click.option(
    "--most",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Maximum number of tilings per kernel and shape.",
)
@click.option(
    "--repeats", type=click.IntRange(1), default=10, show_default=True, help="Timed rounds, of which medians are taken."
)
@click.option("--dry-run", is_flag=True, help="Only list what would be measured.")
@quiet_option
@json_option
def command(
    names: tuple[str, ...], model: str | None, most: int, repeats: int, dry_run: bool, quiet: bool, as_json: bool
) -> None:
    """Measure every kernel that runs on this device, with several tilings, and keep the fastest.

    Each is compared with the reference first. The result is a table in the cache, which overrides the shipped one until
    the kernels or jax change. Ctrl-C keeps what has been measured; the next run resumes from there.
    """
    from llama_jax import runtime
    from llama_jax.config import preset
    from llama_jax.kernels.registry import operation
    from llama_jax.kernels.tuning.tune import candidates, tune
    from llama_jax.loading import check_kernels_once
    from llama_jax.measure.numbers import numbers_of
    from llama_jax.targets import current

    runtime.enable_compilation_cache()
    numbers = None if model is None else numbers_of(preset(model))

    def say(line: str) -> None:
        if not quiet:
            click.echo(printable(line), err=True)

    check_kernels_once(say)
    found = candidates([operation(name) for name in names or OPERATIONS], current(), numbers, most)
    if dry_run or not found:
        _print_plan(found, as_json=as_json)
        return
    tuning = tune(found, rounds=repeats, progress=lambda *args: say(_line(*args)))
    rules = {op: [rule.to_json() for rule in rules] for op, rules in tuning.rules.items()}
    if as_json:
        measurements = [dataclasses.asdict(m) for m in tuning.measurements]
        table = str(tuning.table)
        print_json({"device": tuning.device, "table": table, "rules": rules, "measurements": measurements})
        return
    for op, lines in rules.items():
        for rule in lines:
            tiles = pairs_text(rule.get("tiles", {}))
            click.echo(f"{op} {rule['dtype']} {rule['shape']}: {rule['backend']} {tiles}({rule['source']})")
    click.echo(f"written to {tuning.table}")


def _print_plan(found: tuple[Candidate, ...], *, as_json: bool) -> None:
    plan: list[dict[str, Any]] = [
        {"operation": c.operation.name, "case": c.case.name, "backend": c.backend, "tiles": c.tile_numbers}
        for c in found
    ]
    if as_json:
        print_json({"candidates": plan})
        return
    for item in plan:
        click.echo(f"{item['operation']}, {item['case']}: {item['backend']} {pairs_text(item['tiles'])}".rstrip())
    if found:
        click.echo(f"{len(found)} candidates")
    else:
        click.echo("nothing to measure: on this device the references are all there is")


def _line(done: int, total: int, m: Measurement) -> str:
    tried = " ".join(filter(None, (m.backend, pairs_text(m.tiles))))
    outcome = m.problem if m.seconds is None else f"{m.seconds * 1e6:.1f} µs"
    return f"[{done}/{total}] {m.operation}, {m.case}: {tried}: {outcome}"
