"""What writers of checkpoints that were stopped have left, for people to remove."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from llama_jax import disk


@dataclass(frozen=True)
class Leftover:
    """What a writer that was stopped has left.

    Attributes:
      path: a folder or an empty file.
      nbytes: disk space that removing it frees.
    """

    path: Path
    nbytes: int


def leftovers(folder: Path) -> list[Leftover]:
    """What stopped writers of checkpoints have left directly in a folder, by name.

    Nothing that a running process is writing, and nothing of another program. A replaced checkpoint that stands alone
    (its successor never got the name) is no leftover: the next conversion to its place puts it back.
    """
    if not folder.is_dir():
        return []
    return [Leftover(path, _size(path)) for path in sorted(folder.iterdir()) if _is_leftover(path)]


def remove_leftovers(folder: Path) -> list[Leftover]:
    """Removes what `leftovers` finds and returns it. A conversion that could have gone on has to begin afresh then.

    Raises:
      StorageError: something cannot be removed.
    """
    found = []
    for left in leftovers(folder):
        base = _base(left.path)
        # Held, so that no writer begins to use it meanwhile; a stale lock file goes away with this.
        with disk.storage_errors(left.path), disk.file_lock(disk.lock_of(base)):
            disk.remove(left.path)
        found.append(left)
    return found


def _base(path: Path) -> Path:
    """The checkpoint that a leftover belongs to."""
    return path.with_name(path.name.removesuffix(path.suffix))


def _is_leftover(path: Path) -> bool:
    if path.suffix not in (disk.PARTIAL, disk.ASIDE, disk.LOCK) or path.is_symlink():
        return False
    base = _base(path)
    if disk.is_locked(disk.lock_of(base)):
        return False
    if path.suffix == disk.PARTIAL:
        return disk.is_unfinished(path)
    if path.suffix == disk.ASIDE:
        return path.is_dir() and base.is_dir()
    return path.is_file() and path.stat().st_size == 0


def _size(path: Path) -> int:
    """Bytes on disk; files with several names (parts of a conversion) count once."""
    seen, total = set(), 0
    for place, _, names in os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]:
        for name in names:
            stat = os.lstat(os.path.join(place, name))
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                total += stat.st_size
    return total
