"""A server: its settings, its models, its metrics, and where in its life it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_jax.server.metrics import Metrics
from llama_jax.server.models import Models
from llama_jax.server.settings import ServerSettings


@dataclass
class Life:
    """State of a server between its start and its end.

    Attributes:
      active: requests under way, without those of `guard.OPEN`; draining: whether new ones are turned away.
    """

    active: int = 0
    draining: bool = False


@dataclass(frozen=True)
class ServerState:
    """All that routes answer from."""

    settings: ServerSettings
    models: Models
    metrics: Metrics
    life: Life = field(default_factory=Life)
