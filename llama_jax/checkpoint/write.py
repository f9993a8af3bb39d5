"""Writing checkpoints, tensor by tensor: peak memory is one batch or the largest tensor, whatever the model's size."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from orbax.checkpoint import v1 as ocp

from llama_jax.checkpoint import format as fmt
from llama_jax.checkpoint import storage
from llama_jax.config import LlamaConfig, config_to_hf
from llama_jax.errors import CheckpointError, RequestError, StorageError
from llama_jax.params import flatten, param_specs, unflatten

BATCH_BYTES = 256 << 20
"""Tensors are handed to Orbax in batches of at most this many bytes (a larger tensor alone)."""
CHUNK_BYTES = 256 << 20
"""Smaller tensors are one chunk on disk, larger ones several, so that reading one never needs it twice in memory."""
UNFINISHED = "unfinished.llama_jax"
"""Stands in a folder that is being written, so that no other folder of that name is ever cleared away."""
FILE_BYTES = 1 << 30
"""Size at which Orbax begins another data file."""


class CheckpointWriter:
    """Writes one checkpoint; a context manager. Nothing stands at `path` before `commit` has returned.

    Everything is written below `<path>.partial`, which is renamed at the end. Leaving the context without `commit`
    removes it; a killed process leaves it behind, and the next writer clears it away.

    Args:
      path: the folder to make.
      total_bytes: size of all tensors together, checked against the free disk space.
      overwrite: whether a checkpoint that stands at `path` may be replaced; it stays until the new one is complete.

    Raises:
      StorageError: `path` exists (and may not or cannot be replaced), or cannot be written.
      DoesNotFit: too little disk space.
    """

    def __init__(self, path: str | Path, *, total_bytes: int, overwrite: bool = False):
        self.path = Path(path).absolute()
        self._total_bytes = total_bytes
        self._overwrite = overwrite
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._batch: dict[str, np.ndarray] = {}
        self._tensors: dict[str, fmt.TensorInfo] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> CheckpointWriter:
        with contextlib.ExitStack() as stack:
            stack.enter_context(storage.file_lock(self.path.with_name(self.path.name + ".lock")))
            with storage.storage_errors(self.path):
                storage.restore_folder(self.path)
                self._check_destination()
                self._clear_partial()
                storage.check_space(self.path, self._total_bytes)
                self._partial.mkdir()
                (self._partial / UNFINISHED).touch()
            # Errors are ignored: after an interrupt Orbax's threads may still be writing there.
            stack.callback(shutil.rmtree, self._partial, ignore_errors=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._batch.clear()
        self._stack.close()

    def _check_destination(self) -> None:
        if not self.path.exists() and not self.path.is_symlink():
            return
        if not self._overwrite:
            raise StorageError(f"{self.path} exists", hint="choose another folder, or pass --overwrite")
        # Only what this program wrote is ever deleted by it.
        if not self.path.is_dir() or not (fmt.is_checkpoint(self.path) or not any(self.path.iterdir())):
            raise StorageError(
                f"{self.path} exists and is not a checkpoint of llama_jax, so it is not overwritten",
                hint="choose another folder",
            )

    def _clear_partial(self) -> None:
        """Removes what a killed writer left, after making sure that it is that."""
        left = self._partial
        if not left.exists():
            return
        if not ((left / UNFINISHED).exists() or fmt.is_checkpoint(left) or (left.is_dir() and not any(left.iterdir()))):
            raise StorageError(
                f"{left} is in the way and is not of llama_jax", hint="move it, or choose another folder"
            )
        storage.remove(left)

    def add(self, name: str, array: np.ndarray) -> None:
        """Takes one tensor, under its dotted name. The array must not change before `commit`."""
        if name in self._tensors:
            raise CheckpointError(f"tensor {name} is given twice", hint="this is a fault of the program; report it")
        array = np.ascontiguousarray(array)
        if array.dtype.name not in fmt.DTYPES:
            raise CheckpointError(
                f"tensor {name} has dtype {array.dtype.name}", hint=f"tensors may be {', '.join(fmt.DTYPES)}"
            )
        pending = sum(a.nbytes for a in self._batch.values())
        if self._batch and pending + array.nbytes > BATCH_BYTES:
            self._flush()
        self._tensors[name] = fmt.TensorInfo(array.shape, array.dtype.name, fmt.digest(array.view(np.uint8)))
        self._batch[name] = array

    def _flush(self, metadata: dict[str, Any] | None = None) -> None:
        context = ocp.Context()
        context.array.saving.use_compression = False
        context.array.saving.ocdbt_target_data_file_size = FILE_BYTES
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        # Nobody changes the arrays meanwhile, so they need not be copied first.
        context.memory.deepcopy_host_arrays = False
        with storage.storage_errors(self.path), context:
            ocp.partial.save(self._partial / fmt.PARAMS, unflatten(self._batch), custom_metadata=metadata)
        self._batch.clear()

    def commit(
        self,
        config: LlamaConfig,
        *,
        source: fmt.Source,
        generation_config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes | str] | None = None,
    ) -> Path:
        """Writes what is left, then gives the checkpoint its name.

        Args:
          config: written as config.json with the dtype of most of the weights.
          source: where the weights came from.
          generation_config: written as generation_config.json, if given.
          files: further small files (tokenizer, chat template), name to contents.

        Raises:
          CheckpointError: the tensors that were added are not those that the config asks for.
          UnsupportedModel: a config.json cannot express the config.
        """
        check_names(self._tensors, config, self.path)
        # The last batch carries the digests of all, so it is written only now and is never empty.
        self._flush(fmt.custom_metadata(self._tensors))
        weight: Counter[str] = Counter()
        for info in self._tensors.values():
            weight[info.dtype] += info.nbytes
        dtype = weight.most_common(1)[0][0]
        contents = dict(files or {})
        contents[fmt.CONFIG] = _json(config_to_hf(config.replace(dtype=dtype)))
        if generation_config:
            contents[fmt.GENERATION_CONFIG] = _json(generation_config)
        with storage.storage_errors(self.path):
            ocp.partial.finalize(self._partial / fmt.PARAMS)
            digests = {name: _write(self._partial, name, data) for name, data in sorted(contents.items())}
            _write(self._partial, fmt.MARKER, _json(fmt.marker(source, dtype, tool_version(), digests)))
            (self._partial / UNFINISHED).unlink()
            storage.replace_folder(self._partial, self.path)
        return self.path


def save(
    path: str | Path,
    params: Mapping[str, Any],
    config: LlamaConfig,
    *,
    source: fmt.Source | None = None,
    generation_config: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a checkpoint from arrays in memory (numpy or jax, on any device).

    Returns:
      The checkpoint's folder.

    Raises:
      CheckpointError: the tree does not fit the config; names the tensor.
      StorageError, DoesNotFit: see `CheckpointWriter`.
    """
    flat = flatten(params)
    check_names(flat, config, Path(path))
    for spec in param_specs(config):
        if tuple(flat[spec.name].shape) != spec.shape:
            raise CheckpointError(
                f"tensor {spec.name} has shape {tuple(flat[spec.name].shape)}, the config asks for {spec.shape}",
                hint="check that params and config belong together",
            )
    total = sum(leaf.nbytes for leaf in flat.values())
    with CheckpointWriter(path, total_bytes=total, overwrite=overwrite) as writer:
        for spec in param_specs(config):
            writer.add(spec.name, np.asarray(flat[spec.name]))
        return writer.commit(config, source=source or fmt.Source(), generation_config=generation_config, files=files)


