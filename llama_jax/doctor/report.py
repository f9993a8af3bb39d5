"""The report that `doctor` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]

INTERNAL = 70
"""Exit code of a problem without a specific one."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
      detail: what was found.
      fix: a command or a sentence; empty if there is nothing to fix.
      exit_code: of `llama-jax doctor` if this is the first problem; 0 for one without a specific code.
    """

    name: str
    status: Status
    detail: str
    fix: str = ""
    exit_code: int = 0


@dataclass(frozen=True)
class Report:
    """The results of all checks.

    Attributes:
      checks: in the order of looking.
      system, versions, environment: facts without a judgement.
      devices: as jax sees them, empty if it does not answer.
      kernels: what `auto` would choose there for small arguments of every operation (`llama_jax.kernels.choices`).
      numerics: each check of a kernel against the reference, where that was asked for.
    """

    checks: tuple[Check, ...]
    system: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    backend: str | None = None
    devices: tuple[dict[str, Any], ...] = ()
    kernels: tuple[dict[str, Any], ...] = ()
    numerics: tuple[dict[str, Any], ...] = ()

    @property
    def exit_code(self) -> int:
        """0 without a problem, else that of the first one."""
        return next((check.exit_code or INTERNAL for check in self.checks if check.status == "problem"), 0)

    @property
    def ok(self) -> bool:
        return self.exit_code == 0
