"""Measures how long a call takes on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from llama_jax.kernels.dispatch.cases import Arrays

ROUND_S = 0.02
"""Seconds that one timed round should last at least: far longer than starting a program takes."""
MOST_CALLS = 500


def seconds_per_call(run: Callable[..., Any], arrays: Arrays, rounds: int) -> float:
    """The median over `rounds` of the time of one call, in seconds.

    Many calls run in one compiled loop, each waiting for the one before, so that neither Python nor the start of a
    program is measured. All calls read the same arrays: what fits into a cache is read from there.
    """
    calls = 1
    while True:
        loop = jax.jit(lambda arrays, calls=calls: _repeat(run, arrays, calls))
        jax.block_until_ready(loop(arrays))  # compiles
        once = _timed(loop, arrays)
        if once >= ROUND_S / 2 or calls >= MOST_CALLS:
            break
        calls = min(max(calls + 1, int(calls * ROUND_S / max(once, 1e-6))), MOST_CALLS)
    return statistics.median([once, *(_timed(loop, arrays) for _ in range(rounds - 1))]) / calls


def _timed(f: Callable[[Arrays], Any], arrays: Arrays) -> float:
    began = time.perf_counter()
    jax.block_until_ready(f(arrays))
    return time.perf_counter() - began


def _repeat(run: Callable[..., Any], arrays: Arrays, calls: int) -> Any:
    """`calls` calls. The barrier makes the arrays of each wait for the result of the one before.

    The number is compiled in: in a loop with any other end the host is asked in each turn.
    """

    def body(_: int, state: tuple[Arrays, Any]) -> tuple[Arrays, Any]:
        return jax.lax.optimization_barrier((state[0], run(**state[0])))

    out = run(**arrays)
    return jax.lax.fori_loop(0, calls - 1, body, (arrays, out))[1] if calls > 1 else out
