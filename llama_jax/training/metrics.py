"""Measurements of a run, one JSON object a line, and what is shown of them."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

from llama_jax import disk
from llama_jax.errors import RequestError
from llama_jax.measure.bench import sound_share


@dataclass(frozen=True)
class Measured:
    """One step.

    Attributes:
      step: counted from 1; steps: of the run.
      loss: mean over the learned tokens in nats, or over pairs; before the step changed anything.
      learned: tokens that were learned; tokens: all but padding.
      grad_norm: before clipping.
      seconds: since the last step.
      mfu: FLOPs that the step needs a second, over the rate of a large matrix product; None where that is not sound.
      left_s: what the rest of the run will take.
      means: what the loss reports besides, such as "accuracy".
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
    means: Mapping[str, float] = field(default_factory=dict)


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
        values = asdict(measured)
        self._write(values | values.pop("means"))

    def validated(self, step: int, means: Mapping[str, float]) -> None:
        """Appends the loss of the validation files after a step, and what it reports besides."""
        self._write({"step": step, **{f"validation_{name}": value for name, value in means.items()}})

    def _write(self, value: dict[str, Any]) -> None:
        with disk.storage_errors(self._path), self._path.open("ab") as file:
            file.write(json.dumps(value).encode() + b"\n")
            file.flush()


class Watch:
    """Measures steps and tells of each once the next one has been dispatched, so that the device never waits.

    Args:
      steps: of the run; rate: the learning rate of each.
      share: seconds and the lengths of a step's texts to its MFU.
      told: called with each step, in order.
    """

    def __init__(
        self,
        steps: int,
        rate: Callable[[int], Any],
        share: Callable[[float, list[int]], float],
        told: Callable[[Measured], None],
    ):
        self._steps, self._rate, self._share, self._told = steps, rate, share, told
        self._pending: tuple[int, Mapping[str, jax.Array], list[int]] | None = None
        self._times: deque[float] = deque(maxlen=50)
        self.loss: float | None = None
        self.restart()

    def restart(self) -> None:
        """Begins the next step's time now."""
        self._began = time.perf_counter()

    def dispatched(self, number: int, found: Mapping[str, jax.Array], lengths: list[int]) -> None:
        """Takes what a step, counted from 0, will have measured; waits for the one before."""
        self.finish()
        self._pending = number, found, lengths

    def finish(self) -> None:
        """Waits for the step that was dispatched last, and tells of it.

        Raises:
          RequestError: its loss or gradient is not finite. A run that saves no state before has sound checkpoints.
        """
        if self._pending is None:
            return
        (number, found, lengths), self._pending = self._pending, None
        values = {name: float(x) for name, x in jax.device_get(found).items()}
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        self._times.append(seconds)
        self.loss = values["loss"]
        if not math.isfinite(self.loss + values["grad_norm"]):
            raise RequestError(
                f"step {number + 1}: the loss is {self.loss}, the norm of its gradient {values['grad_norm']}",
                param="optimizer",
                hint="training has diverged: choose a lower learning_rate or a longer warmup, and another output",
            )
        self._told(
            Measured(
                step=number + 1,
                steps=self._steps,
                loss=values["loss"],
                learned=int(values["tokens"]),
                tokens=sum(lengths),
                grad_norm=values["grad_norm"],
                learning_rate=float(self._rate(number)),
                seconds=seconds,
                tokens_per_s=sum(lengths) / seconds,
                mfu=sound_share(self._share(seconds, lengths)),
                left_s=statistics.median(self._times) * (self._steps - number - 1),
                means={name: value for name, value in values.items() if name not in ("loss", "tokens", "grad_norm")},
            )
        )
