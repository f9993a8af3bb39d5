"""The local memory of work-groups, and who touched it since the last barrier.

Races. Between two barriers of a work-group its waves run in any order. So it is an error when one wave reads what
another wrote since the last barrier, or changes what another read or wrote since then. For every byte the waves that
read and wrote it are kept, as bits. Writing what a byte holds already changes nothing and is no race: compilers let
several waves store equal results. Reading a byte that nobody ever wrote is an error too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from amd.emulator.errors import Fault
from amd.emulator.memory import aligned, gather, scatter
from amd.emulator.numerics import I64, U16, U64, Array, U
from amd.emulator.waves import Waves

MAX_WAVES = 16
"""Waves of a work-group: 1024 threads."""


@dataclass(frozen=True)
class _Marks:
    """The bookkeeping of units of `width` bytes: views of the same arrays for each width.

    Attributes:
      writers, readers: 16 bits for each byte of a unit, the waves that touched it.
      written: 8 bits for each byte, 1 once somebody wrote it.
      ones: a number that spreads 16 bits to every byte's place; `all_written`: what `written` is when all bytes are.
    """

    width: int
    writers: Array
    readers: Array
    written: Array
    ones: np.generic
    all_written: np.generic

    def spread(self, bits: Array) -> Array:
        """Each wave's bit (uint64) at every byte of a unit."""
        return bits.astype(self.writers.dtype, copy=False) * self.ones

    def of_bytes(self, marks: Array) -> Array:
        """uint16 [units, width]."""
        return np.ascontiguousarray(marks).view(U16).reshape(-1, self.width)


