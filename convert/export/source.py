"""What both exports need of a checkpoint: its tensors, checked against config.json, and its small files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.format import Checkpoint, digest, open_checkpoint
from llama_jax.checkpoint.read import TensorReader
from llama_jax.convert.model_source import some
from llama_jax.errors import CheckpointError
from llama_jax.params import ParamSpec, param_specs

_AGAIN = "the checkpoint is damaged; convert it again, or copy it again from where it came"


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

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


class ExportSource:
    """An opened checkpoint whose tensors are those that its config.json asks for.

    Attributes:
      checkpoint: its metadata.
      specs: its leaves, in the order of the forward pass.

    Raises:
      ModelNotFound, CheckpointError: as `llama_jax.checkpoint.open_checkpoint`; or a tensor is missing, unknown or of
        another shape.
    """

    def __init__(self, path: str | Path):
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.specs: tuple[ParamSpec, ...] = param_specs(self.checkpoint.config)
        self._reader = TensorReader(self.checkpoint)
        found, wanted = self.checkpoint.tensors, {spec.name: spec for spec in self.specs}
        for what, names in (("lacks", wanted.keys() - found.keys()), ("holds unknown", found.keys() - wanted.keys())):
            if names:
                raise CheckpointError(f"{self.checkpoint.path} {what} tensor {some(names)}", hint=_AGAIN)
        for name, spec in wanted.items():
            if found[name].shape != spec.shape:
                raise CheckpointError(
                    f"{self.checkpoint.path}: tensor {name} has shape {list(found[name].shape)}, "
                    f"config.json asks for {list(spec.shape)}",
                    hint=_AGAIN,
                )

    def dtype(self, spec: ParamSpec) -> str:
        """Name of a leaf's dtype in the checkpoint."""
        return self.checkpoint.tensors[spec.name].dtype

    def read(self, spec: ParamSpec) -> np.ndarray:
        """Reads one leaf and checks its digest.

        Raises:
          CheckpointError: it cannot be read or is damaged; names it.
        """
        return self._reader.read(spec.name)

    def files(self, wanted: re.Pattern[str]) -> Mapping[str, bytes]:
        """The small files beside the tensors whose names match, their digests checked.

        Raises:
          CheckpointError: a file is missing or damaged; names it.
        """
        found = {}
        for name, expected in sorted(self.checkpoint.file_digests.items()):
            if not wanted.fullmatch(name):
                continue
            path = self.checkpoint.path / name
            try:
                found[name] = path.read_bytes()
            except OSError as e:
                raise CheckpointError(f"{path} cannot be read: {e.strerror}", hint=_AGAIN) from e
            if digest(found[name]) != expected:
                raise CheckpointError(f"{path} has digest {digest(found[name])}, expected {expected}", hint=_AGAIN)
        return found
