"""`llama-jax doctor`: what this machine and this installation can do, and what is missing."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llama_jax.cli.options import examples, in_a_folder, json_option
from llama_jax.cli.terminal import installing, pairs_text, print_json, printable, size_text

if TYPE_CHECKING:
    from llama_jax.doctor import Report

_SIGNS = {"ok": "ok     ", "warning": "WARNING", "problem": "PROBLEM"}


@click.command(
    name="doctor",
    epilog=examples("llama-jax doctor", "llama-jax doctor --numerics", "llama-jax doctor --bundle report.zip"),
)
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=90, show_default=True, help="Seconds to wait for the devices."
)
@click.option("--numerics", is_flag=True, help="Compare every kernel with its reference on the device. Takes minutes.")
@click.option(
    "--bundle",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=in_a_folder,
    metavar="FILE.zip",
    help="Also write FILE.zip for a bug report: this report, packages, output of the driver's tools, tuned kernels.",
)
@json_option
def command(timeout: float, numerics: bool, bundle: Path | None, as_json: bool) -> None:
    """Check devices, versions, drivers and folders, and print what is missing and which command fixes it.

    Exits with 0 if there is no problem, 5 if jax cannot use a device that is there, 4 if a kernel's results differ from
    the reference.
    """
    from llama_jax.doctor import doctor

    def progress(line: str) -> None:
        click.echo(printable(line), err=True)

    if numerics:
        progress("Comparing kernels: everything is compiled first, which takes minutes (fewer on many processors).")

    report = doctor(deadline_s=timeout, numerics=numerics, progress=progress)
    if as_json:
        print_json(dataclasses.asdict(report) | {"ok": report.ok})
    else:
        click.echo(printable(_text(report)))
    if bundle is not None:
        from llama_jax.doctor.bundle import write_bundle

        write_bundle(bundle, report, os.environ)
        progress(f"wrote {bundle}; look at it before you send it to anybody")
    raise click.exceptions.Exit(report.exit_code)


def _text(report: Report) -> str:
    system, lines = report.system, []

    def line(name: str, value: object) -> None:
        if value:
            lines.append(f"{name + ':':<12}{value}")

    line("system", system["os"])
    line("python", system["python"])
    line("cpu", f"{system['cpu']}, {system['cpu_cores']} cores ({' '.join(system['cpu_features'])})")
    if system["memory_total"]:
        line("memory", f"{size_text(system['memory_available'])} of {size_text(system['memory_total'])} available")
    for gpu in system["gpus"]:
        memory = f", {size_text(gpu['memory'])}" if gpu["memory"] else ""
        line("gpu", f"{gpu['vendor']} {gpu['name']}{memory}{'' if gpu['driver'] else ', no driver'}")
    line("target", ", ".join(system["targets"]))
    line("drivers", ", ".join(f"{name} {version}" for name, version in system["drivers"].items()))
    for device in report.devices:
        memory = f", {size_text(device['memory'])}" if device["memory"] else ""
        line("jax device", f"{device['name']}: {device['kind']}{memory}")
    alike: dict[tuple[str, str], list[str]] = {}
    for choice in report.kernels:
        if choice["passed_over"]:
            passed = "; ".join(f"not {p['backend']}: {p['reason']}" for p in choice["passed_over"])
            alike.setdefault((choice["operation"], f"{choice['backend']} ({passed})"), []).append(choice["shape"])
    for (operation, chosen), shapes in alike.items():
        more = f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""
        line("kernel", f"{operation} {shapes[0]}{more}: {chosen}")
    line("cache", system["cache"])
    line("xla cache", system["compilation_cache"])
    line("variables", pairs_text(report.environment))
    line("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items() if version))
    lines.append("")
    for check in report.checks:
        lines.append(f"{_SIGNS[check.status]} {check.name}: {check.detail}")
        if check.fix:
            lines.append(f"        fix: {installing(check.fix)}")
    return "\n".join(lines)