class Lds:
    """Local memory of the work-groups that run together.

    Attributes:
      size: bytes of each work-group.
    """

    def __init__(self, groups: int, size: int, *, check_races: bool):
        self.size = size
        self.stride = -(-size // 16) * 16
        self.raw = np.zeros(groups * self.stride, np.uint8)
        self.words, self.halves = self.raw.view(U), self.raw.view(U16)
        self.check_races = check_races and size > 0
        if self.check_races:
            writers, readers = np.zeros(self.raw.size, U16), np.zeros(self.raw.size, U16)
            written = np.zeros(self.raw.size, np.uint8)
            self._marks = {
                width: _Marks(
                    width,
                    writers.view(f"u{2 * width}"),
                    readers.view(f"u{2 * width}"),
                    written.view(f"u{width}"),
                    np.full(width, 1, U16).view(f"u{2 * width}")[0],
                    np.full(width, 1, np.uint8).view(f"u{width}")[0],
                )
                for width in (1, 2, 4)
            }
            self._touched: list[Array] = []

    def index(self, w: Waves, address: Array, offset: int, size: int, mask: Array | None) -> Array:
        """Byte indices of the lanes of `mask`, in the memory of all groups.

        Raises:
          Fault: one is beyond the group's memory.
        """
        at = (address + U(offset)).astype(I64)  # the sum wraps around at 32 bits
        inside = at if mask is None else at[mask]
        if inside.size and int(inside.max()) + size > self.size:
            raise Fault(f"LDS access of {size} bytes at {int(inside.max())} of {self.size}")
        at += (w.group * self.stride)[:, None]
        return at if mask is None else at[mask]

    def read(self, w: Waves, at: Array, size: int, mask: Array | None) -> list[Array]:
        """Loads 1, 2 or 4 bytes, or several words, at byte indices `at`, those of the lanes of `mask`; see `gather`."""
        if self.check_races and at.size:
            bits = _wave_bits(w, mask)
            for piece in range(0, size, 4):
                for unit, marks in self._units(at + piece, min(4, size - piece)):
                    self._check_read(unit, marks, bits)
        return gather(self.raw, self.halves, self.words, at, size)

    def write(self, w: Waves, at: Array, value: Array, size: int, mask: Array | None) -> None:
        """Stores the low 1, 2 or 4 bytes of words."""
        value = np.broadcast_to(value, at.shape)
        if not self.check_races or not at.size:
            scatter(self.raw, self.halves, self.words, at, value, size)
            return
        bits, wanted = _wave_bits(w, mask), value if size == 4 else value & U((1 << 8 * size) - 1)
        changes = gather(self.raw, self.halves, self.words, at, size)[0] ^ wanted
        for k, (unit, marks) in enumerate(self._units(at, size)):
            self._check_write(unit, marks, bits, changes >> U(8 * k))
        scatter(self.raw, self.halves, self.words, at, value, size)
        if (gather(self.raw, self.halves, self.words, at, size)[0] != wanted).any():
            raise Fault("LDS race: lanes or waves store unlike values to one address in one instruction")

    def barrier(self, groups: Array) -> None:
        """The waves of `groups` (bool [groups]) have met: what they touched before counts no more."""
        if not self.check_races:
            return
        marks, kept = self._marks[4], []
        everyone = bool(groups.all())
        for word in self._touched:
            if not everyone:
                done = groups[word * 4 // self.stride]
                kept.append(word[~done])
                word = word[done]
            marks.writers[word] = 0
            marks.readers[word] = 0
        self._touched = kept

    def _units(self, at: Array, size: int) -> Iterator[tuple[Array, _Marks]]:
        """The access as whole units: one if it is aligned, else its bytes."""
        at = at.reshape(-1)
        if aligned(at, size):
            yield at >> size.bit_length() - 1, self._marks[size]
        else:
            for k in range(size):
                yield at + k, self._marks[1]

    def _check_read(self, unit: Array, marks: _Marks, bits: Array) -> None:
        if (marks.written[unit] != marks.all_written).any():
            at = int(unit[marks.written[unit] != marks.all_written][0]) * marks.width % self.stride
            raise Fault(f"LDS read at {at} of what nobody wrote")
        mine = marks.spread(bits)
        writers = marks.writers[unit]
        if writers.any():
            # A byte that this wave wrote too holds the same value whoever came last: see `_check_write`.
            odd = (writers & mine) != mine
            if odd.any():
                who = marks.of_bytes(writers[odd])
                bad = ((who != 0) & (who & bits[odd, None].astype(U16) == 0)).any(1)
                self._raise_if(bad, unit[odd], marks, bits[odd], who, "reads what was written")
        self._mark(marks.readers, unit, mine, marks)

    def _check_write(self, unit: Array, marks: _Marks, bits: Array, changes: Array) -> None:
        mine = marks.spread(bits)
        others = (marks.writers[unit] | marks.readers[unit]) & ~mine
        if others.any():
            who = marks.of_bytes(others)
            changed = changes.reshape(-1).view(np.uint8).reshape(-1, 4)[:, : marks.width] != 0
            self._raise_if((changed & (who != 0)).any(1), unit, marks, bits, who, "overwrites what was read or written")
        marks.written[unit] = marks.all_written
        self._mark(marks.writers, unit, mine, marks)

    def _raise_if(self, bad: Array, unit: Array, marks: _Marks, bits: Array, who: Array, what: str) -> None:
        if not bad.any():
            return
        first = int(np.flatnonzero(bad)[0])
        other = int(np.bitwise_or.reduce(who[first])) & ~int(bits[first])
        names = ", ".join(str(n) for n in range(MAX_WAVES) if other >> n & 1)
        wave = int(bits[first]).bit_length() - 1
        at = int(unit[first]) * marks.width % self.stride
        raise Fault(f"LDS race at {at}: wave {wave} {what} by wave {names} since the last barrier")

    def _mark(self, marks: Array, unit: Array, mine: Array, form: _Marks) -> None:
        self._touched.append(unit * form.width >> 2)
        while unit.size:
            marks[unit] |= mine
            # Of several waves that mark one unit at once only the last one's bit has been stored.
            lost = (marks[unit] & mine) != mine
            unit, mine = unit[lost], mine[lost]


def _wave_bits(w: Waves, mask: Array | None) -> Array:
    """The wave of each lane of `mask` as a bit, uint64, flat."""
    bits = np.broadcast_to((U64(1) << w.member.astype(U64))[:, None], (w.count, 64))
    return bits.reshape(-1) if mask is None else bits[mask]
