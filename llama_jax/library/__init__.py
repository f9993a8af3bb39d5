"""Model names: the ways a user may name a model, and the cache of converted checkpoints behind them.

A model is a folder of this package's own format, a Hugging Face folder, a GGUF file, `org/name` of the Hugging Face hub
(with `@revision`), or the name of the default model. All but the first are converted once, into the cache. The network
is used for a hub name that is not complete on this machine, and for the default model where its package is not
installed, once somebody has agreed (`network`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from llama_jax.checkpoint.format import Progress, is_checkpoint, open_checkpoint
from llama_jax.errors import ModelNotFound, RequestError, did_you_mean
from llama_jax.folders import CACHE_VARIABLE, cache_dir
from llama_jax.library import bundled, hub, hub_cache
from llama_jax.library.conversion import check_source, convert_once
from llama_jax.library.converted import (
    Notify,
    by_name,
    checkpoints,
    converted_from_hub,
    default_path,
    hub_path,
    local_path,
)
from llama_jax.library.listing import Download, ModelInfo, list_downloads, list_models

__all__ = [
    "CACHE_VARIABLE",
    "DEFAULT_MODEL",
    "Download",
    "Found",
    "ModelInfo",
    "Notify",
    "Pulled",
    "cache_dir",
    "check_source",
    "fetch_source",
    "find",
    "list_downloads",
    "list_models",
    "locate",
    "pull",
    "resolve",
]

DEFAULT_MODEL = bundled.NAME

_MAX_NAME = 4096


@dataclass(frozen=True)
class Pulled:
    """The result of `pull`.

    Attributes:
      name: the name that was requested.
      source: folder or file of the source, as it was downloaded.
      checkpoint: the converted checkpoint, None if no conversion was requested.
      revision: commit (hub), or digest of the file (default model).
      licence: as stated by its source.
      nbytes: of the source's files.
      fresh: whether the hub was asked; False if it could not be reached and a copy on this machine is used.
    """

    name: str
    source: Path
    checkpoint: Path | None
    revision: str
    licence: str | None
    nbytes: int
    fresh: bool


@dataclass(frozen=True)
class Found:
    """The location of a model.

    Attributes:
      path: a checkpoint of this package, or a source in another format.
      converted: folder for the source's conversion, existing or not; None if `path` is a checkpoint.
      name, revision: of the source, if more is known of them than its path.
    """

    path: Path
    converted: Path | None = None
    name: str | None = None
    revision: str | None = None


def resolve(
    name: str | Path = DEFAULT_MODEL, *, progress: Progress | None = None, notify: Notify | None = None
) -> Path:
    """Finds a model and makes sure that it can be loaded, converting it into the cache if necessary.

    Args:
      name: a path, `org/name[@revision]` of the hub, the default model's name, or a name that `list_models` gives.
      progress: called during a download and a conversion.
      notify: called before a download or a conversion; writes to standard error when None.

    Returns:
      A checkpoint folder for `llama_jax.checkpoint.load_params`.

    Raises:
      RequestError: the name is empty, too long, or holds a NUL.
      ModelNotFound, GatedModel: no such model, or its owner has not let you in; or nobody agreed to fetch the default
        model.
      NetworkError: it would have to be downloaded, and the network cannot be reached, or LLAMA_JAX_OFFLINE is set.
      CheckpointError, TokenizerError, UnsupportedModel: it is damaged, or requires something unsupported.
      StorageError, DoesNotFit: the cache cannot be written.
    """
    if str(name) == DEFAULT_MODEL and is_checkpoint(default_path()):
        return default_path()  # the file that it was made from need not be there any more
    return _converted(find(name, progress=progress, notify=notify), progress, notify or _stderr)


def find(name: str | Path = DEFAULT_MODEL, *, progress: Progress | None = None, notify: Notify | None = None) -> Found:
    """Finds a model, downloading it if necessary; converts nothing.

    Args, Raises: as `resolve`.
    """
    name, say = _checked(name), notify or _stderr
    if name == DEFAULT_MODEL:
        return Found(_default_gguf(say), default_path(), bundled.NAME, f"sha256:{bundled.GGUF_SHA256}")
    if (local := _existing(name)) is not None:
        return _local(local)
    if (path := by_name(name)) is not None:
        return Found(path)
    if _is_hub_name(name):
        repo, revision = hub.split_name(name)
        here = hub_cache.complete_snapshot(repo, revision)
        if here is None and (converted := converted_from_hub(repo, revision)):
            # Its download was removed once it had been converted.
            return Found(converted[0])
        return _from_hub(repo, here or hub.snapshot(repo, revision, say, progress))
    raise _unknown(name)


def fetch_source(name: str, *, progress: Progress | None = None, notify: Notify | None = None) -> tuple[Path, str]:
    """The folder or file of a hub model or the default model, downloaded if necessary, and its commit or digest.

    Raises:
      ModelNotFound: it is neither.
      LlamaJaxError: as `resolve` does.
    """
    say = notify or _stderr
    if name == DEFAULT_MODEL:
        return _default_gguf(say), f"sha256:{bundled.GGUF_SHA256}"
    if not _is_hub_name(name):
        raise ModelNotFound(f"no file or folder at {name}", hint="check the path")
    snapshot = hub.snapshot(*hub.split_name(name), say, progress)
    return _source_in(snapshot), snapshot.name


def locate(name: str | Path = DEFAULT_MODEL) -> Path:
    """Finds a model on this machine as it is: a checkpoint, or the folder or file of a source. Converts nothing.

    Raises:
      RequestError: the name is empty, too long, or holds a NUL.
      ModelNotFound: it is not on this machine.
    """
    name = _checked(name)
    if name == DEFAULT_MODEL:
        if is_checkpoint(default_path()):
            return default_path()
        if (gguf := bundled.find(cache_dir())) is None:
            raise ModelNotFound(f"{name} is not on this machine", hint=f"run `llama-jax pull {name}`")
        return gguf
    if (local := _existing(name)) is not None:
        return local if is_checkpoint(local) else _source_in(local)
    if (path := by_name(name)) is not None:
        return path
    if _is_hub_name(name):
        repo, revision = hub.split_name(name)
        here = hub_cache.complete_snapshot(repo, revision)
        if here is None:
            if converted := converted_from_hub(repo, revision):
                return converted[0]
            raise hub.not_here(repo, revision)
        path = hub_path(repo, here.name)
        return path if is_checkpoint(path) else _source_in(here)
    raise _unknown(name)


def check_name(name: str) -> None:
    """Checks that a name could be a model's, on this machine or on the hub, which is not asked.

    Raises:
      RequestError: it is empty, too long, or holds a NUL.
      ModelNotFound: it is neither.
    """
    name = _checked(name)
    if name != DEFAULT_MODEL and _existing(name) is None and by_name(name) is None and not _is_hub_name(name):
        raise _unknown(name)


def pull(
    name: str = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    convert: bool = True,
    progress: Progress | None = None,
    notify: Notify | None = None,
) -> Pulled:
    """Downloads a model, checks it, and converts it into the cache.

    Unlike `resolve` it asks the hub for the revision's present commit, and checks the files that are here already.

    Args:
      name: `org/name[@revision]` of the hub, or the default model's name.
      revision: branch, tag or commit, if the name gives none.
      convert: whether to make a checkpoint of it.
      progress, notify: as in `resolve`.

    Raises:
      RequestError: it is no name of the hub.
      LlamaJaxError: as `resolve` does.
    """
    say = notify or _stderr
    if name == DEFAULT_MODEL:
        if revision is not None:
            raise RequestError(f"{name} has one revision", param="revision", hint="leave it out")
        gguf = _default_gguf(say, ask=False)  # who pulls it has agreed
        path = resolve(name, progress=progress, notify=say) if convert else None
        size = gguf.stat().st_size
        return Pulled(name, gguf, path, f"sha256:{bundled.GGUF_SHA256}", bundled.LICENCE, size, True)
    repo, revision = hub.split_name(name, revision)
    folder, offer = hub.pull(repo, revision, say, progress, convert=convert)
    path = _converted(_from_hub(repo, folder), progress, say) if convert else None
    if offer is not None:
        return Pulled(name, folder, path, offer.commit, offer.licence, offer.nbytes, True)
    licence = open_checkpoint(path).source.licence if path else None
    nbytes = sum(s.nbytes for s in hub_cache.snapshots(repo) if s.path == folder)
    return Pulled(name, folder, path, folder.name, licence, nbytes, False)


def _stderr(message: str) -> None:
    print(message, file=sys.stderr)


def _checked(name: str | Path) -> str:
    name = str(name)
    if not name.strip() or len(name) > _MAX_NAME or "\0" in name:
        raise RequestError(
            f"a model name of {len(name)} characters" + (" with a NUL in it" if "\0" in name else ""),
            param="model",
            hint="give a path, org/name of the hub, or a name from `llama-jax list`",
        )
    return name


def _is_hub_name(name: str) -> bool:
    return hub.NAME.fullmatch(name) is not None and ".." not in name


def _unknown(name: str) -> ModelNotFound:
    return ModelNotFound(
        f"no model {name!r}: neither a file or folder, nor a hub name (org/name), nor in the cache",
        hint=f"{did_you_mean(name, _names())} see `llama-jax list`; the default is {DEFAULT_MODEL}".lstrip(),
    )


def _names() -> list[str]:
    return [DEFAULT_MODEL, *(path.name for path in checkpoints())]


def _default_gguf(say: Notify, *, ask: bool = True) -> Path:
    gguf = bundled.find(cache_dir()) or bundled.fetch(cache_dir(), say, ask=ask)
    bundled.check(gguf)
    return gguf


def _existing(name: str) -> Path | None:
    path = Path(name)
    try:
        path = path.expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        # A part of the name is too long for a path, or `~user` is nobody.
        return None


def _local(path: Path) -> Found:
    if is_checkpoint(path):
        return Found(path)
    source = _source_in(path)
    return Found(source, local_path(source))


def _source_in(path: Path) -> Path:
    """The part of a path that is to be converted; see `llama_jax.convert.folders.model_in`."""
    from llama_jax.convert.folders import model_in

    return model_in(path)


def _from_hub(repo: str, snapshot: Path) -> Found:
    return Found(_source_in(snapshot), hub_path(repo, snapshot.name), repo, snapshot.name)


def _converted(found: Found, progress: Progress | None, say: Notify) -> Path:
    if found.converted is None:
        return found.path
    return convert_once(
        found.path,
        found.converted,
        progress,
        say,
        warn_larger=found.name != DEFAULT_MODEL,  # it is small, and its numbers are to be exact
        name=found.name,
        revision=found.revision,
    )
