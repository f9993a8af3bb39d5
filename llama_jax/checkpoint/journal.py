"""The journal of an unfinished checkpoint: the parts written so far, from which a stopped writer resumes.

    <path>.partial/
      unfinished.llama_jax                what is being written: the identity that was given to `CheckpointWriter`
      parts/000000/params.partial_save/   one batch of tensors, as `orbax.checkpoint.v1.partial` saves it
      parts/000000/part.json              its tensors and their digests; written last: the part is whole if it is there
      checkpoint/                         the checkpoint that is made of the parts in the end

Each part is a separate partial save, since one that was killed midway leaves a folder that Orbax neither
resumes nor cleans up. `orbax.checkpoint.v1.partial.finalize` moves the files of its parts about and cannot be
repeated if it is stopped, so it is given links to them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

from llama_jax import disk
from llama_jax.checkpoint import format as fmt
from llama_jax.checkpoint.read import TensorReader
from llama_jax.errors import CheckpointError
from llama_jax.params import unflatten

CHUNK_BYTES = 256 << 20
"""Smaller tensors are one chunk on disk, larger ones several, so that reading one never needs it twice in memory."""
FILE_BYTES = 1 << 30
"""Size at which Orbax begins another data file."""

_JOURNAL = "part.json"
_PARTIAL_SAVE = f"{fmt.PARAMS}.partial_save"
_STORE = "state/ocdbt.process_0"
_UNLINKABLE = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


@dataclass(frozen=True)
class Part:
    """One batch of tensors on disk; `TensorReader` reads it.

    Attributes:
      folder: where it lies.
      tensors: dotted name to shape, dtype and digest.
      note: a JSON object that the writer's caller gave.
    """

    folder: Path
    tensors: Mapping[str, fmt.TensorInfo]
    note: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def arrays_path(self) -> Path:
        """The OCDBT store that holds the arrays."""
        return self._saved / _STORE

    @property
    def _saved(self) -> Path:
        """The one folder in which Orbax has put all that it wrote."""
        found = sorted((self.folder / _PARTIAL_SAVE).glob("*.pending_*"))
        return found[0] if len(found) == 1 else self.folder / _PARTIAL_SAVE / "missing"


def write_part(folder: Path, arrays: Mapping[str, np.ndarray], note: Mapping[str, Any], *, keep: bool = True) -> Part:
    """Writes tensors into a new folder; when this returns they are on the disk itself.

    Args:
      folder: must not exist.
      arrays: dotted name to C-contiguous array.
      note: kept with the part.
      keep: False takes the files out of the system's memory once they are written.

    Raises:
      OSError, ValueError: see `disk.storage_errors`.
    """
    tensors = {n: fmt.TensorInfo(a.shape, a.dtype.name, fmt.digest(a.view(np.uint8))) for n, a in arrays.items()}
    folder.mkdir(parents=True)
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.ocdbt_target_data_file_size = FILE_BYTES
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    # Nobody changes the arrays meanwhile, so they need not be copied first.
    context.memory.deepcopy_host_arrays = False
    with context, _failures_told_once():
        ocp.partial.save(folder / fmt.PARAMS, unflatten(arrays))
    disk.sync_tree(folder, keep=keep)
    value = {"tensors": {n: [list(t.shape), t.dtype, t.digest] for n, t in tensors.items()}, "note": dict(note)}
    disk.write_file(folder / _JOURNAL, json.dumps(value).encode())
    return Part(folder, tensors, note)


@contextlib.contextmanager
def _failures_told_once() -> Iterator[None]:
    """Keeps Orbax from printing the failure that it raises: its log has the traceback, and the writes that are still
    under way when it gives up find its event loop closed and say so."""
    absl, hook = logging.getLogger("absl"), sys.excepthook

    def quiet(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    def closed_loop_is_no_news(kind: type[BaseException], e: BaseException, tb: TracebackType | None) -> None:
        if not (isinstance(e, RuntimeError) and "Event loop is closed" in str(e)):
            hook(kind, e, tb)

    absl.addFilter(quiet)
    sys.excepthook = closed_loop_is_no_news
    try:
        yield
    except Exception:
        time.sleep(0.5)  # for those writes; nothing here can wait for them
        raise
    finally:
        absl.removeFilter(quiet)
        sys.excepthook = hook


def read_parts(folder: Path) -> list[Part]:
    """The complete parts in a folder, in order; everything else there is removed."""
    parts = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            value = json.loads((path / _JOURNAL).read_text(encoding="utf-8"))
            tensors = {n: fmt.TensorInfo(tuple(shape), dtype, d) for n, (shape, dtype, d) in value["tensors"].items()}
            parts.append(Part(path, tensors, value["note"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            disk.remove(path)
    return parts


def sound_parts(folder: Path, total_bytes: int, progress: fmt.Progress | None) -> list[Part]:
    """The parts in a folder whose tensors can all be read back and have their digests; everything else is removed.

    Args:
      total_bytes: for `progress`, which is called for every tensor that is sound.
    """
    found, done = [], 0
    for part in read_parts(folder):
        reader = TensorReader(part)
        for name, info in part.tensors.items():
            try:
                reader.read(name)
            except CheckpointError:
                disk.remove(part.folder)
                break
            done += info.nbytes
            if progress:
                progress(done, total_bytes, name)
        else:
            found.append(part)
    return found


def join(parts: list[Part], folder: Path) -> None:
    """Makes the Orbax checkpoint `folder`/params of the parts, which stay as they are and share their data with it."""
    together = folder / _PARTIAL_SAVE
    together.mkdir(parents=True)
    for part in parts:
        _link_tree(part._saved, together / part._saved.name)
    with ocp.Context():
        ocp.partial.finalize(folder / fmt.PARAMS)


def _link_tree(src: Path, dst: Path) -> None:
    """Copies a folder; the array store's files, which are never changed in place, get a second name only.

    Where files cannot have two names the folder is moved: a writer that is stopped after that begins afresh.
    """
    try:
        for place, _, files in os.walk(src):
            inside = Path(place).relative_to(src)
            (dst / inside).mkdir(parents=True)
            copy = os.link if inside.is_relative_to(_STORE) else shutil.copyfile
            for name in files:
                copy(Path(place, name), dst / inside / name)
    except OSError as e:
        if e.errno not in _UNLINKABLE:
            raise
        disk.remove(dst)
        src.rename(dst)
