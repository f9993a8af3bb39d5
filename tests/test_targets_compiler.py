"""Readers of what XLA's compiler for AMD GPUs makes, on small inputs made by hand."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.aot.compiler import code_object, hlo, libraries, wire
from llama_jax.aot.compiler.instructions import matrix_instructions
from llama_jax.aot.compiler.occupancy import occupancy
from llama_jax.errors import CompilerUnavailable

# --- Protocol buffers, Snappy, Riegeli --------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_varint(value: int, rest: bytes) -> None:
    data = varint(value)
    assert wire.varint(b"x" + data + rest, 1) == (value, 1 + len(data))


def test_fields() -> None:
    inner = field(1, b"first") + field(1, b"last") + field(2, 300)
    message = field(3, inner) + varint(4 << 3 | 5) + b"4byt" + varint(5 << 3 | 1) + b"8 bytes!" + field(6, 0)
    assert list(wire.fields(message)) == [(3, inner), (4, b"4byt"), (5, b"8 bytes!"), (6, 0)]
    assert wire.text_at(message, 3, 1) == "last"
    assert wire.integer_at(message, 3, 2) == 300
    assert wire.messages(inner, 1) == [b"first", b"last"]
    assert (wire.message_at(message, 9, 1), wire.integer_at(message, 9), wire.text_at(message, 3, 7)) == (b"", 0, "")


@pytest.mark.parametrize("message", [field(1, b"abc")[:-1], b"\x0b", varint(1 << 3 | 1) + b"short"])
def test_damaged_message(message: bytes) -> None:
    with pytest.raises(ValueError, match="protocol buffer"):
        list(wire.fields(message))


def literal(data: bytes) -> bytes:
    """Snappy's literal of any length."""
    n = len(data) - 1
    if n < 60:
        return bytes([n << 2]) + data
    width = 1 if n < 256 else 2
    return bytes([59 + width << 2]) + n.to_bytes(width, "little") + data


def copy(offset: int, length: int, width: int) -> bytes:
    """Snappy's three ways to repeat what came before."""
    if width == 1:
        return bytes([(length - 4) << 2 | offset >> 8 << 5 | 1, offset & 255])
    return bytes([(length - 1) << 2 | (2 if width == 2 else 3)]) + offset.to_bytes(width, "little")


def compressed(*parts: bytes, size: int) -> bytes:
    return varint(size) + b"".join(parts)


def test_snappy() -> None:
    long = bytes(range(256)) * 2
    assert wire.snappy(compressed(literal(b"abcdef"), size=6)) == b"abcdef"
    assert wire.snappy(compressed(literal(long), copy(512, 40, 2), size=552)) == long + long[:40]
    assert wire.snappy(compressed(literal(b"abcdef"), copy(4, 4, 1), size=10)) == b"abcdefcdef"
    assert wire.snappy(compressed(literal(b"ab"), copy(2, 7, 1), size=9)) == b"ababababa"  # overlaps itself
    assert wire.snappy(compressed(literal(b"x"), copy(1, 64, 4), size=65)) == b"x" * 65
    assert wire.snappy(compressed(size=0)) == b""


