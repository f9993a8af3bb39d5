"""A checkpoint as a `ModelSource`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.format import DAMAGED, open_checkpoint
from llama_jax.checkpoint.read import TensorReader
from llama_jax.checkpoint.small_files import copied_files
from llama_jax.checkpoint.source import check_dtypes, check_tensors
from llama_jax.config import LlamaConfig
from llama_jax.params import ParamSpec, param_specs


class CheckpointSource:
    """An opened checkpoint with the tensors that its config requires; see `checkpoint.source.ModelSource`.

    Args:
      path: the checkpoint's folder.
      config: what the tensors must fit; the checkpoint's own config when None.

    Attributes:
      checkpoint: its metadata.
      specs: its leaves, in the order of the forward pass.

    Raises:
      ModelNotFound, CheckpointError, UnsupportedModel: as `open_checkpoint`; or a tensor is missing, unknown or of
        another shape.
    """

    def __init__(self, path: str | Path, *, config: LlamaConfig | None = None):
        self.checkpoint = open_checkpoint(path)
        self.path, self.source = self.checkpoint.path, self.checkpoint.source
        self.config = config or self.checkpoint.config
        self.specs = param_specs(self.config)
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        check_tensors(self.path, shapes, self.specs, hint=f"config.json is of another model, or {DAMAGED}")
        check_dtypes(self.checkpoint.tensors, self.config, self.path)
        self._reader = TensorReader(self.checkpoint)

    @property
    def generation_config(self) -> Mapping[str, Any]:
        return self.checkpoint.generation_config

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files as they are now; their digests, which `verify` compares, are not checked."""
        return copied_files(self.path)

    def dtype(self, spec: ParamSpec) -> np.dtype:
        return jnp.dtype(self.checkpoint.tensors[spec.name].dtype)

    def read(self, spec: ParamSpec) -> np.ndarray:
        """Reads one leaf and checks its digest.

        Raises:
          CheckpointError: it cannot be read or is damaged; names it.
        """
        return self._reader.read(spec.name)

    def has_rows(self, spec: ParamSpec) -> bool:
        return True

    def read_rows(self, spec: ParamSpec, start: int, out: np.ndarray) -> None:
        self._reader.read_rows(spec.name, start, out)

    def check(self, spec: ParamSpec, digest: str) -> None:
        self._reader.check(spec.name, digest)

    def close(self) -> None:
        """Does nothing: no file stays open between reads."""
