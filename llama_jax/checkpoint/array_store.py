"""The array store of a checkpoint: where the bytes of its tensors are on disk, and how any rows of them are read.

Orbax keeps arrays as zarr v3 (https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html) in an OCDBT database
(https://google.github.io/tensorstore/kvstore/ocdbt/index.html). Reading them through tensorstore means a whole chunk,
up to 256 MiB, for a single row, and a second copy of it in memory. The chunks of our checkpoints are not compressed, so
tensorstore only locates them, and their bytes are read with `pread` straight to their destination, which
is twice as fast.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
import tensorstore as ts

from llama_jax.checkpoint.format import ITEMSIZES

_MAX_DIMS = 8
_MAX_METADATA_BYTES = 1 << 20
"""Of one array; the largest take some hundred."""
_VALUE = re.compile(r"value:([^:]*):([^:]*):(\d+):(\d+)")

type Location = bytes | tuple[Path, int, int]
"""A small value itself, or the file, the first byte and the size of a larger one."""


@dataclass(frozen=True)
class ChunkedArray:
    """One array of a store.

    Attributes:
      shape, dtype: of the whole array; dtype by name.
      chunk_shape: every chunk has it, also where it reaches beyond the end of the array.
      chunks: position in the grid of chunks to where the chunk's bytes stand; None if they are stored in any other way
        than one after the other, e.g. compressed.
      trailer: what stands behind the elements of each chunk.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]
    chunks: Mapping[tuple[int, ...], Location] | None
    trailer: bytes = b""

    def read_rows(self, start: int, out: np.ndarray) -> None:
        """Fills `out` [rows, ...] with the rows from `start` on; reads no other bytes where chunks have whole rows.

        Raises:
          ValueError: a chunk is missing, too short or has another trailer.
          OSError: a file cannot be read.
        """
        assert self.chunks is not None
        rows, stop = self.chunk_shape[0], start + len(out)
        rest = [range(-(-n // size)) for n, size in zip(self.shape[1:], self.chunk_shape[1:], strict=True)]
        row_bytes = math.prod(self.chunk_shape[1:]) * out.itemsize
        for first, *others in itertools.product(range(start // rows, -(-stop // rows)), *rest):
            a, b = max(start, first * rows), min(stop, (first + 1) * rows)
            where = self.chunks.get((first, *others))
            if where is None:
                raise ValueError(f"chunk {[first, *others]} is missing")
            skip = (a - first * rows) * row_bytes
            if skip == 0 and self.trailer:
                self._check_trailer(where, rows * row_bytes)
            if self.chunk_shape[1:] == self.shape[1:]:
                _read(where, skip, out[a - start : b - start])
                continue
            part = np.empty((b - a, *self.chunk_shape[1:]), out.dtype)
            _read(where, skip, part)
            inner = [
                slice(i * size, min((i + 1) * size, n))
                for i, size, n in zip(others, self.chunk_shape[1:], self.shape[1:], strict=True)
            ]
            box = tuple(slice(s.stop - s.start) for s in inner)
            out[(slice(a - start, b - start), *inner)] = part[(slice(None), *box)]

    def _check_trailer(self, where: Location, skip: int) -> None:
        """Not used here, but other readers fail on a damaged one, so it must not pass for sound."""
        found = np.empty(len(self.trailer), np.uint8)
        _read(where, skip, found)
        if found.tobytes() != self.trailer:
            raise ValueError("the index behind a chunk is damaged")


def _read(where: Location, skip: int, out: np.ndarray) -> None:
    view = memoryview(out.reshape(-1).view(np.uint8))
    if isinstance(where, bytes):
        view[:] = where[skip : skip + len(view)]
        return
    path, offset, _ = where
    # Opened for each read: a store has few files, each block is megabytes, and nothing has to be closed later.
    fd, done = os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0
    try:
        while done < len(view):
            n = os.preadv(fd, [view[done : done + (1 << 30)]], offset + skip + done)
            if n == 0:
                raise ValueError(f"{path} ends at byte {os.fstat(fd).st_size}, it was longer")
            done += n
    finally:
        os.close(fd)


def open_arrays(path: Path) -> dict[str, ChunkedArray]:
    """All arrays of a store by name; reads its index, but no array.

    Args:
      path: folder of the OCDBT database, absolute.

    Raises:
      ValueError, OSError: it cannot be read, is damaged, or has chunks outside the folder.
    """
    return find_arrays(dict(_values(path)))


def find_arrays(values: Mapping[str, Location]) -> dict[str, ChunkedArray]:
    """The arrays among the keys and values of a store.

    Raises:
      ValueError, OSError: the metadata of one cannot be read or is malformed.
    """
    arrays = {}
    for key, value in values.items():
        name, _, last = key.rpartition("/")
        if last == "zarr.json":
            raw = value if isinstance(value, bytes) else _whole(value)
            try:
                arrays[name] = _array(name, json.loads(raw), values)
            except (KeyError, TypeError, AttributeError, RecursionError, IndexError) as e:
                raise ValueError(f"the zarr metadata of {name} is malformed ({e!r})") from e
    return arrays


def _values(path: Path) -> Iterator[tuple[str, Location]]:
    """Key and place of every value: a walk through the database's B+tree, which tensorstore decodes and checks."""
    store = ts.KvStore.open({"driver": "file", "path": f"{path}/"}).result()
    root = ts.ocdbt.dump(store).result()["versions"][-1]["root"]
    pending = [(root["location"], b"")] if "location" in root else []
    while pending:
        location, prefix = pending.pop()
        for entry in ts.ocdbt.dump(store, location).result()["entries"]:
            if "location" in entry:
                pending.append((entry["location"], prefix + entry["subtree_common_prefix"]))
            elif "inline_value" in entry:
                yield (prefix + entry["key"]).decode(), bytes(entry["inline_value"])
            else:
                yield (prefix + entry["key"]).decode(), _location(path, entry["indirect_value"])


def _location(path: Path, reference: str) -> Location:
    found = _VALUE.fullmatch(reference)
    if found is None:
        raise ValueError(f"the index holds the malformed reference {reference!r}")
    file = PurePosixPath(unquote(found[1]) + unquote(found[2]))
    if file.is_absolute() or ".." in file.parts:
        raise ValueError(f"the index points to {file}, outside of the store")
    return path / file, int(found[3]), int(found[4])


def _whole(where: tuple[Path, int, int]) -> bytes:
    if where[2] > _MAX_METADATA_BYTES:
        raise ValueError(f"metadata of {where[2]:,} bytes")
    raw = np.empty(where[2], np.uint8)
    _read(where, 0, raw)
    return raw.tobytes()


def _array(name: str, zarr: dict[str, Any], values: Mapping[str, Location]) -> ChunkedArray:
    shape, dtype = _sizes(zarr["shape"]), zarr["data_type"]
    chunk_shape = _sizes(zarr["chunk_grid"]["configuration"]["chunk_shape"])
    encoding = zarr["chunk_key_encoding"]
    separator = encoding.get("configuration", {}).get("separator", "/")
    plain = zarr["chunk_grid"]["name"] == "regular" and encoding["name"] == "default" and len(shape) > 0
    nbytes = math.prod(chunk_shape) * ITEMSIZES[dtype]
    trailer = _trailer(zarr["codecs"], chunk_shape, nbytes)
    if not plain or trailer is None:
        return ChunkedArray(shape, dtype, chunk_shape, None)
    chunks: dict[tuple[int, ...], Location] = {}
    grid = [-(-n // size) for n, size in zip(shape, chunk_shape, strict=True)]
    if math.prod(grid) > len(values):
        return ChunkedArray(shape, dtype, chunk_shape, chunks, trailer)  # most are missing, which reading will say
    for at in itertools.product(*map(range, grid)):
        key = f"{name}/" + separator.join(("c", *map(str, at)))
        if key not in values:
            continue
        where = values[key]
        size = len(where) if isinstance(where, bytes) else where[2]
        if size != nbytes + len(trailer):
            raise ValueError(f"chunk {key} has {size} bytes, its shape asks for {chunk_shape} of {dtype}")
        chunks[at] = where
    return ChunkedArray(shape, dtype, chunk_shape, chunks, trailer)


def _sizes(value: list[int]) -> tuple[int, ...]:
    if len(value) > _MAX_DIMS or not all(type(n) is int and 0 < n < 2**63 for n in value):
        raise ValueError(f"{value!r:.80} is not a shape")
    return tuple(value)


def _trailer(codecs: list[dict[str, Any]], chunk_shape: tuple[int, ...], nbytes: int) -> bytes | None:
    """The bytes after a chunk's elements, if these are in order and little-endian; None if encoded otherwise.

    Orbax wraps each chunk into a shard of its own (zarr's codec "sharding_indexed"), which ends in an index: offset and
    size of the only inner chunk, 64 bits each, and the CRC-32C of both.
    """
    if len(codecs) != 1:
        return None
    name, options = codecs[0]["name"], codecs[0].get("configuration", {})
    if name == "bytes":
        return b"" if options.get("endian", "little") == "little" else None
    if name != "sharding_indexed" or tuple(options["chunk_shape"]) != chunk_shape:
        return None
    index_codecs = [codec["name"] for codec in options["index_codecs"]]
    if options.get("index_location", "end") != "end" or index_codecs != ["bytes", "crc32c"]:
        return None
    if _trailer(options["codecs"], chunk_shape, nbytes) != b"":
        return None
    index = struct.pack("<QQ", 0, nbytes)
    return index + struct.pack("<I", _crc32c(index))


def _crc32c(data: bytes) -> int:
    """The CRC of RFC 3720 (Castagnoli), bit by bit: for a few bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
