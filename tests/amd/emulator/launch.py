"""Launches one kernel: registers as the hardware sets them up, work-groups in portions, all of them to their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amd.emulator.code_object import KernelCode
from amd.emulator.errors import Fault, NotModelled
from amd.emulator.lds import MAX_WAVES, Lds
from amd.emulator.memory import Memory, Region
from amd.emulator.numerics import LANES, U64, U, pack_lanes
from amd.emulator.program import Program
from amd.emulator.scheduler import run
from amd.emulator.waves import EXEC, Waves

LDS_BYTES = {"gfx942": 64 << 10, "gfx950": 160 << 10}


@dataclass(frozen=True)
class Options:
    """How kernels are executed.

    Attributes:
      seed: None runs waves in order, a number in an order of its own (see `scheduler`).
      check_races: look for races in local memory and for reads of what nobody wrote there.
      limit: wave instructions of one launch.
      waves: how many run at a time, in whole work-groups. Enough to spread the cost of each Python call, few enough
        that their registers stay in the processor's cache.
    """

    seed: int | None = None
    check_races: bool = True
    limit: int = 10**9
    waves: int = 256


@dataclass(frozen=True)
class Launch:
    """Grid (in work-groups), block (in threads) and the local memory that is asked for on top of the kernel's own."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    lds_bytes: int


class Kernel:
    """A kernel, decoded once, for any number of launches."""

    def __init__(self, code: KernelCode, arch: str):
        if code.flushes_denormals:
            raise NotModelled(f"kernel {code.name} flushes denormals")
        self.code, self.arch = code, arch
        self.program = Program.load(code.name, code.image, code.entry, code.registers, arch)
        image = np.frombuffer(code.image.ljust(-(-len(code.image) // 4) * 4, b"\0"), np.uint8)
        self.image = Region("the code object", image, image.size)

    def launch(self, how: Launch, arguments: Sequence[Region], options: Options) -> int:
        """Runs the whole grid; `arguments` are the buffers whose addresses the kernel takes.

        Returns:
          the number of wave instructions executed.

        Raises:
          EmulatorError: with kernel, program counter and instruction.
        """
        threads, groups = int(np.prod(how.block)), int(np.prod(how.grid))
        per_group = -(-threads // 64)
        lds_bytes = how.lds_bytes + self.code.lds_bytes
        if per_group > MAX_WAVES or lds_bytes > LDS_BYTES[self.arch]:
            raise Fault(f"{self.code.name}: {threads} threads, {lds_bytes} bytes of LDS do not fit on {self.arch}")
        pointers = np.zeros(max(self.code.kernarg_bytes + 64, 256) // 8, U64)
        # Regions count from 1: the code, the arguments, then the buffers.
        pointers[: len(arguments)] = (np.arange(len(arguments)) + 3).astype(U64) << U64(32)
        memory = Memory([self.image, Region("the arguments", pointers.view(np.uint8), pointers.nbytes), *arguments])
        rng = None if options.seed is None else np.random.default_rng(options.seed)
        order = np.arange(groups) if rng is None else rng.permutation(groups)
        portion = max(1, options.waves // per_group)
        executed = 0
        for first in range(0, groups, portion):
            some = order[first : first + portion]
            lds = Lds(some.size, lds_bytes, check_races=options.check_races)
            waves = Waves(some.size, per_group, self.code.registers.count, memory, lds, self.code.scratch_bytes)
            self._set_up(waves, some, how, threads)
            executed += run(self.program, waves, limit=options.limit - executed, rng=rng)
        return executed

    def _set_up(self, waves: Waves, groups: np.ndarray, how: Launch, threads: int) -> None:
        s = waves.all_s
        s[0], s[1] = 0, 2  # the arguments are region 2
        place = np.unravel_index(groups[waves.all_group], how.grid[::-1])[::-1]
        register = self.code.first_id
        for axis in range(3):
            if self.code.group_ids[axis]:
                s[register] = place[axis]
                register += 1
        thread = waves.all_member[:, None] * 64 + LANES
        z, y, x = np.unravel_index(np.minimum(thread, threads - 1), how.block[::-1])
        waves.all_v[0] = x | y << 10 | z << 20
        on = pack_lanes(thread < threads)
        s[EXEC], s[EXEC + 1] = on[:, 0].astype(U), on[:, 1]
