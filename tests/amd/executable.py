"""Runs whole executables that XLA compiled for gfx942 or gfx950: kernels in the emulator, XLA's own copies, fills,
loops and branches here. Calls of libraries (hipBLASLt, RCCL, ...) are refused.

What the numbers of protocol buffer fields mean: `llama_jax.aot.compiler.executable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from amd.emulator import Kernel, KernelCode, Launch, NotModelled, Options, Region, load_kernel
from amd.emulator.waves import POISON
from llama_jax.aot.compiler.executable import gpu_executable
from llama_jax.aot.compiler.wire import fields, integer_at, message_at, messages, text_at, varint

# Fields of GpuExecutableProto.
_MODULE, _CODE, _BUFFERS, _OUTPUTS, _CONSTANTS, _THUNKS = 1, 4, 10, 11, 12, 13
# Kinds of ThunkProto. 1 is its description, 58 a wait for something that has been done at once here.
_SEQUENCE, _CONDITIONAL, _WHILE, _KERNEL, _COPY = 2, 6, 7, 8, 13
_ZERO, _FILL, _CUSTOM_KERNEL, _START, _IGNORED = 19, 28, 36, 57, (1, 58)


@dataclass(frozen=True)
class LaunchRecord:
    """One launch of a kernel: its name, and the wave instructions that it executed."""

    name: str
    wave_instructions: int


@dataclass(frozen=True)
class _Slice:
    """A part of one of the executable's allocations."""

    allocation: int
    offset: int
    size: int

    @classmethod
    def of(cls, message: bytes) -> _Slice:
        return cls(integer_at(message, 3), integer_at(message, 1), integer_at(message, 2))


class Executable:
    """A serialised executable for one GPU, ready to run any number of times.

    Args:
      edit: changes a kernel's code before it is decoded, to plant a bug.
    """

    def __init__(self, serialized: bytes, arch: str, edit: Callable[[KernelCode], KernelCode] | None = None):
        self.arch, self._edit = arch, edit
        self._fields = gpu_executable(serialized)
        self._shared = next((elf for elf in self._fields.get(_CODE, []) if elf[:4] == b"\x7fELF"), b"")
        self._allocations = [
            (integer_at(a, 1), integer_at(a, 2), integer_at(a, 6) if integer_at(a, 5) else None)
            for a in messages(self._fields[_BUFFERS][0], 1)
        ]
        self._outputs = dict(self._output(entry) for entry in self._fields.get(_OUTPUTS, []))
        self._constants = [self._constant(c) for c in self._fields.get(_CONSTANTS, [])]
        self._kernels: dict[tuple[str, bytes], Kernel] = {}

    def run(
        self, arguments: Sequence[np.ndarray], outputs: int, options: Options
    ) -> tuple[list[np.ndarray], list[LaunchRecord]]:
        """Runs the program.

        Args:
          arguments: flat, in the order of its parameters.
          outputs: how many arrays it returns.

        Returns:
          the bytes (uint8, at least as many as the array has) of every output, and all launches in order.
        """
        run = _Run(self, arguments, options)
        for thunk in self._fields[_THUNKS]:
            run.thunk(thunk)
        alone = outputs == 1 and len(self._outputs) == 1
        where = [next(iter(self._outputs.values()))] if alone else [self._outputs[n] for n in range(outputs)]
        return [run.allocations[k] for k in where], run.launches

    def kernel(self, name: str, elf: bytes) -> Kernel:
        """A kernel of its own code object, or of the module's where `elf` is empty; decoded once."""
        key = (name, elf)
        if key not in self._kernels:
            code = load_kernel(elf or self._shared, name)
            self._kernels[key] = Kernel(self._edit(code) if self._edit else code, self.arch)
        return self._kernels[key]

    @staticmethod
    def _output(entry: bytes) -> tuple[int, int]:
        """Index of an output, and its allocation."""
        index = message_at(entry, 1, 1)
        return (varint(index, 0)[0] if index else integer_at(entry, 1, 1)), integer_at(entry, 2, 1)

    def _constant(self, message: bytes) -> tuple[int, bytes]:
        """Allocation and bytes of a constant: given, or a literal of the module."""
        given = [value for _, value in fields(message_at(message, 2)) if isinstance(value, bytes)]
        name = text_at(message, 1)
        body = max(given, key=len) if given else _literal(self._fields[_MODULE][0], name)
        return integer_at(message, 3), body


def _literal(module: bytes, symbol: str) -> bytes:
    """Bytes of the HLO constant that the symbol `buffer_for_NAME` stands for."""
    for computation in messages(message_at(module, 1), 3):
        for instruction in messages(computation, 2):
            name = f"buffer_for_{text_at(instruction, 1)}".replace(".", "_").replace("-", "_")
            if name not in (symbol, symbol.removesuffix("_0")):
                continue
            for number, value in fields(message_at(instruction, 8)):
                if number in (3, 8, 9, 11, 13, 15, 16, 17) and isinstance(value, bytes):
                    return value  # u8 f32 f64 f16 bf16 s8 u16 s16: as they lie in memory
                width = {2: 1, 4: 4, 5: 8, 6: 4, 7: 8}.get(number)  # bool s32 s64 u32 u64: varints
                if width and isinstance(value, bytes):
                    numbers, at = [], 0
                    while at < len(value):
                        n, at = varint(value, at)
                        numbers.append((n & (1 << 8 * width) - 1).to_bytes(width, "little"))
                    return b"".join(numbers)
    return b""


