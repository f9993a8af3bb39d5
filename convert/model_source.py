"""What conversion asks of a source format, and checks that all of them share."""

from __future__ import annotations

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


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names of a set, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


_FINITE_BLOCK = 1 << 17
"""Elements that are looked at together: they and what is made of them stay in the processor's cache."""


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
    """Raises CheckpointError with the tensor's name and the count if any element is NaN or infinite."""
    if bad := count_nonfinite(array):
        raise CheckpointError(
            f"{path}: tensor {name} holds {bad} values that are NaN or infinite (of {array.size})",
            hint="the source is damaged; if the values are meant, pass --allow-nonfinite",
        )
