"""A model that a server has, loaded or not, and where it comes from."""

from __future__ import annotations

import asyncio
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
    """Where a model comes from. Its methods take long and are called in a thread."""

    def outline(self) -> Footprint | None:
        """Return what the model takes; None where that cannot be told before it is downloaded."""
        ...

    def fetch(self) -> None:
        """Bring what has to be downloaded or converted onto this machine.

        Raises:
          LlamaJaxError: as `llama_jax.load`.
        """
        ...

    def open(self, kept: int, progress: Callable[[str], None]) -> tuple[Engine, Tokenizer]:
        """Load the model and make its engine, which is not started.

        Args:
          kept: bytes of each device to leave free for other models; progress: told in a few words how far it is.

        Raises:
          LlamaJaxError: as `llama_jax.load` and `Engine`.
        """
        ...


@dataclass(eq=False)
class Slot:
    """One of a server's models.

    Attributes:
      names: by which clients ask for it, the first of which answers carry.
      source: None for a model that was loaded before the server, and stays.
      tool_parser: see `Served`.
      served: the model, while it is loaded; held: bytes of each device that it takes then.
      loading: done when it is loaded, or cannot be; progress: how far that is.
      outline: what it takes at least, once that is known.
      users: requests that use it or wait for it; used: when the last of them ended.
      failure: the kind of error by which it could not be loaded; retry: when it is tried again.
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
    def status(self) -> Literal["loaded", "loading", "failed", "unloaded"]:
        """Where it is."""
        if self.served is not None:
            return "loaded"
        if self.loading is not None:
            return "loading"
        return "failed" if self.failure else "unloaded"

    @property
    def context(self) -> int | None:
        """Tokens of a sequence, where that is known."""
        if self.served is not None:
            return self.served.capacity
        return None if self.outline is None else self.outline.context

    def told(self, progress: str) -> None:
        """Take note of how far loading is."""
        self.progress = progress

    def refused(self, pause: float) -> Refused:
        """Return what those are told who ask for it before it is tried again, `pause` seconds from now: nothing of this
        machine's files."""
        return Refused(
            503,
            f"the model {self.names[0]!r} cannot be loaded: {self.failure}",
            code=self.failure,
            hint="the server's log has the reason; other models are not affected",
            headers={"retry-after": str(max(RETRY_S, round(pause)))},
        )
