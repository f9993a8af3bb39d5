"""Reads tensors of a checkpoint into host memory, and checks them all.

The bytes are read from the files that Orbax wrote, without Orbax (see `array_store`). Buffers are aligned to 64 bytes,
so that XLA on the CPU uses them in place.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ml_dtypes  # noqa: F401
import numpy as np
import tensorstore as ts

from llama_jax.checkpoint import lock
from llama_jax.checkpoint.array_store import ChunkedArray, open_arrays
from llama_jax.checkpoint.format import DAMAGED, Progress, TensorInfo, digest, open_checkpoint
from llama_jax.errors import CheckpointError

ALIGNMENT = 64
"""Bytes; what XLA's CPU client asks of a buffer that it is to use without a copy."""
IN_FLIGHT_BYTES = 1 << 30
"""Host memory for tensors that are being read at one time (a larger tensor is read alone)."""


class Stored(Protocol):
    """Tensors in one array store on disk: an opened checkpoint, or a part of an unfinished one."""

    @property
    def arrays_path(self) -> Path:
        """The OCDBT store that holds the arrays."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Dotted name to shape, dtype and digest."""
        ...


class TensorReader:
    """Reads tensors of an opened checkpoint, whole or row by row; may be used from several threads."""

    def __init__(self, checkpoint: Stored):
        self._checkpoint = checkpoint
        # Every tensor is read once, so a cache would only hold memory.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})

    @functools.cached_property
    def _arrays(self) -> dict[str, ChunkedArray]:
        return open_arrays(self._checkpoint.arrays_path.absolute())

    def read(self, name: str, *, check: bool = True) -> np.ndarray:
        """Reads one tensor.

        Args:
          name: dotted name.
          check: whether to compare its digest.

        Returns:
          An array in the dtype on disk, C-contiguous and aligned.

        Raises:
          CheckpointError: it cannot be read, or shape, dtype or digest differ; names the tensor.
        """
        self._find(name)  # before memory of the announced size is taken
        array = empty_aligned(self._checkpoint.tensors[name])
        self.read_rows(name, 0, array)
        if check:
            self.check(name, digest(array.reshape(-1).view(np.uint8)))
        return array

    def read_rows(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out` [rows, ...], C-contiguous and of the dtype on disk, with the rows from `start` on.

        Raises:
          CheckpointError: they cannot be read, or shape or dtype differ; names the tensor.
        """
        array = self._find(name)
        try:
            if array.chunks is not None:
                array.read_rows(start, out)
            else:
                # Compressed, which this program never writes: chunk by chunk through the library.
                ts.array(out).write(self._open(name)[start : start + len(out)]).result()
        except (ValueError, OSError) as e:
            raise self._unreadable(name, _first_line(e)) from e

    def _find(self, name: str) -> ChunkedArray:
        """The location of a tensor, if the store has it in the shape and dtype of the checkpoint's list."""
        info = self._checkpoint.tensors[name]
        try:
            array = self._arrays.get(name)
        except (ValueError, OSError) as e:
            raise self._unreadable(name, _first_line(e)) from e
        if array is None:
            raise self._unreadable(name, "it is missing")
        if array.shape != info.shape or array.dtype != info.dtype:
            raise CheckpointError(
                f"{self._where(name)} is {array.dtype}{list(array.shape)}, "
                f"the checkpoint's list of tensors says {info.dtype}{list(info.shape)}",
                hint=DAMAGED,
            )
        return array

    def check(self, name: str, found: str) -> None:
        """Raises CheckpointError unless `found` is the digest of the tensor."""
        expected = self._checkpoint.tensors[name].digest
        if found != expected:
            raise CheckpointError(f"{self._where(name)} has digest {found}, expected {expected}", hint=DAMAGED)

    def _unreadable(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self._where(name)} cannot be read ({why})", hint=DAMAGED)

    def _where(self, name: str) -> str:
        return f"{self._checkpoint.arrays_path}: tensor {name}"

    def _open(self, name: str) -> ts.TensorStore:
        base = self._checkpoint.arrays_path.absolute()
        spec = {
            "driver": "zarr3",
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{base}/"},
                "path": f"{name}/",
            },
            # A tensor whose data is missing must not read as zeros.
            "fill_missing_data_reads": False,
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }
        return ts.open(spec, context=self._context, open=True, read=True).result()


def _first_line(e: BaseException) -> str:
    return str(e).splitlines()[0][:300] if str(e) else type(e).__name__


def empty_aligned(info: TensorInfo) -> np.ndarray:
    """An uninitialised array whose address is a multiple of ALIGNMENT."""
    raw = np.empty(info.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    # The names of small floats are known to numpy once ml_dtypes is imported.
    return raw[start : start + info.nbytes].view(np.dtype(info.dtype)).reshape(info.shape)


class Budget:
    """Admits work while its bytes are within a limit; one piece of work is always admitted."""

    def __init__(self, limit: int):
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    def take(self, n: int) -> None:
        """Waits until n more bytes are within the limit."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + n <= self._limit)
            self._used += n

    def give_back(self, n: int) -> None:
        """Releases what `take` acquired."""
        with self._changed:
            self._used -= n
            self._changed.notify_all()

    @contextmanager
    def hold(self, n: int) -> Iterator[None]:
        """Holds n bytes for the duration of a block."""
        self.take(n)
        try:
            yield
        finally:
            self.give_back(n)


def for_each_tensor[T](
    tensors: Mapping[str, TensorInfo],
    names: Sequence[str],
    work: Callable[[str], T],
    progress: Progress | None = None,
    held: Callable[[str], int] | None = None,
) -> list[T]:
    """Runs `work` for every tensor on a few threads, within IN_FLIGHT_BYTES; returns the results in order.

    `progress` is called from this thread alone. `held` tells how many bytes of the host's memory the work on a tensor
    takes; the tensor's size when None.
    """
    budget = Budget(IN_FLIGHT_BYTES)

    def one(name: str) -> T:
        with budget.hold(held(name) if held else tensors[name].nbytes):
            return work(name)

    total, done, results = sum(tensors[n].nbytes for n in names), 0, []
    # Reading, hashing and copying all release the interpreter lock; more threads than cores gain nothing.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for name, result in zip(names, pool.map(one, names), strict=True):
            results.append(result)
            done += tensors[name].nbytes
            if progress:
                progress(done, total, name)
    finally:
        pool.shutdown(cancel_futures=True)
    return results


@dataclass(frozen=True)
class VerifyReport:
    """The findings of `verify`.

    Attributes:
      tensors, bytes: how many tensors were read, and their size.
      failures: one sentence for each tensor or file that is damaged.
    """

    path: Path
    tensors: int
    bytes: int
    failures: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.failures


def verify(path: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Reads every tensor and every small file of a checkpoint and compares their digests with those that it records.

    They are in three places, which must agree: the array store's metadata, llama_jax.json and model.lock.json.

    Args:
      path: checkpoint folder.
      progress: called after each tensor.

    Returns:
      A report that names all that is damaged, not only the first.

    Raises:
      CheckpointError: the folder cannot be opened as a checkpoint at all.
    """
    checkpoint = open_checkpoint(path)
    reader = TensorReader(checkpoint)

    def check(name: str) -> str | None:
        try:
            reader.read(name)
        except CheckpointError as e:
            return e.message
        return None

    names = list(checkpoint.tensors)
    failures = [f for f in for_each_tensor(checkpoint.tensors, names, check, progress) if f]
    failures += lock.failures(checkpoint)
    return VerifyReport(checkpoint.path, len(names), checkpoint.nbytes, tuple(failures))
