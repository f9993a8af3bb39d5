"""The cache of converted models: its location, and the names of models in it.

    <cache>/models/<name>/      one checkpoint a model; writers put `<name>.partial` and `<name>.lock` beside it
    <cache>/downloads/          the default model's file, where its package is not installed

Downloads from the Hugging Face hub are in the hub's own cache (`llama_jax.library.hub_cache`), which other programs
share.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from llama_jax.checkpoint.format import FORMAT_VERSION, TEMPLATES, digest, is_checkpoint, open_checkpoint
from llama_jax.errors import LlamaJaxError
from llama_jax.folders import cache_dir
from llama_jax.library import bundled

Notify = Callable[[str], None]
"""Called with a sentence for the user before something slow or large begins."""

MADE_AS = f"v{FORMAT_VERSION}.2"
"""Ending of names in the cache. The last number rises when a source comes to be read in another way, so that what was
converted before is converted again."""
REMOVED = ".llama_jax-removed"
"""Ending of a checkpoint whose removal has begun."""
UNFINISHED = (".partial", ".llama_jax-old", REMOVED)
"""Endings of what is no model in the cache, though it may look like one."""

_SOURCE_SUFFIXES = (".safetensors", ".bin", ".pth", ".json", ".gguf", ".model", ".jinja")
_PLAIN = re.compile(r"[\w.\-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


def models_dir() -> Path:
    """Folder that holds one checkpoint a model."""
    return cache_dir() / "models"


def default_path() -> Path:
    """The path of the default model's checkpoint once it has been converted."""
    return models_dir() / f"{bundled.NAME}-{bundled.VERSION}-{MADE_AS}"


def hub_path(repo: str, commit: str) -> Path:
    """The path of a hub model's checkpoint, at a commit, once it has been converted."""
    return models_dir() / f"{_hub_stem(repo)}-{commit[:12]}-{MADE_AS}"


def local_path(source: Path) -> Path:
    """The path of a local folder's or file's checkpoint; it changes when a file of the source changes."""
    if source.is_file():
        files = {source.name: source}
    else:
        found = (*source.iterdir(), *(source / TEMPLATES).glob("*.jinja"))
        files = {str(p.relative_to(source)): p for p in sorted(found) if p.suffix in _SOURCE_SUFFIXES and p.is_file()}
    parts = [str(source.resolve())]
    for name, file in files.items():
        stat = file.stat()
        parts.append(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}")
    stem = re.sub(r"[^A-Za-z0-9.\-]+", "-", source.resolve().stem).strip("-.")[:64] or "model"
    return models_dir() / f"{stem.lower()}-{digest(chr(10).join(parts).encode())[-12:]}-{MADE_AS}"


def checkpoints() -> list[Path]:
    """Every finished checkpoint in the cache, by name."""
    try:
        return sorted(p for p in models_dir().iterdir() if not p.name.endswith(UNFINISHED) and is_checkpoint(p))
    except OSError:
        # No cache yet, or one that cannot be read: nothing has been converted for this user.
        return []


def by_name(name: str) -> Path | None:
    """The checkpoint that `list_models` lists under a name."""
    if not _PLAIN.fullmatch(name) or ".." in name or name.endswith(UNFINISHED):
        return None
    path = models_dir() / name
    return path if is_checkpoint(path) else None


def converted_from_hub(repo: str, revision: str | None = None) -> list[Path]:
    """The checkpoints of a hub model, the newest first.

    Args:
      repo: `org/name`.
      revision: only those of this commit (seven of its digits or more); all when None. The name of a branch or tag
        matches none, since a checkpoint knows its commit only.
    """
    found = []
    for path in checkpoints():
        # The folder's name saves opening the others; it alone could be that of another model.
        if not path.name.startswith(_hub_stem(repo) + "-"):
            continue
        try:
            source = open_checkpoint(path).source
        except LlamaJaxError:
            continue
        commit = source.revision or ""
        if source.name == repo and (
            revision is None or (_COMMIT.fullmatch(revision) is not None and commit.startswith(revision))
        ):
            found.append(path)
    return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)


def _hub_stem(repo: str) -> str:
    return repo.replace("/", "--")


def disk_bytes(path: Path) -> int:
    """Bytes that a file, or all files below a folder, take up; links count as nothing."""
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        try:
            if file.is_file() and not file.is_symlink():
                total += file.stat().st_size
        except OSError:
            continue  # it went away meanwhile
    return total
