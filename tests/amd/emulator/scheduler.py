"""Runs a program: which waves execute when, barriers, and the limit on instructions.

In order: the waves at the lowest program counter execute together, so that waves that took different ways meet again.
Shuffled: of each work-group one wave runs as far as it can (to a barrier or its end) before the next may start, in an
order drawn anew after each barrier. A program without races gives the same results under either.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from amd.emulator.errors import EmulatorError, Fault
from amd.emulator.numerics import Array
from amd.emulator.program import Block, Program
from amd.emulator.waves import Waves

READY, WAITING, DONE = 0, 1, 2


def run(program: Program, waves: Waves, *, limit: int, rng: np.random.Generator | None) -> int:
    """Runs all waves to their end.

    Args:
      limit: wave instructions that may be executed.
      rng: for shuffled order; None runs in order.

    Returns:
      the number of wave instructions executed.

    Raises:
      EmulatorError: with kernel, program counter and instruction.
    """
    n = waves.all_group.size
    pc, state = np.full(n, program.entry, np.int64), np.zeros(n, np.int8)
    executed = 0
    with np.errstate(all="ignore"):
        for rows in _in_order(pc, state) if rng is None else _shuffled(pc, state, waves.per_group, rng):
            block = program.block(int(pc[rows.start]))
            waves.select(rows)
            _execute(program, block, waves)
            executed += block.count * waves.count
            if executed > limit:
                raise Fault(f"{program.name}: more than {limit} wave instructions")
            if block.end == "end":
                state[rows] = DONE
            else:
                pc[rows] = block.next
                if block.taken is not None:
                    pc[rows][block.taken(waves)] = block.target
            if block.end != "branch":
                if block.end == "barrier":
                    state[rows] = WAITING
                _release(waves, state)
    return executed


def _execute(program: Program, block: Block, waves: Waves) -> None:
    at = 0
    try:
        for at, step in enumerate(block.steps):  # noqa: B007
            step(waves)
    except EmulatorError as error:
        raise program.located(error, block.where[at]) from error
    except Exception as error:
        raise program.located(EmulatorError(f"{type(error).__name__}: {error}"), block.where[at]) from error


def _release(waves: Waves, state: Array) -> None:
    """Lets the waves of a work-group pass its barrier once all that have not ended wait there."""
    groups = state.reshape(-1, waves.per_group)
    met = ~(groups == READY).any(1) & (groups == WAITING).any(1)
    if met.any():
        waves.lds.barrier(met)
        groups[met[:, None] & (groups == WAITING)] = READY


def _in_order(pc: Array, state: Array) -> Iterator[slice]:
    n = pc.size
    while True:
        ready = state == READY
        if not ready.any():
            return  # waves that wait are released as soon as the last one of their group waits or ends
        lowest = pc[ready].min()
        which = ready & (pc == lowest)
        yield slice(0, n) if which.all() else progression(np.flatnonzero(which))


def _shuffled(pc: Array, state: Array, per_group: int, rng: np.random.Generator) -> Iterator[slice]:
    """One member of every group at a time."""
    while (state == READY).any():
        for member in rng.permutation(per_group):
            mine = slice(int(member), None, per_group)
            while (ready := state[mine] == READY).any():
                here = pc[mine]
                which = np.flatnonzero(ready & (here == here[ready].min())) * per_group + int(member)
                yield progression(which)


def progression(index: Array) -> slice:
    """The longest start of ascending indices that is a slice with equal steps."""
    if index.size == 1:
        return slice(int(index[0]), int(index[0]) + 1)
    step = int(index[1] - index[0])
    breaks = np.flatnonzero(np.diff(index) != step)
    last = int(index[breaks[0]] if breaks.size else index[-1])
    return slice(int(index[0]), last + 1, step)
