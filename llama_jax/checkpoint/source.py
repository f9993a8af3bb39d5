"""The protocol of a model's source, in whatever format it is stored, and checks that all formats share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.format import CONFIG, DTYPES, MARKER, Source, TensorInfo
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.params import ParamSpec, param_specs


class ModelSource(Protocol):
    """An opened model: all of its tensors are known to exist with the right shape, none has been read.

    Checkpoints implement it (`checkpoint.checkpoint_source`), and every format of `llama_jax.convert`. Conversion and
    `checkpoint.build.load_source` read models through it alone.
    """

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
    """A tensor of a source, and the place of its bytes.

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


@runtime_checkable
class HasNotes(Protocol):
    """A source with notes for the user about its conversion."""

    @property
    def notes(self) -> Sequence[str]:
        """Sentences for the user, e.g. about what was left out."""
        ...


@runtime_checkable
class InOrder(Protocol):
    """A source that makes one layer after the other: leaves must be requested in the order of `param_specs`."""

    def resume(self, written: Callable[[str], np.ndarray | None]) -> None:
        """Says how to read what was made of it before: an array by its dotted name, None where there is none."""
        ...


def tell_notes(model: ModelSource, notify: Callable[[str], None] | None) -> None:
    """Passes a source's notes to `notify`."""
    if notify is not None and isinstance(model, HasNotes):
        for note in model.notes:
            notify(note)


_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")


def provenance(model: ModelSource, spec: ParamSpec) -> tuple[SourceTensor, ...]:
    """The source's tensors behind a leaf; empty for a source that does not know."""
    return tuple(model.provenance(spec)) if isinstance(model, HasProvenance) else ()


def weight_files(model: ModelSource, specs: Iterable[ParamSpec]) -> tuple[Path, ...]:
    """The files that hold the weights, sorted. A source that does not know counts with all of its folder; a checkpoint
    with the file that has the digests of all others."""
    files = {tensor.file for spec in specs for tensor in provenance(model, spec)}
    if not files:
        files = {model.path}
        if model.path.is_dir():
            known = (path for path in model.path.iterdir() if path.suffix in _WEIGHTS or path.name == MARKER)
            files = {path for path in known if path.is_file()}
    return tuple(sorted(files))


@runtime_checkable
class RowSource(Protocol):
    """A source that can read some rows of a leaf, if its file stores the leaf unchanged."""

    def has_rows(self, spec: ParamSpec) -> bool:
        """Returns whether `read_rows` can read this leaf; if not, only `read` can."""
        ...

    def read_rows(self, spec: ParamSpec, start: int, out: np.ndarray) -> None:
        """Fills `out` [rows, ...] with the rows from `start` on. May be called from several threads at once."""
        ...


@runtime_checkable
class HasDigests(Protocol):
    """A source that recorded the digest of each leaf when it was written."""

    def check(self, spec: ParamSpec, digest: str) -> None:
        """Raises CheckpointError unless this is the digest (`checkpoint.format.Digest`) of the leaf's bytes."""
        ...


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES_BY_NAME: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}
"""Possible values of `LlamaConfig.dtype`."""


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names of a set, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_names(
    path: Path,
    found: Iterable[str],
    wanted: Iterable[str],
    *,
    hint: str,
    asks: str = CONFIG,
    holder: Callable[[str], Path] | None = None,
) -> None:
    """Raises CheckpointError unless the tensors `found` are exactly those `wanted`.

    Args:
      path: the model's file or folder, for messages.
      asks: the file that requires the tensors, for messages.
      holder: the file of a tensor that was found, where that is not `path`.
    """
    found, wanted = set(found), set(wanted)
    if missing := wanted - found:
        raise CheckpointError(f"{path} lacks tensor {some(missing)}, which {asks} asks for", hint=hint)
    if unknown := found - wanted:
        where = holder(min(unknown)) if holder else path
        raise CheckpointError(f"{where} holds tensor {some(unknown)}, which {asks} does not ask for", hint=hint)


def check_tensors(
    path: Path,
    found: Mapping[str, tuple[int, ...]],
    specs: Iterable[ParamSpec],
    *,
    hint: str,
    asks: str = CONFIG,
) -> None:
    """Raises CheckpointError unless the tensors are those of the leaves `specs`, in name and shape.

    Args:
      found: dotted name to shape.
      path, asks: as for `check_names`.
    """
    wanted = {spec.name: spec.shape for spec in specs}
    check_names(path, found, wanted, hint=hint, asks=asks)
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(found[name])}, {asks} asks for {list(shape)}", hint=hint
            )


def check_vocabulary(files: Mapping[str, bytes | str], vocab_size: int, path: Path) -> None:
    """Raises CheckpointError if the tokenizer among a model's small files has more pieces than the model has rows for.

    Tokens that were added to a tokenizer may lie beyond the model's vocabulary: of some models they stand for images,
    or for padding. A file that cannot be read is left to those who read tokenizers.
    """
    largest = _largest_piece(files)
    if isinstance(largest, int) and largest >= vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has ids up to {largest}, the model's vocabulary ends at {vocab_size - 1}",
            hint="the tokenizer is that of another model; put this model's own files there",
        )


def _largest_piece(files: Mapping[str, bytes | str]) -> object:
    """The largest id of a vocabulary without added tokens; None where it cannot be read."""
    try:
        if "tokenizer.json" in files:
            vocabulary = json.loads(files["tokenizer.json"])["model"]["vocab"]
            return max(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
        model = files.get("tokenizer.model")
        if not isinstance(model, bytes):
            return None
        from sentencepiece import SentencePieceProcessor

        return int(SentencePieceProcessor(model_proto=model).vocab_size()) - 1
    except (ValueError, KeyError, TypeError, RecursionError, RuntimeError, ImportError):
        return None


def check_dtypes(tensors: Mapping[str, TensorInfo], config: LlamaConfig, path: Path) -> None:
    """Raises CheckpointError unless every tensor has the dtype and scheme that the config requires."""
    for spec in param_specs(config):
        found, allowed = tensors[spec.name], DTYPES if spec.dtype is None else (spec.dtype,)
        if found.dtype not in allowed or found.scheme != spec.scheme:
            raise CheckpointError(
                f"{path}: tensor {spec.name} is {found.dtype} of scheme {found.scheme}; "
                f"it should be {' or '.join(allowed)} of scheme {spec.scheme}",
                hint="config and weights do not belong together, or the checkpoint is damaged",
            )
