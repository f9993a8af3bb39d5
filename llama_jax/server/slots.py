"""A server's model, loaded or not, and its source."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from llama_jax.generation.engine import Engine
from llama_jax.generation.restarts import Restarts
from llama_jax.server.budget import Footprint
from llama_jax.server.errors import RETRY_S, Refused
from llama_jax.server.served import Served
from llama_jax.text.tokenizer import Tokenizer


class Source(Protocol):
    """Source of a model. Its methods are slow and are called in a thread."""

    def outline(self) -> Footprint | None:
        """Return what the model needs; None if that is unknown before it is downloaded."""
        ...

    def fetch(self) -> None:
        """Download and convert the model if necessary.

        Raises:
          LlamaJaxError: as `llama_jax.load`.
        """
        ...

    def open(self, kept: int, progress: Callable[[str], None]) -> tuple[Engine, Tokenizer]:
        """Load the model and make its engine without starting it.

        Args:
          kept: bytes of each device to leave free for other models; progress: called with short progress texts.

        Raises:
          LlamaJaxError: as `llama_jax.load` and `Engine`.
        """
        ...


@dataclass(eq=False)
class Slot:
    """One of a server's models.

    Attributes:
      names: for clients; answers carry the first.
      source: None for a model that was loaded before the server and stays loaded.
      tool_parser: see `Served`.
      served: the model, while loaded; held: bytes of each device that it then takes.
      loading: done when it is loaded or has failed; progress: of loading.
      outline: the least that it needs, once known.
      users: number of requests that use it or wait for it; used: when the last of them ended.
      failure: kind of the error of the last attempt to load; retry: time of the next attempt.
    """

    names: tuple[str, ...]
    source: Source | None
    tool_parser: str = ""
    served: Served | None = None
    held: int = 0
    loading: asyncio.Future[None] | None = None
    progress: str = ""
    outline: Footprint | None = None
    users: int = 0
    used: float = 0.0
    failure: str = ""
    retry: float = 0.0
    attempts: Restarts = field(default_factory=Restarts)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests can choose, while it is loaded."""
        return () if self.served is None else self.served.engine.adapters

    @property
    def status(self) -> Literal["loaded", "loading", "failed", "unloaded"]:
        """Its loading status."""
        if self.served is not None:
            return "loaded"
        if self.loading is not None:
            return "loading"
        return "failed" if self.failure else "unloaded"

    @property
    def step(self) -> int:
        """Bytes of each device that a step takes while it lasts, if known."""
        return 0 if self.outline is None else self.outline.step

    @property
    def context(self) -> int | None:
        """Tokens of a sequence, if known."""
        if self.served is not None:
            return self.served.capacity
        return None if self.outline is None else self.outline.context

    def told(self, progress: str) -> None:
        """Record the progress of loading."""
        self.progress = progress

    def refused(self, pause: float) -> Refused:
        """Return the error until the next attempt, in `pause` seconds; it reveals nothing of local files."""
        return Refused(
            503,
            f"the model {self.names[0]!r} cannot be loaded: {self.failure}",
            code=self.failure,
            hint="the server's log has the reason; other models are not affected",
            headers={"retry-after": str(max(RETRY_S, math.ceil(pause)))},
        )
