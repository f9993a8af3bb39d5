"""Checks of kernels: the choice among them, their results, and the XLA options that decode steps are compiled with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.doctor.report import Check
from llama_jax.errors import VerificationError
from llama_jax.kernels.checking.child import Numerics


def check_choices(kernels: Mapping[str, Any]) -> list[Check]:
    """The choices of `auto` here; a kernel that is disabled, or a choice that cannot be made, is a finding."""
    if error := kernels.get("error"):
        return [Check("kernels", "problem", error, kernels["hint"])]
    backends: dict[str, list[str]] = {}
    for choice in kernels.get("choices", ()):
        known = choice["measured"] or choice["backend"] == "reference"
        backends.setdefault(choice["operation"], []).append(choice["backend"] + ("" if known else " (not measured)"))
    if not backends:
        return []
    detail = "; ".join(f"{op}: {', '.join(dict.fromkeys(names))}" for op, names in backends.items())
    return [Check("kernels", "ok", detail)]


def check_native(native: Mapping[str, Any] | None) -> list[Check]:
    """The code for int8 activations on a CPU (`kernels.integer_matmul.library.status`); nothing on a GPU."""
    if native is None:
        return []
    name = "int8 activations"
    if native["instructions"]:
        return [Check(name, "ok", f"the CPU's kernel multiplies them, by {native['instructions']}")]
    if native["compiler"]:
        detail = f"the first load with them compiles the CPU's kernel with {native['compiler']}"
        return [Check(name, "ok", detail)]
    return [Check(name, "ok", f"XLA multiplies them: {native['missing']}", "install g++ or clang, for a faster kernel")]


def check_numerics(found: Numerics) -> list[Check]:
    """Returns whether the kernels compute what the reference does."""
    if found.error:
        fix = "see the message; LLAMA_JAX_KERNELS names other kernels"
        return [Check("numerics", "problem", f"the kernels could not be checked: {found.error}", fix)]
    checks = [
        Check(
            "numerics",
            "problem",
            f"{check['operation']}/{check['backend']}, {check['case']}: {check['problem']}",
            "kernels cannot be compared with it; a newer jax or GPU plugin may compute right"
            if check["backend"] == "reference"
            else "this kernel is not chosen on this device any more; a newer jax or GPU plugin may compute right",
            VerificationError.exit_code,
        )
        for check in found.failed
    ]
    if not checks:
        names = dict.fromkeys(f"{check['operation']}/{check['backend']}" for check in found.checks)
        checks.append(Check("numerics", "ok", f"{len(found.checks)} comparisons agree: {', '.join(names) or 'none'}"))
    return checks


def check_graphs(graphs: Sequence[dict[str, str]]) -> list[Check]:
    """Reports the options from `graph_options`, on one device and, with several, of a model that is split over them.

    No check where the choice is left to XLA.
    """
    return [
        Check("graphs", "ok", f"{what} of a batch are compiled with {' '.join(map('='.join, options.items()))}")
        for what, options in zip(("decode steps", "a split model's decode steps"), graphs, strict=False)
        if options
    ]
