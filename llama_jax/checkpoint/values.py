"""Checks of tensors' values: what only a damaged file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import CheckpointError

_FINITE_BLOCK = 1 << 17
"""Elements that are looked at together: they and what is made of them stay in the processor's cache."""
_SAMPLE = 1 << 14


def count_nonfinite(array: np.ndarray) -> int:
    """How many elements are NaN or infinite: those whose exponent bits are all ones. Needs no memory to speak of."""
    exponents_of: Mapping[str, np.unsignedinteger[Any]] = {
        "float32": np.uint32(0x7F800000),
        "bfloat16": np.uint16(0x7F80),
        "float16": np.uint16(0x7C00),
    }
    mask = exponents_of[array.dtype.name]
    flat = np.ascontiguousarray(array).reshape(-1).view(mask.dtype)
    exponents, found = np.empty(min(flat.size, _FINITE_BLOCK), mask.dtype), 0
    for i in range(0, flat.size, _FINITE_BLOCK):
        block = flat[i : i + _FINITE_BLOCK]
        part = np.bitwise_and(block, mask, out=exponents[: block.size])
        # Nearly always there is none, and a maximum takes half the time of a comparison and a count.
        if part.max() == mask:
            found += int(np.count_nonzero(part == mask))
    return found


def check_finite(name: str, array: np.ndarray, path: Path) -> None:
    """Refuses what only a damaged file holds: NaN, infinity, a matrix of zeros, a tensor of subnormal numbers.

    Raises:
      CheckpointError: names the tensor, and counts.
    """
    refuse_nonfinite(name, count_nonfinite(array), array.size, path)
    if array.ndim > 1 and not array.any():
        raise _unsound(name, f"nothing but zeros ({array.size} of them)", path)
    if 2 * (few := _count_subnormal(array)) > array.size:
        raise _unsound(name, f"{few} subnormal values (of {array.size}), far too small for weights", path)


def refuse_nonfinite(name: str, bad: int, size: int, path: Path) -> None:
    """Raises CheckpointError if `bad` of `size` elements of a tensor are NaN or infinite."""
    if bad:
        raise _unsound(name, f"{bad} values that are NaN or infinite (of {size})", path)


def _unsound(name: str, what: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {name} holds {what}",
        hint="the source is damaged; if the values are meant, convert it with --allow-nonfinite",
    )


def _count_subnormal(array: np.ndarray) -> int:
    """How many elements are smaller than the smallest normal number, but not 0; 0 if a sample shows less than half.

    float16 has too narrow a range for this to say anything.
    """
    if array.dtype == np.float16:
        return 0
    flat = array.reshape(-1)
    smallest = np.float32(2.0**-126)  # of bfloat16 as well

    def count(part: np.ndarray) -> int:
        size = np.abs(part.astype(np.float32))
        return int(np.count_nonzero((size > 0) & (size < smallest)))

    sample = flat[:: max(1, flat.size // _SAMPLE)]
    if 2 * count(sample) <= sample.size:
        return 0
    return sum(count(flat[i : i + _FINITE_BLOCK]) for i in range(0, flat.size, _FINITE_BLOCK))
