"""The weights of a Hugging Face folder in the model's form, however they are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_jax.checkpoint.source import SourceTensor
from llama_jax.convert.safetensors_file import DTYPES
from llama_jax.convert.weight_file import WeightFile, blocks, same_tensor, source_tensor
from llama_jax.errors import CheckpointError, UnsupportedModel

MISMATCH = "config.json and the weights do not belong together, or the download is incomplete"


class Weight(Protocol):
    """One weight: known to exist, not read yet.

    Attributes:
      path: the file that holds it.
      name: its name there.
      dtype: what `read_into` gives.
    """

    path: Path
    name: str

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def stored(self) -> Sequence[SourceTensor]:
        """The tensors that hold it."""
        ...

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises CheckpointError unless it has this shape, UnsupportedModel if its dtype is not supported."""
        ...

    def read_into(self, out: np.ndarray, *, expert: int | None = None, row: int = 0) -> None:
        """Fills `out` with rows from `row` on: of the weight, or of one expert's matrix of a stack [expert, ...]."""
        ...


class PlainWeight:
    """A tensor of floats; see `Weight`."""

    def __init__(self, file: WeightFile, name: str):
        self.path = file.path
        self.name = name
        self.file = file
        self.entry = file.entries[name]

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.entry.dtype]

    @property
    def stored(self) -> Sequence[SourceTensor]:
        return [source_tensor(self.file, self.name)]

    def check(self, shape: tuple[int, ...]) -> None:
        if self.entry.dtype not in DTYPES:
            raise UnsupportedModel(
                f"{self.path}: tensor {self.name} has dtype {self.entry.dtype}",
                hint=f"supported: {', '.join(DTYPES)}; of quantised weights config.json has to say how",
            )
        if self.entry.shape != shape:
            raise CheckpointError(
                f"{self.path}: tensor {self.name} has shape {list(self.entry.shape)}, "
                f"config.json asks for {list(shape)}",
                hint=MISMATCH,
            )

    def read_into(self, out: np.ndarray, *, expert: int | None = None, row: int = 0) -> None:
        matrix = self.entry.shape if expert is None else self.entry.shape[1:]
        skip = (expert or 0) * math.prod(matrix) + row * math.prod(matrix[1:])
        self.file.read_into(self.name, out, skip * out.itemsize)

    def equals(self, other: PlainWeight) -> bool:
        """Returns whether both hold the same bytes, dtype and shape."""
        return same_tensor(self.file, self.name, other.file, other.name)

    def all_zero(self) -> bool:
        """Returns whether every byte is 0."""
        return not any(block.any() for block in blocks(self.file, self.name))
