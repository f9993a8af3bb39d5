"""Changes of a running engine, made between two of its steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from llama_jax.errors import LlamaJaxError
from llama_jax.generation.jobs import Jobs


class Change:
    """Something to do between two steps, for a caller in an event loop that waits for `done`."""

    def __init__(self, run: Callable[[Jobs], None], loop: asyncio.AbstractEventLoop):
        self.run, self.done, self._loop = run, loop.create_future(), loop

    def end(self, error: LlamaJaxError | None) -> None:
        """Tells the caller; from any thread. Nobody is told whose loop is closed."""

        def tell() -> None:
            if self.done.done():  # its caller has left
                return
            self.done.set_result(None) if error is None else self.done.set_exception(error)

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(tell)
