"""The files of a Hugging Face folder: where they are, which of them hold weights, and what is missing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Set
from pathlib import Path

from llama_jax.checkpoint.format import CONFIG, CORRECT, read_json
from llama_jax.checkpoint.source import some
from llama_jax.convert.folders import LAYOUTS, MISSING, SINGLE, no_model
from llama_jax.errors import CheckpointError, LlamaJaxError

AGAIN = "the folder is damaged or was not downloaded completely; get it again"


def weight_shards(path: Path) -> dict[str, set[str]]:
    """The weight files of a folder, each with the tensors that the index promises in it.

    Raises:
      LlamaJaxError: there are none, or some of them are missing; says what is there instead.
    """
    for single, index in LAYOUTS:
        if (path / single).exists():
            return {single: set()}
        if (path / index).exists():
            shards = _indexed(path, index)
            if missing := [name for name in shards if not os.path.exists(path / name)]:
                more = f", and {len(missing) - 1} more of the {len(shards)} files that {index} names"
                inside(path, missing[0], more if len(missing) > 1 else "")
            return shards
    raise no_model(path)


def _indexed(path: Path, index: str) -> dict[str, set[str]]:
    where = read_json(inside(path, index), hint=CORRECT).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        raise CheckpointError(f"{path / index} has no valid weight_map", hint=AGAIN)
    shards: dict[str, set[str]] = {}
    for tensor, file in where.items():
        shards.setdefault(file, set()).add(tensor)
    return dict(sorted(shards.items()))


def check_promised(path: Path, promised: set[str], found: Set[str], shards: Mapping[str, set[str]]) -> None:
    """Raises CheckpointError if a file lacks a tensor that the index promises in it; says which file it seems to be.

    Args:
      promised: the tensors that should be in it.
      found: those that are.
      shards: what the index promises in every file.
    """
    if absent := promised - found:
        lacks = f"{path} lacks tensor {some(absent)}, which the index promises"
        if (other := next((name for name, tensors in shards.items() if tensors == found), None)) is not None:
            raise CheckpointError(
                f"{lacks}; by its tensors it is {other}",
                hint=f"the parts were mixed up: give each its own name, and get {path.name} if it is not among them",
            )
        raise CheckpointError(lacks, hint=AGAIN)


def inside(folder: Path, name: str, more: str = "") -> Path:
    """A file of the folder. Refuses names and links that point outside it.

    In the cache of huggingface_hub the files of a snapshot are links to `blobs` of the same model, which is fine; so is
    the store of contents that its models share.

    Args:
      more: goes behind the message where the file is missing.
    """
    path = folder / name
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed += [root.parent.parent / "blobs", root.parents[2] / "blobs"]
    try:
        resolved, there = path.resolve(), path.is_file()
    except (OSError, RuntimeError, ValueError) as e:  # too long, a loop of links, a NUL or lone surrogate in it
        raise CheckpointError(f"{folder}: {name!r} cannot be looked up ({type(e).__name__})", hint=AGAIN) from e
    if not any(resolved.is_relative_to(a) for a in allowed) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{folder}: {name!r} leads out of the folder", hint="a model's files must lie in its own folder"
        )
    if not there:
        raise CheckpointError(f"{path} is missing{more}", hint=MISSING)
    return path


def licence(path: Path) -> str | None:
    """The licence that the model card (README.md, YAML between two lines of dashes) names."""
    try:
        with (path / "README.md").open(encoding="utf-8") as card:
            head = card.read(20_000)
    except (OSError, ValueError):
        return None
    parts = head.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    found = re.search(r"^license(?:_name)?:\s*([\w.\-]+)\s*$", parts[1], re.MULTILINE)
    return found[1] if found else None


def is_huggingface(path: Path) -> bool:
    """Returns whether a folder looks like a Hugging Face model."""
    return (path / CONFIG).is_file()


def required_files(path: Path) -> list[Path]:
    """The weight files of a folder, existing or not; used to check whether a download is complete."""
    try:
        return [path / name for name in weight_shards(path)]
    except LlamaJaxError:
        return [path / SINGLE]
