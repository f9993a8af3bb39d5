"""Folders for data that this package can recreate (converted models, compiled programs, measurements of kernels), and
for communication between its processes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from llama_jax.errors import StorageError

CACHE_VARIABLE = "LLAMA_JAX_CACHE"


def cache_dir() -> Path:
    """The cache folder, which may not exist yet: LLAMA_JAX_CACHE, else this system's folder for caches.

    Raises:
      StorageError: the variable is not set and platformdirs is not installed.
    """
    if value := os.environ.get(CACHE_VARIABLE):
        return Path(value).expanduser()
    try:
        import platformdirs
    except ImportError as error:
        raise StorageError(
            "the package platformdirs is not installed, so there is no default for the cache folder",
            hint=f"set {CACHE_VARIABLE} to a folder, or run: pip install platformdirs",
        ) from error
    return Path(platformdirs.user_cache_dir("llama_jax"))


def runtime_dir() -> Path:
    """This user's folder for sockets, which may not exist yet and is gone when the machine restarts: in
    XDG_RUNTIME_DIR, else in the system's temporary folder, where others could have made it."""
    if value := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(value) / "llama_jax"
    return Path(tempfile.gettempdir()) / f"llama_jax-{os.getuid()}"
