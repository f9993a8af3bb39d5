"""Opens a model in whatever format it is stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from llama_jax.checkpoint.format import is_checkpoint
from llama_jax.checkpoint.source import ModelSource
from llama_jax.errors import CheckpointError, ModelNotFound, UnsupportedModel


def open_source(
    path: Path, *, name: str | None = None, revision: str | None = None, dequantize: bool = True
) -> ModelSource:
    """Opens the model at `path` for conversion, in whatever format it is.

    Args:
      dequantize: whether quantised weights are read as floats; False keeps those in their own precision that a layout
        of `llama_jax.quantized` can hold.

    Raises:
      ModelNotFound: nothing does.
      UnsupportedModel: something does that cannot be converted.
    """
    from llama_jax.convert.folders import is_gguf, model_in, no_model_file
    from llama_jax.convert.gguf import GgufModel
    from llama_jax.convert.hf import HuggingFaceFolder
    from llama_jax.convert.meta import MetaFolder, is_meta

    path = model_in(path)
    if path.is_file():
        if not is_gguf(path):
            raise no_model_file(path)
        return GgufModel(path, name=name, revision=revision, dequantize=dequantize)
    if not path.is_dir():
        raise ModelNotFound(f"no file or folder at {path}", hint="check the path")
    if is_checkpoint(path):
        raise UnsupportedModel(
            f"{path} is a converted checkpoint already",
            hint="use it as it is; --dtype of the other commands casts on load",
        )
    if is_meta(path):
        return MetaFolder(path, name=name, revision=revision)
    return HuggingFaceFolder(path, name=name, revision=revision, dequantize=dequantize)


def open_model(
    path: Path, *, name: str | None = None, revision: str | None = None, dequantize: bool = False
) -> ModelSource:
    """Opens a checkpoint or a source; see `open_source`. Of a checkpoint, weights that are decoded are float32."""
    # Imported here, since it brings jax, which opening a source for a listing does not need.
    from llama_jax.checkpoint.checkpoint_source import CheckpointSource

    if not is_checkpoint(path):
        return open_source(path, name=name, revision=revision, dequantize=dequantize)
    source = CheckpointSource(path)
    if not (dequantize and source.config.schemes):
        return source
    from llama_jax.convert.quantizing import DequantizedSource

    return DequantizedSource(source, "float32")


@contextlib.contextmanager
def opened(
    path: Path, *, name: str | None = None, revision: str | None = None, dequantize: bool = False
) -> Iterator[ModelSource]:
    """Opens a checkpoint or a source while it is loaded; a context manager.

    Not every format has digests, so a file that is replaced or written to while it is read is noticed by its size and
    time.

    Args:
      name, revision: of a source, where they are known better than by its path.
      dequantize: see `open_model`.

    Raises:
      ModelNotFound, UnsupportedModel, CheckpointError: see `open_source` and `CheckpointSource`.
      CheckpointError: on leaving, if a file has changed; names it.
    """
    before = _stamps(path)
    with contextlib.closing(open_model(path, name=name, revision=revision, dequantize=dequantize)) as source:
        yield source
    after = _stamps(path)
    if changed := sorted(str(file) for file in before.keys() | after.keys() if before.get(file) != after.get(file)):
        raise CheckpointError(
            f"{', '.join(changed[:5])} changed while the model was being loaded",
            hint="wait until whatever writes there has finished, and load again",
        )


def _stamps(path: Path) -> dict[Path, tuple[int, int, int]]:
    """Inode, size and time of the last change of a file, or of each file in a folder."""
    stamps = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in path.iterdir() if path.is_dir() else [path]:
            with contextlib.suppress(FileNotFoundError):
                stat = file.stat()
                stamps[file] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return stamps
