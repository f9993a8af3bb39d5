"""Destinations of a batch run's output lines: a file that survives a kill (`journal`), or a stream, in order."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

from llama_jax.batch_file.records import encode, index_of, is_error
from llama_jax.batch_file.storage import storage_errors


class Output(Protocol):
    """Destination of a run's output; a context manager.

    Attributes:
      done: indices of the answered input lines; errors: number of those with an error.
      cut: bytes of a torn line left by an earlier run.
    """

    done: set[int]
    errors: int
    cut: int

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds output lines.

        Raises:
          StorageError, DoesNotFit: they cannot be written.
        """
        ...

    def finish(self) -> None:
        """Called once every line is there."""
        ...


class Stream:
    """Output lines on a stream, such as standard output: each is written once it and all lines before it are there.

    Args:
      indices: of the input lines, in order.
    """

    def __init__(self, stream: BinaryIO, indices: Sequence[int]):
        self.done: set[int] = set()
        self.errors = 0
        self.cut = 0
        self._stream, self._indices = stream, indices
        self._written = 0
        self._waiting: list[tuple[int, bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an interruption: writes what is there, though lines before it are missing.
        if kind is None or not issubclass(kind, OSError):
            self._write(len(self._waiting))

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """See `Output`."""
        for record in records:
            index = index_of(record)
            assert index is not None
            heapq.heappush(self._waiting, (index, encode(record)))
            self.done.add(index)
            self.errors += is_error(record)
        ready = 0
        ordered = sorted(index for index, _ in self._waiting)
        while ready < len(ordered) and ordered[ready] == self._indices[self._written + ready]:
            ready += 1
        self._write(ready)

    def finish(self) -> None:
        """See `Output`."""

    def _write(self, count: int) -> None:
        with storage_errors(Path("standard output")):
            for _ in range(count):
                self._stream.write(heapq.heappop(self._waiting)[1])
                self._written += 1
            self._stream.flush()
