"""Removes models: only files in the caches that are ours and are not being written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_jax.checkpoint.format import is_checkpoint
from llama_jax.checkpoint.leftovers import leftovers
from llama_jax.disk import file_lock, is_locked, lock_of, storage_errors
from llama_jax.disk import remove as remove_path
from llama_jax.errors import ModelNotFound, RequestError, StorageError
from llama_jax.folders import cache_dir
from llama_jax.library import bundled, hub, hub_cache
from llama_jax.library.converted import (
    REMOVED,
    by_name,
    converted_from_hub,
    default_path,
    disk_bytes,
    models_dir,
)


@dataclass(frozen=True)
class Removable:
    """Something that `remove` takes away.

    Attributes:
      kind: "model", "download" (of the hub, or the default model's file) or "leftover".
      name: what the user calls it.
      path: the folder or file.
      nbytes: what it takes up.
      lock: the file whose lock a process holds while it writes there.
      snapshot: of a download, its snapshot in the hub's cache.
    """

    kind: str
    name: str
    path: Path
    nbytes: int
    lock: Path
    snapshot: hub_cache.Snapshot | None = None


def find_models(name: str, *, downloads: bool = False) -> list[Removable]:
    """The effects of removing a model.

    Args:
      name: a name from `list_models`, or `org/name[@revision]` for all that was made of it.
      downloads: whether its download is meant as well.

    Raises:
      ModelNotFound: nothing of this name is in the cache.
      RequestError: it is a path, and not the name of something in the cache.
    """
    found: list[Removable] = []
    if name == bundled.NAME:
        if is_checkpoint(default_path()):
            found.append(_model(name, default_path()))
        kept = bundled.downloads_dir(cache_dir()) / bundled.GGUF
        if downloads and kept.is_file():
            found.append(Removable("download", name, kept, kept.stat().st_size, bundled.lock_path(cache_dir())))
    elif (path := by_name(name)) is not None:
        found.append(_model(name, path))
    elif hub.NAME.fullmatch(name) and ".." not in name:
        repo, revision = hub.split_name(name)
        found += [_model(path.name, path) for path in _of_hub(repo, revision)]
        if downloads:
            found += _downloads(repo, revision)
    elif Path(name).exists():
        raise RequestError(
            f"{name} is a path; only models in the cache are removed, by their names",
            param="name",
            hint="see `llama-jax list`; a folder of your own you can delete yourself",
        )
    if not found:
        also = "" if downloads else "; --downloads removes what was only downloaded"
        raise ModelNotFound(f"nothing called {name!r:.300} is in the cache", hint=f"see `llama-jax list`{also}")
    return found


def _of_hub(repo: str, revision: str | None) -> list[Path]:
    if revision is None:
        return converted_from_hub(repo)
    commits = {s.commit for s in hub_cache.snapshots(repo) if revision in s.refs} or {revision}
    return [path for commit in sorted(commits) for path in converted_from_hub(repo, commit)]


def _downloads(repo: str, revision: str | None) -> list[Removable]:
    lock = hub_cache.lock_path(repo)
    found = [
        Removable("download", f"{repo}@{s.commit[:12]}", s.path, s.nbytes, lock, s)
        for s in hub_cache.snapshots(repo)
        if revision is None or revision in s.refs or s.commit.startswith(revision)
    ]
    if revision is None:
        parts = sorted((hub_cache.repo_folder(repo) / "blobs").glob("*.incomplete"))
        found += [Removable("download", f"{repo} (unfinished)", p, p.stat().st_size, lock) for p in parts]
    return found


def find_leftovers() -> list[Removable]:
    """Leftovers in the cache of interrupted conversions, downloads and removals that no process is working on."""
    paths = leftovers(models_dir())
    with contextlib.suppress(OSError):
        paths += [path for path in models_dir().iterdir() if path.name.endswith(REMOVED)]
    # Each has the name of the checkpoint that was being written (or removed), and an ending.
    found = {path: lock_of(path.with_suffix("")) for path in paths}
    found |= dict.fromkeys(bundled.leftovers(cache_dir()), bundled.lock_path(cache_dir()))
    return [
        Removable("leftover", path.name, path, disk_bytes(path), lock)
        for path, lock in sorted(found.items())
        if not path.is_symlink() and not is_locked(lock)
    ]


def _model(name: str, path: Path) -> Removable:
    return Removable("model", name, path, disk_bytes(path), lock_of(path))


def remove(what: Sequence[Removable]) -> int:
    """Removes what `find_models` and `find_leftovers` found.

    Returns:
      Bytes that were freed. Contents that another snapshot of the hub's cache uses stay and do not count.

    Raises:
      StorageError: something is being written by another process, or cannot be removed; what came before it is gone.
    """
    freed = 0
    for thing in what:
        with storage_errors(thing.path), _alone(thing):
            if thing.snapshot is not None:
                freed += hub_cache.delete(thing.snapshot)
            else:
                _remove_one(thing)
                freed += thing.nbytes
    return freed


def _remove_one(thing: Removable) -> None:
    path, inside = thing.path, hub_cache.root() if thing.path.name.endswith(".incomplete") else cache_dir()
    if path.is_symlink() or not path.resolve().is_relative_to(inside.resolve()):
        raise StorageError(f"{path} does not lie in the cache itself", hint="it is a link; remove it yourself")
    if thing.kind == "model":
        # Renamed first, so that a removal that is stopped half-way leaves no half checkpoint under its name.
        gone = path.with_name(path.name + REMOVED)
        remove_path(gone)
        path.rename(gone)
        path = gone
    remove_path(path)


@contextlib.contextmanager
def _alone(thing: Removable) -> Iterator[None]:
    """Keeps other processes from writing there meanwhile; refuses if one does already."""
    if is_locked(thing.lock):
        raise StorageError(
            f"{thing.path} is being written by another process", hint="wait for it, or stop it; then run again"
        )
    with file_lock(thing.lock):
        yield
