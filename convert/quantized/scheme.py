"""Quantisation schemes, and the tensors of one quantised weight."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.wrong_file import AGAIN
from llama_jax.convert.quantized.codes import Codes
from llama_jax.convert.safetensors_file import DTYPES
from llama_jax.convert.weight_file import Entry, WeightFile
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.quantized import Layout, layout_named

FLOATS = ("F32", "BF16", "F16")
_DTYPES: Mapping[str, np.dtype] = {
    **DTYPES,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""The safetensors dtypes that quantised weights are made of."""

DAMAGED = "config.json and the weights do not belong together, or the download is incomplete"


def unsupported(key: str, value: object, supported: str = "") -> UnsupportedModel:
    """The error for a value of quantization_config that changes the weights in an unsupported way."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return UnsupportedModel(
        f"config.json: {key} = {shown} is not supported",
        hint=f"supported: {supported}" if supported else "use the model's bfloat16, float16 or float32 weights",
    )


class PartName(NamedTuple):
    """The meaning of a tensor's name: it is a `part` of the quantised `weight`.

    A tensor that says nothing about weights, such as the scale of an activation, has None for both.
    """

    weight: str | None
    part: str | None


IGNORED = PartName(None, None)
SAME = "weight"
"""The part with the name of the weight itself."""


@dataclass(frozen=True)
class Part:
    """The requirements on one tensor of a quantised weight.

    Attributes:
      dtypes: safetensors names of the dtypes it may have.
      shapes: the shapes it may have.
      optional: whether it may be missing.
      scale: whether its values must be finite.
      nonzero: whether none of them may be 0.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    optional: bool = False
    scale: bool = False
    nonzero: bool = False


class Bundle:
    """The tensors that represent one quantised weight.

    Attributes:
      weight: name that the weight would have if it were not quantised.
      tensors: part to the file that holds it and its name there.
    """

    def __init__(self, weight: str):
        self.weight = weight
        self.tensors: dict[str, tuple[WeightFile, str]] = {}

    @property
    def path(self) -> Path:
        return next(iter(self.tensors.values()))[0].path

    def entry(self, part: str) -> Entry:
        file, name = self.tensors[part]
        return file.entries[name]

    def where(self, part: str) -> str:
        """File and tensor, for messages."""
        file, name = self.tensors[part]
        return f"{file.path}: tensor {name}"

    def read(self, part: str, expert: int | None = None) -> np.ndarray:
        """Reads one tensor, or what it holds (along its first axis) for one expert."""
        entry = self.entry(part)
        shape = entry.shape if expert is None else entry.shape[1:]
        out = np.empty(shape, _DTYPES[entry.dtype])
        file, name = self.tensors[part]
        file.read_into(name, out, (expert or 0) * out.nbytes)
        return out

    def lacks(self, part: str) -> CheckpointError:
        """The error for a tensor that is missing."""
        return CheckpointError(f"{self.path}: quantised weight {self.weight} lacks its tensor {part!r}", hint=DAMAGED)

    def check_groups(self, part: str, index: np.ndarray, count: int) -> None:
        """Raises CheckpointError unless a tensor holds group numbers from 0 to `count` - 1."""
        if index.min() < 0 or index.max() >= count:
            raise CheckpointError(
                f"{self.where(part)} holds groups from {index.min()} to {index.max()}, there are {count}",
                hint=AGAIN,
            )

    def order(self, part: str) -> np.ndarray | None:
        """The order [cols] that makes neighbours of each group's columns, by the tensor that says the group of every
        column. None where they are, as without that tensor, or where it says nothing: -1."""
        index = self.read(part) if part in self.tensors else np.zeros(1)
        return None if (index[1:] >= index[:-1]).all() else np.argsort(index, kind="stable").astype(np.int32)

    def even(self, part: str, group: int) -> bool:
        """Returns whether every group has this many columns, by that tensor."""
        index = self.read(part) if part in self.tensors else np.full(1, -1)
        return bool((index == -1).all() or (np.unique(index, return_counts=True)[1] == group).all())

    def check(self, parts: Mapping[str, Part]) -> None:
        """Compares the tensors with what they must be.

        Raises:
          CheckpointError: one is missing, unknown, or of the wrong dtype or shape; names it.
        """
        for part in self.tensors.keys() - parts.keys():
            raise CheckpointError(
                f"{self.where(part)} has no place in the quantisation that config.json names", hint=DAMAGED
            )
        for part, wanted in parts.items():
            if part not in self.tensors:
                if wanted.optional:
                    continue
                raise self.lacks(part)
            entry = self.entry(part)
            if entry.dtype not in wanted.dtypes:
                raise CheckpointError(
                    f"{self.where(part)} has dtype {entry.dtype}, the quantisation asks for "
                    f"{' or '.join(wanted.dtypes)}",
                    hint=DAMAGED,
                )
            if entry.shape not in wanted.shapes:
                raise CheckpointError(
                    f"{self.where(part)} has shape {list(entry.shape)}, the quantisation in config.json asks for "
                    f"{' or '.join(str(list(shape)) for shape in wanted.shapes)}",
                    hint=DAMAGED,
                )


