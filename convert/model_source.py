"""What conversion asks of a source format, and checks that all of them share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.format import Source
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError

if TYPE_CHECKING:
    from llama_jax.convert.weight_file import WeightFile
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
        """Reads one leaf in its canonical shape. May be called from several threads at once."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source, and where its bytes stand.

    Attributes:
      name: what the source calls it.
      file: the file that holds it.
      offset, nbytes: its place in the file; of use for reading in the files' order. 0 where that is not known.
    """

    name: str
    file: Path
    offset: int = 0
    nbytes: int = 0


def source_tensor(file: WeightFile, name: str) -> SourceTensor:
    """A tensor of an opened file of weights."""
    entry = file.entries[name]
    return SourceTensor(name, file.path, entry.offset, entry.nbytes)


@runtime_checkable
class HasProvenance(Protocol):
    """A `ModelSource` that knows which tensors of which files a leaf is made from. Every source should."""

    def provenance(self, spec: ParamSpec) -> Sequence[SourceTensor]:
        """The source's tensors that `read` makes this leaf from, in order."""
        ...


_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")


def provenance(model: ModelSource, spec: ParamSpec) -> tuple[SourceTensor, ...]:
    """The source's tensors behind a leaf; empty for a source that does not know."""
    return tuple(model.provenance(spec)) if isinstance(model, HasProvenance) else ()


def weight_files(model: ModelSource, specs: Iterable[ParamSpec]) -> tuple[Path, ...]:
    """The files that hold the weights, sorted. A source that does not know counts with all of its folder."""
    files = {tensor.file for spec in specs for tensor in provenance(model, spec)}
    if not files:
        files = {model.path}
        if model.path.is_dir():
            files = {path for path in model.path.iterdir() if path.suffix in _WEIGHTS and path.is_file()}
    return tuple(sorted(files))


@runtime_checkable
class RowSource(Protocol):
    """A source that can read some rows of a leaf, where the leaf stands in its file as it is."""

    def read_rows(self, spec: ParamSpec, start: int, out: np.ndarray) -> bool:
        """Fills `out` [rows, ...] with the rows from `start` on; False, and nothing read, if only `read` can do it.

        The answer is the same for all rows of a leaf. May be called from several threads at once.
        """
        ...


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
