"""Base of the readers of weight files: opens and closes them, and reads bytes at an offset."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from llama_jax.checkpoint.source import SourceTensor
from llama_jax.checkpoint.wrong_file import AGAIN, other_format, read_head, refuse, wrong_file
from llama_jax.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: safetensors' name of its dtype, its shape, where it begins, and its size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class WeightFile(ABC):
    """An open file of named tensors, none of which has been read: `SafetensorsFile` or `TorchFile`.

    Attributes:
      path: the file.
      entries: name to tensor.
      magic: the first bytes of every file of the format, if there are such.

    Raises:
      CheckpointError: the file cannot be opened, is malformed, or is something else; names the file and the tensor.
    """

    entries: Mapping[str, Entry]
    magic: ClassVar[bytes] = b""

    def __init__(self, path: Path):
        self.path = path
        self._fd = open_file(path)
        with closed_on_error(self.close):
            try:
                self.entries = self._parse()
            except CheckpointError as e:
                refuse_other(path, self.magic, e)
                raise

    def close(self) -> None:
        """Closes the file; reading from it afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, name: str, out: np.ndarray, skip: int = 0) -> None:
        """Fills a C-contiguous array with bytes of a tensor (in C order), from byte `skip` of it on.

        Raises:
          CheckpointError: the file ends too early or cannot be read.
        """
        nbytes, flat = self.entries[name].nbytes, out.reshape(-1).view(np.uint8)
        if skip < 0 or skip + len(flat) > nbytes:
            raise ValueError(f"{name}: bytes {skip} to {skip + len(flat)} of {nbytes}")
        self._read(name, flat, skip)

    def _read(self, name: str, flat: np.ndarray, skip: int) -> None:
        read_at(self._fd, memoryview(flat), self.entries[name].offset + skip, self.path, f"tensor {name}")

    def _bad(self, what: str) -> CheckpointError:
        """The error for a file that violates its format."""
        return CheckpointError(f"{self.path}: {what}", hint=AGAIN)

    @abstractmethod
    def _parse(self) -> Mapping[str, Entry]: ...


def refuse_other(path: Path, magic: bytes, cause: BaseException | None = None) -> None:
    """Raises CheckpointError if a file of weights that its parser refuses is something else; says what.

    Args:
      magic: the first bytes of the format that it should be.
    """
    head, size = read_head(path)
    if not (magic and head.startswith(magic)):
        refuse(path, wrong_file(head, size, "binary") or other_format(head), cause)


@contextlib.contextmanager
def closed_on_error(close: Callable[[], object]) -> Iterator[None]:
    """Closes something if the block, which opens the rest of it, fails."""
    try:
        yield
    except BaseException:
        close()
        raise


def source_tensor(file: WeightFile, name: str) -> SourceTensor:
    """A tensor of an opened file of weights."""
    entry = file.entries[name]
    return SourceTensor(name, file.path, entry.offset, entry.nbytes)


def open_file(path: Path) -> int:
    """A descriptor for reading; raises CheckpointError if the file cannot be opened."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as e:
        raise CheckpointError(f"cannot open {path}: {e.strerror}", hint="check that it is there and readable") from e


def read_at(fd: int, view: memoryview, offset: int, path: Path, what: str) -> None:
    """Fills a view of bytes from a place in a file.

    Data is read with `pread` and not mapped, since a file that is cut short while it is mapped kills the process.

    Args:
      path, what: the file and the part of it, for messages.

    Raises:
      CheckpointError: the file ends too early or cannot be read.
    """
    done = 0
    while done < len(view):
        try:
            n = os.preadv(fd, [view[done : done + (1 << 30)]], offset + done)
        except OSError as e:
            raise CheckpointError(f"{path}: cannot read {what}: {e.strerror}", hint=AGAIN) from e
        if n == 0:
            raise CheckpointError(f"{path}: the file ends within {what}", hint=AGAIN)
        done += n


def same_tensor(a: WeightFile, a_name: str, b: WeightFile, b_name: str) -> bool:
    """Returns whether two tensors are bitwise equal; reads them in blocks, unless they are one place in one file."""
    x, y = a.entries[a_name], b.entries[b_name]
    if a is b and x == y:
        return True
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    return all(np.array_equal(p, q) for p, q in zip(blocks(a, a_name), blocks(b, b_name), strict=True))


def blocks(file: WeightFile, name: str, size: int = 16 << 20) -> Iterator[np.ndarray]:
    """The bytes of a tensor, some at a time."""
    nbytes = file.entries[name].nbytes
    for start in range(0, nbytes, size):
        block = np.empty(min(size, nbytes - start), np.uint8)
        file.read_into(name, block, start)
        yield block
