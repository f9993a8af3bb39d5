"""Metadata of AMDGPU code objects: registers, spills and memory of each kernel.

https://llvm.org/docs/AMDGPUUsage.html#code-object-metadata; https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

import struct
from mmap import mmap
from typing import Any

ELF = b"\x7fELF"
_NOTE, _SYMBOLS = 7, 2
_AMDGPU_METADATA = 32


def is_code_object(data: bytes | mmap) -> bool:
    return data[:4] == ELF


def kernels(elf: bytes) -> dict[str, dict[str, Any]]:
    """Metadata of every kernel by its name, under LLVM's keys (".vgpr_count", ".vgpr_spill_count", ...).

    Raises:
      ValueError: it is no AMDGPU code object.
    """
    for header in section_headers(elf):
        if header[1] != _NOTE:
            continue
        at, end = header[4], header[4] + header[5]
        while at < end:
            name_size, size, kind = struct.unpack_from("<III", elf, at)
            name, content = at + 12, at + 12 + (name_size + 3 & ~3)
            if kind == _AMDGPU_METADATA and elf[name : name + 6] == b"AMDGPU":
                metadata, _ = msgpack(elf, content)
                return {kernel[".name"]: kernel for kernel in metadata.get("amdhsa.kernels", [])}
            at = content + (size + 3 & ~3)
    raise ValueError("no AMDGPU metadata in this ELF file")


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
    """Of each section of an ELF64 file: name, type, flags, address, offset, size, link, info, alignment, entry size."""
    if not is_code_object(elf):
        raise ValueError("not an ELF file")
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    return [struct.unpack_from("<IIQQQQIIQQ", elf, start + i * size) for i in range(count)]


_WIDTH = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


def msgpack(data: bytes, at: int = 0) -> tuple[Any, int]:
    """A MessagePack value at an offset, and the offset behind it.

    Raises:
      ValueError: an extension type, which this metadata does not use.
    """
    tag = data[at]
    at += 1
    if tag < 0x80 or tag >= 0xE0:
        return (tag if tag < 0x80 else tag - 256), at
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], at
    if 0xCA <= tag <= 0xD3:
        form = ">" + "fdBHIQbhiq"[tag - 0xCA]
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if tag < 0xC0:
        kind = "text" if tag >= 0xA0 else "list" if tag >= 0x90 else "map"
        count = tag & (31 if kind == "text" else 15)
    elif width := _WIDTH.get(tag):
        kind = "bytes" if tag <= 0xC6 else "text" if tag <= 0xDB else "list" if tag <= 0xDD else "map"
        count, at = int.from_bytes(data[at : at + width], "big"), at + width
    else:
        raise ValueError(f"MessagePack type {tag:#x}")
    if kind in ("text", "bytes"):
        content = data[at : at + count]
        return (content.decode() if kind == "text" else content), at + count
    items = []
    for _ in range(count if kind == "list" else 2 * count):
        value, at = msgpack(data, at)
        items.append(value)
    return (items if kind == "list" else dict(zip(items[::2], items[1::2], strict=True))), at
