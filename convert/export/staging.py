"""Writing a file or folder under another name first, so that nothing half-written ever has the final one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_jax import disk
from llama_jax.errors import StorageError

UNFINISHED = "unfinished-export.llama_jax"
"""Marks a folder that is being written, so that no other folder of that name is ever cleared away."""


@contextlib.contextmanager
def staged(path: Path, *, needed: int, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Lends the name `<path>.partial` to a block that makes a file or a folder there; renames it when the block ends.

    An error in the block removes what was made. A killed process leaves it, and the next call clears it away.

    Args:
      path: the final name, absolute.
      needed: bytes that will be written, checked against the free disk space.
      overwrite: whether what is at `path` may be replaced; it stays until the new one is complete.
      replaceable: whether what is at a path is of a kind that this program writes; nothing else is ever deleted.

    Raises:
      StorageError: something is at `path` (and may not be replaced), or it cannot be written.
      DoesNotFit: too little disk space.
    """
    partial = path.with_name(path.name + disk.PARTIAL)
    with disk.file_lock(disk.lock_of(path)), disk.storage_errors(path):
        disk.restore_folder(path)
        if path.exists() or path.is_symlink():
            if not overwrite:
                raise StorageError(f"{path} exists", hint="choose another name, or pass --overwrite")
            if not replaceable(path):
                raise StorageError(
                    f"{path} exists and is not an export of llama_jax, so it is not overwritten",
                    hint="choose another name",
                )
        if partial.exists():
            if not ((partial / UNFINISHED).exists() or replaceable(partial)):
                raise StorageError(
                    f"{partial} is in the way and is not of llama_jax", hint="move it, or choose another name"
                )
            disk.remove(partial)
        disk.check_space(path, needed)
        try:
            yield partial
            if partial.is_dir():
                (partial / UNFINISHED).unlink()
                disk.sync(partial)
                disk.replace_folder(partial, path)
            else:
                partial.replace(path)
            disk.sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.remove(partial)
            raise


def start_folder(path: Path) -> None:
    """Makes the folder that `staged` lent a name for."""
    path.mkdir()
    (path / UNFINISHED).touch()


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file and waits until it is on the disk."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    disk.sync(path)
