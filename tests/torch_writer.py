"""Files as `torch.save` writes them, put together by instructions, so that tests can also write what it never would."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def integer(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tupled(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(module: str, name: str, *args: bytes) -> bytes:
    return named(module, name) + tupled(*args) + b"R"


def storage(key: str, numel: int, kind: str = "FloatStorage") -> bytes:
    return tupled(text("storage"), named("torch", kind), text(key), text("cpu"), integer(numel)) + b"Q"


def tensor(stored: bytes, offset: int, shape: Sequence[int], strides: Sequence[int]) -> bytes:
    sizes = [tupled(*map(integer, n)) for n in (shape, strides)]
    hooks = called("collections", "OrderedDict")
    return called("torch._utils", "_rebuild_tensor_v2", stored, integer(offset), *sizes, b"\x89", hooks)


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def state_dict(tensors: Mapping[str, bytes]) -> bytes:
    items = b"".join(text(name) + value for name, value in tensors.items())
    return pickled(called("collections", "OrderedDict") + b"(" + items + b"u")


def write_archive(
    path: Path, data: bytes, storages: Mapping[str, bytes] | None = None, *, compression: int = zipfile.ZIP_STORED
) -> None:
    """A zip archive with a pickle and the bytes of its storages by their keys."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for key, raw in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", raw)
        archive.writestr("archive/version", "3\n")


def torch_save(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes contiguous tensors; those that are one object share a storage."""
    keys: dict[int, str] = {}
    values, storages = {}, {}
    for name, array in tensors.items():
        key = keys.setdefault(id(array), str(len(keys)))
        strides = [s // array.itemsize for s in np.ascontiguousarray(array).strides]
        values[name] = tensor(storage(key, array.size, STORAGES[array.dtype]), 0, array.shape, strides)
        storages[key] = array.tobytes()
    write_archive(path, state_dict(values), storages)
