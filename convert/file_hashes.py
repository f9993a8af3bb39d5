"""sha256 of source files during a conversion: right behind the reader, while the bytes are still in memory."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from llama_jax.disk import forget
from llama_jax.errors import CheckpointError

_BLOCK_BYTES = 4 << 20


class FileHashes:
    """Hashes files on its own thread; a context manager.

    Args:
      files: all files, in the order in which they will be read.
      known: sha256 in hexadecimal of files that need not be read again.
      keep: False takes what has been hashed out of the system's memory.
    """

    def __init__(self, files: Sequence[Path], known: Mapping[Path, str] | None = None, *, keep: bool = True):
        self._files = files
        self._keep = keep
        self._done = dict(known or {})
        self._open: dict[Path, _Hashed] = {}
        self._buffer = memoryview(bytearray(_BLOCK_BYTES))
        self._wanted: queue.SimpleQueue[tuple[Path, int | None] | None] = queue.SimpleQueue()
        self._failure: CheckpointError | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="file-hashes", daemon=True)

    def __enter__(self) -> FileHashes:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stopped = True
        self._wanted.put(None)
        self._thread.join()
        for opened in self._open.values():
            opened.file.close()

    @property
    def done(self) -> Mapping[Path, str]:
        """The files that have been hashed to their ends."""
        return dict(self._done)

    def follow(self, file: Path, end: int) -> None:
        """Says that `file` has been read up to byte `end`; returns at once."""
        self._wanted.put((file, end))

    def finish(self) -> Mapping[Path, str]:
        """Waits until all files have been hashed.

        Raises:
          CheckpointError: one of them cannot be read.
        """
        for file in self._files:
            self._wanted.put((file, None))
        self._wanted.put(None)
        self._thread.join()
        if self._failure:
            raise self._failure
        return dict(self._done)

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None and not self._stopped and not self._failure:
            file, end = wanted
            if file in self._done:
                continue
            try:
                self._advance(file, end)
            except OSError as e:
                self._failure = CheckpointError(
                    f"cannot read {file}: {e.strerror}", hint="check that it is there and readable"
                )
                self._failure.__cause__ = e

    def _advance(self, path: Path, end: int | None) -> None:
        """Hashes a file up to byte `end`, to its own end when None."""
        if path not in self._open:
            self._open[path] = _Hashed(path)
        hashed = self._open[path]
        end, start = hashed.size if end is None else min(end, hashed.size), hashed.position
        while hashed.position < end and not self._stopped:
            n = hashed.file.readinto(self._buffer[: end - hashed.position])
            if not n:
                raise OSError(0, "it has become shorter")
            hashed.hash.update(self._buffer[:n])
            hashed.position += n
        if not self._keep:
            forget(hashed.file.fileno(), start, hashed.position - start)
        if hashed.position == hashed.size:
            self._done[path] = hashed.hash.hexdigest()
            self._open.pop(path).file.close()


class _Hashed:
    """One open file, hashed up to some byte."""

    def __init__(self, path: Path):
        self.file = path.open("rb", buffering=0)
        self.size = os.fstat(self.file.fileno()).st_size
        self.position = 0
        self.hash = hashlib.sha256()
