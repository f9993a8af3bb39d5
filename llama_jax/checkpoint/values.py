"""Checks of tensors' values: those that only a damaged file holds, and those rare enough for a warning."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.format import DTYPES
from llama_jax.checkpoint.source import some
from llama_jax.errors import CheckpointError
from llama_jax.params import ParamSpec
from llama_jax.schemes import PLAIN

_FINITE_BLOCK = 1 << 17
"""Elements that are checked together: they and their intermediate results stay in the processor's cache."""
_SAMPLE = 1 << 14


def count_nonfinite(array: np.ndarray) -> int:
    """Counts NaN and infinite elements: those whose exponent bits are all ones, and in float8_e4m3fn, which has no
    infinity, all bits but the sign. Needs hardly any memory; integers are always finite."""
    exponents_of: Mapping[str, np.unsignedinteger[Any]] = {
        "float32": np.uint32(0x7F800000),
        "bfloat16": np.uint16(0x7F80),
        "float16": np.uint16(0x7C00),
        "float8_e4m3fn": np.uint8(0x7F),
        "float8_e5m2": np.uint8(0x7C),
    }
    if array.dtype.kind in "iu":
        return 0
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
    """Refuses what only a damaged file holds: NaN, infinity, a tensor of subnormal numbers.

    Raises:
      CheckpointError: names the tensor, and counts.
    """
    refuse_nonfinite(name, count_nonfinite(array), array.size, path)
    if array.dtype.name in DTYPES and 2 * (few := _count_subnormal(array)) > array.size:
        raise _unsound(path, f"tensor {name} holds {few} subnormal values (of {array.size}), far too small for weights")


def refuse_nonfinite(name: str, bad: int, size: int, path: Path) -> None:
    """Raises CheckpointError if `bad` of `size` elements of a tensor are NaN or infinite."""
    if bad:
        raise _unsound(path, f"tensor {name} holds {bad} values that are NaN or infinite (of {size})")


def is_matrix(spec: ParamSpec) -> bool:
    """Returns whether a leaf is one of the model's matrices, or represents one, as a scheme's scales do."""
    return len(spec.shape) > 1 if spec.scheme == PLAIN.name else spec.path[-1] == "scales"


def is_zero(array: np.ndarray) -> bool:
    """Returns whether an array of floats is all zeros; for any other it reads only a few numbers."""
    unsigned = np.dtype(f"u{array.itemsize}")
    but_sign = unsigned.type(np.iinfo(unsigned).max >> 1)
    flat = np.ascontiguousarray(array).reshape(-1).view(unsigned)
    return not any((flat[i : i + _FINITE_BLOCK] & but_sign).any() for i in range(0, flat.size, _FINITE_BLOCK))


def zeros_warning(zeros: Collection[str], matrices: int, path: Path, *, refuse: bool = True) -> str | None:
    """A warning about matrices that hold only zeros; None where there are none.

    A few of them are no fault: layers that were inserted into a model (LLaMA Pro, mergekit's passthrough) have an
    output projection of zeros, so that they pass on what they are given until they are trained.

    Args:
      zeros: their names.
      matrices: how many the model has in all.
      refuse: whether to refuse a model most of whose matrices they are.

    Raises:
      CheckpointError: they are most of the model's.
    """
    if not zeros:
        return None
    what = f"{len(zeros)} of {matrices} matrices hold nothing but zeros ({some(zeros)})"
    if refuse and 2 * len(zeros) > matrices:
        raise _unsound(path, what)
    return f"Warning: {path}: {what}, as in layers that were inserted and not trained; else the source is damaged"


def _unsound(path: Path, what: str) -> CheckpointError:
    command = f"llama-jax convert {shlex.quote(str(path))} DST --any-values"
    return CheckpointError(
        f"{path}: {what}",
        hint=f"the source is damaged: get it again; if the values are meant, `{command}` takes them, and DST loads",
    )


def _count_subnormal(array: np.ndarray) -> int:
    """Counts elements smaller than the smallest normal number, but not 0; 0 if a sample shows less than half.

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
