"""Writing safely: disk space, typed errors, one writer at a time, and replacing a folder as one step."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import DoesNotFit, StorageError

_OLD = ".llama_jax-old"

SPARE_BYTES = 64 << 20
"""Free space wanted beyond the tensors themselves, for metadata and the small files."""


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns the failures of writing below `path` into DoesNotFit (disk full, quota) and StorageError (all others)."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path, str(e.strerror)) from e
        hint = "choose a folder that you may write to; LLAMA_JAX_CACHE moves the cache of converted models"
        raise StorageError(f"cannot write {path}: {e.strerror or e}", hint=hint) from e
    except ValueError as e:
        # The array store reports its system errors as ValueError.
        if "RESOURCE_EXHAUSTED" in str(e) or "No space left" in str(e):
            raise _full(path, "no space left on the device") from e
        raise


def _full(path: Path, reason: str) -> DoesNotFit:
    free = ""
    with contextlib.suppress(OSError):
        free = f"; {shutil.disk_usage(existing_parent(path)).free:,} bytes are free"
    return DoesNotFit(f"cannot write {path}: {reason}{free}", hint="free some space or choose another folder")


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_space(path: Path, needed: int) -> None:
    """Checks that `needed` bytes and a little more are free where `path` will be written.

    Raises:
      DoesNotFit: they are not; states both numbers.
    """
    free = shutil.disk_usage(existing_parent(path)).free
    if free < needed + SPARE_BYTES:
        raise DoesNotFit(
            f"writing {path} needs {needed + SPARE_BYTES:,} bytes, but {free:,} are free",
            hint="free some space, choose another folder, or set LLAMA_JAX_CACHE to one on a larger disk",
        )


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds an advisory lock on a file, waiting for its other holders; the file goes away with the last of them.

    The lock dies with its process, so a killed one leaves nothing that blocks the next.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _locked(path)
    try:
        yield
    finally:
        # Removed before it is released: whoever waits for this file finds it gone and makes a new one.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(fd)


def lock_of(path: Path) -> Path:
    """The file whose lock a process holds while it writes a checkpoint at `path`."""
    return path.with_name(path.name + ".lock")


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file; False where there is no such file."""
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def leftovers(folder: Path) -> list[Path]:
    """What stopped writers left in a folder of checkpoints, and nobody is working on: for people to remove."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        ending = next((e for e in (".partial", _OLD, ".lock") if path.name.endswith(e)), None)
        if ending and not path.is_symlink() and not is_locked(lock_of(path.with_name(path.name.removesuffix(ending)))):
            found.append(path)
    return found


def _locked(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def remove(path: Path) -> None:
    """Removes a folder and all below it, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def replace_folder(new: Path, path: Path) -> None:
    """Renames `new` to `path`; a folder that stood there goes away once the new one has its name.

    Between the two renames nothing stands at `path`; `restore_folder` undoes a change that was interrupted there.
    """
    old = _aside(path)
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    remove(old)


def restore_folder(path: Path) -> None:
    """Cleans up after a `replace_folder` that was killed: the old folder comes back unless the new one is in place."""
    old = _aside(path)
    if old.exists():
        if path.exists():
            remove(old)
        else:
            old.rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + _OLD)
