"""Reading safetensors files (https://huggingface.co/docs/safetensors): eight bytes of length, a JSON header, the data.

The header is checked before anything is trusted: bounds, overlaps, gaps, sizes, duplicate names. Data is read with
`pread` and not mapped, since truncating a mapped file kills the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoint.source import BFLOAT16
from llama_jax.checkpoint.wrong_file import AGAIN
from llama_jax.convert.weight_file import Entry, WeightFile
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


class SafetensorsFile(WeightFile):
    """An open safetensors file; see `WeightFile`.

    Attributes:
      metadata: strings of the header that say nothing about tensors.
    """

    def _parse(self) -> dict[str, Entry]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{self.path}: a header of {length} bytes does not fit a file of {size}",
                hint=AGAIN,
            )
        try:
            raw = os.pread(self._fd, length, 8).decode("utf-8")
            header = json.loads(raw, object_pairs_hook=_checked, parse_constant=_refused)
        except (ValueError, RecursionError) as e:
            raise self._bad(f"the header is not valid JSON ({e})") from e
        # The format wants the brace first of all, even before white space.
        if not raw.startswith("{"):
            raise self._bad("the header is not a JSON object")
        notes = header.pop("__metadata__", {})
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise self._bad("the header's __metadata__ holds more than strings")
        self.metadata: Mapping[str, str] = notes
        entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        end = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if entry.offset != end:
                raise self._bad(f"tensor {name} begins at byte {entry.offset}, the one before it ends at {end}")
            end += entry.nbytes
            if end > size:
                raise self._bad(f"tensor {name} ends at byte {end}, the file at {size}: it is truncated")
        if end != size:
            raise self._bad(f"{size - end} bytes follow the last tensor")
        return entries

    def _entry(self, name: str, value: Any, data: int) -> Entry:
        try:
            dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
            if len(value) != 3:
                raise ValueError("it has more keys than dtype, shape and data_offsets")
            if not isinstance(shape, list) or not isinstance(value["data_offsets"], list):
                raise TypeError("shape and data_offsets are not lists")
            if len(shape) > _MAX_DIMS:
                raise ValueError(f"{len(shape)} dimensions")
            if not all(type(n) is int and 0 <= n <= _MAX_BYTES for n in (*shape, begin, end)):
                raise ValueError("a size or offset is not a natural number of 63 bits")
            nbytes = math.prod(shape) * _ITEM_SIZES[dtype]
        except (KeyError, TypeError, ValueError) as e:
            raise self._bad(f"the header's entry of tensor {name} is malformed ({e!r})") from e
        if end - begin != nbytes:
            raise self._bad(f"tensor {name} is {dtype}{shape}, {nbytes} bytes, but takes up {end - begin}")
        return Entry(dtype, tuple(shape), data + begin, nbytes)


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    for text in (*found, *found.values()):
        if isinstance(text, str):
            text.encode("utf-8")  # fails on lone surrogates, which JSON can spell and no other text can hold
    return found
