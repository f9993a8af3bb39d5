"""Loads a shared library whose dependencies are not installed, by substituting empty libraries for them.

XLA's plugin for ROCm is linked against the HIP runtime and a dozen ROCm libraries, which it does not call while it
compiles. Where they are missing, libraries with the same names are made in memory: their functions return
hipErrorNoDevice. Nothing is written to disk, no compiler and no environment variable is needed.

ELF: https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html; versions of symbols:
https://refspecs.linuxfoundation.org/LSB_5.0.0/LSB-Core-generic/LSB-Core-generic/symversion.html
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from llama_jax.aot.compiler.code_object import section_headers
from llama_jax.errors import CompilerUnavailable
from llama_jax.targets.rocm import DOCS

_DYNAMIC, _DYNSYM, _VERNEED, _VERSYM = 6, 11, 0x6FFFFFFE, 0x6FFFFFFF
_NEEDED = 1
_SYSTEM = ("libc.", "libm.", "libdl.", "librt.", "libpthread.", "libstdc++.", "libgcc_s.", "ld-linux")
# mov eax, 100 (hipErrorNoDevice); ret
_RETURN_NO_DEVICE = bytes.fromhex("b864000000c3")
_PAGE = 0x1000


def load(path: Path) -> tuple[ctypes.CDLL, ...]:
    """Loads a library, with stand-ins for those that it needs and that cannot be found.

    Returns:
      The library and its stand-ins; they have to be kept for as long as it is used.

    Raises:
      CompilerUnavailable: it does not load, or this is not Linux on x86-64.
    """
    check_platform(sys.platform, platform.machine())
    try:
        return (ctypes.CDLL(str(path)),)
    except OSError as error:
        if "cannot open shared object file" not in str(error) or not path.is_file():
            raise CompilerUnavailable(f"{path} does not load: {error}", hint="install the package again") from error
    needed, undefined = dependencies(path)
    loaded: list[ctypes.CDLL] = []
    files: list[int] = []
    try:
        for name in needed:
            # The loader knows a library by its path, here that of the open file: closed only once all are loaded. The
            # one that needs it then finds it by the name inside.
            files.append(os.memfd_create(name))
            # All functions are in the first one: symbols are looked up in every library that is loaded.
            os.write(files[-1], stand_in(name, () if loaded else undefined))
            loaded.append(ctypes.CDLL(f"/proc/self/fd/{files[-1]}"))
        return (*loaded, ctypes.CDLL(str(path)))
    except OSError as error:
        raise CompilerUnavailable(
            f"{path} does not load with stand-ins for the ROCm libraries: {error}",
            hint=f"install ROCm ({DOCS}), or use the versions of the extra rocm-aot",
        ) from error
    finally:
        for file in files:
            os.close(file)


def check_platform(system: str, machine: str) -> None:
    """Raises CompilerUnavailable where neither the plugin nor stand-ins exist."""
    if system != "linux" or machine.lower() not in ("x86_64", "amd64"):
        raise CompilerUnavailable(
            f"XLA's compiler for AMD GPUs exists for Linux on x86-64, not for {system} on {machine}",
            hint="run this in a Linux x86-64 container or machine; no GPU is needed there",
        )


def dependencies(path: Path) -> tuple[list[str], list[str]]:
    """Libraries that an ELF64 library needs beyond those of the C and C++ runtime, and the symbols that it takes from
    them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
        headers = section_headers(image)
        by_type = {header[1]: header for header in headers}  # one each of the kinds that matter
        dynamic, symbols = by_type[_DYNAMIC], by_type[_DYNSYM]
        versions, needs = by_type[_VERSYM], by_type[_VERNEED]
        strings = headers[dynamic[6]][4]

        def text(offset: int) -> str:
            return image[strings + offset : image.find(b"\0", strings + offset)].decode()

        entries = struct.iter_unpack("<QQ", image[dynamic[4] : dynamic[4] + dynamic[5]])
        needed = [name for tag, value in entries if tag == _NEEDED and not _is_system(name := text(value))]
        library_of = {}
        at = needs[4]
        for _ in range(needs[7]):
            _, versions_here, name, first, following = struct.unpack_from("<HHIII", image, at)
            entry = at + first
            for _ in range(versions_here):
                _, _, index, _, step = struct.unpack_from("<IHHII", image, entry)
                library_of[index] = text(name)
                entry += step
            at += following
        undefined = []
        for i in range(1, symbols[5] // 24):
            name, info, _, section, _, _ = struct.unpack_from("<IBBHQQ", image, symbols[4] + 24 * i)
            (version,) = struct.unpack_from("<H", image, versions[4] + 2 * i)
            is_global = info >> 4 == 1
            if section == 0 and is_global and not _is_system(library_of.get(version & 0x7FFF, "")):
                undefined.append(text(name))
        return needed, undefined


def _is_system(library: str) -> bool:
    return library.startswith(_SYSTEM)


def stand_in(name: str, functions: Sequence[str] = ()) -> bytes:
    """An ELF64 shared library for x86-64 with the given SONAME, whose functions all return 100."""
    strings = bytearray(b"\0" + name.encode() + b"\0")
    offsets = []
    for function in functions:
        offsets.append(len(strings))
        strings += function.encode() + b"\0"
    symbols = bytes(24) + b"".join(struct.pack("<IBBHQQ", at, 0x12, 0, 1, _PAGE, 6) for at in offsets)
    body = _RETURN_NO_DEVICE.ljust(16, b"\xcc") + symbols
    hash_at = _PAGE + len(body)
    body += _hash_table(functions)
    strings_at = _PAGE + len(body)
    body += strings
    dynamic_at = (_PAGE + len(body) + _PAGE - 1) & -_PAGE
    # SONAME, HASH, STRTAB, SYMTAB, STRSZ, SYMENT, NULL
    dynamic = struct.pack("<14Q", 14, 1, 4, hash_at, 5, strings_at, 6, _PAGE + 16, 10, len(strings), 11, 24, 0, 0)
    header = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)

    def segment(kind: int, flags: int, at: int, size: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, align)

    header += segment(1, 5, 0, _PAGE + len(body), _PAGE)  # LOAD, readable and executable
    header += segment(1, 6, dynamic_at, len(dynamic), _PAGE)  # LOAD, writable
    header += segment(2, 6, dynamic_at, len(dynamic), 8)  # DYNAMIC
    header += segment(0x6474E551, 6, 0, 0, 16)  # GNU_STACK: not executable
    return (header.ljust(_PAGE, b"\0") + body).ljust(dynamic_at, b"\0") + dynamic


def _hash_table(functions: Iterable[str]) -> bytes:
    """The SysV hash table of symbols 1, 2, ..."""
    names = list(functions)
    buckets, chains = [0] * max(1, len(names)), [0] * (len(names) + 1)
    for i, name in enumerate(names, 1):
        bucket = _elf_hash(name) % len(buckets)
        chains[i], buckets[bucket] = buckets[bucket], i
    values = (len(buckets), len(chains), *buckets, *chains)
    return struct.pack(f"<{len(values)}I", *values)


def _elf_hash(name: str) -> int:
    value = 0
    for char in name.encode():
        value = (value << 4) + char
        value ^= (value & 0xF0000000) >> 24
        value &= 0x0FFFFFFF
    return value
