"""The input of a batch run, read several times, from a file or standard input."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llama_jax.errors import RequestError

STANDARD = Path("-")
"""Standard input, or standard output."""
_HINT = "give a file of JSON lines, or - for standard input"


class Source:
    """An open input.

    Attributes:
      indices: number, from 0, of every line that is not empty.
      digest: of all bytes.
    """

    def __init__(self, path: Path):
        """Opens a file, or spools all of standard input for "-", and reads it once.

        Raises:
          RequestError: it cannot be read.
        """
        self._path = path
        self._file = _spooled() if path == STANDARD else _open(path)
        self._state = self._now()
        digest = hashlib.sha256()
        self.indices = []
        for index, raw in enumerate(self._raw()):
            digest.update(raw)
            if raw.strip():
                self.indices.append(index)
        self.digest = f"sha256:{digest.hexdigest()}"

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yields number and bytes of every line that is not empty. Only one iteration at a time.

        Raises:
          RequestError: the file has changed since it was opened, or cannot be read any more.
        """
        for index, raw in enumerate(self._raw()):
            if raw.strip():
                yield index, raw
            if not index % 1024:
                self._check()
        self._check()

    def _raw(self) -> Iterator[bytes]:
        self._file.seek(0)
        try:
            yield from self._file
        except OSError as error:
            raise RequestError(f"cannot read {self._path}: {error.strerror}", param="input", hint=_HINT) from error

    def _check(self) -> None:
        if self._now() != self._state:
            raise RequestError(
                f"{self._path} has changed since the run began", param="input", hint="run again, with --overwrite"
            )

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns


def _open(path: Path) -> BinaryIO:
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} is not a regular file", param="input", hint=_HINT)
    try:
        return open(path, "rb")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}", param="input", hint=_HINT) from error


def _spooled() -> BinaryIO:
    """All of standard input in an unnamed temporary file, since it is read more than once."""
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(tempfile.TemporaryFile())
        try:
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.flush()
        except OSError as error:
            raise RequestError(
                f"cannot take in standard input: {error.strerror}", param="input", hint="TMPDIR names another folder"
            ) from error
        opened.pop_all()
    return file
