"""What a device is: the numbers that kernels, plans and reports are made from."""

from __future__ import annotations

from llama_jax.targets.detect import current
from llama_jax.targets.table import TARGETS, Target, find

__all__ = ["TARGETS", "Target", "current", "find"]
