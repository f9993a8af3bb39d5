"""What the readers of weight files share: their interface, the dtypes of weights, and reading bytes at a place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_jax.checkpoint.source import SourceTensor
from llama_jax.errors import CheckpointError

DAMAGED = "the file is damaged or was not downloaded completely; get it again"


class WeightEntry(Protocol):
    """One tensor of a file: safetensors' name of its dtype, its shape, where it begins, and its size in bytes."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class WeightFile(Protocol):
    """An open file of named tensors, none of which has been read: `SafetensorsFile` or `TorchFile`."""

    path: Path

    @property
    def entries(self) -> Mapping[str, WeightEntry]: ...

    def read_into(self, name: str, out: np.ndarray, skip: int = 0) -> None:
        """Fills a C-contiguous array with bytes of a tensor (in C order), from `skip` bytes behind its beginning on.

        Raises:
          CheckpointError: the file ends too early or cannot be read.
        """
        ...

    def close(self) -> None: ...


def source_tensor(file: WeightFile, name: str) -> SourceTensor:
    """A tensor of an opened file of weights."""
    entry = file.entries[name]
    return SourceTensor(name, file.path, entry.offset, entry.nbytes)


def open_file(path: Path) -> int:
    """A descriptor for reading; CheckpointError if there is none to be had."""
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
            raise CheckpointError(f"{path}: cannot read {what}: {e.strerror}", hint=DAMAGED) from e
        if n == 0:
            raise CheckpointError(f"{path}: the file ends within {what}", hint=DAMAGED)
        done += n


def same_tensor(a: WeightFile, a_name: str, b: WeightFile, b_name: str, block: int = 16 << 20) -> bool:
    """Whether two tensors are equal, bit for bit; reads them in blocks, unless they are one place in one file."""
    x, y = a.entries[a_name], b.entries[b_name]
    if a is b and x == y:
        return True
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    for start in range(0, x.nbytes, block):
        p, q = (np.empty(min(block, x.nbytes - start), np.uint8) for _ in range(2))
        a.read_into(a_name, p, start)
        b.read_into(b_name, q, start)
        if not np.array_equal(p, q):
            return False
    return True
