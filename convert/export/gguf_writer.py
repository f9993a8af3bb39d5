"""Writing a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), version 3, tensor by tensor."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from llama_jax.convert.weight_file import closed_on_error

ALIGNMENT = 32
"""Bytes; what the format assumes when "general.alignment" does not say otherwise."""

Value = str | bool | int | float | Sequence[str] | Sequence[int] | Sequence[float]
"""Types of metadata: integers are written as uint32, in arrays as int32; floats as float32, as llama.cpp does."""


@dataclass(frozen=True)
class GgufPlan:
    """A tensor that will be written: its type, and its shape, outermost dimension first."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


class GgufWriter:
    """A GGUF file that is being written; a context manager. Leaving it without an error waits for the disk.

    Args:
      path: the file; it must not exist.
      metadata: key to value, in the order of the file.
      plan: name to type and shape of every tensor; they must be written in this order.

    Raises:
      OSError: the file cannot be written.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Value], plan: Mapping[str, GgufPlan]):
        self._file = path.open("xb")
        with closed_on_error(self._file.close):
            self._file.write(_header(metadata, plan))

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, data: np.ndarray) -> None:
        """Writes the next bytes of a tensor; they are C-contiguous."""
        self._file.write(memoryview(data.reshape(-1).view(np.uint8)))

    def end_tensor(self) -> None:
        """Pads up to the next tensor."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))


def data_bytes(plan: Mapping[str, GgufPlan]) -> int:
    """Size of all tensors in the file, each padded to the alignment."""
    return sum(_aligned(tensor.nbytes) for tensor in plan.values())


def _header(metadata: Mapping[str, Value], plan: Mapping[str, GgufPlan]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(plan), len(metadata))]
    parts += [_text(key) + _typed(value) for key, value in metadata.items()]
    offset = 0
    for name, tensor in plan.items():
        dims = tensor.shape[::-1]
        parts.append(_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.kind, offset))
        offset += _aligned(tensor.nbytes)
    raw = b"".join(parts)
    return raw + bytes(-len(raw) % ALIGNMENT)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    """A value and the number of its type before it."""
    types = gguf.GGUFValueType
    if isinstance(value, str):
        return struct.pack("<I", types.STRING) + _text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", types.BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", types.UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", types.FLOAT32, value)
    if value and isinstance(value[0], str):
        item, raw = types.STRING, b"".join(map(_text, value))
    elif value and isinstance(value[0], float):
        item, raw = types.FLOAT32, np.asarray(value, "<f4").tobytes()
    else:
        item, raw = types.INT32, np.asarray(value, "<i4").tobytes()
    return struct.pack("<IIQ", types.ARRAY, item, len(value)) + raw
