"""Optimisers and schedules of optax, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import optax

from llama_jax.errors import RequestError, did_you_mean

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Optimizer:
    """Settings of an optimiser.

    Attributes:
      name: one of `OPTIMIZERS`.
      learning_rate: the highest of the run.
      schedule: how it falls after the warm-up: "constant", "linear" or "cosine".
      warmup: steps over which it rises linearly, the first of which is a step of rate / warmup.
      end: what it falls to, as a share of the highest.
      betas: of adamw and lion.
      eps: of adamw.
      weight_decay: decoupled, on matrices alone: neither norms nor biases decay.
      max_grad_norm: longer gradients are scaled to this norm; None or inf leaves them.

    Raises:
      RequestError: a name is not known, or a number is out of range.
    """

    name: str = "adamw"
    learning_rate: float = 2e-4
    schedule: str = "constant"
    warmup: int = 0
    end: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name, known in (("name", tuple(OPTIMIZERS)), ("schedule", SCHEDULES)):
            if (value := getattr(self, name)) not in known:
                hint = did_you_mean(value, known) or f"there are {', '.join(known)}"
                raise RequestError(f"no optimiser has the {name} {value!r}", param=name, hint=hint)
        ranges = {  # nan is in none of them
            "learning_rate": (0 < self.learning_rate < math.inf, "be positive", "e.g. 2e-4"),
            "warmup": (self.warmup >= 0, "not be negative", "0 is none"),
            "end": (0 <= self.end <= 1, "be from 0 to 1", "it is a share of the highest rate"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "be from 0 to below 1", "e.g. [0.9, 0.999]"),
            "eps": (0 < self.eps < math.inf, "be positive", "e.g. 1e-8"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "not be negative", "0 is none"),
            "max_grad_norm": (self.max_grad_norm is None or self.max_grad_norm > 0, "be positive", "inf is no limit"),
        }
        for name, (sound, must, hint) in ranges.items():
            if not sound:
                raise RequestError(f"{name} = {getattr(self, name)} must {must}", param=name, hint=hint)

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate of each step, counted from 0, of a run of so many."""
        peak, rest = self.learning_rate, max(1, steps - self.warmup)
        falls: dict[str, Callable[[], optax.Schedule]] = {
            "constant": lambda: optax.constant_schedule(peak),
            "linear": lambda: optax.linear_schedule(peak, self.end * peak, rest),
            "cosine": lambda: optax.cosine_decay_schedule(peak, rest, self.end),
        }
        fall = falls[self.schedule]()
        if not self.warmup:
            return fall
        rise = optax.linear_schedule(peak / self.warmup, peak, max(1, self.warmup - 1))
        return optax.join_schedules([rise, fall], [self.warmup])

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optax schedule for a run of N steps."""
        made = OPTIMIZERS[self.name](self, self.rate(steps))
        return made if self.max_grad_norm is None else optax.chain(optax.clip_by_global_norm(self.max_grad_norm), made)


def _matrices(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def _adamw(o: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, *o.betas, eps=o.eps, weight_decay=o.weight_decay, mask=_matrices)


def _lion(o: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(rate, *o.betas, weight_decay=o.weight_decay, mask=_matrices)


def _adafactor(o: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    made = optax.adafactor(rate)
    if not o.weight_decay:
        return made
    # Its own decay is not multiplied by the rate, as that of the others is.
    return optax.chain(made, optax.add_decayed_weights(lambda step: -rate(step) * o.weight_decay, _matrices))


def _sgd(o: Optimizer, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(o.weight_decay, _matrices), optax.sgd(rate))


OPTIMIZERS: Mapping[str, Callable[[Optimizer, optax.Schedule], optax.GradientTransformation]] = MappingProxyType(
    {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "sgd": _sgd}
)
"""Optimisers by name: adamw (arXiv:1711.05101), lion (arXiv:2302.06675), adafactor (arXiv:1804.04235), sgd."""
