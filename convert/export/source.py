"""Parts that both exports share: their report, and a checkpoint's small files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.checkpoint_source import CheckpointSource
from llama_jax.checkpoint.format import DAMAGED, Checkpoint, digest
from llama_jax.convert.quantizing import DequantizedSource
from llama_jax.errors import CheckpointError, UnsupportedModel
from llama_jax.params import ParamSpec, param_specs, stored_as
from llama_jax.quantized import Layout, layout_named, stored_layout


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
      path: the folder or file.
      files: names of the files, in the order of their names; the file's own for a single one.
      tensors, bytes: how many tensors there are, and the size of their data.
      dtype: of most of the weights, as the format calls it.
      notes: sentences about what other programs will do differently, empty if nothing.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int
    bytes: int
    dtype: str
    notes: tuple[str, ...] = ()


class PlainSource:
    """A checkpoint to export: all of its weights are plain, quantised ones are decoded.

    Args:
      decoded: numpy name of the dtype that these are decoded to; that of the checkpoint when None.

    Attributes:
      checkpoint: its metadata.
      stored: its leaves as they are.
      config: without schemes.
      specs: its leaves, in the order of the forward pass.
      nbytes: of the leaves as they are read.

    Raises:
      UnsupportedModel: a scheme of another package stores weights. Others as `CheckpointSource`.
    """

    def __init__(self, path: str | Path, decoded: str | None = None):
        self.stored = source = CheckpointSource(path)
        self.checkpoint = source.checkpoint
        self._schemes = dict(source.config.schemes)
        if others := sorted({name for _, name in source.config.schemes if stored_layout(name) is None}):
            raise UnsupportedModel(
                f"{source.path} stores weights by {', '.join(others)}, which no other format knows",
                hint="export the checkpoint that it was made from",
            )
        plain = DequantizedSource(source, decoded or self.checkpoint.dtype)
        self.config, self.specs = plain.config, param_specs(plain.config)
        self.read, self.dtype = plain.read, plain.dtype
        self.nbytes = sum(spec.size * plain.dtype(spec).itemsize for spec in self.specs)

    def layout(self, spec: ParamSpec) -> Layout | None:
        """The layout that stores a leaf; None of a plain one, and of columns in another order."""
        return layout_named(self._schemes.get(spec.leaf, "")) if spec.path[-1] == "weight" else None

    def members(self, spec: ParamSpec) -> dict[str, np.ndarray]:
        """The members of a leaf that a scheme stores, by name."""
        return {member.path[-1]: self.stored.read(member) for member in stored_as(spec, self._schemes)}


def checked_files(checkpoint: Checkpoint, wanted: re.Pattern[str]) -> dict[str, bytes]:
    """The small files beside a checkpoint's tensors whose names match, their digests checked.

    Raises:
      CheckpointError: a file is missing or damaged; names it.
    """
    found = {}
    for name, expected in sorted(checkpoint.file_digests.items()):
        if not wanted.fullmatch(name):
            continue
        path = checkpoint.path / name
        try:
            found[name] = path.read_bytes()
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read: {e.strerror}", hint=DAMAGED) from e
        if digest(found[name]) != expected:
            raise CheckpointError(f"{path} has digest {digest(found[name])}, expected {expected}", hint=DAMAGED)
    return found
