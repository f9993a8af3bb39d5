"""Metadata of AMDGPU code objects: registers, spills and memory of each kernel.

https://llvm.org/docs/AMDGPUUsage.html#code-object-metadata
"""

from __future__ import annotations

import struct
from mmap import mmap
from typing import Any, NoReturn

ELF = b"\x7fELF"
_NOTE, _SYMBOLS = 7, 2
_AMDGPU_METADATA = 32


def is_code_object(data: bytes | mmap) -> bool:
    return data[:4] == ELF


def kernels(elf: bytes) -> dict[str, dict[str, Any]]:
    """Metadata of every kernel by its name, under LLVM's keys (".vgpr_count", ".vgpr_spill_count", ...).

    Raises:
      ValueError: it is no AMDGPU code object, or is damaged.
    """
    for header in section_headers(elf):
        if header[1] != _NOTE:
            continue
        at, end = header[4], header[4] + header[5]
        while at < end:
            name_size, size, kind = struct.unpack_from("<III", elf, at)
            name, content = at + 12, at + 12 + (name_size + 3 & ~3)
            if kind == _AMDGPU_METADATA and elf[name : name + 6] == b"AMDGPU":
                metadata = _unpacked(elf[content : content + size])
                return {kernel[".name"]: kernel for kernel in metadata.get("amdhsa.kernels", [])}
            at = content + (size + 3 & ~3)
    raise ValueError("no AMDGPU metadata in this ELF file")


def _unpacked(note: bytes) -> dict[str, Any]:
    import msgpack

    def no_extension(code: int, data: bytes) -> NoReturn:
        raise ValueError(f"extension type {code}, which this metadata does not use")

    try:
        return msgpack.unpackb(note, ext_hook=no_extension)
    except ValueError as e:
        raise ValueError(f"damaged MessagePack: {e!r}") from e


def code(elf: bytes, kernel: str) -> bytes:
    """Machine code of a kernel, by its symbol; empty if there is none."""
    headers = section_headers(elf)
    for header in headers:
        if header[1] != _SYMBOLS:
            continue
        names = headers[header[6]][4]
        for at in range(header[4], header[4] + header[5], 24):
            name, _, _, section, address, size = struct.unpack_from("<IBBHQQ", elf, at)
            end = elf.find(b"\0", names + name)
            if elf[names + name : end] == kernel.encode() and 0 < section < len(headers):
                start = address - headers[section][3] + headers[section][4]
                return elf[start : start + size]
    return b""


def section_headers(elf: bytes | mmap) -> list[tuple[int, ...]]:
    """Section headers of an ELF64 file: name, type, flags, address, offset, size, link, info, alignment, entry size."""
    if not is_code_object(elf):
        raise ValueError("not an ELF file")
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    return [struct.unpack_from("<IIQQQQIIQQ", elf, start + i * size) for i in range(count)]
