"""Threads for work that would keep an event loop from its other callers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

BRIEF = 2048
"""Tokens or characters that are checked and encoded at once; some 0.2 ms."""


async def run_away[T](function: Callable[[], T], *, brief: bool) -> T:
    """Runs a function in a thread unless it is brief: handing work over and back waits twice for the interpreter's
    lock, which the engine's thread holds for a part of each step."""
    return function() if brief else await asyncio.to_thread(function)
