"""Verdict on whether a model fits, as text: the same lines for `plan` and `compile`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.cli.terminal import size_text

if TYPE_CHECKING:
    from llama_jax.plan import Verdict
    from llama_jax.targets import Target

GLOSSARY = """\b
What the numbers mean:
  peak         the most that a device holds in any phase: loading the weights,
               prefill, growing the cache (the old and the new one), decode
  slots        room for tokens in a row's cache. It starts with the prompt and
               1024 more and doubles when it is full, so it may hold more than
               the context
  jax may use  a fraction of the device's memory: XLA_CLIENT_MEM_FRACTION
               or --memory-fraction, 0.75 unless set; it fits if the peak does
  reading, arithmetic, exchange
               bytes, operations and all-reduced bytes of a run on one device,
               counted from shapes, each with its time at the peak rate of the
               data sheet; "at least" is the least time of all together
"""
_WHEN = {
    "loading": "while the weights are loaded",
    "prefill": "in prefill",
    "growing": "while the cache grows",
    "decode": "in decode",
    "verify": "when drafts are tried",
    "draft": "when the draft model drafts",
    "follow": "when the draft model reads",
    "start": "when the engine starts",
    "mark": "when the host says what may come next",
    "scrub": "when a row has failed",
    "mixed": "in steps with prompts",
    "scored": "in steps with prompts whose log-probabilities are asked for",
}


def memory_lines(verdict: Verdict, target: Target) -> list[str]:
    """The peak and the available memory, below a heading."""
    phases = ", ".join(f"{name} {size_text(size)}" for name, size in verdict.phases.items() if size)
    lines = [f"  peak         {size_text(verdict.peak)} {_WHEN[verdict.worst]} ({phases})"]
    if verdict.usable is None:
        return [*lines, "  jax may use  unknown: the table has no memory for this target"]
    share = f"{verdict.fraction:.0%} of {size_text(target.memory)}"
    return [
        *lines,
        f"  jax may use  {size_text(verdict.usable)}, {share}; the rest is for code, libraries and the driver",
    ]


def verdict_lines(verdict: Verdict, remedies: Sequence[str], room: str = "") -> list[str]:
    """Whether it fits; `room`, or what would make it fit."""
    from llama_jax.plan import ways_to_fit

    if verdict.usable is None:
        return ["whether it fits is not known"]
    sizes = f"{size_text(verdict.peak)} of the {size_text(verdict.usable)} that jax may use"
    if verdict.fits:
        return [f"fits: {sizes}{room}"]
    return [f"DOES NOT FIT: {sizes}", f"  {ways_to_fit(remedies)}"]


def verdict_facts(verdict: Verdict, remedies: Sequence[str]) -> dict[str, Any]:
    """The same as JSON-compatible values."""
    return {
        "fits": verdict.fits,
        "peak_bytes": verdict.peak,
        "usable_bytes": verdict.usable,
        "memory_fraction": verdict.fraction,
        "phases": dict(verdict.phases),
        "remedies": list(remedies),
    }
