"""Whether a model fits a number of devices, and how fast it could be there, from shapes and data sheets alone.

    plan = make_plan(preset("llama-3.1-70b"), find("mi300x"), {"tensor": 8}, Workload(batch=32, context=8192))
    print(plan.fits, plan.needs.peak, plan.tokens_per_s)

Nothing is downloaded, compiled or run, and no device is started. Bytes of weights and cache are exact, temporary ones a
stated formula (`plan.memory`); times are predictions from peak rates (`plan.roofline`). `docs/plan.md` explains every
line of the report.
"""

from __future__ import annotations

from llama_jax.plan.memory import Bytes, Needs, Place
from llama_jax.plan.roofline import Floor
from llama_jax.plan.search import MEMORY_FRACTION, Plan, make_plan, smallest_mesh
from llama_jax.plan.workload import Calls, Workload, calls

__all__ = [
    "MEMORY_FRACTION",
    "Bytes",
    "Calls",
    "Floor",
    "Needs",
    "Place",
    "Plan",
    "Workload",
    "calls",
    "make_plan",
    "smallest_mesh",
]
