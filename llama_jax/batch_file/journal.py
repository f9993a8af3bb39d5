"""The output of a batch run on disk: locked, appended batch by batch, and whole again after a kill at any moment.

While a run lasts, OUT grows by whole batches, each written and synced at once. OUT.meta.json says which run it belongs
to and is what a running process locks. A kill leaves at most one torn line at the end, which the next run cuts off.
When every line is there, OUT is put into the order of the input.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llama_jax.errors import CheckpointError, DoesNotFit, LlamaJaxError, RequestError, StorageError

_FRESH = "choose another output file, or start afresh with --overwrite"


class Journal:
    """The open output of one run; a context manager that gives the lock back.

    Attributes:
      path: the output file, links followed.
      done: indices of the input lines whose output stands in the file.
      errors: how many of those are errors.
      cut: bytes of a torn last line that were cut off on opening.
    """

    def __init__(self, path: Path, *, settings: Mapping[str, Any], overwrite: bool = False):
        """Opens an output file, or creates it, and locks it.

        Args:
          settings: what the results depend on, JSON values. A file that was begun with others is refused.
          overwrite: start afresh, whatever the file holds.

        Raises:
          StorageError, DoesNotFit: the file cannot be written, or another process is writing it.
          RequestError: the file is no output of a batch run, or one with other settings; names the setting.
          CheckpointError: the file is damaged somewhere else than at its end.
        """
        self.path = path.resolve()
        self.done: set[int] = set()
        self.errors = 0
        self.cut = 0
        self._meta_path = self.path.with_name(self.path.name + ".meta.json")
        if self.path.exists() and not self.path.is_file():
            raise StorageError(f"{path} is not a regular file", hint="give the name of a file for the output")
        if not overwrite and _size(self.path) and not self._meta_path.exists():
            raise RequestError(f"{path} exists and has no {self._meta_path.name}", param="output", hint=_FRESH)
        try:
            self._meta = open(os.open(self._meta_path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _storage_error(self._meta_path, error) from error
        try:
            self._lock()
            self._settle(dict(settings), overwrite)
            self._out = self._open_file()
        except BaseException:
            self._meta.close()
            raise
        try:
            self._take_stock()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.close()
        self._meta.close()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds output lines, all at once, and returns when they are on the disk.

        Raises:
          StorageError, DoesNotFit: they cannot be written; the file is as it was before.
        """
        if not records:
            return
        data = b"".join(map(_line, records))
        start = self._out.seek(0, os.SEEK_END)
        try:
            view = memoryview(data)
            while view:
                view = view[self._out.write(view) :]
            os.fsync(self._out.fileno())
        except OSError as error:
            self._out.truncate(start)
            raise _storage_error(self.path, error) from error
        for record in records:
            self.done.add(record["index"])
            self.errors += "error" in record

    def sort(self) -> None:
        """Puts the lines into the order of the input. The file is replaced in one step, or not at all.

        Raises:
          StorageError, DoesNotFit: there is no room for the copy; the file stays complete, but unsorted.
        """
        places = sorted((record["index"], start, len(raw)) for start, raw, record in self._records())
        if all(a[1] < b[1] for a, b in itertools.pairwise(places)):
            return
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            with open(temporary, "wb") as sorted_file:
                for _, start, size in places:
                    self._out.seek(start)
                    sorted_file.write(_read(self._out, size))
                sorted_file.flush()
                os.fsync(sorted_file.fileno())
            shutil.copymode(self.path, temporary)
            os.replace(temporary, self.path)
            _sync_folder(self.path.parent)
            self._out.close()
            self._out = self._open_file()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _storage_error(temporary, error) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._meta, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise StorageError(
                    f"another process is writing {self.path}", hint="wait for it, or choose another output file"
                ) from error
            raise _storage_error(self._meta_path, error) from error

    def _settle(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Agrees with what OUT.meta.json says, or writes it if there are no results yet."""
        try:
            if overwrite and _size(self.path):
                os.truncate(self.path, 0)
            if not _size(self.path):
                # Settings are on the disk before the first result is: results without settings cannot come about.
                self._meta.truncate(0)
                self._meta.seek(0)
                self._meta.write(json.dumps(settings, indent=1, sort_keys=True).encode() + b"\n")
                os.fsync(self._meta.fileno())
                _sync_folder(self.path.parent)
                return
            self._meta.seek(0)
            raw = self._meta.read()
        except OSError as error:
            raise _storage_error(self.path, error) from error
        try:
            before = json.loads(raw)
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise CheckpointError(f"{self._meta_path} is damaged", hint=_FRESH)
        for name in sorted({*settings, *before}):
            if (now := settings.get(name)) != (then := before.get(name)):
                raise RequestError(
                    f"{self.path} was begun with {name} = {_short(then)}; this run has {_short(now)}",
                    param=name,
                    hint=f"run with the same settings and input to go on, {_FRESH}",
                )

    def _open_file(self) -> FileIO:
        try:
            return open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise _storage_error(self.path, error) from error

    def _take_stock(self) -> None:
        """Notes what stands in the file, and cuts off a torn end."""
        try:
            size, end = self._out.seek(0, os.SEEK_END), 0
            for start, raw, record in self._records():
                if record["index"] in self.done:
                    raise CheckpointError(f"{self.path} holds line {record['index']} twice", hint=_FRESH)
                self.done.add(record["index"])
                self.errors += "error" in record
                end = start + len(raw)
            self.cut = size - end
            if self.cut:
                self._out.truncate(end)
                os.fsync(self._out.fileno())
            _sync_folder(self.path.parent)
        except OSError as error:
            raise _storage_error(self.path, error) from error

    def _records(self) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """Offset, bytes and content of every output line, up to a torn end."""
        with open(self.path, "rb") as file:
            start, torn = 0, None
            for number, raw in enumerate(file, 1):
                record = _parse(raw)
                if record is None:
                    torn = number if torn is None else torn
                elif torn is not None:
                    # A kill tears the end only.
                    raise CheckpointError(f"line {torn} of {self.path} is damaged", hint=_FRESH)
                else:
                    yield start, raw, record
                start += len(raw)


def _line(record: Mapping[str, Any]) -> bytes:
    # A lone surrogate, as an "id" may hold, becomes the JSON escape that it was in the input.
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _parse(raw: bytes) -> dict[str, Any] | None:
    """An output line, None if it is torn."""
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("index")) is int else None


def _read(file: FileIO, size: int) -> bytes:
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        data += more
    return data


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _storage_error(path: Path, error: OSError) -> LlamaJaxError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFit(
            f"no space left for {path}", hint="free some space and run again: the run goes on where it was"
        )
    return StorageError(f"cannot write {path}: {error.strerror}", hint="check the folder and its permissions")
