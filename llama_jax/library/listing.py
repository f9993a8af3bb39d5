"""Lists the models on this machine: converted ones, and downloads from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llama_jax.checkpoint.format import MARKER, open_checkpoint
from llama_jax.errors import LlamaJaxError
from llama_jax.library import bundled, hub_cache
from llama_jax.library.converted import checkpoints, default_path, disk_bytes, hub_path


@dataclass(frozen=True)
class ModelInfo:
    """One model that can be used without a download or a conversion, or the default model.

    Attributes:
      name: what to say for it.
      path: its checkpoint, None if it has not been converted yet.
      source: kind and name of what it was converted from.
      dtype, nbytes: of the weights on disk; None and 0 before conversion.
      licence: as its source states it.
      error: why it cannot be used, empty if it can.
      revision: the source's commit or digest, where it is known.
      disk_bytes: of all files of the checkpoint.
      converted: when it was, in seconds since 1970; None before.
    """

    name: str
    path: Path | None
    source: str
    dtype: str | None = None
    nbytes: int = 0
    licence: str | None = None
    error: str = ""
    revision: str | None = None
    disk_bytes: int = 0
    converted: float | None = None


@dataclass(frozen=True)
class Download:
    """A model in the hub's cache that has not been converted.

    Attributes:
      name: what to say for it, `org/name` or `org/name@revision`.
      path: folder of its files.
      commit: the revision.
      complete: whether all of its weights are there.
      nbytes: of its files.
      modified: when it was downloaded, in seconds since 1970.
      licence: as its model card states it.
    """

    name: str
    path: Path
    commit: str
    complete: bool
    nbytes: int
    modified: float
    licence: str | None


def list_models() -> tuple[ModelInfo, ...]:
    """The default model and everything in the cache, by name. Damaged ones are listed with their error."""
    default = ModelInfo(
        bundled.NAME,
        None,
        f"gguf {bundled.GGUF}",
        licence=bundled.LICENCE,
        revision=f"sha256:{bundled.GGUF_SHA256}",
    )
    found = {bundled.NAME: default}
    for folder in checkpoints():
        name = bundled.NAME if folder == default_path() else folder.name
        size, converted = disk_bytes(folder), (folder / MARKER).stat().st_mtime
        try:
            c = open_checkpoint(folder)
        except LlamaJaxError as e:
            found[name] = ModelInfo(name, folder, "unknown", error=e.message, disk_bytes=size, converted=converted)
            continue
        found[name] = ModelInfo(
            name,
            folder,
            f"{c.source.kind} {c.source.name}",
            c.dtype,
            c.nbytes,
            c.source.licence,
            revision=c.source.revision,
            disk_bytes=size,
            converted=converted,
        )
    return tuple(found.values())


def list_downloads() -> tuple[Download, ...]:
    """Models in the hub's cache that this package can use and that have not been converted, complete or not."""
    converted = {path.name for path in checkpoints()}
    found = []
    for s in hub_cache.all_snapshots():
        if hub_path(s.repo, s.commit).name in converted or not hub_cache.is_supported(s.path):
            continue
        # Brings numpy, which a list without downloads does not need.
        from llama_jax.convert.hf_files import licence

        if "main" in s.refs:
            name = s.repo
        else:
            name = f"{s.repo}@{next(iter(s.refs), s.commit[:12])}"
        complete = hub_cache.is_complete(s.path)
        found.append(Download(name, s.path, s.commit, complete, s.nbytes, s.modified, licence(s.path)))
    return tuple(found)
