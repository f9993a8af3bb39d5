"""sha256 of source files while they are converted: right behind the reader, where the bytes are still in memory."""

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
    """Hashes files on a thread of its own; a context manager.

    Args:
      files: all files, in the order in which they will be read.
      known: sha256 in hexadecimal of files that need not be read again.
      keep: False takes what has been hashed out of the system's memory.
    """

    def __init__(self, files: Sequence[Path], known: Mapping[Path, str] | None = None, *, keep: bool = True):
        self._files = files
        self.keep = keep
        self._done = dict(known or {})
        self._open: dict[Path, _Hash] = {}
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
            opened.close()

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
                if file not in self._open:
                    self._open[file] = _Hash(file)
                if self._open[file].advance(end, self):
                    self._done[file] = self._open[file].hexdigest()
                    self._open.pop(file).close()
            except OSError as e:
                self._failure = CheckpointError(
                    f"cannot read {file}: {e.strerror}", hint="check that it is there and readable"
                )
                self._failure.__cause__ = e

    @property
    def stopped(self) -> bool:
        """Whether nobody wants the rest."""
        return self._stopped


class _Hash:
    """One file, hashed up to some byte."""

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._fd).st_size
        self._position = 0
        self._hash = hashlib.sha256()
        self._buffer = bytearray(_BLOCK_BYTES)

    def advance(self, end: int | None, owner: FileHashes) -> bool:
        """Goes on to byte `end` (the end of the file when None); returns whether that was the last one."""
        view, end, start = memoryview(self._buffer), self._size if end is None else min(end, self._size), self._position
        while self._position < end and not owner.stopped:
            n = os.preadv(self._fd, [view[: min(_BLOCK_BYTES, end - self._position)]], self._position)
            if n == 0:
                raise OSError(0, "it has become shorter")
            self._hash.update(view[:n])
            self._position += n
        if not owner.keep:
            forget(self._fd, start, self._position - start)
        return self._position == self._size

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        os.close(self._fd)
