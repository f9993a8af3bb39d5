"""Leftovers of interrupted checkpoint writers, for people to remove."""

from __future__ import annotations

from pathlib import Path

from llama_jax import disk


def leftovers(folder: Path) -> list[Path]:
    """The folders and empty files that interrupted writers of checkpoints left directly in a folder, by name.

    Nothing that a running process is writing, and nothing of another program. A replaced checkpoint that stands alone
    (its successor never got the name) is no leftover: the next conversion to its place puts it back.
    """
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if _is_leftover(path)]


def _is_leftover(path: Path) -> bool:
    if path.suffix not in (disk.PARTIAL, disk.ASIDE, disk.LOCK) or path.is_symlink():
        return False
    base = path.with_suffix("")  # the checkpoint that it belongs to
    if disk.is_locked(disk.lock_of(base)):
        return False
    if path.suffix == disk.PARTIAL:
        return disk.is_unfinished(path)
    if path.suffix == disk.ASIDE:
        return path.is_dir() and base.is_dir()
    return path.is_file() and path.stat().st_size == 0
