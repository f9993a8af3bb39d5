"""Reading safetensors files (https://huggingface.co/docs/safetensors): eight bytes of length, a JSON header, the data.

The header is checked before anything is trusted: bounds, overlaps, gaps, sizes, doubled names. Data is read with
`pread` and not mapped, since a file that is cut short while it is mapped kills the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.source import BFLOAT16
from llama_jax.convert.weight_file import open_file, read_at
from llama_jax.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
}
# Known, so that a file that holds them beside the weights still reads; none can be a weight.
_ITEM_SIZES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ITEM_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8}
_ITEM_SIZES |= {name: dtype.itemsize for name, dtype in DTYPES.items()}

_MAX_DIMS = 64
"""Dimensions that an array of numpy can have."""
_MAX_BYTES = 2**63 - 1

_HINT = "the file is damaged or was not downloaded completely; get it again"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: safetensors name of its dtype, shape, and where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file.

    Attributes:
      path: the file.
      entries: name to tensor.
      metadata: strings of the header that say nothing about tensors.

    Raises:
      CheckpointError: the file cannot be opened, or its header is malformed; names the file and the tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        self._fd = open_file(path)
        try:
            self.entries = self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; reading from it afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read_into(self, name: str, out: np.ndarray, skip: int = 0) -> None:
        """Fills a C-contiguous array with bytes of a tensor, from `skip` bytes behind its beginning on.

        Raises:
          CheckpointError: the file ends too early or cannot be read.
        """
        entry = self.entries[name]
        view = memoryview(out.reshape(-1).view(np.uint8))
        if skip < 0 or skip + len(view) > entry.nbytes:
            raise ValueError(f"{name}: bytes {skip} to {skip + len(view)} of {entry.nbytes}")
        read_at(self._fd, view, entry.offset + skip, self.path, f"tensor {name}")

    def _parse(self) -> dict[str, Entry]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{self.path}: a header of {length} bytes does not fit a file of {size}",
                hint=_HINT if size >= 8 else "the file is empty or not a safetensors file",
            )
        try:
            raw = os.pread(self._fd, length, 8).decode("utf-8")
            header = json.loads(raw, object_pairs_hook=_checked, parse_constant=_refused)
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{self.path}: the header is not valid JSON ({e})", hint=_HINT) from e
        # The format wants the brace first of all, even before white space.
        if not raw.startswith("{"):
            raise CheckpointError(f"{self.path}: the header is not a JSON object", hint=_HINT)
        notes = header.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise CheckpointError(f"{self.path}: the header's __metadata__ holds more than strings", hint=_HINT)
        self.metadata: Mapping[str, str] = notes
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if entry.offset != end:
                raise CheckpointError(
                    f"{self.path}: tensor {name} begins at byte {entry.offset}, the one before it ends at {end}",
                    hint=_HINT,
                )
            end += entry.nbytes
            if end > size:
                raise CheckpointError(
                    f"{self.path}: tensor {name} ends at byte {end}, the file at {size}: it is truncated", hint=_HINT
                )
        if end != size:
            raise CheckpointError(f"{self.path}: {size - end} bytes follow the last tensor", hint=_HINT)
        return entries

    def _entry(self, name: str, value: Any, data: int) -> Entry:
        try:
            dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
            if len(value) != 3:
                raise ValueError("it has more keys than dtype, shape and data_offsets")
            if not isinstance(shape, list) or not isinstance(value["data_offsets"], list):
                raise TypeError("shape and data_offsets are no lists")
            if len(shape) > _MAX_DIMS:
                raise ValueError(f"{len(shape)} dimensions")
            if not all(type(n) is int and 0 <= n <= _MAX_BYTES for n in (*shape, begin, end)):
                raise ValueError("a size or offset is not a natural number of 63 bits")
            nbytes = math.prod(shape) * _ITEM_SIZES[dtype]
        except (KeyError, TypeError, ValueError) as e:
            raise CheckpointError(
                f"{self.path}: the header's entry of tensor {name} is malformed ({e!r})", hint=_HINT
            ) from e
        if end - begin != nbytes:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {dtype}{shape}, {nbytes} bytes, but takes up {end - begin}",
                hint=_HINT,
            )
        return Entry(dtype, tuple(shape), data + begin, nbytes)


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    for text in (*found, *found.values()):
        if isinstance(text, str):
            text.encode("utf-8")  # fails on lone surrogates, which JSON can spell and no other text can hold
    return found
