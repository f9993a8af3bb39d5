"""Reading the leaves of a source: in the order of its files, checked, cast, and ahead of whoever uses them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from llama_jax.checkpoint.format import digest
from llama_jax.checkpoint.read import Budget
from llama_jax.checkpoint.source import ModelSource, provenance
from llama_jax.checkpoint.values import check_finite, is_matrix, is_zero
from llama_jax.convert.casting import cast
from llama_jax.convert.file_hashes import FileHashes
from llama_jax.params import ParamSpec
from llama_jax.schemes import PLAIN

AHEAD_BYTES = 768 << 20
"""Host memory for leaves that have been read and are not used yet, those in use included (a larger leaf is alone)."""


@dataclass(frozen=True)
class Leaf:
    """One leaf, as it will be stored.

    Attributes:
      source_digest: of the values before any cast.
      zero: whether it is a matrix of zeros.
    """

    spec: ParamSpec
    array: np.ndarray
    source_digest: str
    zero: bool


def in_file_order(model: ModelSource, specs: Sequence[ParamSpec]) -> list[ParamSpec]:
    """The leaves in the order in which a disk reads them best; unknown ones last, in their own order."""

    def place(spec: ParamSpec) -> tuple[bool, str, int]:
        tensors = provenance(model, spec)
        return (False, str(tensors[0].file), tensors[0].offset) if tensors else (True, "", 0)

    return sorted(specs, key=place)


def stored_dtype(model: ModelSource, spec: ParamSpec, dtype: np.dtype | None) -> np.dtype:
    """Return the dtype that a leaf is stored in: `dtype` if that is given and the leaf is plain, else its own."""
    return model.dtype(spec) if dtype is None or spec.scheme != PLAIN.name else dtype


def memory(model: ModelSource, spec: ParamSpec, dtype: np.dtype | None) -> int:
    """Bytes of host memory that reading a leaf takes: the data read and, if it is cast, the result."""
    found, stored = model.dtype(spec), stored_dtype(model, spec, dtype)
    return spec.size * (found.itemsize + (stored.itemsize if stored != found else 0))


def read_leaf(
    model: ModelSource, spec: ParamSpec, dtype: np.dtype | None, *, allow_nonfinite: bool, hashes: FileHashes
) -> Leaf:
    """Reads one leaf and casts it to `dtype`, if given and it is plain.

    Args:
      hashes: told how far the source's files have been read.

    Raises:
      CheckpointError: it cannot be read, holds NaN or infinity, or values that are too large for the dtype.
    """
    array = np.ascontiguousarray(model.read(spec))
    for tensor in provenance(model, spec):
        hashes.follow(tensor.file, tensor.offset + tensor.nbytes)
    if not allow_nonfinite:
        check_finite(spec.name, array, model.path)
    zero = is_matrix(spec) and is_zero(array)
    found = digest(array.reshape(-1).view(np.uint8))
    array = cast(spec.name, array, stored_dtype(model, spec, dtype), model.path, allow_nonfinite=allow_nonfinite)
    return Leaf(spec, array, found, zero)


@contextmanager
def read_ahead[T, R](
    batches: Sequence[Sequence[T]], read: Callable[[T], R], size: Callable[[T], int], limit: int
) -> Iterator[Iterator[list[R]]]:
    """Reads on a thread while the caller works on what has been read.

    Args:
      batches: what to read.
      read: reads one item.
      size: bytes of host memory that an item takes.
      limit: bytes that may be read and not used up yet; a larger item is read when nothing else is held.

    Yields:
      An iterator of the batches' results. A batch counts as consumed when the next one is requested; its list is
      emptied then. An error of `read` is raised there.
    """
    budget, ready = Budget(limit), queue.SimpleQueue[list[R] | BaseException | None]()
    stop = threading.Event()

    def run() -> None:
        try:
            for batch in batches:
                results = []
                for item in batch:
                    budget.take(size(item))
                    if stop.is_set():
                        return
                    results.append(read(item))
                ready.put(results)
                del results
            ready.put(None)
        except BaseException as e:
            ready.put(e)

    def results() -> Iterator[list[R]]:
        for batch in batches:
            found = ready.get()
            if isinstance(found, BaseException):
                raise found
            assert found is not None
            yield found
            found.clear()
            budget.give_back(sum(map(size, batch)))

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield results()
    finally:
        stop.set()
        # Whatever it waits for is there now.
        budget.give_back(sum(size(item) for batch in batches for item in batch))
        thread.join()
