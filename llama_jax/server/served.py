"""The model that a server serves, and what every route needs of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from llama_jax.generation.engine import Engine
from llama_jax.server.errors import Refused
from llama_jax.server.metrics import Metrics
from llama_jax.server.settings import ServerSettings
from llama_jax.text.tokenizer import Tokenizer


@dataclass
class Life:
    """State of a server between its start and its end.

    Attributes:
      active: requests under way, without those of `guard.OPEN`; draining: whether new ones are turned away.
    """

    active: int = 0
    draining: bool = False


@dataclass(frozen=True)
class Served:
    """An engine, and how clients know it.

    Attributes:
      names: of the model, the first of which answers carry.
      created: when it was loaded, in seconds of Unix time.
    """

    engine: Engine
    tokenizer: Tokenizer
    names: tuple[str, ...]
    settings: ServerSettings
    metrics: Metrics
    life: Life = field(default_factory=Life)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def capacity(self) -> int:
        """Tokens that a prompt and its continuation may have together."""
        return min(self.engine.settings.capacity, self.engine.model.config.context_length)

    def check_model(self, name: str | None) -> None:
        """Check that a request is for this model; one that names none is.

        Raises:
          Refused: it names another.
        """
        if name is not None and name not in self.names:
            raise Refused(
                404,
                f"there is no model {name!r:.100} here",
                code="model_not_found",
                param="model",
                hint=f"the model is {self.names[0]!r}",
            )


def served_name(model: str) -> str:
    """Return the name of a model for clients: of a file or folder only its own name, and not where it is."""
    path = Path(model)
    return path.resolve().name if path.exists() else model
