"""Device models: the numbers that kernels, plans and reports are made from.

    target = find("mi300x")
    print(target.memory, target.lds_bytes)

Importing this package does not import jax.
"""

from __future__ import annotations

from llama_jax.targets.collective import Collective
from llama_jax.targets.detect import abstract_device, current, default_device, detected, of_device
from llama_jax.targets.table import TARGETS, added_targets, find
from llama_jax.targets.target import Cache, Links, Rates, Source, Target

__all__ = [
    "TARGETS",
    "Cache",
    "Collective",
    "Links",
    "Rates",
    "Source",
    "Target",
    "abstract_device",
    "added_targets",
    "current",
    "default_device",
    "detected",
    "find",
    "of_device",
]