def check_names(names: Mapping[str, Any], config: LlamaConfig, path: Path) -> None:
    """Raises CheckpointError unless `names` are exactly the tensors that the config asks for."""
    wanted = {spec.name for spec in param_specs(config)}
    for what, wrong in (("lacks", wanted - names.keys()), ("holds unknown", names.keys() - wanted)):
        if wrong:
            some = sorted(wrong)[:5]
            more = f" and {len(wrong) - len(some)} more" if len(wrong) > len(some) else ""
            raise CheckpointError(
                f"{path} {what} tensor {', '.join(some)}{more}",
                hint="config and weights do not belong together, or the checkpoint is damaged",
            )


def storage_dtype(name: str) -> np.dtype:
    """The numpy dtype of a name.

    Raises:
      RequestError: weights are not stored in this dtype.
    """
    if name not in fmt.DTYPES:
        raise RequestError(f"dtype {name!r} is not known", param="dtype", hint=f"one of {', '.join(fmt.DTYPES)}")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def tool_version() -> str:
    """Version of the installed package, or "unknown" when it runs from a source tree that is not installed."""
    try:
        return version("llama-jax")
    except PackageNotFoundError:
        return "unknown"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _write(folder: Path, name: str, data: bytes | str) -> str:
    """Writes a small file and returns its digest. Names come from models, so they must not leave the folder."""
    if name != Path(name).name or name in ("", ".", ".."):
        raise CheckpointError(f"{name!r} is not a plain file name", hint="this is a fault of the program; report it")
    raw = data.encode("utf-8") if isinstance(data, str) else data
    (folder / name).write_bytes(raw)
    return fmt.digest(raw)
