"""Safe writing: disk space, typed errors, one writer at a time, durable files, and atomic replacement of a folder."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_jax.errors import DoesNotFit, StorageError

SPARE_BYTES = 64 << 20
"""Free space wanted beyond the tensors themselves, for metadata and the small files."""
UNFINISHED = "unfinished.llama_jax"
"""Marks a folder that is being written, so that no other folder of that name is ever cleared away."""
PARTIAL, ASIDE, LOCK = ".partial", ".llama_jax-old", ".lock"
"""Suffixes of a checkpoint's name for the folder it is written in, for the checkpoint that it replaces (where two
folders cannot change their names in one step), and for the file that writers lock."""

_TMP = ".tmp"
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")


@contextlib.contextmanager
def storage_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns the failures of writing below `path` into DoesNotFit (disk full, quota) and StorageError (all others).

    Args:
      path: what is being written.
      needed: bytes still to be written there, for the message; left out when 0.
    """
    try:
        yield
    except OSError as e:
        raise _typed(path, e.errno or 0, e.strerror or str(e), needed) from e
    except ValueError as e:
        # The array store reports its system errors as ValueError, with their number in the text.
        if number := _SYSTEM_ERROR.search(str(e)):
            raise _typed(path, int(number[1]), os.strerror(int(number[1])), needed) from e
        if "RESOURCE_EXHAUSTED" in str(e) or "No space left" in str(e):
            raise _typed(path, errno.ENOSPC, "no space left on the device", needed) from e
        raise


def _typed(path: Path, number: int, reason: str, needed: int) -> DoesNotFit | StorageError:
    if number not in (errno.ENOSPC, errno.EDQUOT):
        hint = "choose a folder that you may write to; LLAMA_JAX_CACHE moves the cache of converted models"
        if number == errno.EIO:
            hint = "the disk fails; see the system's log, and choose a folder on another one"
        return StorageError(f"cannot write {path}: {reason}", hint=hint)
    numbers = f"; {needed:,} bytes are needed" if needed else ""
    with contextlib.suppress(OSError):
        numbers += f"; {shutil.disk_usage(existing_parent(path)).free:,} bytes are free"
    return DoesNotFit(f"cannot write {path}: {reason}{numbers}", hint="free some space or choose another folder")


def size_text(nbytes: int) -> str:
    """Bytes for people, in powers of ten: "269 MB"."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}" if unit != "B" else f"{nbytes} B"
        value /= 1000
    return f"{value:.3g} TB"


def existing_parent(path: Path) -> Path:
    """The path itself or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


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
def file_lock(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds an advisory lock on a file, waiting for its other holders; the file goes away with the last of them.

    The lock dies with its process, so a killed one leaves nothing that blocks the next.

    Args:
      path: the file.
      waiting: called once if another process holds the lock, before the wait.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _locked(path, waiting)
    try:
        yield
    finally:
        # Removed before it is released: whoever waits for this file finds it gone and makes a new one.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(fd)


def is_unfinished(folder: Path) -> bool:
    """Returns whether a folder was begun by a writer of this program: only such folders are ever removed."""
    if not folder.is_dir():
        return False
    # The second: what is left of a writer that was stopped before it had even put its mark.
    return (folder / UNFINISHED).exists() or {p.name for p in folder.iterdir()} <= {f"{UNFINISHED}{_TMP}"}


def lock_of(path: Path) -> Path:
    """The file whose lock a process holds while it writes a checkpoint at `path`."""
    return path.with_name(path.name + LOCK)


def is_locked(path: Path) -> bool:
    """Returns whether a process holds the lock of a file; False where there is no such file."""
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


def _locked(path: Path, waiting: Callable[[], None] | None) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    waiting()
                    waiting = None
                fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file in one step: it is there with all of its bytes, on the disk itself, or not at all."""
    unfinished = path.with_name(path.name + _TMP)
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    sync(path.parent)


def sync(path: Path, *, keep: bool = True) -> None:
    """Waits until a file's bytes, or a folder's list of names, are on the disk itself.

    Args:
      keep: False takes the file out of the system's memory as well.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if not keep:
            forget(fd, 0, 0)
    finally:
        os.close(fd)


def sync_tree(folder: Path, *, keep: bool = True) -> None:
    """Waits until a folder and all below it are on the disk itself; `keep` as for `sync`."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(place, name), keep=keep)
        sync(Path(place))


def forget(fd: int, start: int, length: int) -> None:
    """Takes a range of a file (to its end when `length` is 0) out of the system's memory, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)


def fits_file_cache(nbytes: int) -> bool:
    """Returns whether files of this size may stay in the page cache: they take at most half of what is available.

    Larger ones would drive out what other programs need and, in the end, themselves before they are read again.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return True  # not Linux: the system decides
    return nbytes <= available // 2


def remove(path: Path) -> None:
    """Removes a folder and all below it, or a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def replace_folder(new: Path, path: Path) -> None:
    """Renames `new` to `path`; a folder that stood there goes away once the new one has its name.

    Where the system can let two folders change their names in one step (Linux), there is no moment without a folder at
    `path`. Elsewhere there is one; `restore_folder` undoes a change that was interrupted there.
    """
    if path.exists() and _exchange(new, path):
        sync(path.parent)
        remove(new)
        return
    old = _aside(path)
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    sync(path.parent)
    remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names with renameat2(2); False where the system or the file system cannot."""
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def restore_folder(path: Path) -> None:
    """Cleans up after a `replace_folder` that was killed: the old folder comes back unless the new one is in place."""
    old = _aside(path)
    if old.exists():
        if path.exists():
            remove(old)
        else:
            old.rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ASIDE)
