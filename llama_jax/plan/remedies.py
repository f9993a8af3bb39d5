"""Proposals that would make a model fit: each is one change to a plan, and fits by the same rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llama_jax.cache import KV_DTYPES
from llama_jax.config import LlamaConfig
from llama_jax.plan.device_memory import usable_bytes
from llama_jax.plan.mesh_choice import choose_mesh
from llama_jax.plan.search import Plan, make_plan

_FRACTIONS = (0.9, 0.95)
"""Largest fraction of a device's memory that leaves room for code and libraries."""


def remedies(config: LlamaConfig, plan: Plan) -> tuple[str, ...]:
    """Options of `llama-jax plan` and `compile`, each of which alone makes a plan fit; none for one that fits."""
    return () if plan.fits is not False else tuple(_found(config, plan))


def ways_to_fit(remedies: Sequence[str]) -> str:
    """A line about them."""
    if not remedies:
        return "no single change makes it fit: use more devices, a smaller context and a smaller batch together"
    return f"any of these makes it fit: {'; '.join(remedies)}"


def _found(config: LlamaConfig, plan: Plan) -> Iterator[str]:
    target, workload = plan.target, plan.workload
    most = target.links.host_devices
    for devices in (n for n in (2, 4, 8, 16) if plan.devices < n <= most):
        if choose_mesh(config, target, workload, devices=devices, usable=plan.usable).fits:
            yield f"--mesh auto --devices {devices}" + (" (in place of the mesh that was given)" if plan.sizes else "")
            break
    if plan.largest_batch:
        yield f"--batch {plan.largest_batch}"
    if plan.largest_context and plan.largest_context > workload.prompt:
        yield f"--context {plan.largest_context}"
    if workload.kv_dtype is None:
        for name in (each for each in KV_DTYPES if each != "fp8"):  # which is as large as int8
            smaller = replace(workload, kv_dtype=name)
            if make_plan(config, target, plan.mesh, smaller, memory_fraction=plan.verdict.fraction).fits:
                yield f"--kv-dtype {name}"
                break
    if workload.itemsize > 2 and target.vendor != "cpu":
        smaller = replace(workload, dtype="bfloat16")
        if make_plan(config, target, plan.mesh, smaller, memory_fraction=plan.verdict.fraction).fits:
            yield "--dtype bfloat16"
    for fraction in _FRACTIONS:
        if fraction > plan.verdict.fraction and plan.needs.peak <= (usable_bytes(target, fraction) or 0):
            yield f"--memory-fraction {fraction}"
            break
