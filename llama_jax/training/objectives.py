"""Losses by name: what each reads, and what it compares with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from llama_jax.training.data import Texts, read_pairs, read_texts
from llama_jax.training.loss import CROSS_ENTROPY, Objective
from llama_jax.training.preference import Dpo

if TYPE_CHECKING:
    from llama_jax.training.settings import Settings


@dataclass(frozen=True)
class Loss:
    """A loss of runs.

    Attributes:
      read: reads files of its kind, as `read_texts`.
      objective: from settings.
      compared: whether its batches need the `entropies` of the model that a run starts from.
    """

    read: Callable[..., Texts]
    objective: Callable[[Settings], Objective]
    compared: bool = False


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "cross_entropy": Loss(read_texts, lambda settings: CROSS_ENTROPY),
        "dpo": Loss(read_pairs, lambda settings: Dpo(settings.dpo.beta), compared=True),
    }
)
"""By the name that settings give."""
