"""Writing a safetensors file tensor by tensor (https://huggingface.co/docs/safetensors).

The safetensors library needs all tensors of a file in memory. But the header needs only their names, dtypes and shapes,
so it can be written first, and every tensor, or a piece of one, at its offset as soon as it is available.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_jax.convert.safetensors_file import DTYPES
from llama_jax.convert.weight_file import closed_on_error

_WRITTEN = {**DTYPES, "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
"""Dtypes: floats of plain weights, and integers of packed codes."""
_NAMES = {dtype.name: name for name, dtype in _WRITTEN.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written: numpy name of its dtype, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _WRITTEN[_NAMES[self.dtype]].itemsize


class SafetensorsWriter:
    """A safetensors file that is being written.

    Args:
      path: the file; it must not exist.
      plan: name to dtype and shape of every tensor.
      metadata: strings for the header; transformers requires {"format": "pt"}.

    Raises:
      OSError: the file cannot be written.
    """

    def __init__(self, path: Path, plan: Mapping[str, TensorPlan], metadata: Mapping[str, str]):
        header, self._offsets = _layout(plan, metadata)
        self._left = sum(tensor.nbytes for tensor in plan.values())
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with closed_on_error(self.close):
            self._put(header, 0)

    def write(self, name: str, array: np.ndarray, skip: int = 0) -> None:
        """Writes bytes of a tensor, from byte `skip` of it on. The last byte of all closes the file.

        Args:
          array: C-contiguous; every byte of every tensor has to be written once.
        """
        self._put(memoryview(array.reshape(-1).view(np.uint8)), self._offsets[name] + skip)
        self._left -= array.nbytes
        if not self._left:
            self.close()

    def close(self) -> None:
        """Waits until the file is on the disk, and closes it; closing it twice does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done : done + (1 << 30)], offset + done)


def _layout(plan: Mapping[str, TensorPlan], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor begins. Wide dtypes come first, so that all tensors are aligned."""
    names = sorted(plan, key=lambda name: (-_WRITTEN[_NAMES[plan[name].dtype]].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name in names:
        tensor, starts[name] = plan[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw, {name: 8 + len(raw) + start for name, start in starts.items()}
