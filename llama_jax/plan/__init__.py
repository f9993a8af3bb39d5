"""Predicts whether a model fits a number of devices, and how fast it could be, from shapes and data sheets alone.

    plan = make_plan(preset("llama-3.1-70b"), find("mi300x"), {"tensor": 8}, Workload(batch=32, context=8192))
    print(plan.fits, plan.needs.peak, plan.tokens_per_s)

Nothing is downloaded, compiled or run. Only `resolve_mesh`, which `load` calls for `mesh="auto"`, starts a
device. Bytes of weights and cache are exact, temporary ones a stated formula (`plan.memory`); times are
predictions from peak rates (`plan.roofline`). `docs/plan.md` explains every line of the report.
"""

from __future__ import annotations

from llama_jax.plan.automatic import AUTO, AutoMesh, MeshRequest, resolve_mesh
from llama_jax.plan.device_memory import ENGINE_FRACTION, MEMORY_FRACTION, memory_fraction
from llama_jax.plan.memory import Bytes, DeviceShare, Needs
from llama_jax.plan.mesh_choice import Candidate, MeshChoice, choose_mesh, smallest_mesh
from llama_jax.plan.remedies import remedies, ways_to_fit
from llama_jax.plan.roofline import Floor
from llama_jax.plan.search import Plan, make_plan
from llama_jax.plan.verdict import Verdict
from llama_jax.plan.workload import Calls, Workload, calls, default_workload

__all__ = [
    "AUTO",
    "ENGINE_FRACTION",
    "MEMORY_FRACTION",
    "AutoMesh",
    "Bytes",
    "Calls",
    "Candidate",
    "DeviceShare",
    "Floor",
    "MeshChoice",
    "MeshRequest",
    "Needs",
    "Plan",
    "Verdict",
    "Workload",
    "calls",
    "choose_mesh",
    "default_workload",
    "make_plan",
    "memory_fraction",
    "remedies",
    "resolve_mesh",
    "smallest_mesh",
    "ways_to_fit",
]