@dataclass(frozen=True)
class Scheme(ABC):
    """One way of quantising weights, with the parameters of one checkpoint.

    Attributes:
      ignored: modules that config.json names, in full, as not quantised.
      names: of tensors; the first group is the weight that one belongs to, but for `suffix`, the second is its part.
      activations: names of tensors that say nothing about weights.
    """

    ignored: frozenset[str]

    names: ClassVar[re.Pattern[str]]
    suffix: ClassVar[str] = ""
    activations: ClassVar[re.Pattern[str] | None] = None

    @property
    @abstractmethod
    def label(self) -> str:
        """Name and parameters in a few words, for people."""

    def part(self, tensor: str) -> PartName | None:
        """Interprets a tensor's name; None if this scheme has no such name."""
        if found := self.names.fullmatch(tensor):
            return PartName(found[1] + self.suffix, found[2])
        return IGNORED if self.activations and self.activations.fullmatch(tensor) else None

    def ignores(self, module: str) -> bool:
        """Returns whether config.json lists a module, or one that contains it, as not quantised."""
        parts = module.split(".")
        return any(".".join(parts[:n]) in self.ignored for n in range(2, len(parts) + 1))

    @abstractmethod
    def parts(self, bundle: Bundle, shape: tuple[int, ...]) -> Mapping[str, Part]:
        """Requirements on the tensors of a weight of this shape; [expert, rows, cols] where experts are stacked.

        Raises:
          CheckpointError, UnsupportedModel: a small tensor that describes the others is damaged, or asks for more than
            is supported.
        """

    def layout(self, bundle: Bundle, shape: tuple[int, ...]) -> Layout | None:
        """The layout that can hold the codes of a weight unchanged; None if there is none, so that it is decoded.

        Args:
          bundle, shape: as for `parts`, which has been found to agree.
        """
        return None

    def order(self, bundle: Bundle) -> np.ndarray | None:
        """The order in which `layout` stores columns: int32 [cols], of each its place in the weight; None for their
        own."""
        return None

    @abstractmethod
    def codes(self, bundle: Bundle, tensors: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Codes:
        """The codes of one matrix.

        Args:
          bundle: for messages.
          tensors: part to contents, those of one expert where experts are stacked.
          shape: [rows, cols] of the weight.
        """


def grouped(kind: str, group: int | None, columns: int, offset: str | None = None, scales: str = "") -> Layout | None:
    """A layout with groups of this size, if rows divide into them; a group that is a row, or None, is a whole row.

    Args:
      scales: safetensors name of the scales' dtype, which groups keep; "" for float32.
    """
    short = {"F32": "f32", "F16": "f16", "BF16": "bf16", "": "f32"}[scales]
    layout = Layout(kind, group, offset, short) if group not in (None, columns) else Layout(kind, None, offset)
    return layout if layout.fits(columns) and layout_named(layout.name) is not None else None


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
