"""What conversion asks of a source format, and checks that all of them share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.format import Source
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError

if TYPE_CHECKING:
    from llama_jax.params import ParamSpec


class ModelSource(Protocol):
    """An opened source model: all of its tensors are known to be there and of the right shape, none has been read."""

    path: Path
    config: LlamaConfig
    source: Source

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """Contents of generation_config.json, empty if unknown."""
        ...

    @property
    def files(self) -> Mapping[str, bytes | str]:
        """Small files that go beside the tensors: tokenizer, chat template, licence."""
        ...

    def dtype(self, spec: ParamSpec) -> np.dtype:
        """Dtype in which `read` will return this leaf."""
        ...

    def read(self, spec: ParamSpec) -> np.ndarray:
        """Reads one leaf in its canonical shape."""
        ...

    def close(self) -> None: ...


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES_BY_NAME: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}
"""What a `LlamaConfig.dtype` may be."""


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names of a set, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


_FINITE_BLOCK = 4 << 20
_SAMPLE = 1 << 14


def count_nonfinite(array: np.ndarray) -> int:
    """How many elements are NaN or infinite: those whose exponent bits are all ones. Needs 32 MiB at most."""
    bits, mask = {
        "float32": (np.uint32, 0x7F800000),
        "bfloat16": (np.uint16, 0x7F80),
        "float16": (np.uint16, 0x7C00),
    }[array.dtype.name]
    flat = np.ascontiguousarray(array).reshape(-1).view(bits)
    return sum(
        int(np.count_nonzero((flat[i : i + _FINITE_BLOCK] & bits(mask)) == mask))
        for i in range(0, flat.size, _FINITE_BLOCK)
    )


def check_finite(name: str, array: np.ndarray, path: Path) -> None:
    """Refuses what only a damaged file holds: NaN, infinity, a matrix of zeros, a tensor of subnormal numbers.

    Raises:
      CheckpointError: names the tensor, and counts.
    """
    if bad := count_nonfinite(array):
        what = f"{bad} values that are NaN or infinite (of {array.size})"
    elif array.ndim > 1 and not array.any():
        what = f"nothing but zeros ({array.size} of them)"
    elif 2 * (few := _count_subnormal(array)) > array.size:
        what = f"{few} subnormal values (of {array.size}), far too small for weights"
    else:
        return
    raise CheckpointError(
        f"{path}: tensor {name} holds {what}",
        hint="the source is damaged; if the values are meant, pass --allow-nonfinite",
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


def check_vocabulary(tokenizer_json: bytes | str | None, vocab_size: int, path: Path) -> None:
    """Raises CheckpointError if a tokenizer has more pieces than the model has rows for.

    Tokens that were added to a tokenizer may stand behind the model's vocabulary: of some models they stand for images,
    or for padding. A file that cannot be read is left to those who read tokenizers.
    """
    try:
        vocabulary = json.loads(tokenizer_json or "")["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        largest = max(ids)
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if isinstance(largest, int) and largest >= vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has ids up to {largest}, the model's vocabulary ends at {vocab_size - 1}",
            hint="the tokenizer is that of another model; get the files again",
        )
