"""The directory of a zip archive, as `torch.save` writes them since torch 1.6.

Only members that are stored, not compressed, are read, as such files have them, so a member is never larger than the
file. Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.7 to 4.3.16.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_jax.checkpoint.wrong_file import AGAIN
from llama_jax.errors import CheckpointError

MAGIC = b"PK\x03\x04"
MAX_DIRECTORY_BYTES = 16 << 20
"""Directory entries take about 100 bytes, one for each tensor."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_HEADER = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 0xFFFF
_IN_EXTRA = 0xFFFFFFFF


@dataclass(frozen=True)
class Member:
    """One file of an archive: the offset of its own header, and its size in bytes."""

    header: int
    size: int
    stored: bool


class ZipDirectory:
    """The members of an archive.

    Attributes:
      members: name to member.

    Raises:
      CheckpointError: the directory is missing or malformed.
    """

    def __init__(self, fd: int, path: Path):
        self._fd, self._path, self._size = fd, path, os.fstat(fd).st_size
        try:
            self.members = dict(self._entries(*self._find()))
        except (struct.error, UnicodeDecodeError) as e:
            raise self._bad(f"the zip directory is malformed ({e})") from e

    def place(self, name: str) -> tuple[int, int]:
        """Offset of a member's data in the file, and its size in bytes.

        Raises:
          CheckpointError: there is no such member, it is compressed, or it does not lie within the file.
        """
        member = self.members.get(name)
        if member is None:
            raise self._bad(f"the archive lacks {name}")
        if not member.stored:
            raise self._bad(f"{name} is compressed or encrypted, which torch never does")
        raw = os.pread(self._fd, _HEADER.size, member.header)
        if len(raw) < _HEADER.size or raw[:4] != MAGIC:
            raise self._bad(f"{name} has no header at byte {member.header}")
        *_, name_bytes, extra_bytes = _HEADER.unpack(raw)
        begin = member.header + _HEADER.size + name_bytes + extra_bytes
        if begin + member.size > self._size:
            raise self._bad(f"{name} ends at byte {begin + member.size}, the file at {self._size}: it is truncated")
        return begin, member.size

    def _bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {what}", hint=AGAIN)

    def _find(self) -> tuple[int, int]:
        """Offset of the directory, and its size in bytes."""
        start = max(0, self._size - _END.size - _MAX_COMMENT)
        tail = os.pread(self._fd, self._size - start, start)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < _END.size:
            raise self._bad("the zip directory at its end is missing: it is truncated")
        *_, size, offset, _ = _END.unpack_from(tail, at)
        locator = start + at - _LOCATOR64.size
        raw = os.pread(self._fd, _LOCATOR64.size, locator) if locator >= 0 else b""
        if raw[:4] == b"PK\x06\x07":
            _, _, end64, _ = _LOCATOR64.unpack(raw)
            if end64 > self._size - _END64.size:
                raise self._bad("the zip64 directory lies outside of the file")
            raw = os.pread(self._fd, _END64.size, end64)
            if raw[:4] != b"PK\x06\x06":
                raise self._bad("the zip64 directory is missing")
            *_, size, offset = _END64.unpack(raw)
        if size > MAX_DIRECTORY_BYTES or offset + size > self._size:
            raise self._bad(f"a zip directory of {size} bytes at byte {offset} does not fit a file of {self._size}")
        return offset, size

    def _entries(self, offset: int, size: int) -> Iterator[tuple[str, Member]]:
        directory = os.pread(self._fd, size, offset)
        at, seen = 0, set()
        while at < size:
            fields = _ENTRY.unpack_from(directory, at)
            magic, _, _, flags, method, _, _, _, packed, unpacked, n_name, n_extra, n_comment, *_, header = fields
            at += _ENTRY.size
            if magic != b"PK\x01\x02" or at + n_name + n_extra + n_comment > size:
                raise self._bad(f"the zip directory is malformed at byte {offset + at - _ENTRY.size}")
            name = directory[at : at + n_name].decode("utf-8")
            extra = directory[at + n_name : at + n_name + n_extra]
            at += n_name + n_extra + n_comment
            unpacked, packed, header = _zip64(extra, unpacked, packed, header)
            if name in seen:
                raise self._bad(f"{name!r} stands twice in the zip directory")
            seen.add(name)
            yield name, Member(header, unpacked, stored=method == 0 and not flags & 1 and packed == unpacked)


def _zip64(extra: bytes, *values: int) -> list[int]:
    """The values of a directory entry, those that did not fit 32 bits from its extra field 1 (section 4.5.3)."""
    found, at, end = [], 0, 0
    while _IN_EXTRA in values and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at, end = at + 4, at + 4 + length
        if kind == 1:
            break
        at = end
    for value in values:
        if value == _IN_EXTRA:
            if at + 8 > end:
                raise struct.error("a size beyond 32 bits is missing")
            (value,) = struct.unpack_from("<Q", extra, at)
            at += 8
        found.append(value)
    return found
