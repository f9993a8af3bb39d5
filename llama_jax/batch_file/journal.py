"""The on-disk output of a batch run: locked, appended to as lines are done, and recoverable after a kill at any moment.

During a run, OUT grows by whole lines, written and synced in groups. OUT.meta.json identifies the run, and is locked by
the running process. A kill leaves at most one torn line at the end, which the next run cuts off. Once every line is
there, OUT is sorted into the order of the input.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Self

from llama_jax.batch_file.records import encode, index_of, is_error
from llama_jax.batch_file.storage import storage_errors
from llama_jax.disk import sync
from llama_jax.errors import CheckpointError, RequestError, StorageError

_FRESH = "choose another output file, or start afresh with --overwrite"


class Journal:
    """The open output of one run; a context manager that releases the lock.

    Attributes:
      path: the output file, with links resolved.
      done: indices of the input lines whose output is in the file.
      errors: how many of those are errors.
      cut: bytes of a torn last line that were cut off on opening.
    """

    def __init__(self, path: Path, *, settings: Mapping[str, Any], overwrite: bool = False):
        """Opens or creates an output file, and locks it.

        Args:
          settings: JSON values that the results depend on. A file that was begun with other settings is refused.
          overwrite: start afresh, discarding the file's contents.

        Raises:
          StorageError, DoesNotFit: the file cannot be written, or another process is writing it.
          RequestError: the file is not the output of a batch run, or has other settings; names the setting.
          CheckpointError: the file is damaged elsewhere than at its end.
        """
        self.path = path.resolve()
        self.done: set[int] = set()
        self.errors = 0
        self.cut = 0
        self._meta_path = _meta_path(self.path)
        _check_file(self.path, overwrite=overwrite)
        with contextlib.ExitStack() as opened:
            self._meta = opened.enter_context(_open(self._meta_path))
            self._lock()
            self._settle(dict(settings), overwrite)
            self._out = opened.enter_context(_open(self.path))
            self._take_stock()
            opened.pop_all()  # from here on __exit__ closes them

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._meta.close()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds output lines in one write, and returns once they are on disk.

        Raises:
          StorageError, DoesNotFit: they cannot be written; the file is unchanged.
        """
        if not records:
            return
        data = b"".join(map(encode, records))
        start = self._out.seek(0, os.SEEK_END)
        with storage_errors(self.path):
            try:
                view = memoryview(data)
                while view:
                    view = view[self._out.write(view) :]
                os.fsync(self._out.fileno())
            except OSError:
                self._out.truncate(start)
                raise
        for record in records:
            self._note(record)

    def finish(self) -> None:
        """Sorts the lines into the order of the input. The file is replaced atomically.

        Raises:
          StorageError, DoesNotFit: there is no room for the copy; the file stays complete but unsorted.
        """
        places = sorted((index, start, len(raw)) for start, raw, index, _ in self._records())
        if all(a[1] < b[1] for a, b in itertools.pairwise(places)):
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        with storage_errors(temporary):
            try:
                with open(self.path, "rb") as unsorted_file, open(temporary, "wb") as sorted_file:
                    for _, start, size in places:
                        unsorted_file.seek(start)
                        if sorted_file.write(unsorted_file.read(size)) < size:
                            raise OSError(errno.EIO, "the file became shorter while it was read")
                    sorted_file.flush()
                    os.fsync(sorted_file.fileno())
                shutil.copymode(self.path, temporary)
                os.replace(temporary, self.path)
                sync(self.path.parent)
                self._out.close()
                self._out = _open(self.path)
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

    def _lock(self) -> None:
        with storage_errors(self._meta_path):
            try:
                fcntl.flock(self._meta, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise StorageError(
                    f"another process is writing {self.path}", hint="wait for it, or choose another output file"
                ) from error

    def _settle(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Checks the settings against OUT.meta.json, or writes it if there are no results yet."""
        with storage_errors(self.path):
            if overwrite and _size(self.path):
                os.truncate(self.path, 0)
            if not _size(self.path):
                # Settings reach the disk before the first result, so that there are no results without settings.
                self._meta.truncate(0)
                self._meta.seek(0)
                self._meta.write(json.dumps(settings, indent=1, sort_keys=True).encode() + b"\n")
                os.fsync(self._meta.fileno())
                sync(self.path.parent)
                return
            self._meta.seek(0)
            raw = self._meta.read()
        _compare(self.path, raw, settings)

    def _take_stock(self) -> None:
        """Indexes the file's contents, and cuts off a torn end."""
        with storage_errors(self.path):
            size, end = self._out.seek(0, os.SEEK_END), 0
            for start, raw, index, record in self._records():
                if index in self.done:
                    raise CheckpointError(f"{self.path} holds line {index} twice", hint=_FRESH)
                self._note(record)
                end = start + len(raw)
            self.cut = size - end
            if self.cut:
                self._out.truncate(end)
                os.fsync(self._out.fileno())
            sync(self.path.parent)

    def _note(self, record: Mapping[str, Any]) -> None:
        index = index_of(record)
        assert index is not None
        self.done.add(index)
        self.errors += is_error(record)

    def _records(self) -> Iterator[tuple[int, bytes, int, dict[str, Any]]]:
        """Offset, bytes, index and content of every output line, up to a torn end."""
        with open(self.path, "rb") as file:
            start, torn = 0, None
            for number, raw in enumerate(file, 1):
                record = _parse(raw)
                index = None if record is None else index_of(record)
                if record is None or index is None:
                    torn = number if torn is None else torn
                elif torn is not None:
                    # A kill tears only the end.
                    raise CheckpointError(f"line {torn} of {self.path} is damaged", hint=_FRESH)
                else:
                    yield start, raw, index, record
                start += len(raw)


def check_output(path: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Raises the errors of `Journal` without changing anything; `settings` may be incomplete.

    Raises:
      StorageError, RequestError, CheckpointError: as `Journal` does.
    """
    path = path.resolve()
    _check_file(path, overwrite=overwrite)
    if not path.parent.is_dir():
        raise StorageError(f"cannot write {path}: {path.parent} is not a folder", hint="make it, or name another file")
    if not overwrite and _size(path):
        with storage_errors(path):
            raw = _meta_path(path).read_bytes()
        _compare(path, raw, settings, settings)


def _meta_path(path: Path) -> Path:
    return path.with_name(path.name + ".meta.json")


def _check_file(path: Path, *, overwrite: bool) -> None:
    if path.exists() and not path.is_file():
        raise StorageError(f"{path} is not a regular file", hint="give the name of a file, or - for standard output")
    if not overwrite and _size(path) and not _meta_path(path).exists():
        raise RequestError(f"{path} exists and has no {_meta_path(path).name}", param="output", hint=_FRESH)


def _compare(path: Path, raw: bytes, settings: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Compares settings with those that the file was begun with: only these names, or all of both."""
    try:
        before = json.loads(raw)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise CheckpointError(f"{_meta_path(path)} is damaged", hint=_FRESH)
    for name in sorted({*settings, *before} if names is None else names):
        if (now := settings.get(name)) != (then := before.get(name)):
            raise RequestError(
                f"{path} was begun with {name} = {_short(then)}; this run has {_short(now)}",
                param=name,
                hint=f"run with the same settings and input to resume, {_FRESH}",
            )


def _parse(raw: bytes) -> dict[str, Any] | None:
    """Parses an output line; None if it is torn."""
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _open(path: Path) -> FileIO:
    with storage_errors(path):
        return open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
