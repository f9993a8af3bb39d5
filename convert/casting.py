"""Weights in another dtype: rounded to the nearest, never to infinity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.format import DTYPES
from llama_jax.checkpoint.source import BFLOAT16
from llama_jax.checkpoint.values import count_nonfinite
from llama_jax.errors import CheckpointError, RequestError


def storage_dtype(name: str) -> np.dtype:
    """The numpy dtype of a name.

    Raises:
      RequestError: weights are not stored in this dtype.
    """
    if name not in DTYPES:
        raise RequestError(f"dtype {name!r} is not known", param="dtype", hint=f"one of {', '.join(DTYPES)}")
    return BFLOAT16 if name == BFLOAT16.name else np.dtype(name)


_BLOCK_BYTES = 32 << 20


def row_blocks(array: np.ndarray, ways: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Splits a tensor, so that results derived from it are in memory only block by block.

    Args:
      array: [..., columns], C-contiguous.
      ways: number of devices that share a block.

    Yields:
      Number of the block's first row, and the block, [rows, columns], of 32 MiB (or one row) for each device at most.
    """
    rows = array.reshape(-1, array.shape[-1])
    step = ways * max(1, _BLOCK_BYTES // max(1, rows.itemsize * rows.shape[1]))
    for first in range(0, len(rows), step):
        yield first, rows[first : first + step]


def cast(name: str, array: np.ndarray, dtype: np.dtype, path: Path, *, allow_nonfinite: bool = False) -> np.ndarray:
    """Rounds to the nearest; refuses values that the dtype cannot hold (beyond 65504 in float16).

    Raises:
      CheckpointError: names the tensor and counts the values that became infinite.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    overflowed = 0 if allow_nonfinite else count_nonfinite(result)
    if overflowed and (overflowed := overflowed - count_nonfinite(array)):
        raise CheckpointError(
            f"{path}: tensor {name} holds {overflowed} values that are too large for {dtype.name}",
            hint="choose bfloat16 or float32",
        )
    return result
