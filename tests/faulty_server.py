"""`llama-jax` with other limits, and with an engine that fails in the way that a file names, once there is such a file.

python faulty_server.py '{"file": FILE, "limits": {"stalled_s": 1}}' serve MODEL ...
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_jax.cli import main
from llama_jax.generation.jobs import Jobs
from llama_jax.server.settings import Limits

FAULTS: dict[str, Callable[[], Any]] = {
    "slow": lambda: time.sleep(0.05),
    "hang": lambda: time.sleep(600),
    "hold": lambda: re.match("(a+)+b", "a" * 100),  # never lets another thread of Python's run
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(3),
}


def program(file: Path, **limits: float) -> tuple[str, str]:
    """Arguments of Python that run it."""
    return __file__, json.dumps({"file": str(file), "limits": limits})


def install(file: Path, limits: Mapping[str, float]) -> None:
    """Lets steps look for the file before they run, and changes the default limits."""
    step = Jobs.step

    def faulty(self: Jobs) -> Any:
        if file.exists():
            FAULTS[file.read_text()]()
        return step(self)

    Jobs.step = faulty  # type: ignore[method-assign]
    names = Limits.__init__.__code__.co_varnames[1:]
    defaults = dict(zip(names, Limits.__init__.__defaults__ or (), strict=False)) | limits
    Limits.__init__.__defaults__ = tuple(defaults[name] for name in names if name in defaults)  # type: ignore[attr-defined]


if __name__ == "__main__":
    given = json.loads(sys.argv.pop(1))
    install(Path(given["file"]), given["limits"])
    main()
