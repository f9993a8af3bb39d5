"""`llama-jax` with an engine that fails in the way that a file names, once there is such a file.

    python faulty_server.py FILE serve MODEL ...
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_jax.cli import main
from llama_jax.generation.jobs import Jobs

FAULTS: dict[str, Callable[[], Any]] = {
    "hang": lambda: time.sleep(600),
    "hold": lambda: re.match("(a+)+b", "a" * 100),  # never lets another thread of Python's run
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(3),
}


def install(file: Path) -> None:
    """Lets steps look for the file before they run."""
    step = Jobs.step

    def faulty(self: Jobs) -> Any:
        if file.exists():
            FAULTS[file.read_text()]()
        return step(self)

    Jobs.step = faulty  # type: ignore[method-assign]


if __name__ == "__main__":
    install(Path(sys.argv.pop(1)))
    main()
