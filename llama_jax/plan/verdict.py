"""Decides whether a device has enough memory: one rule, for plans and for compiled programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llama_jax.plan.device_memory import usable_bytes
from llama_jax.targets import Target


@dataclass(frozen=True)
class Verdict:
    """The memory each phase needs on a device, beside what jax may use of it.

    Attributes:
      phases: bytes by the names of `Needs.phases`; a model fits if the largest of them does.
      fraction: of the device's memory that jax may use.
      usable: that in bytes; None where the table has no memory for the target.
    """

    phases: Mapping[str, int]
    fraction: float
    usable: int | None

    @classmethod
    def of(cls, target: Target, phases: Mapping[str, int], fraction: float) -> Verdict:
        """The verdict on a target's device."""
        return cls(phases, fraction, usable_bytes(target, fraction))

    @property
    def peak(self) -> int:
        """Of the phase that needs most."""
        return max(self.phases.values())

    @property
    def worst(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def fits(self) -> bool | None:
        """None where memory is unknown."""
        return None if self.usable is None else self.peak <= self.usable
