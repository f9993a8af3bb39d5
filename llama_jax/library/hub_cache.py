"""The Hugging Face hub's cache on this machine, which other programs share: listing its contents, and removing a model.

Its layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_jax.errors import LlamaJaxError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PREFIX = "models--"


@dataclass(frozen=True)
class Snapshot:
    """One commit of a hub model in the hub's cache.

    Attributes:
      path: folder of its files.
      refs: branches and tags that are known to be this commit.
      nbytes: of its files.
      modified: seconds since 1970, of its latest change.
    """

    repo: str
    commit: str
    path: Path
    refs: tuple[str, ...]
    nbytes: int
    modified: float


def root() -> Path:
    """The folder of the hub's cache, which may not exist yet."""
    # huggingface_hub knows the variables that move it.
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def repo_folder(repo: str) -> Path:
    """The folder of a model, there or not."""
    return root() / (_PREFIX + repo.replace("/", "--"))


def lock_path(repo: str) -> Path:
    """Held while this program downloads or removes a model."""
    return root() / ".locks" / repo_folder(repo).name / "llama_jax.lock"


def complete_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of a model on this machine if its configuration and all of its weights are there; asks no network."""
    for found in snapshots(repo):
        if revision is None:
            wanted = "main" in found.refs
        else:
            wanted = revision in found.refs or (len(revision) >= 7 and found.commit.startswith(revision))
        if wanted and is_complete(found.path):
            return found.path
    return None


def is_complete(path: Path) -> bool:
    """Returns whether a snapshot can be converted: no weights are missing, and all other files came before them."""
    from llama_jax.convert.gguf_parts import parts_by_name
    from llama_jax.convert.hf_files import is_huggingface, required_files

    try:
        if is_huggingface(path) and all(file.is_file() for file in required_files(path)):
            return True
        weights = [p for p in path.iterdir() if p.suffix.lower() in (".gguf", ".pth")]
        return bool(weights) and all(part.is_file() for p in weights for part in parts_by_name(p))
    except (OSError, LlamaJaxError):
        return False


def all_snapshots() -> list[Snapshot]:
    """Every commit of every model in the hub's cache, by name."""
    try:
        folders = sorted(p.name for p in root().iterdir() if p.name.startswith(_PREFIX) and p.is_dir())
    except OSError:
        return []
    names = [name.removeprefix(_PREFIX).split("--") for name in folders]
    return [found for parts in names if len(parts) == 2 for found in snapshots("/".join(parts))]


def snapshots(repo: str) -> list[Snapshot]:
    """Every commit of a model in the hub's cache."""
    folder = repo_folder(repo)
    refs: dict[str, list[str]] = {}
    for file in (folder / "refs").rglob("*"):
        try:
            commit = file.read_text().strip()
        except (OSError, ValueError):
            continue
        refs.setdefault(commit, []).append(file.relative_to(folder / "refs").as_posix())
    try:
        paths = sorted(p for p in (folder / "snapshots").iterdir() if _COMMIT.fullmatch(p.name))
    except OSError:
        return []
    return [_snapshot(repo, path, refs.get(path.name, ())) for path in paths]


def _snapshot(repo: str, path: Path, refs: Sequence[str]) -> Snapshot:
    sizes, times = [0], [0.0]
    for file in path.rglob("*"):
        try:
            stat = file.stat()
        except OSError:
            continue  # a link to a content that is gone
        if file.is_file():
            sizes.append(stat.st_size)
            times.append(stat.st_mtime)
    return Snapshot(repo, path.name, path, tuple(sorted(refs)), sum(sizes), max(times))


def is_supported(path: Path) -> bool:
    """Returns whether a snapshot is of a family that this package computes, as far as its config.json says."""
    from llama_jax.config import config_from_hf

    try:
        config_from_hf(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return any(p.suffix.lower() == ".gguf" for p in path.iterdir())
    except (OSError, ValueError, RecursionError, LlamaJaxError):
        return False
    return True


def delete(found: Snapshot) -> int:
    """Removes a snapshot, with every content that no other snapshot uses; returns the bytes that were freed."""
    import huggingface_hub

    strategy = huggingface_hub.scan_cache_dir(root()).delete_revisions(found.commit)
    strategy.execute()
    return int(strategy.expected_freed_size)
