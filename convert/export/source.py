"""Parts that both exports share: their report, and a checkpoint's small files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llama_jax.checkpoint.checkpoint_source import CheckpointSource
from llama_jax.checkpoint.format import DAMAGED, Checkpoint, digest
from llama_jax.errors import CheckpointError, UnsupportedModel


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


def open_plain(path: str | Path) -> CheckpointSource:
    """Opens a checkpoint to export.

    Raises:
      UnsupportedModel: it stores weights by schemes, which no other format knows. Others as `CheckpointSource`.
    """
    source = CheckpointSource(path)
    if schemes := {scheme for _, scheme in source.config.schemes}:
        raise UnsupportedModel(
            f"{source.path} stores weights by {', '.join(sorted(schemes))}, which no other format knows",
            hint="export the checkpoint that it was made from",
        )
    return source


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
