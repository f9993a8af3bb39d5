"""Contents of a serialised XLA executable for AMD GPUs: its kernels with their resources, and its library calls.

Two nested Riegeli files of protocol buffers, `xla/pjrt/proto` around xla/backends/gpu/runtime's GpuExecutableProto, in
pieces as xla/util/split_proto writes them. The numbers of fields are those of jaxlib 0.11.2:
https://github.com/openxla/xla/blob/main/xla/service/gpu/gpu_executable.proto,
https://github.com/openxla/xla/blob/main/xla/backends/gpu/runtime/thunk.proto.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from llama_jax.aot.compiler import code_object
from llama_jax.aot.compiler.instructions import matrix_instructions
from llama_jax.aot.compiler.occupancy import occupancy
from llama_jax.aot.compiler.wire import (
    RIEGELI_SIGNATURE,
    fields,
    integer_at,
    message_at,
    messages,
    riegeli,
    text_at,
)

Fields = Mapping[int, list[bytes]]
"""Values by field number, of a message that was stored in pieces."""

# Fields of GpuExecutableProto.
_CODE, _DEVICE, _THUNKS = 4, 6, 13
# Kinds of ThunkProto, by the field that holds them.
_KERNEL, _CUSTOM_KERNEL, _CUSTOM_CALL, _GROUP = 8, 36, 30, 47
# Thunks that hold sequences of thunks, and the fields that are such sequences: sequential (itself one), conditional,
# while, dynamic slice, asynchronous start.
_NESTED: dict[int, tuple[int | None, ...]] = {2: (None,), 6: (2,), 7: (2, 3), 18: (1,), 57: (3,)}
_LIBRARY = {
    9: "rocBLAS/hipBLASLt gemm",
    11: "triangular solve",
    15: "cudnn",
    22: "hipBLASLt matmul",
    24: "norm",
    25: "MIOpen convolution",
    27: "fft",
    38: "all-gather",
    39: "all-reduce",
    40: "reduce-scatter",
    41: "all-to-all",
    43: "collective-permute",
}


@dataclass(frozen=True)
class Kernel:
    """A GPU kernel of an executable.

    Attributes:
      launches: how often it occurs in the program; a loop's body counts once.
      grid, block: work-groups, and threads of each.
      vgpr: vector registers of a lane; on CDNA 2 and later with the `agpr` accumulation registers among them.
      sgpr: scalar registers of a wave.
      vgpr_spills, sgpr_spills: registers that were moved to memory.
      scratch_bytes: memory of a lane for spills and arrays.
      lds_bytes: local memory of a work-group, static and dynamic.
      occupancy: waves of it that fit on one SIMD; None if the limits of the architecture are not known.
      matrix_instructions: MFMA or WMMA instructions in its code; None if the architecture's code cannot be read.
      code_bytes: size of its machine code.
      elf: the code object that holds it.
    """

    name: str
    arch: str
    launches: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    wave_size: int
    vgpr: int
    agpr: int
    sgpr: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    lds_bytes: int
    occupancy: int | None
    matrix_instructions: int | None
    code_bytes: int
    elf: bytes

    @property
    def waves(self) -> int:
        """Waves of a work-group."""
        x, y, z = self.block
        return -(-x * y * z // self.wave_size)

    @property
    def spills(self) -> int:
        return self.vgpr_spills + self.sgpr_spills


@dataclass(frozen=True)
class _Launch:
    name: str
    elf: bytes
    lds_bytes: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


def gpu_executable(serialized: bytes) -> Fields:
    """The fields of the GpuExecutableProto in a serialised executable.

    Raises:
      ValueError: it holds something else, or is damaged.
    """
    start = serialized.find(RIEGELI_SIGNATURE)
    if start < 0:
        raise ValueError("no Riegeli file in it")
    _, outer = _joined(serialized[start:])
    name, inner = _joined(outer[1][0])
    if name != "xla.gpu.GpuExecutableProto":
        raise ValueError(f"not a GPU executable: {name}")
    return inner


def kernels(exe: Fields) -> tuple[Kernel, ...]:
    """Every kernel of an executable (`gpu_executable`), in the order of their first launch."""
    arch = text_at(exe[_DEVICE][0], 2, 1) if _DEVICE in exe else ""
    shared = {
        name: (metadata, elf)
        for elf in exe.get(_CODE, [])
        if code_object.is_code_object(elf)
        for name, metadata in code_object.kernels(elf).items()
    }
    launches = Counter(_launches(exe))
    found = []
    for launch, times in launches.items():
        if launch.elf:
            metadata, elf = code_object.kernels(launch.elf)[launch.name], launch.elf
        else:
            metadata, elf = shared[launch.name]
        code = code_object.code(elf, launch.name)
        x, y, z = launch.block
        # The launch's request; the code object states only the static part.
        lds_bytes = launch.lds_bytes + metadata[".group_segment_fixed_size"]
        vgpr, sgpr, wave_size = metadata[".vgpr_count"], metadata[".sgpr_count"], metadata[".wavefront_size"]
        found.append(
            Kernel(
                name=launch.name,
                arch=arch.split(":")[0],
                launches=times,
                grid=launch.grid,
                block=launch.block,
                wave_size=wave_size,
                vgpr=vgpr,
                agpr=metadata.get(".agpr_count", 0),
                sgpr=sgpr,
                vgpr_spills=metadata[".vgpr_spill_count"],
                sgpr_spills=metadata[".sgpr_spill_count"],
                scratch_bytes=metadata[".private_segment_fixed_size"],
                lds_bytes=lds_bytes,
                occupancy=occupancy(
                    arch, vgpr=vgpr, sgpr=sgpr, lds_bytes=lds_bytes, threads=x * y * z, wave_size=wave_size
                ),
                matrix_instructions=matrix_instructions(arch, code),
                code_bytes=len(code),
                elf=elf,
            )
        )
    return tuple(found)


def library_calls(exe: Fields) -> Counter[str]:
    """Operations of an executable other than its own kernels, with their counts: library calls, collectives."""
    calls: Counter[str] = Counter()
    for number, value in _of_thunks(exe.get(_THUNKS, [])):
        if number == _CUSTOM_CALL and isinstance(value, bytes):
            calls[f"custom call {text_at(value, 1)}"] += 1
        elif number in _LIBRARY:
            calls[_LIBRARY[number]] += 1
    return calls


def _joined(file: bytes) -> tuple[str, Fields]:
    """Type name and fields of a message that XLA has stored in pieces."""
    manifest, *pieces = riegeli(file)
    joined: dict[int, list[bytes]] = {}
    for record, piece in zip(messages(manifest, 2), pieces, strict=False):
        # A record says either which field it is, or that it is a message with the fields in it.
        override = messages(record, 3)
        parts = [(integer_at(override[0], 1, 1), piece)] if override else fields(piece)
        for number, value in parts:
            if isinstance(value, bytes):
                joined.setdefault(number, []).append(value)
    return text_at(manifest, 1), joined


def _of_thunks(thunks: Iterable[bytes]) -> Iterator[tuple[int, int | bytes]]:
    """Fields of these thunks and of all inside them: of each its own first."""
    for thunk in thunks:
        yield from fields(thunk)
        yield from _of_thunks(_inside(thunk))


def _inside(thunk: bytes) -> Iterator[bytes]:
    """The thunks directly inside one."""
    for number, value in fields(thunk):
        if not isinstance(value, bytes):
            continue
        if number == _GROUP:
            yield from messages(value, 2)
        for field in _NESTED.get(number, ()):
            for sequence in [value] if field is None else messages(value, field):
                yield from messages(sequence, 1)


def _launches(exe: Fields) -> Iterator[_Launch]:
    """Kernel launches of an executable."""
    for number, value in _of_thunks(exe.get(_THUNKS, [])):
        if number == _CUSTOM_KERNEL and isinstance(value, bytes):  # brings its own code object
            spec = message_at(value, 3)
            name, elf = text_at(spec, 2, 4), message_at(spec, 2, 2, 1)
            yield _Launch(name, elf, integer_at(spec, 6), _size(spec, 3, 2), _size(spec, 4, 1))
        elif number == _KERNEL and isinstance(value, bytes):  # of the module's code object
            yield _Launch(text_at(value, 3), b"", integer_at(value, 6), _size(value, 4, 1, 2), _size(value, 4, 2, 1))


def _size(message: bytes, *path: int) -> tuple[int, int, int]:
    """A Dim3D, whose fields are 1 by default."""
    given = {number: value for number, value in fields(message_at(message, *path)) if isinstance(value, int)}
    return given.get(1, 1), given.get(2, 1), given.get(3, 1)
