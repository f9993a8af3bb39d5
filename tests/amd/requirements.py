"""What the tests of this folder need besides the usual packages, and whether doing without is an error."""

from __future__ import annotations

import importlib.util
import os

PACKAGES = {"tinygrad": "tinygrad", "jax_plugins.xla_rocm7": "jax-rocm7-pjrt"}
"""Module to the package that brings it: the dependency group `amd`."""


def missing() -> list[str]:
    """The packages that are not installed."""
    return [package for module, package in PACKAGES.items() if not _exists(module)]


def required() -> bool:
    """Whether tests that cannot run must fail: in CI, or when LLAMA_JAX_REQUIRE_AMD is set."""
    return any(os.environ.get(name, "") not in ("", "0") for name in ("CI", "LLAMA_JAX_REQUIRE_AMD"))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
