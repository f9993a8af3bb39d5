"""Ends a process whose device or event loop hangs: nothing in it can be restarted, so its supervisor must."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llama_jax.errors import EngineFailed
from llama_jax.server.state import ServerState

FAULT = 70
"""The exit code (EX_SOFTWARE of sysexits.h)."""
LAST_WORDS_S = 5.0
"""Time for the last answers to waiting clients."""
_CHECKS = 10
"""Checks within the time limit of a step."""

log = logging.getLogger("llama_jax.server")


@asynccontextmanager
async def watched(server: ServerState) -> AsyncIterator[None]:
    """Ends the process once a step has taken `hung_s`, or this event loop has not run for that long.

    Clients that wait for the engine are told first. If the loop hangs, they cannot be told: a thread that does not need
    the interpreter writes the stack of every thread to standard error and ends the process with 1.
    """
    watching = asyncio.create_task(_watch(server))
    try:
        yield
    finally:
        watching.cancel()
        faulthandler.cancel_dump_traceback_later()


async def _watch(server: ServerState) -> None:
    most = server.settings.limits.hung_s
    while True:
        faulthandler.dump_traceback_later(most, exit=True)
        age = max((served.engine.step_age_s for served in server.models.loaded), default=0.0)
        if age > most:
            await _end(server, age)
        await asyncio.sleep(most / _CHECKS)


async def _end(server: ServerState, age: float) -> None:
    log.error("the device has worked at one step for %.0f s; the process ends", age)
    server.life.draining = True
    for served in server.models.loaded:
        served.engine.give_up(EngineFailed("the engine's device hangs", hint="send the request again later"))
    for _ in range(100):
        if not server.life.active:
            break
        await asyncio.sleep(LAST_WORDS_S / 100)
    os._exit(FAULT)
