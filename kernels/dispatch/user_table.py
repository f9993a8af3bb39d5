"""The user's own table for a target, which `llama-jax tune` writes and which wins over the shipped one."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax.errors import StorageError
from llama_jax.folders import cache_dir
from llama_jax.kernels.dispatch.fingerprint import source_hash, versions
from llama_jax.kernels.dispatch.tables import Rule, Table, parse
from llama_jax.targets import Target


def path_of(target: Target) -> Path:
    """The path of the user's table for a target, whether it exists or not."""
    return cache_dir() / "kernels" / f"{target.name}.json"


def user_rules(operation: str, target: Target) -> tuple[Sequence[Rule], tuple[tuple[str, str], ...]]:
    """The rules of the user's table, and why there are none where they are passed over.

    Raises:
      KernelError: the file is damaged.
    """
    try:
        path = path_of(target)
        stat = path.stat()
    except (OSError, StorageError):  # no table, or no folder for one
        return (), ()
    table, made_with = _read(path, stat.st_mtime_ns, stat.st_size)
    if not (rules := table.get(operation, ())):
        return (), ()
    if why := _stale(operation, made_with):
        return (), (("tuned table", why),)
    return rules, ()


def _stale(operation: str, made_with: Mapping[str, Any]) -> str:
    if jax.process_count() > 1:
        # Each host has its own file, and all of them must compile the same program.
        return "several processes compute together"
    if made_with.get("sources", {}).get(operation) != source_hash(operation):
        return "measured with other kernels: run `llama-jax tune` again"
    if made_with.get("versions") != versions():
        return "measured with other versions of jax or its plugins: run `llama-jax tune` again"
    return ""


@functools.lru_cache(maxsize=8)
def _read(path: Path, mtime_ns: int, size: int) -> tuple[Table, Mapping[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return parse(text, str(path)), json.loads(text)
