"""State of a server: its settings, models, metrics and life cycle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from llama_jax.generation.engine import Engine
from llama_jax.server.metrics import Metrics
from llama_jax.server.models import Models
from llama_jax.server.served import Served
from llama_jax.server.settings import ServerSettings
from llama_jax.server.slots import Slot
from llama_jax.text.tokenizer import Tokenizer


@dataclass
class Life:
    """State of a server between its start and its end.

    Attributes:
      active: requests in progress, except those of `guard.OPEN`; draining: whether new ones are rejected.
    """

    active: int = 0
    draining: bool = False


@dataclass(frozen=True)
class ServerState:
    """Everything that routes need to answer."""

    settings: ServerSettings
    models: Models
    metrics: Metrics
    life: Life = field(default_factory=Life)

    @classmethod
    def of(cls, engine: Engine, tokenizer: Tokenizer, names: tuple[str, ...], settings: ServerSettings) -> Self:
        """Return a server of one engine that has been made but not started."""
        metrics = Metrics()
        of_model = metrics.of(names[0], engine.snapshot, lambda: engine.restarts.total)
        slot = Slot(names, None, served=Served(engine, tokenizer, names, settings, of_model))
        return cls(settings, Models([slot], settings, metrics), metrics)
