"""Writing checkpoints in batches of tensors, so that an interrupted writer can resume with the next batch."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llama_jax import disk
from llama_jax.checkpoint import format as fmt
from llama_jax.checkpoint import journal, lock
from llama_jax.checkpoint.read import TensorReader
from llama_jax.checkpoint.small_files import json_bytes, main_dtype, small_files, tool_version
from llama_jax.checkpoint.source import check_dtypes, check_tensors
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, LlamaJaxError, RequestError, StorageError, UnsupportedModel
from llama_jax.params import flatten, param_specs

BATCH_BYTES = 256 << 20
"""Tensors are written in batches of at most this many bytes (a larger tensor alone)."""

_PARTS, _STAGED = "parts", "checkpoint"
_MISMATCH = "check that the tensors and the config belong together"


class CheckpointWriter:
    """Writes one checkpoint; a context manager. Nothing exists at `path` before `commit` has returned.

    Everything is written below `<path>.partial` (see `checkpoint.journal`) and gets its name at the end, in one step.
    What is left when the context ends early, or the process, depends on `identity`: with one, the batches that were
    written stay, and the next writer with the same identity resumes after them. Errors that another try cannot help
    (a damaged source, say) remove them.

    Args:
      path: the folder to make.
      total_bytes: size of all tensors together, checked against the free disk space.
      overwrite: whether a checkpoint at `path` may be replaced; it stays until the new one is complete.
      identity: a JSON object that is equal for writers that write the same tensors; None for one that begins afresh.
      progress: called for every tensor that an earlier writer left and that is sound.
      notify: called with a sentence before a wait, and where something is left for a later try.

    Attributes:
      written: the tensors on disk.

    Raises:
      StorageError: `path` exists (and may not or cannot be replaced), or cannot be written.
      DoesNotFit: too little disk space.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        total_bytes: int,
        overwrite: bool = False,
        identity: Mapping[str, Any] | None = None,
        progress: fmt.Progress | None = None,
        notify: Callable[[str], None] | None = None,
    ):
        self.path = Path(path).absolute()
        self._total_bytes = total_bytes
        self._overwrite = overwrite
        self._identity = identity
        self._progress = progress
        self._say: Callable[[str], None] = notify or (lambda _: None)
        self._partial = self.path.with_name(self.path.name + disk.PARTIAL)
        self._parts: list[journal.Part] = []
        self._keep_cached = disk.fits_file_cache(total_bytes)
        self._stack = contextlib.ExitStack()

    @property
    def written(self) -> Mapping[str, fmt.TensorInfo]:
        return {name: info for part in self._parts for name, info in part.tensors.items()}

    @property
    def notes(self) -> Sequence[Mapping[str, Any]]:
        """The notes given to `write`, by this writer and by those that it continues."""
        return [part.note for part in self._parts]

    def read(self, name: str) -> np.ndarray | None:
        """A tensor that was written, also by an earlier writer; None for any other."""
        for part in self._parts:
            if name in part.tensors:
                return TensorReader(part).read(name)
        return None

    def __enter__(self) -> CheckpointWriter:
        with contextlib.ExitStack() as stack:
            waiting = f"Waiting for another conversion to {self.path} to end"
            stack.enter_context(disk.file_lock(disk.lock_of(self.path), lambda: self._say(waiting)))
            with disk.storage_errors(self.path, self._total_bytes):
                disk.restore_folder(self.path)
                self._check_destination()
                # Older versions gave a finished checkpoint its name in two steps.
                ours = disk.is_unfinished(self._partial) or fmt.is_checkpoint(self._partial)
                if self._partial.exists() and not ours:
                    raise StorageError(
                        f"{self._partial} is in the way and is not of llama_jax",
                        hint="move it, or choose another folder",
                    )
                stack.push(self._leave)
                self._go_on_or_begin()
                done = sum(part.nbytes for part in self._parts)
                disk.check_space(self.path, self._total_bytes - done)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(kind, e, tb)

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

    def _go_on_or_begin(self) -> None:
        """Takes over the files left by a writer of the same tensors, or removes those of another one."""
        left, marker = self._partial, self._partial / disk.UNFINISHED
        identity = json.dumps(self._identity, sort_keys=True).encode()
        if self._identity is None or not marker.exists() or marker.read_bytes() != identity:
            disk.remove(left)
        left.mkdir(exist_ok=True)
        if not marker.exists():
            disk.write_file(marker, identity)
        disk.remove(left / _STAGED)
        self._parts = journal.sound_parts(left / _PARTS, self._total_bytes, self._progress)

    def _leave(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if e is None or self._identity is None or not _worth_another_try(e):
            self._discard()
            return
        # What is not whole is of no use to the next writer. Orbax's threads may still be writing there.
        with contextlib.suppress(OSError):
            self._parts = journal.read_parts(self._partial / _PARTS)
            disk.remove(self._partial / _STAGED)
        if not self._parts:
            self._discard()
            return
        done = sum(part.nbytes for part in self._parts)
        again = (
            f"{done:,} of {self._total_bytes:,} bytes are done: run it again to go on there, or remove {self._partial}"
        )
        if isinstance(e, LlamaJaxError):
            e.hint = f"{e.hint}; {again}" if e.hint else again
        else:
            self._say(f"Stopped: {again}")

    def _discard(self) -> None:
        """Removes all that was written; the marker that permits the removal goes last."""
        with contextlib.suppress(OSError):
            for path in self._partial.iterdir():
                if path.name != disk.UNFINISHED:
                    disk.remove(path)
            disk.remove(self._partial)

    def write(self, arrays: Mapping[str, np.ndarray], note: Mapping[str, Any] | None = None) -> None:
        """Writes a batch of tensors, under their dotted names. When it returns, they are on the disk itself.

        Args:
          arrays: must not change meanwhile.
          note: a JSON object to find again in `notes`, after an interruption too.

        Raises:
          CheckpointError: a tensor was written before, or its dtype cannot be stored by any scheme.
          StorageError, DoesNotFit: the batch cannot be written.
        """
        for name, array in arrays.items():
            if name in self.written:
                raise CheckpointError(f"tensor {name} is given twice", hint="this is a fault of the program; report it")
            if array.dtype.name not in fmt.ITEMSIZES:
                raise CheckpointError(
                    f"tensor {name} has dtype {array.dtype.name}", hint=f"tensors may be {', '.join(fmt.ITEMSIZES)}"
                )
        number = max((int(part.folder.name) for part in self._parts), default=-1) + 1
        folder = self._partial / _PARTS / f"{number:06}"
        with disk.storage_errors(self.path, self._total_bytes - sum(part.nbytes for part in self._parts)):
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            self._parts.append(journal.write_part(folder, contiguous, note or {}, keep=self._keep_cached))

    def commit(
        self,
        config: LlamaConfig,
        *,
        source: fmt.Source,
        generation_config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes | str] | None = None,
        source_files: Sequence[lock.SourceFile] = (),
        origins: Mapping[str, lock.Origin] | None = None,
        dtype: str | None = None,
        method: str | None = None,
    ) -> Path:
        """Puts the checkpoint together and gives it its name.

        Args:
          config: written as config.json with the dtype of most of the weights.
          source: where the weights came from.
          generation_config: written as generation_config.json, if given.
          files: further small files (tokenizer, chat template), name to contents.
          source_files, origins, dtype, method: for model.lock.json; see `checkpoint.lock`.

        Raises:
          CheckpointError: the tensors that were written are not those that the config requires.
          UnsupportedModel: a config.json cannot express the config.
        """
        written = self.written
        shapes = {name: info.shape for name, info in written.items()}
        check_tensors(self.path, shapes, param_specs(config), hint=_MISMATCH, asks="the config")
        # In the config's order, which does not depend on the order of writing.
        tensors = {spec.name: replace(written[spec.name], scheme=spec.scheme) for spec in param_specs(config)}
        check_dtypes(tensors, config, self.path)
        stored = main_dtype(tensors.values())
        contents = small_files(config, stored, generation_config, files)
        staged = self._partial / _STAGED
        with disk.storage_errors(self.path):
            journal.join(self._parts, staged)
            fmt.set_custom_metadata(staged, tensors)
            digests = {name: fmt.digest(data) for name, data in contents.items()}
            for name, data in contents.items():
                (staged / name).parent.mkdir(exist_ok=True)
                (staged / name).write_bytes(data)
            locked = lock.Lock(
                source=source,
                source_files=tuple(source_files),
                dtype=dtype,
                method=method,
                tensors={name: info.digest for name, info in tensors.items()},
                origins=origins or {},
                files=digests,
                tool=tool_version(),
            )
            data = json_bytes(lock.contents(locked, lock.store_digests(staged)))
            (staged / lock.LOCK_FILE).write_bytes(data)
            marker = fmt.marker(source, stored, tool_version(), digests | {lock.LOCK_FILE: fmt.digest(data)})
            marker["digest"] = lock.marker_digest(marker)
            (staged / fmt.MARKER).write_bytes(json_bytes(marker))
            disk.sync_tree(staged)
            disk.replace_folder(staged, self.path)
        return self.path


