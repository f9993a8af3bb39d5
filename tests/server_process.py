"""The server as a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

KEY = "a-key"


@contextlib.contextmanager
def serving(
    model: Path | str, *options: str, key: str = KEY, program: Sequence[str] = ("-m", "llama_jax.cli")
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server, and what it says once it answers."""
    command = [sys.executable, *program, "serve", str(model), "--no-convert", "--port", "0", "--json"]
    command += ["--rows", "2", "--dtype", "float32", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"LLAMA_JAX_API_KEY": key}
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()
