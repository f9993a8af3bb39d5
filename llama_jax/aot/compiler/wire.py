"""Protocol buffers, Snappy and Riegeli, as far as a serialised XLA executable uses them.

https://protobuf.dev/programming-guides/encoding/
https://github.com/google/snappy/blob/main/format_description.txt
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

RIEGELI_SIGNATURE = bytes.fromhex("83af70d10d884a3f0000000000000000")
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number at an offset, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field of a message, in order; integers for varints, bytes for all else."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"protocol buffer field of kind {kind}")
        if at + size > len(message):
            raise ValueError("protocol buffer field behind the end of its message")
        yield key >> 3, message[at : at + size]
        at += size


def messages(message: bytes, number: int) -> list[bytes]:
    """Every field of this number that is not a varint."""
    return [value for field, value in fields(message) if field == number and isinstance(value, bytes)]


def message_at(message: bytes, *path: int) -> bytes:
    """The last field at a path of numbers; empty if there is none, as in any message with default values."""
    for number in path:
        found = messages(message, number)
        if not found:
            return b""
        message = found[-1]
    return message


def integer_at(message: bytes, *path: int) -> int:
    """The last integer at a path of numbers; 0 if there is none."""
    found = [v for f, v in fields(message_at(message, *path[:-1])) if f == path[-1] and isinstance(v, int)]
    return found[-1] if found else 0


def text_at(message: bytes, *path: int) -> str:
    """The last string at a path of numbers; empty if there is none."""
    return message_at(message, *path).decode()


def snappy(data: bytes) -> bytes:
    """Raw Snappy, decompressed.

    Raises:
      ValueError: it is damaged.
    """
    size, at = varint(data, 0)
    out = bytearray()
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:  # a literal
            length = tag >> 2
            if length >= 60:
                width = length - 59
                length = int.from_bytes(data[at : at + width], "little")
                at += width
            out += data[at : at + length + 1]
            at += length + 1
            continue
        if tag & 3 == 1:  # a copy of what came before
            length, offset, at = ((tag >> 2) & 7) + 4, (tag >> 5) << 8 | data[at], at + 1
        else:
            width = 2 if tag & 3 == 2 else 4
            length, offset, at = (tag >> 2) + 1, int.from_bytes(data[at : at + width], "little"), at + width
        if not 0 < offset <= len(out):
            raise ValueError("damaged Snappy block")
        start = len(out) - offset
        piece = out[start : start + length]
        out += piece if offset >= length else (piece * (length // offset + 1))[:length]
    if len(out) != size:
        raise ValueError("damaged Snappy block")
    return bytes(out)


def riegeli(data: bytes) -> list[bytes]:
    """The records of a Riegeli file of simple chunks, uncompressed or in Snappy.

    Raises:
      ValueError: it has chunks of another kind.
    """
    stream = b"".join(data[i + _BLOCK_HEADER : i + _BLOCK] for i in range(0, len(data), _BLOCK))
    records: list[bytes] = []
    at = 0
    while at + _CHUNK_HEADER <= len(stream):
        (size,) = struct.unpack_from("<Q", stream, at + 8)
        kind, count = stream[at + 24 : at + 25], int.from_bytes(stream[at + 25 : at + 32], "little")
        chunk = stream[at + _CHUNK_HEADER : at + _CHUNK_HEADER + size]
        at += _CHUNK_HEADER + max(size, count)
        if kind in (b"s", b"p"):  # signature, padding
            continue
        if kind != b"r" or chunk[:1] not in (b"\0", b"s"):
            raise ValueError(f"Riegeli chunk {kind!r} with compression {chunk[:1]!r}")
        sizes_size, start = varint(chunk, 1)
        sizes, values = chunk[start : start + sizes_size], chunk[start + sizes_size :]
        if chunk[:1] == b"s":  # each is preceded by its decompressed size, which Snappy states again
            sizes, values = (snappy(part[varint(part, 0)[1] :]) for part in (sizes, values))
        in_sizes = in_values = 0
        for _ in range(count):
            length, in_sizes = varint(sizes, in_sizes)
            records.append(values[in_values : in_values + length])
            in_values += length
    return records
