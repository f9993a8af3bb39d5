"""Reading the files of `torch.save` (.bin, .pth, .pt) without torch, and without running the pickle inside.

Since torch 1.6 such a file is a zip archive: `data.pkl` describes the tensors, `data/0`, `data/1`, ... hold the
numbers. Older files are a sequence of pickles followed by the numbers. Formats: `_save` and `_legacy_save` in
https://github.com/pytorch/pytorch/blob/main/torch/serialization.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.checkpoint.wrong_file import AGAIN
from llama_jax.convert import torch_pickle, torch_zip
from llama_jax.convert.torch_pickle import MAX_NAME, MAX_PICKLE_BYTES, STORAGES, PickleError, Storage, TensorView
from llama_jax.convert.weight_file import Entry, WeightFile, read_at
from llama_jax.errors import CheckpointError

# The first pickle of the old format: a number that `torch.save` puts there.
_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_OLD_VERSION = 1001
# A view is read with all that lies between its elements; this bounds how much more than the tensor that is.
_MAX_SPREAD = 8
_SPREAD_BYTES = 1 << 20

_Place = tuple[int, int]
"""Offset of a storage in the file, and its size in bytes."""


@dataclass(frozen=True)
class TorchEntry(Entry):
    """One tensor of a file.

    Attributes:
      strides: in elements; they need not be those of C order.
      itemsize: bytes of an element.
    """

    strides: tuple[int, ...]
    itemsize: int

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow each other in C order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.nbytes == 0
            expected *= size
        return True


class TorchFile(WeightFile):
    """An open file of `torch.save` that holds a state dict; see `WeightFile`.

    Tensors may share a storage (tied weights) and may be views of any strides. Elements that stand for several
    (`Tensor.expand`) are refused, so that no tensor is larger than the file. So is a pickle that holds anything but
    named tensors.
    """

    entries: Mapping[str, TorchEntry]
    magic = torch_zip.MAGIC

    def _read(self, name: str, flat: np.ndarray, skip: int) -> None:
        entry = self.entries[name]
        if entry.contiguous:
            super()._read(name, flat, skip)
        elif len(flat):
            self._gather(name, entry, flat, skip)

    def _gather(self, name: str, entry: TorchEntry, flat: np.ndarray, skip: int) -> None:
        """Reads the part of the file that holds the wanted rows (of the first dimension), and extracts them."""
        row = entry.nbytes // entry.shape[0]
        first, last = skip // row, -(-(skip + len(flat)) // row)
        shape = (last - first, *entry.shape[1:])
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, entry.strides, strict=True))
        raw = np.empty((span, entry.itemsize), np.uint8)
        begin = entry.offset + first * entry.strides[0] * entry.itemsize
        read_at(self._fd, memoryview(raw.reshape(-1)), begin, self.path, f"tensor {name}")
        rows = np.lib.stride_tricks.as_strided(
            raw, (*shape, entry.itemsize), (*(s * entry.itemsize for s in entry.strides), 1), writeable=False
        )
        if len(flat) == (last - first) * row:
            flat.reshape(rows.shape)[...] = rows
        else:
            flat[:] = rows.reshape(-1)[skip - first * row :][: len(flat)]

    def _parse(self) -> dict[str, TorchEntry]:
        head = os.pread(self._fd, len(_OLD_MAGIC), 0)
        try:
            if head.startswith(torch_zip.MAGIC):
                views, place = self._open_zip()
            elif head == _OLD_MAGIC:
                views, place = self._open_old()
            else:
                raise CheckpointError(
                    f"{self.path} is not a file of torch.save: it begins with {head[:8]!r}", hint=AGAIN
                )
        except PickleError as e:
            raise self._bad(str(e)) from e
        return {name: self._entry(name, view, place) for name, view in views.items()}

    def _entry(self, name: str, view: TensorView, place: Callable[[Storage], _Place]) -> TorchEntry:
        dtype, itemsize = STORAGES[view.storage.kind]
        begin, nbytes = place(view.storage)
        if nbytes != view.storage.numel * itemsize:
            raise self._bad(
                f"tensor {name} lies in a storage of {view.storage.numel} {dtype}, which takes up {nbytes} bytes"
            )
        numel = math.prod(view.shape)
        span = view.offset + 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)) if numel else 0
        if max(span, numel) > view.storage.numel:
            raise self._bad(
                f"tensor {name} is {dtype}{list(view.shape)} from element {view.offset} on with strides "
                f"{list(view.strides)}, its storage has {view.storage.numel} elements"
            )
        offset = begin + view.offset * itemsize
        entry = TorchEntry(dtype, view.shape, offset, numel * itemsize, view.strides, itemsize)
        if not entry.contiguous and span * itemsize > _MAX_SPREAD * entry.nbytes + _SPREAD_BYTES:
            raise self._bad(f"the elements of tensor {name} lie too far apart, with strides {list(view.strides)}")
        return entry

    def _open_zip(self) -> tuple[dict[str, TensorView], Callable[[Storage], _Place]]:
        archive = torch_zip.ZipDirectory(self._fd, self.path)
        roots = [name.removesuffix("data.pkl") for name in archive.members if name.endswith("/data.pkl")]
        if len(roots) != 1 or roots[0].count("/") != 1:
            raise self._bad(f"it has {len(roots)} members called data.pkl, not one: it is not a file of torch.save")
        (root,) = roots
        if f"{root}byteorder" in archive.members and self._member(archive, f"{root}byteorder", 16) != b"little":
            raise self._bad("its numbers are big-endian, which is not supported")
        value, _ = torch_pickle.unpickle(self._member(archive, f"{root}data.pkl", MAX_PICKLE_BYTES))
        return _state_dict(value), lambda storage: archive.place(f"{root}data/{storage.key}")

    def _member(self, archive: torch_zip.ZipDirectory, name: str, limit: int) -> bytes:
        begin, size = archive.place(name)
        if size > limit:
            raise self._bad(f"{name} has {size} bytes, more than any state dict needs")
        data = bytearray(size)
        read_at(self._fd, memoryview(data), begin, self.path, name)
        return bytes(data)

    def _open_old(self) -> tuple[dict[str, TensorView], Callable[[Storage], _Place]]:
        """The format before torch 1.6: magic, version, facts of the machine, the state dict, keys, storages."""
        data = os.pread(self._fd, MAX_PICKLE_BYTES, 0)
        version, at = torch_pickle.unpickle(data, len(_OLD_MAGIC))
        machine, at = torch_pickle.unpickle(data, at)
        value, at = torch_pickle.unpickle(data, at)
        keys, at = torch_pickle.unpickle(data, at)
        if version != _OLD_VERSION or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise self._bad("it has another version or byte order than torch.save writes here")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise self._bad("its list of storages is malformed")
        views = _state_dict(value)
        itemsizes = {view.storage.key: STORAGES[view.storage.kind][1] for view in views.values()}
        size, places = os.fstat(self._fd).st_size, {}
        for key in keys:
            numel = int.from_bytes(os.pread(self._fd, 8, at), "little")
            nbytes = numel * itemsizes.get(key, 0)
            if key not in itemsizes or key in places or at + 8 + nbytes > size:
                raise self._bad(f"its storage {key!r:.100} is unknown, stands twice, or ends behind the file")
            places[key] = (at + 8, nbytes)
            at += 8 + nbytes

        def place(storage: Storage) -> _Place:
            if storage.key not in places:
                raise self._bad(f"it lacks the storage {storage.key!r:.100}")
            return places[storage.key]

        return views, place


def _state_dict(value: Any) -> dict[str, TensorView]:
    """Checks that an unpickled value is a dict of named tensors.

    Raises:
      PickleError: it is something else.
    """
    if not isinstance(value, dict):
        raise PickleError(f"it holds a {type(value).__name__}, not a state dict of named tensors")
    for key, tensor in value.items():
        if not isinstance(key, str) or len(key) > MAX_NAME:
            raise PickleError("a key of its state dict is not the name of a tensor")
        if not isinstance(tensor, TensorView):
            raise PickleError(f"its entry {key!r:.200} is a {type(tensor).__name__}, not a tensor")
    return value
