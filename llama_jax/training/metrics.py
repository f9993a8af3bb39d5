"""Measurements of a run, one JSON object a line, and what is shown of them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_jax import disk


@dataclass(frozen=True)
class Measured:
    """One step.

    Attributes:
      step: counted from 1; steps: of the run.
      loss: mean over the learned tokens, in nats; before the step changed anything.
      learned: tokens that were learned; tokens: all but padding.
      grad_norm: before clipping.
      seconds: since the last step.
      mfu: FLOPs that the step needs a second, over the rate of a large matrix product; None where that is not sound.
      left_s: what the rest of the run will take.
    """

    step: int
    steps: int
    loss: float
    learned: int
    tokens: int
    grad_norm: float
    learning_rate: float
    seconds: float
    tokens_per_s: float
    mfu: float | None
    left_s: float


class MetricsFile:
    """A file of measurements that a resumed run continues.

    Args:
      path: the file.
      step: the last step that stays; later ones, of a run that was killed, are removed.
    """

    def __init__(self, path: Path, step: int):
        self._path = path
        with disk.storage_errors(path):
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            kept = b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step)
            disk.write_file(path, kept)

    def add(self, measured: Measured) -> None:
        """Appends a step."""
        self._write(asdict(measured))

    def validated(self, step: int, loss: float) -> None:
        """Appends the loss of the validation files after a step."""
        self._write({"step": step, "validation_loss": loss})

    def _write(self, value: dict[str, Any]) -> None:
        with disk.storage_errors(self._path), self._path.open("ab") as file:
            file.write(json.dumps(value).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