@pytest.mark.parametrize(
    "data",
    [
        compressed(literal(b"ab"), size=3),
        compressed(literal(b"ab"), copy(3, 4, 1), size=6),
        compressed(copy(0, 4, 1), size=4),
    ],
)
def test_damaged_snappy(data: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        wire.snappy(data)


def riegeli_file(*chunks: tuple[str, str, list[bytes]]) -> bytes:
    """A file of chunks (kind, compression, records), with the headers of blocks and of chunks."""
    stream = wire.RIEGELI_SIGNATURE.ljust(40, b"\0")[:0]
    body = bytearray(stream)
    for kind, compression, records in chunks:
        sizes, values = b"".join(varint(len(r)) for r in records), b"".join(records)
        if compression == "s":
            sizes, values = (varint(len(p)) + compressed(literal(p), size=len(p)) for p in (sizes, values))
        content = (compression.encode() if compression else b"\0") + varint(len(sizes)) + sizes + values
        body += bytes(8) + struct.pack("<Q", len(content)) + bytes(8) + kind.encode()
        body += len(records).to_bytes(7, "little") + bytes(8) + content
    out, room = bytearray(), (1 << 16) - 24
    for start in range(0, len(body), room):
        out += bytes(24) + body[start : start + room]
    return bytes(out)


@pytest.mark.parametrize("compression", ["", "s"])
def test_riegeli(compression: str) -> None:
    records = [b"one", b"", b"three" * 20]
    file = riegeli_file(("s", "", []), ("r", compression, records), ("r", compression, [b"x"]))
    assert wire.riegeli(file) == [*records, b"x"]


def test_riegeli_over_blocks() -> None:
    records = [bytes([i]) * 30_000 for i in range(5)]
    assert wire.riegeli(riegeli_file(("r", "", records))) == records


def test_riegeli_of_another_kind() -> None:
    with pytest.raises(ValueError, match="'z'"):
        wire.riegeli(riegeli_file(("r", "z", [b"x"])))
    with pytest.raises(ValueError, match="'t'"):
        wire.riegeli(riegeli_file(("t", "", [b"x"])))


# --- Code objects -----------------------------------------------------------------------------------------------------


def code_object_file(kernels: dict[str, bytes], metadata: Any = None) -> bytes:
    """An ELF64 file with an AMDGPU note, a symbol for each kernel, and its code at address 0x1000 and up."""
    metadata = {"amdhsa.kernels": [{".name": name} for name in kernels]} if metadata is None else metadata
    content = msgpack.packb(metadata)
    note = struct.pack("<III", 7, len(content), 32) + b"AMDGPU\0\0" + content + bytes(-len(content) % 4)
    note = struct.pack("<III", 4, 4, 1) + b"GNU\0" + b"\1\2\3\4" + note  # another note comes first
    strings, symbols, text = b"\0", bytes(24), b""
    for name, code in kernels.items():
        symbols += struct.pack("<IBBHQQ", len(strings), 0x12, 0, 4, 0x1000 + len(text), len(code))
        strings += name.encode() + b"\0"
        text += code
    parts = [(7, note), (3, strings), (2, symbols), (1, text)]
    body, headers = b"", bytes(64)
    for kind, data in parts:
        address, link = (0x1000 if kind == 1 else 0), (2 if kind == 2 else 0)
        headers += struct.pack("<IIQQQQIIQQ", 0, kind, 0, address, 64 + len(body), len(data), link, 0, 0, 0)
        body += data
    head = b"\x7fELF\2\1\1".ljust(40, b"\0") + struct.pack("<Q", 64 + len(body)) + bytes(10)
    return head + struct.pack("<HHH", 64, 5, 0) + body + headers


def test_code_object() -> None:
    elf = code_object_file({"first": b"\1\2\3\4", "second": b"\5\6\7\x08" * 3})
    assert code_object.kernels(elf) == {"first": {".name": "first"}, "second": {".name": "second"}}
    assert code_object.code(elf, "first") == b"\1\2\3\4"
    assert code_object.code(elf, "second") == b"\5\6\7\x08" * 3
    assert code_object.code(elf, "third") == b""


def test_no_code_object() -> None:
    elf = code_object_file({})
    with pytest.raises(ValueError, match="no AMDGPU metadata"):
        code_object.kernels(elf.replace(b"AMDGPU", b"NVIDIA"))
    with pytest.raises(ValueError, match="not an ELF"):
        code_object.kernels(b"MZ" + elf)


@pytest.mark.parametrize("name", [msgpack.ExtType(7, b"x"), b"\xff"])
def test_damaged_code_object(name: object) -> None:
    elf = code_object_file({}, {"amdhsa.kernels": [{".name": name}]})
    with pytest.raises(ValueError, match="damaged MessagePack"):
        code_object.kernels(elf.replace(b"\xc4\1\xff", b"\xc1\1\xff"))


# --- Occupancy --------------------------------------------------------------------------------------------------------


def waves(
    arch: str, vgpr: int, *, lds: int = 0, threads: int = 256, sgpr: int = 32, wave: int | None = None
) -> int | None:
    wave = wave or (64 if arch.startswith("gfx9") else 32)
    return occupancy(arch, vgpr=vgpr, sgpr=sgpr, lds_bytes=lds, threads=threads, wave_size=wave)


@pytest.mark.parametrize(
    ("arch", "by_registers"),
    [
        # LLVM's own tables: llvm/test/CodeGen/AMDGPU/occupancy-levels.ll and vgpr-occupancy of gfx90a; gfx1100 has 1536
        # registers in steps of 24, gfx1102 1024 in steps of 16.
        (
            "gfx90a",
            {
                24: 8,
                64: 8,
                65: 7,
                72: 7,
                73: 6,
                80: 6,
                96: 5,
                97: 4,
                128: 4,
                129: 3,
                168: 3,
                169: 2,
                256: 2,
                257: 1,
                512: 1,
            },
        ),
        ("gfx942:sramecc+:xnack-", {64: 8, 65: 7, 128: 4, 256: 2, 512: 1}),
        ("gfx1100", {96: 16, 97: 12, 120: 12, 144: 10, 168: 9, 169: 8, 192: 8, 193: 7, 216: 7, 240: 6, 256: 5}),
        ("gfx1102", {64: 16, 65: 12, 80: 12, 96: 10, 112: 9, 128: 8, 144: 7, 160: 6, 192: 5, 256: 4}),
    ],
)
def test_occupancy_by_registers(arch: str, by_registers: dict[int, int]) -> None:
    assert {vgpr: waves(arch, vgpr) for vgpr in by_registers} == by_registers


def test_occupancy_by_local_memory() -> None:
    # Four waves of 64 a group: one a SIMD of a compute unit with four.
    assert [waves("gfx942", 32, lds=n << 10) for n in (8, 16, 32, 33, 64, 65)] == [8, 4, 2, 1, 1, 0]
    assert [waves("gfx950", 32, lds=n << 10) for n in (20, 64, 80, 160, 161)] == [8, 2, 2, 1, 0]
    # Half of a pair's 128 KiB is a group's most: two groups of eight waves on four SIMDs.
    assert waves("gfx1100", 32, lds=64 << 10) == 4
    assert waves("gfx942", 32, lds=64 << 10, threads=64) == 1


def test_occupancy_by_the_rest() -> None:
    assert waves("gfx942", 0, sgpr=0) == 8
    assert waves("gfx942", 8, sgpr=104) == 7
    assert waves("gfx1100", 8, sgpr=106) == 16  # every wave has its own
    assert waves("gfx1100", 96, wave=64) == 8
    assert waves("gfx803", 8) is None


# --- Instructions -----------------------------------------------------------------------------------------------------

MFMA, MFMA_GFX950, ACCVGPR = (0xD3C00000 | 0x54 - 0x40 << 16, 0), (0xD3B50000, 0), (0xD3D84000, 0)
WMMA = (0xCC410000, 0)


def words(*parts: tuple[int, ...]) -> bytes:
    flat = [word for part in parts for word in part]
    return struct.pack(f"<{len(flat)}I", *flat)


def test_matrix_instructions() -> None:
    end = (0xBF810000,)
    # s_mov_b32 s0, literal; v_mov_b32 v0, literal; s_add_u32 with one: each followed by what looks like a product.
    literals = [(word, MFMA[0]) for word in (0xBE8000FF, 0x7E0002FF, 0x8000FF00)]
    assert matrix_instructions("gfx942", words(MFMA, ACCVGPR, *literals, MFMA, end)) == 2
    assert matrix_instructions("gfx950", words(MFMA_GFX950, end)) == 1
    assert matrix_instructions("gfx90a", words(end)) == 0
    # s_mov_b32 and v_mov_b32 with a literal, v_fmac in pairs, v_add3 with a literal.
    rdna = [(0xBE8000FF, WMMA[0]), (0x7E0002FF, WMMA[0]), (0xC80000FF, 0, WMMA[0]), (0xD6550000, 0x3FC, WMMA[0])]
    assert matrix_instructions("gfx1100", words(WMMA, *rdna, WMMA, (0xBFB00000,))) == 2
    # A store to global memory has three words on gfx12, two before.
    store = (0xEE068000, 0, WMMA[0])
    assert matrix_instructions("gfx1201", words(store, WMMA, (0xBFB00000,))) == 1
    assert matrix_instructions("gfx803", words(MFMA)) is None
    assert matrix_instructions("gfx942", words((MFMA[0],))) is None  # ends within an instruction


# --- HLO --------------------------------------------------------------------------------------------------------------

HLO = """HloModule jit_f, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %r = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %p = (s32[], bf16[64,128]{1,0}) parameter(0)
  %ar = bf16[64,128]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %inner = (s32[], bf16[64,128]{1,0}) while(%p), condition=%c2, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %t = (s32[], bf16[64,128]{1,0}) tuple(%i, %ar)
}

%inner_body (p: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %cp = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,0}}
  %cpd = f32[10]{0} collective-permute-done(%cp)
}

%cond (p: s32[]) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n)
}

%unknown (p: s32[]) -> s32[] {
  %a2a = s8[16,4]{1,0} all-to-all(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%async (p: f32[2,8]) -> f32[2,1] {
  ROOT %rs = f32[2,1]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={1}, to_apply=%add
}

%branch.1 (p: f32[]) -> f32[] {
  %cb = f32[] collective-broadcast(%p), replica_groups={}
}

ENTRY %main.1_spmd (a: bf16[64,128]) -> bf16[64,128] {
  %ag = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}
  %agd = bf16[64,128]{1,0} all-gather-done(%ag)
  %w = (s32[], bf16[64,128]{1,0}) while(%t0), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"32"}}
  %ars = ((bf16[8,16]{1,0}), bf16[8,16]{1,0}) all-reduce-start(%a), replica_groups={{0,1},{2,3}}, to_apply=%add
  %w2 = s32[] while(%t1), condition=%cond, body=%unknown
  %s = ((f32[2,8]{1,0}), f32[2,1]{1,0}, u32[]) async-start(%b), calls=%async
  %c = f32[] conditional(%i, %x, %y), branch_computations={%branch.1, %branch.2}
  %f = bf16[64,128]{1,0} fusion(%x), kind=kLoop, calls=%body
  ROOT %two = (f32[4]{0}, f32[6]{0}) all-reduce(%x, %y), channel_id=1, replica_groups=mesh['tensor'=8] {'tensor'}, to_apply=%add
}
"""  # noqa: E501


def test_collectives() -> None:
    found = {(c.kind, c.devices, c.count, c.bytes): c for c in hlo.collectives(HLO, 8)}
    assert set(found) == {
        ("all-reduce", 4, 32, 64 * 128 * 2),
        ("collective-permute", 3, 96, 40),
        ("all-to-all", 4, 1, 64),
        ("all-gather", 8, 1, 64 * 128 * 2),
        ("reduce-scatter", 8, 1, 2 * 8 * 4),
        ("collective-broadcast", 8, 1, 4),
        ("all-reduce", 8, 1, 40),
        ("all-reduce", 2, 1, 256),
    }
    assert [c.kind for c in found.values() if c.unknown_trips] == ["all-to-all"]


def test_traffic() -> None:
    def traffic(kind: str, devices: int = 4) -> float:
        return hlo.Collective(kind, devices, 10, 1000).traffic

    assert traffic("all-reduce") == 15_000
    assert traffic("all-gather") == traffic("reduce-scatter") == traffic("all-to-all") == 7_500
    assert traffic("collective-permute") == 10_000
    assert traffic("all-reduce", 1) == 0


def test_program_without_collectives() -> None:
    assert hlo.collectives("", 8) == ()
    assert hlo.collectives("ENTRY %main (a: f32[]) -> f32[] {\n  ROOT %r = f32[] add(%a, %a)\n}\n", 8) == ()


# --- Stand-ins for libraries ------------------------------------------------------------------------------------------

linux_only = pytest.mark.skipif(
    not hasattr(ctypes, "CDLL") or not Path("/proc/self/maps").exists(), reason="needs Linux"
)


@linux_only
def test_stand_in(tmp_path: Path) -> None:
    names = [f"hipFunction{i}" for i in range(50)]
    path = tmp_path / "libmade.so.7"
    path.write_bytes(libraries.stand_in("libmade.so.7", names))
    library = ctypes.CDLL(str(path))
    assert [getattr(library, name)() for name in names] == [100] * 50
    with pytest.raises(AttributeError):
        library.hipFunction50  # noqa: B018
    assert libraries.load(path)[0].hipFunction3() == 100  # nothing is missing


def test_libraries_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(CompilerUnavailable, match="does not load") as caught:
        libraries.load(tmp_path / "absent.so")
    assert caught.value.exit_code == 5
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(CompilerUnavailable, match="does not load"):
        libraries.load(tmp_path / "text.so")


def check(system: str, machine: str) -> Callable[[], None]:
    return lambda: libraries.check_platform(system, machine)


def test_platforms() -> None:
    check("linux", "x86_64")()
    check("linux", "AMD64")()
    for system, machine in (("darwin", "arm64"), ("linux", "aarch64"), ("win32", "AMD64")):
        with pytest.raises(CompilerUnavailable, match=f"not for {system} on {machine}") as caught:
            check(system, machine)()
        assert "container" in caught.value.hint
