"""A kernel's machine code as basic blocks of ready-made steps; everything that can be decided early is decided here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from amd.emulator import control, ds, global_memory, packed, scalar, vector
from amd.emulator.errors import EmulatorError, NotModelled
from amd.emulator.instruction import Instruction, decode
from amd.emulator.numerics import Array
from amd.emulator.operands import Registers, Step
from amd.emulator.waves import Waves

MAX_INSTRUCTIONS = 200_000
"""Of one kernel; more means that decoding ran into data."""


@dataclass(frozen=True)
class Block:
    """Instructions that are always executed one after the other.

    Attributes:
      steps: what they do, in order; without those that do nothing.
      where: for each step, the instruction it comes from.
      count: instructions, those without a step and the last one included.
      end: "branch" (or simply falling through), "barrier" or "end".
      taken: for a branch, which of the executing waves jump to `target`; None falls through.
    """

    steps: tuple[Step, ...]
    where: tuple[Instruction, ...]
    count: int
    end: str
    next: int
    target: int = 0
    taken: Callable[[Waves], Array] | None = None


@dataclass(frozen=True)
class Program:
    """The code of one kernel.

    Attributes:
      name: of the kernel.
      code: the image of its code object.
      entry: byte offset of the first instruction.
      registers: the vector registers that it declares.
      arch: "gfx942" or "gfx950".
    """

    name: str
    code: bytes
    entry: int
    registers: Registers
    arch: str
    blocks: dict[int, Block] = field(default_factory=dict)
    leaders: set[int] = field(default_factory=set)
    decoded: dict[int, Instruction] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, code: bytes, entry: int, registers: Registers, arch: str) -> Program:
        """Finds the basic blocks that can be reached."""
        program = cls(name, code, entry, registers, arch)
        program._find_leaders()
        return program

    def _decode(self, pc: int) -> Instruction:
        if pc not in self.decoded:
            self.decoded[pc] = decode(self.code, pc)
        return self.decoded[pc]

    def block(self, pc: int) -> Block:
        """The block that starts at `pc`; made when it is first needed, so that only what runs must be known."""
        if pc not in self.blocks:
            self.blocks[pc] = self._build(pc)
        return self.blocks[pc]

    def _build(self, pc: int) -> Block:
        steps: list[Step] = []
        where: list[Instruction] = []
        count = 0
        while True:
            x = self._decode(pc)
            pc += x.size
            count += 1
            if x.format == "SOPP":
                if x.name in control.BRANCHES:
                    target = pc + 4 * x.signed("simm16")
                    return Block(tuple(steps), tuple(where), count, "branch", pc, target, control.BRANCHES[x.name])
                if x.name == "S_BARRIER":
                    return Block(tuple(steps), tuple(where), count, "barrier", pc)
                if x.name == "S_ENDPGM":
                    return Block(tuple(steps), tuple(where), count, "end", pc)
                if x.name not in control.NO_OPS:
                    raise self.located(NotModelled(x.name), x)
            else:
                try:
                    step = step_of(x, self.registers, self.arch)
                except EmulatorError as error:
                    raise self.located(error, x) from error
                if step is not None:
                    steps.append(step)
                    where.append(x)
            if pc in self.leaders:
                return Block(tuple(steps), tuple(where), count, "branch", pc)

    def _find_leaders(self) -> None:
        """Where basic blocks start: the entry, every target of a branch, and what follows a branch."""
        self.leaders.add(self.entry)
        todo, seen = [self.entry], set()
        while todo:
            pc = todo.pop()
            while pc not in seen:
                seen.add(pc)
                if len(seen) > MAX_INSTRUCTIONS:
                    raise NotModelled(f"{self.name}: more than {MAX_INSTRUCTIONS} instructions")
                try:
                    x = self._decode(pc)
                except NotModelled:
                    break  # met again, and reported, if it is ever executed
                pc += x.size
                if x.name in control.BRANCHES:
                    target = pc + 4 * x.signed("simm16")
                    self.leaders.update((target, pc))
                    todo.append(target)
                    if x.name == "S_BRANCH":
                        break
                elif x.name in ("S_ENDPGM", "S_SETPC_B64"):
                    break

    def located(self, error: EmulatorError, x: Instruction) -> EmulatorError:
        """The same error with kernel, program counter and instruction."""
        return type(error)(f"{error}\n  kernel {self.name}, pc {x.pc:#x}: {x.text}")


def step_of(x: Instruction, registers: Registers, arch: str) -> Step | None:
    """The function of an instruction, None if it does nothing.

    Raises:
      NotModelled: nobody has written it yet.
      Fault: it uses registers that the kernel did not declare.
    """
    match x.format:
        case "SOP1":
            return scalar.sop1(x)
        case "SOP2":
            return scalar.sop2(x)
        case "SOPC":
            return scalar.sopc(x)
        case "SOPK":
            return scalar.sopk(x)
        case "SMEM":
            return scalar.smem(x)
        case "VOP1":
            return vector.vop1(x, registers, arch)
        case "VOP2":
            return vector.vop2(x, registers, arch)
        case "VOPC":
            return vector.vopc(x, registers)
        case "VOP3" | "VOP3SD":
            return vector.vop3(x, registers, arch)
        case "VOP3P":
            return packed.vop3p(x, registers, arch)
        case "DS":
            return ds.ds(x, registers)
        case "FLAT" | "GLOBAL":
            return global_memory.flat(x, registers)
        case "SCRATCH":
            return global_memory.scratch(x, registers)
        case "MUBUF":
            return global_memory.mubuf(x, registers)
    raise NotModelled(x.format)
