"""Numbers of the model that a run starts from, which losses compare with: computed once, kept in the run's folder."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import disk
from llama_jax.training.batch import Batch
from llama_jax.training.packing import Example, Pair, Rows, Text


def measure(
    rows: Rows,
    texts: Sequence[Example],
    steps: int | None,
    entropies: Callable[[Batch], Any],
    counted: Callable[[int, int, str], None] | None = None,
) -> np.ndarray:
    """The `entropies` of all texts, one after the other: float32 [tokens], NaN for texts that no step has.

    Args:
      rows: of the texts.
      steps: of the run; None for all that see each text once.
      entropies: of a batch, float32 [..., length].
      counted: called with steps done, steps in all and "steps".
    """
    found: dict[Text, np.ndarray] = {}
    total = rows.steps(1) if steps is None else min(steps, rows.steps(1))
    for step in range(total):
        if counted is not None:
            counted(step, total, "steps")
        batch, _ = rows.batch(step)
        values = np.asarray(entropies(batch)).reshape(batch.tokens.shape)
        found |= {place.text: values[place.row, place.where] for place in rows.places(step)}
    missing = (np.full(len(text.tokens), np.nan, np.float32) for text in _flat(texts))
    return np.concatenate([found.get(text, nan) for text, nan in zip(_flat(texts), missing, strict=True)])


def with_reference(texts: Sequence[Example], values: np.ndarray) -> list[Example]:
    """The texts, each with its part of what `measure` returned."""
    ends = np.cumsum([len(text.tokens) for text in _flat(texts)])
    own = iter(np.split(values, ends[:-1]))

    def of(text: Text) -> Text:
        return dataclasses.replace(text, reference=next(own))

    return [of(x) if isinstance(x, Text) else Pair(of(x.chosen), of(x.rejected)) for x in texts]


def write(path: Path, about: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays with a JSON object that `read` compares; StorageError if it cannot."""
    file = io.BytesIO()
    held: dict[str, Any] = {"about": np.asarray(json.dumps(dict(about), sort_keys=True)), **arrays}
    np.savez(file, **held)
    with disk.storage_errors(path):
        disk.write_file(path, file.getvalue())


def read(path: Path, about: Mapping[str, str]) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if there is none, or it is damaged or of another run."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            found = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return found if str(found.pop("about", "")) == json.dumps(dict(about), sort_keys=True) else None


def _flat(texts: Sequence[Example]) -> list[Text]:
    return [text for example in texts for text in example.texts]
