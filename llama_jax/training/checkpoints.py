"""Checkpoints of a run: Orbax folders with a digest of every array, which get their name when they are complete."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax import disk
from llama_jax.checkpoint.format import digest
from llama_jax.errors import CheckpointError, RequestError
from llama_jax.training.step import State

_STEP = re.compile(r"\d{8}")
_UNFINISHED = ".orbax-checkpoint-tmp"
_NOTE = "llama_jax"


def latest(folder: Path) -> int | None:
    """The last step that the folder has a checkpoint of."""
    return max(_steps(folder), default=None)


def save(folder: Path, state: State, about: Mapping[str, Any], *, keep: int) -> Path:
    """Writes the checkpoint of a state, then removes all but the last `keep`.

    Args:
      about: a JSON object that `restore` compares.

    Raises:
      StorageError, DoesNotFit: it cannot be written.
    """
    from orbax.checkpoint import v1 as ocp

    arrays = _arrays(state)
    path = folder / f"{int(state.step):08}"
    note = {"about": dict(about), "digests": {name: _digest(x) for name, x in arrays.items()}}
    with disk.storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        disk.check_space(path, sum(x.nbytes for x in arrays.values()))
        ocp.save(path.absolute(), arrays, overwrite=True, custom_metadata={_NOTE: json.dumps(note)})
        stale = [f"{step:08}" for step in sorted(_steps(folder))[:-keep]]
        for name in stale + [name for name in os.listdir(folder) if _UNFINISHED in name]:
            disk.remove(folder / name)
    return path


def abstract(state: State) -> State:
    """Shapes, dtypes and placement of a state's arrays, which need not exist any more."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def restore(folder: Path, step: int, like: State, about: Mapping[str, Any]) -> State:
    """The state of a checkpoint.

    Args:
      like: the `abstract` of a state of the same shapes, placed as the result will be.
      about: as it was given to `save`.

    Raises:
      RequestError: the checkpoint is of a run with other settings, data or base weights.
      CheckpointError: it is damaged, or of another model.
    """
    from orbax.checkpoint import v1 as ocp

    path = folder / f"{step:08}"
    arrays = _arrays(like)
    try:
        note = json.loads(ocp.metadata(path.absolute()).custom_metadata[_NOTE])
        # Earlier versions noted less.
        if other := [name for name in about if note["about"].get(name, about[name]) != about[name]]:
            raise RequestError(
                f"{path} is of a run with other {' and '.join(other)}",
                param="output",
                hint="choose another folder for output, or remove this one",
            )
        found = ocp.load(path.absolute(), arrays)
        if wrong := [name for name, x in found.items() if _digest(x) != note["digests"].get(name)]:
            raise ValueError(f"the digest of {wrong[0]} differs")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {(str(error) or repr(error)).splitlines()[0]}",
            hint="remove it, and the run resumes from the one before",
        ) from error
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in arrays])


def _arrays(state: State) -> dict[str, Any]:
    """The arrays of a state by the path of each."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}


def _digest(x: Any) -> str:
    return digest(np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8).data)


def _steps(folder: Path) -> list[int]:
    names = os.listdir(folder) if folder.is_dir() else []
    return [int(name) for name in names if _STEP.fullmatch(name)]
