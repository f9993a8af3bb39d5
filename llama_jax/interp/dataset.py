"""Activations on disk: a folder of zarr v3 arrays, which any zarr library reads, and a description beside them.

    description.json     names, dtype, what they were made of, and how many texts and tokens are certain
    token_ids            int32 [tokens], all texts one after another
    text_ends            int64 [texts], where each text ends among the tokens
    layers.12.out, ...   [tokens, ...], a row for each token

Arrays may be longer than the description says, by what a run that was stopped had begun; the next one overwrites it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from llama_jax.disk import storage_errors, write_file
from llama_jax.errors import CheckpointError, RequestError, did_you_mean

FORMAT = 1
DESCRIPTION, TOKEN_IDS, TEXT_ENDS = "description.json", "token_ids", "text_ends"
CHUNK_BYTES = 4 << 20
"""Bytes of a chunk, about: a chunk is a file, and what a reader holds at least."""


@dataclass(frozen=True)
class Description:
    """Contents of description.json.

    Attributes:
      settings: what the activations depend on; only runs with the same may continue the folder.
      shapes: of a token's activation, by name; dtype: of all of them.
      texts, tokens: that are certain.
      digest: of the token ids of these texts.
    """

    settings: Mapping[str, Any]
    shapes: Mapping[str, list[int]]
    dtype: str
    texts: int = 0
    tokens: int = 0
    digest: str = ""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        with storage_errors(folder):
            write_file(folder / DESCRIPTION, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Description:
        """Raises CheckpointError if the folder holds no such dataset, or a damaged one."""
        try:
            found = cls(**json.loads((folder / DESCRIPTION).read_text()))
        except (OSError, ValueError, TypeError) as e:
            raise CheckpointError(
                f"{folder} holds no activations: {e}",
                hint="give the folder that record_activations wrote",
            ) from e
        if found.format != FORMAT:
            raise CheckpointError(
                f"{folder} has format {found.format}, this version reads {FORMAT}",
                hint="use the version of llama-jax that wrote it",
            )
        return found


def opened(folder: Path, name: str, shape: tuple[int, ...] = (), dtype: str = "", *, create: bool = False) -> Any:
    """One of the folder's arrays.

    Args:
      shape: of one row; dtype: of the array. Only used with `create`, for one that is not there.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}}
    options: dict[str, Any] = {"create": create, "open": not create}
    if create:
        size = np.dtype(ts.dtype(dtype).numpy_dtype).itemsize * int(np.prod(shape))
        rows = max(CHUNK_BYTES // max(size, 1), 1)
        options |= {"dtype": ts.dtype(dtype), "shape": [0, *shape]}
        options["chunk_layout"] = ts.ChunkLayout(chunk_shape=[rows, *shape])
    try:
        with storage_errors(folder):
            return ts.open(spec, **options).result()
    except ValueError as e:
        raise CheckpointError(f"{folder / name} cannot be read: {e}", hint="record the activations again") from e


class Activations:
    """A dataset of activations; nothing is read until it is asked for.

    Attributes:
      folder: where it is; description: what is in it.
    """

    def __init__(self, folder: Path, description: Description):
        self.folder, self.description = folder, description
        self._arrays: dict[str, Any] = {}

    def __repr__(self) -> str:
        d = self.description
        return f"Activations({self.folder}, {d.texts} texts, {d.tokens} tokens, {', '.join(self.names)})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.description.shapes)

    def __len__(self) -> int:
        """Tokens: rows of every array."""
        return self.description.tokens

    def __getitem__(self, name: str) -> Any:
        """Rows [tokens, ...] of an activation, or "token_ids", as a tensorstore array: index it as numpy's, and await
        the part with `.read().result()` or np.asarray.

        Raises:
          RequestError: it was not recorded.
        """
        if name not in (*self.names, TOKEN_IDS, TEXT_ENDS):
            raise RequestError(
                f"{self.folder} holds no activation {name!r}",
                param="name",
                hint=did_you_mean(name, self.names) or f"it holds {', '.join(self.names)}",
            )
        if name not in self._arrays:
            self._arrays[name] = opened(self.folder, name)
        return self._arrays[name][: self.description.texts if name == TEXT_ENDS else self.description.tokens]

    def rows_of(self, text: int) -> slice:
        """The rows of a text.

        Raises:
          RequestError: there is no such text.
        """
        if not 0 <= text < self.description.texts:
            raise RequestError(
                f"text {text} of {self.description.texts}", param="text", hint="texts are counted from 0"
            )
        first, last = max(text - 1, 0), text + 1
        ends = np.asarray(self[TEXT_ENDS][first:last])
        return slice(0 if text == 0 else int(ends[0]), int(ends[-1]))

    def batches(self, name: str, size: int, *, seed: int | None = None) -> Iterator[np.ndarray]:
        """Rows of an activation, `size` at a time; the last batch may be smaller. Two chunks at most are in memory.

        Args:
          seed: for an order that is shuffled: of chunks, and of rows within each; the same for the same seed.

        Raises:
          RequestError: `size` is not positive; or as for indexing.
        """
        if size < 1:
            raise RequestError(f"batches of {size} rows", param="size", hint="at least 1")
        array = self[name]
        step = array.chunk_layout.read_chunk.shape[0]
        starts = np.arange(0, len(self), step)
        random = None if seed is None else np.random.default_rng(seed)
        left = np.zeros((0, *array.shape[1:]), array.dtype.numpy_dtype)
        for start in starts if random is None else random.permutation(starts):
            part = np.asarray(array[start : min(start + step, len(self))])
            left = np.concatenate([left, part if random is None else part[random.permutation(len(part))]])
            whole = len(left) // size * size
            for i in range(0, whole, size):
                yield left[i : i + size]
            left = left[whole:]
        if len(left):
            yield left


def open_activations(folder: str | Path) -> Activations:
    """A dataset that `record_activations` wrote, or is still writing.

    Raises:
      CheckpointError: the folder holds none, or a damaged one.
    """
    return Activations(Path(folder), Description.read(Path(folder)))
