"""What conversion asks of a source format, and checks that all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        """Reads one leaf in its canonical shape. May be called from several threads at once."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class RowSource(Protocol):
    """A source that can read some rows of a leaf, where the leaf stands in its file as it is."""

    def read_rows(self, spec: ParamSpec, start: int, out: np.ndarray) -> bool:
        """Fills `out` [rows, ...] with the rows from `start` on; False, and nothing read, if only `read` can do it.

        The answer is the same for all rows of a leaf. May be called from several threads at once.
        """
        ...


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names of a set, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


_FINITE_BLOCK = 4 << 20


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
    """Raises CheckpointError with the tensor's name and the count if any element is NaN or infinite."""
    refuse_nonfinite(name, count_nonfinite(array), array.size, path)


def refuse_nonfinite(name: str, bad: int, size: int, path: Path) -> None:
    """Raises CheckpointError if `bad` of `size` elements of a tensor are NaN or infinite."""
    if bad:
        raise CheckpointError(
            f"{path}: tensor {name} holds {bad} values that are NaN or infinite (of {size})",
            hint="the source is damaged; if the values are meant, convert it with --allow-nonfinite",
        )