def _worth_another_try(e: BaseException) -> bool:
    """Returns whether the same call may succeed later: not if the source or the request is at fault."""
    if isinstance(e, CheckpointError) and isinstance(e.__cause__, OSError):
        return True  # a source that could not be read just now
    return not isinstance(e, CheckpointError | RequestError | UnsupportedModel)


def layer_batches(sizes: Mapping[str, int]) -> list[list[str]]:
    """Groups of tensors to write together, in order: those of one layer, or one other leaf.

    Args:
      sizes: dotted name to bytes.
    """

    def group(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:2] if parts[0] == "layers" else parts[:1])

    return [list(names) for _, names in itertools.groupby(sizes, group)]


def batches(sizes: Mapping[str, int]) -> list[list[str]]:
    """Groups of tensors to write together, in order: at most BATCH_BYTES each, or one larger tensor.

    Args:
      sizes: dotted name to bytes.
    """
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = BATCH_BYTES
        groups[-1].append(name)
        room -= size
    return groups


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
    shapes = {name: leaf.shape for name, leaf in flat.items()}
    check_tensors(Path(path), shapes, param_specs(config), hint=_MISMATCH, asks="the config")
    sizes = {spec.name: flat[spec.name].nbytes for spec in param_specs(config)}
    with CheckpointWriter(path, total_bytes=sum(sizes.values()), overwrite=overwrite) as writer:
        for batch in batches(sizes):
            writer.write({name: np.asarray(flat[name]) for name in batch})
        return writer.commit(config, source=source or fmt.Source(), generation_config=generation_config, files=files)
