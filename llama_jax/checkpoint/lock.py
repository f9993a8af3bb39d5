"""model.lock.json: what a checkpoint was made from, byte for byte, and what it consists of.

    lock_version, tool, dtype      the file's own version, the program that wrote it, the requested dtype
    method                         how weights were quantised here, where that is not rounding to the nearest
    source                         kind, name, revision, licence
    source_files                   name, size and sha256 of every weight file that was read
    tensors                        name -> digest in the checkpoint, digest of the source's values before any cast
                                   (equal where nothing was cast), and the source's tensors with their files
    files                          digests of the small files beside the tensors (config, tokenizer, template)
    store                          digests of the small files that the array store keeps for itself

`llama-jax verify` holds these against the checkpoint, and with --source against the source. Two conversions of the same
source by the same version give the same lock but for `store`, where Orbax writes times and random names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llama_jax.checkpoint import format as fmt
from llama_jax.errors import CheckpointError

LOCK_FILE = "model.lock.json"
LOCK_VERSION = 1
SMALL_FILE_BYTES = 1 << 20
"""Files of the array store up to this size are held in the lock; larger ones are tensors, which have digests."""


@dataclass(frozen=True)
class SourceFile:
    """A weight file that was read: its name in the source folder, bytes, and sha256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Origin:
    """The origin of one tensor.

    Attributes:
      tensors: the source's tensors, each as its name and the name of its file.
      digest: of the values in canonical shape as the source gave them, before any cast.
    """

    tensors: tuple[tuple[str, str], ...]
    digest: str


@dataclass(frozen=True)
class Lock:
    """Contents of model.lock.json, without the digests of the array store's own files."""

    source: fmt.Source
    source_files: tuple[SourceFile, ...]
    dtype: str | None
    tensors: Mapping[str, str]
    origins: Mapping[str, Origin]
    files: Mapping[str, str]
    tool: str = ""
    method: str | None = None


def contents(lock: Lock, store: Mapping[str, str]) -> dict[str, Any]:
    """The contents of the file."""
    tensors: dict[str, Any] = {}
    for name, digest in lock.tensors.items():
        tensors[name] = {"digest": digest}
        if origin := lock.origins.get(name):
            tensors[name]["source_digest"] = origin.digest
            tensors[name]["from"] = [{"tensor": tensor, "file": file} for tensor, file in origin.tensors]
    return {
        "lock_version": LOCK_VERSION,
        "tool": {"name": "llama_jax", "version": lock.tool},
        "source": asdict(lock.source),
        "source_files": [asdict(file) for file in lock.source_files],
        "dtype": lock.dtype,
        **({"method": lock.method} if lock.method else {}),
        "tensors": tensors,
        "files": dict(lock.files),
        "store": dict(store),
    }


def read_lock(folder: Path) -> Lock:
    """Reads the lock of a checkpoint.

    Raises:
      CheckpointError: there is none (checkpoints written before there were locks), or it is damaged.
    """
    path = folder / LOCK_FILE
    if not path.exists():
        raise CheckpointError(f"{folder} has no {LOCK_FILE}", hint="convert the model again with this version")
    return _parsed(fmt.read_json(path), path)


def _parsed(value: Mapping[str, Any], path: Path) -> Lock:
    try:
        if (version := value["lock_version"]) > LOCK_VERSION:
            raise CheckpointError(
                f"{path} has lock version {version}, this program reads {LOCK_VERSION}", hint=fmt.UPGRADE
            )
        if version != LOCK_VERSION:
            raise ValueError(f"there is no lock version {version!r:.40}")
        for name in _texts(value["store"]):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"file {name!r} leads out of the folder")
        return Lock(
            source=fmt.parse_source(value["source"]),
            source_files=tuple(_source_file(file) for file in value["source_files"]),
            dtype=value["dtype"],
            method=None if (method := value.get("method")) is None else _text(method),
            tensors=_texts({name: tensor["digest"] for name, tensor in value["tensors"].items()}),
            origins={
                name: Origin(
                    tuple((_text(t["tensor"]), _text(t["file"])) for t in made), _text(tensor["source_digest"])
                )
                for name, tensor in value["tensors"].items()
                if (made := tensor.get("from")) is not None
            },
            files=_texts(value["files"]),
            tool=_text(value["tool"]["version"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{path} is damaged ({type(e).__name__}: {e})", hint="convert the model again") from e


def _source_file(value: Mapping[str, Any]) -> SourceFile:
    file = SourceFile(**value)
    _texts({"name": file.name, "sha256": file.sha256})
    if type(file.bytes) is not int:
        raise TypeError("a size is not an integer")
    return file


def _texts(value: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(text) for name, text in value.items()}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not text")
    return value


def store_digests(folder: Path) -> dict[str, str]:
    """Digests of the small files of the array store of a checkpoint, by their paths below its folder."""
    return {
        path.relative_to(folder).as_posix(): fmt.digest(path.read_bytes())
        for path in sorted((folder / fmt.PARAMS).rglob("*"))
        if path.is_file() and path.stat().st_size <= SMALL_FILE_BYTES
    }


def failures(checkpoint: fmt.Checkpoint) -> list[str]:
    """Compares a checkpoint's lock, marker and small files with one another.

    Returns:
      One sentence for each thing that is damaged. A checkpoint from before there were locks has only its marker's
      digests.
    """
    found = [_file_failure(checkpoint.path / name, digest) for name, digest in checkpoint.file_digests.items()]
    path = checkpoint.path / LOCK_FILE
    if LOCK_FILE not in checkpoint.file_digests:
        # A lock that the marker does not know of: one of the two was changed.
        found.append(f"{checkpoint.path / fmt.MARKER} does not list {LOCK_FILE}" if path.exists() else None)
        return [f for f in found if f]
    found.append(_marker_failure(checkpoint.path / fmt.MARKER))
    try:
        value = fmt.read_json(path)
        lock = _parsed(value, path)
    except CheckpointError as e:
        return [f for f in (*found, e.message) if f]
    if lock.files != {n: d for n, d in checkpoint.file_digests.items() if n != LOCK_FILE}:
        found.append(f"{path} and {fmt.MARKER} list other files or digests")
    if lock.source != checkpoint.source:
        found.append(f"{path} and {fmt.MARKER} name different sources")
    digests = {name: t.digest for name, t in checkpoint.tensors.items()}
    found += [
        f"{path}: tensor {name} has digest {lock.tensors.get(name)}, the checkpoint's metadata say {digests.get(name)}"
        for name in sorted(digests.keys() | lock.tensors.keys())
        if digests.get(name) != lock.tensors.get(name)
    ]
    found += [_file_failure(checkpoint.path / name, digest) for name, digest in value["store"].items()]
    return [f for f in found if f]


def _file_failure(path: Path, expected: Any) -> str | None:
    try:
        if not path.is_file():  # a device may have no end
            return f"{path} is missing"
        found = fmt.digest(path.read_bytes())
    except (OSError, ValueError) as e:  # ValueError: no file can have such a name
        return f"{path} cannot be read: {e}"
    return None if found == expected else f"{path} has digest {found}, expected {expected}"


def _marker_failure(path: Path) -> str | None:
    value = json.loads(path.read_text(encoding="utf-8"))
    found = value.pop("digest", None)
    expected = marker_digest(value)
    return None if found == expected else f"{path} has digest {expected}, expected {found}"


def marker_digest(marker: Mapping[str, Any]) -> str:
    """Digest of llama_jax.json itself: nothing else is written after it that could hold one."""
    return fmt.digest(json.dumps(marker, sort_keys=True).encode())