class _Run:
    """The memory of one run, and what has been launched."""

    def __init__(self, executable: Executable, arguments: Sequence[np.ndarray], options: Options):
        self._executable, self._options = executable, options
        self.launches: list[LaunchRecord] = []
        self.allocations: dict[int, np.ndarray] = {}
        for number, size, parameter in executable._allocations:
            words = np.full(-(-size // 4), POISON, np.uint32)
            self.allocations[number] = raw = words.view(np.uint8)
            if parameter is not None:
                raw[: arguments[parameter].nbytes] = (
                    np.ascontiguousarray(arguments[parameter]).reshape(-1).view(np.uint8)
                )
        for number, body in executable._constants:
            raw = self.allocations[number]
            if not 0 <= raw.size - len(body) < 4:
                raise NotModelled(f"a constant of {raw.size} bytes, of which {len(body)} were found")
            raw[: len(body)] = np.frombuffer(body, np.uint8)

    def _bytes(self, part: bytes) -> np.ndarray:
        s = _Slice.of(part)
        return self.allocations[s.allocation][s.offset : s.offset + s.size]

    def _region(self, name: str, s: _Slice) -> Region:
        end = s.offset + -(-s.size // 4) * 4
        return Region(name, self.allocations[s.allocation][s.offset : end], s.size)

    def _sequence(self, message: bytes) -> None:
        for thunk in messages(message, 1):
            self.thunk(thunk)

    def thunk(self, message: bytes) -> None:
        """Runs one step of the program."""
        actions: dict[int, Callable[[bytes], None]] = {
            _SEQUENCE: self._sequence,
            _START: lambda m: self._sequence(message_at(m, 3)),
            _KERNEL: self._kernel,
            _CUSTOM_KERNEL: self._custom_kernel,
            _COPY: self._copy,
            _ZERO: self._zero,
            _FILL: self._fill,
            _WHILE: self._while,
            _CONDITIONAL: self._conditional,
        }
        for number, value in fields(message):
            if number in _IGNORED:
                continue
            if number not in actions or not isinstance(value, bytes):
                raise NotModelled(f"step of kind {number} (a library call or a collective?)")
            actions[number](value)

    def _kernel(self, m: bytes) -> None:
        how = Launch(_size(m, 4, 1, 2), _size(m, 4, 2, 1), integer_at(m, 6))
        self._launch(text_at(m, 3), b"", how, [_Slice.of(a) for a in messages(m, 1)])

    def _custom_kernel(self, m: bytes) -> None:
        spec = message_at(m, 3)
        how = Launch(_size(spec, 3, 2), _size(spec, 4, 1), integer_at(spec, 6))
        arguments = [_Slice.of(message_at(a, 1)) for a in messages(m, 1)]
        self._launch(text_at(spec, 2, 4), message_at(spec, 2, 2, 1), how, arguments)

    def _launch(self, name: str, elf: bytes, how: Launch, arguments: list[_Slice]) -> None:
        regions = [self._region(f"argument {k}", s) for k, s in enumerate(arguments)]
        executed = self._executable.kernel(name, elf).launch(how, regions, self._options)
        self.launches.append(LaunchRecord(name, executed))

    def _copy(self, m: bytes) -> None:
        copy = message_at(m, 1)
        self._bytes(message_at(copy, 2, 1))[:] = self._bytes(message_at(copy, 1, 1))

    def _zero(self, m: bytes) -> None:
        self._bytes(message_at(m, 1, 1))[:] = 0

    def _fill(self, m: bytes) -> None:
        self._bytes(message_at(m, 1)).view(np.uint32)[:] = integer_at(m, 2)

    def _while(self, m: bytes) -> None:
        go_on = self._bytes(message_at(m, 1))
        # A loop whose trip count is known has no condition to compute.
        trips = next((v for n, v in fields(m) if n == 4 and isinstance(v, int)), None)
        done = 0
        while trips is None or done < trips:
            if trips is None:
                self._sequence(message_at(m, 2))
                if not go_on[0]:
                    return
            self._sequence(message_at(m, 3))
            done += 1

    def _conditional(self, m: bytes) -> None:
        branches, index = messages(m, 2), self._bytes(message_at(m, 1, 1))
        # A bool chooses the first branch when it is true; an index out of range the last one.
        chosen = int(not index[0]) if index.size == 1 else int(index.view(np.int32)[0])
        self._sequence(branches[chosen if 0 <= chosen < len(branches) else -1])


def _size(message: bytes, *path: int) -> tuple[int, int, int]:
    given = {number: value for number, value in fields(message_at(message, *path)) if isinstance(value, int)}
    return given.get(1, 1), given.get(2, 1), given.get(3, 1)
