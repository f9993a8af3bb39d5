"""Variables that hide GPUs from a program: the GPUs they leave, and contradictions between them.

NVIDIA: https://docs.nvidia.com/cuda/cuda-c-programming-guide/#cuda-environment-variables; AMD:
https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html.
"""

from __future__ import annotations

from collections.abc import Mapping

from llama_jax.doctor.report import Check
from llama_jax.targets import hardware

_NAMES = {
    "amd": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
}
"""In the order in which they are applied: each counts among the GPUs that the one before it leaves. HIP takes
CUDA_VISIBLE_DEVICES for its own variable."""


def check_visibility(environ: Mapping[str, str], found: tuple[hardware.Gpu, ...]) -> list[Check]:
    """The variables that apply to the machine's GPUs."""
    usable = [gpu for gpu in found if gpu.driver]
    checks = []
    for vendor, names in _NAMES.items():
        left = sum(gpu.vendor == vendor for gpu in usable)
        given = [name for name in names if name in environ]
        if not left or not given:
            continue
        if vendor == "amd" and len(given) > 1:
            both = " and ".join(f"{name}={environ[name]}" for name in given)
            detail = f"{both}: each counts among the GPUs that the one before it leaves, in its own order"
            checks.append(Check("visible GPUs", "warning", detail, f"keep {given[0]}, unset {', '.join(given[1:])}"))
            continue
        checks += [_check_one(given[0], environ[given[0]], left)]
    return checks


def _check_one(name: str, value: str, there: int) -> Check:
    """One variable: a list of numbers from 0, or of ids; the first that does not exist ends the list."""
    items = [item.strip() for item in value.split(",")]
    wrong = [item for item in items if _beyond(item, there)]
    kept = items[: items.index(wrong[0])] if wrong else items
    if not kept or kept == [""]:
        return Check("visible GPUs", "warning", f"{name}={value} hides all GPUs", f"unset {name}")
    if wrong:
        detail = f"{name}={value}: there is no GPU {wrong[0]} among {there}, and those listed behind it do not count"
        return Check("visible GPUs", "warning", detail, f"export {name}={','.join(kept)}")
    if len(set(items)) < len(items):
        return Check("visible GPUs", "warning", f"{name}={value} names a GPU twice", f"name each once in {name}")
    return Check("visible GPUs", "ok", f"{name}={value}: {len(items)} of {there} can be seen")


def _beyond(item: str, there: int) -> bool:
    number = item.removeprefix("-")
    return number.isdecimal() and not (number == item and int(item) < there)
