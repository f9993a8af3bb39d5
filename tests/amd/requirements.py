"""Requirements of the tests in this folder besides the usual packages, and whether their absence is an error."""

from __future__ import annotations

import importlib.util
import os

from llama_jax.targets import rocm


def missing() -> list[str]:
    """The packages that are not installed: those of the dependency group `amd`, or another plugin for AMD GPUs."""
    emulator = [] if importlib.util.find_spec("tinygrad") else ["tinygrad"]
    return emulator + ([] if rocm.installed() else [rocm.NEWEST.pjrt])


def required() -> bool:
    """Whether tests that cannot run must fail: in CI, or when LLAMA_JAX_REQUIRE_AMD is set."""
    return any(os.environ.get(name, "") not in ("", "0") for name in ("CI", "LLAMA_JAX_REQUIRE_AMD"))
