"""Shared by the benchmarks of kernels: the ceilings of the device, the time of a program, and the file of results."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax

from llama_jax.measure.bench import Ceilings, measure_ceilings

UNTUNED = {"xla_gpu_autotune_level": 0}
"""For programs that are not timed: XLA takes seconds for each of their products to find the fastest kernel."""


@cache
def ceilings(dtype: str, side: int | None) -> Ceilings:
    """Ceilings of the device in that dtype, measured once a run as `llama-jax bench` does it, and printed."""
    found = measure_ceilings(dtype, side=side)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {dtype}: {found}", flush=True)
    return found


def seconds(f: Callable[..., Any], *args: Any, repeats: int) -> float:
    """Median time of a program, once it is compiled."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def write(
    path: Path | None, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Ceilings], **about: str | None
) -> None:
    """Writes what was measured so far, if there is a path: after each row, so that a run which is cut off is not lost.

    Args:
      found: ceilings by dtype. about: what else the numbers depend on; what is None is left out.
    """
    if path is None:
        return
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **{name: value for name, value in about.items() if value is not None},
        "ceilings": {dtype: dataclasses.asdict(numbers) for dtype, numbers in found.items()},
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
