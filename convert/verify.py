"""Checks that a checkpoint still equals what its source would give."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.checkpoint.format import Progress, digest, open_checkpoint
from llama_jax.checkpoint.lock import Lock, SourceFile, read_lock
from llama_jax.checkpoint.read import VerifyReport
from llama_jax.checkpoint.source import ModelSource, weight_files
from llama_jax.config import LlamaConfig
from llama_jax.convert.opening import open_model
from llama_jax.convert.run import locked_files
from llama_jax.errors import RequestError
from llama_jax.quantized.methods import METHODS
from llama_jax.recipe import NEAREST

if TYPE_CHECKING:
    from llama_jax.convert.leaves import Leaf


def verify_source(checkpoint: str | Path, src: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Compares a source with what model.lock.json says a checkpoint was made from.

    Reads all of the source, and of the checkpoint its metadata only: `llama_jax.checkpoint.verify` compares those with
    the checkpoint's own bytes.

    Args:
      checkpoint: the checkpoint's folder.
      src: the folder or file that it was converted from, or a copy of it; the checkpoint, if it is a quantised one's.
      progress: called after each tensor of the source.

    Returns:
      A report that names every file and tensor that differs.

    Raises:
      CheckpointError: the checkpoint has no lock, or either cannot be opened.
      RequestError: its weights were calibrated, so that they come from more than the source.
      ModelNotFound, UnsupportedModel: there is no such source.
    """
    from llama_jax.checkpoint.write import batches
    from llama_jax.convert.casting import storage_dtype
    from llama_jax.convert.file_hashes import FileHashes
    from llama_jax.convert.leaves import AHEAD_BYTES, in_file_order, memory, read_ahead, read_leaf
    from llama_jax.disk import fits_file_cache
    from llama_jax.params import param_specs

    opened = open_checkpoint(checkpoint)
    locked = read_lock(opened.path)
    dtype = None if locked.dtype is None else storage_dtype(locked.dtype)
    failures: list[str] = []

    def read(name: str) -> Leaf:
        # NaN has passed when the checkpoint was made; its digest says whether it is the same.
        return read_leaf(model, specs[name], dtype, allow_nonfinite=True, hashes=hashes)

    with closing(_opened_alike(Path(src), opened.config, locked.method)) as model:
        specs = {spec.name: spec for spec in in_file_order(model, param_specs(model.config))}
        sizes = {name: memory(model, spec, dtype) for name, spec in specs.items()}
        weights = weight_files(model, specs.values())
        total, done = sum(sizes.values()), 0
        failures += _small_files(model, opened.dtype, locked)
        with (
            FileHashes(weights, keep=fits_file_cache(total)) as hashes,
            read_ahead(batches(sizes), read, sizes.__getitem__, AHEAD_BYTES) as leaves,
        ):
            for batch in leaves:
                for leaf in batch:
                    name = leaf.spec.name
                    failures += _tensor(str(model.path), leaf, locked)
                    done += sizes[name]
                    if progress:
                        progress(done, total, name)
            found = {file.name: file for file in locked_files(hashes.finish())}
    missing = locked.tensors.keys() - specs.keys()
    failures += [f"{src} does not give tensor {name}" for name in sorted(missing)]
    return VerifyReport(opened.path, len(specs), total, tuple(_files(src, found, locked) + failures))


def _opened_alike(src: Path, config: LlamaConfig, method: str | None) -> ModelSource:
    """The source, with its weights in the form in which the checkpoint has them."""
    if method is not None and METHODS[method].calibrated:
        raise RequestError(
            f"weights that {method} has made cannot be made again from their source alone",
            param="source",
            hint="verify the checkpoint without --source: that compares every tensor with its digest",
        )
    if not config.schemes:
        return open_model(src, dequantize=True)
    source = open_model(src)
    if dict(source.config.schemes) == dict(config.schemes):
        return source
    source.close()
    from llama_jax.convert.quantizing import QuantizedSource

    return QuantizedSource(open_model(src, dequantize=True), config.schemes, method or NEAREST)


def _files(src: str | Path, found: Mapping[str, SourceFile], locked: Lock) -> list[str]:
    expected = {file.name: file for file in locked.source_files}
    failures = [f"{src} lacks file {name}" for name in sorted(expected.keys() - found.keys())]
    failures += [f"{src} has weights in file {name} as well" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if found[name] != expected[name]:
            have, want = found[name], expected[name]
            failures.append(
                f"{src}: file {name} has {have.bytes:,} bytes and sha256 {have.sha256}, "
                f"the checkpoint was made from {want.bytes:,} bytes with {want.sha256}"
            )
    return failures


def _tensor(src: str, leaf: Leaf, locked: Lock) -> list[str]:
    name, found = leaf.spec.name, digest(leaf.array.reshape(-1).view("uint8"))
    if name not in locked.tensors:
        return [f"{src} gives tensor {name}, which the checkpoint does not have"]
    origin = locked.origins.get(name)
    if origin and origin.digest != leaf.source_digest:
        return [f"{src}: tensor {name} has digest {leaf.source_digest}, the checkpoint was made from {origin.digest}"]
    if found != locked.tensors[name]:
        return [f"{src} gives tensor {name} with digest {found}, the checkpoint has {locked.tensors[name]}"]
    return []


def _small_files(model: ModelSource, dtype: str, locked: Lock) -> list[str]:
    from llama_jax.checkpoint.small_files import small_files

    contents = small_files(model.config, dtype, model.generation_config, model.files)
    found = {name: digest(data) for name, data in contents.items()}
    return [
        f"{model.path} gives {name} with digest {found.get(name)}, the checkpoint has {locked.files.get(name)}"
        for name in sorted(found.keys() | locked.files.keys())
        if found.get(name) != locked.files.get(name)
    ]
