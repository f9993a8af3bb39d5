"""Global memory: the buffers that one kernel may touch, each in 4 GiB of addresses of its own.

A pointer that runs out of its buffer therefore never lands in another one, and every access is checked to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from amd.emulator.errors import Fault
from amd.emulator.numerics import I64, U16, Array, U

CODE = 1
"""The region of the code object's image; arguments and buffers follow."""


@dataclass(frozen=True)
class Region:
    """One buffer.

    Attributes:
      name: for messages.
      raw: uint8, contiguous, padded to a multiple of 4 bytes.
      size: bytes that may be touched.
    """

    name: str
    raw: Array
    size: int

    def __post_init__(self) -> None:
        if self.raw.size % 4 or self.size > self.raw.size or not self.raw.flags.c_contiguous:
            raise ValueError(f"{self.name}: {self.raw.size} bytes for {self.size}, contiguous and padded to 4 needed")


class Memory:
    """The regions of a launch by number, from `CODE` on."""

    def __init__(self, regions: Sequence[Region]):
        self.regions = tuple(regions)
        self.words = [r.raw.view(U) for r in self.regions]
        self.halves = [r.raw.view(U16) for r in self.regions]

    def _pieces(self, address: Array, size: int, what: str) -> Iterator[tuple[Array | None, int, Array]]:
        """(which of the addresses or None for all, region, offsets) of every region that is touched."""
        first, last = int(address.min()) >> 32, int(address.max()) >> 32
        for which in (first,) if first == last else np.unique(address >> 32).tolist():
            chosen = None if first == last else (address >> 32) == which
            part = address if chosen is None else address[chosen]
            end = int(part.max()) - (which << 32) + size
            if not 1 <= which <= len(self.regions):
                raise Fault(f"{what} of {size} bytes at {int(part.max()):#x}, which is in no buffer")
            region = self.regions[which - 1]
            if end > region.size:
                raise Fault(f"{what} of {size} bytes at offset {end - size} of {region.name}, {region.size} bytes long")
            yield chosen, which - 1, part - (which << 32)

    def load(self, address: Array, size: int) -> list[Array]:
        """Loads 1, 2 or 4 bytes, or several words, from each address.

        Returns:
          uint32 arrays like `address`, zero-extended: one, or one for each word.

        Raises:
          Fault: one of them is outside of its buffer.
        """
        count = -(-size // 4)
        if not address.size:
            return [np.zeros(address.shape, U)] * count
        out: list[Array] = []
        for chosen, which, offset in self._pieces(address, size, "load"):
            values = gather(self.regions[which].raw, self.halves[which], self.words[which], offset, size)
            if chosen is None:
                return values
            out = out or [np.zeros(address.shape, U) for _ in values]
            for whole, value in zip(out, values, strict=True):
                whole[chosen] = value
        return out

    def store(self, address: Array, value: Array, size: int) -> None:
        """Stores the low 1, 2 or 4 bytes of uint32 words.

        Raises:
          Fault: one address is outside of its buffer, or in the code.
        """
        if not address.size:
            return
        for chosen, which, offset in self._pieces(address, size, "store"):
            if which < 2:
                raise Fault(f"store to {self.regions[which].name}")
            scatter(
                self.regions[which].raw,
                self.halves[which],
                self.words[which],
                offset,
                value if chosen is None else value[chosen],
                size,
            )


def aligned(offset: Array, size: int) -> bool:
    """Whether all offsets are multiples of a power of two."""
    return not int(np.bitwise_or.reduce(offset, axis=None)) & size - 1


def gather(raw: Array, halves: Array, words: Array, offset: Array, size: int) -> list[Array]:
    """Reads 1, 2 or 4 bytes, or several words, at each byte offset of an array of which three views are given."""
    if size >= 4 and aligned(offset, 4):
        index = offset >> 2
        if size in (8, 16) and aligned(offset, size) and words.size % (size // 4) == 0:
            # Rows of words: one look-up each instead of several.
            rows = words.reshape(-1, size // 4).take(index >> size.bit_length() - 3, axis=0)
            return [rows[..., k] for k in range(size // 4)]
        return [words.take(index + k if k else index) for k in range(size // 4)]
    if size == 2 and aligned(offset, 2):
        return [halves.take(offset >> 1).astype(U)]
    out = []
    for start in range(0, size, 4):
        word = raw[offset + start].astype(U)
        for k in range(1, min(4, size - start)):
            word |= raw[offset + (start + k)].astype(U) << U(8 * k)
        out.append(word)
    return out


def scatter(raw: Array, halves: Array, words: Array, offset: Array, value: Array, size: int) -> None:
    """Writes 1, 2 or 4 bytes at each byte offset; of equal offsets the last one counts."""
    if size == 4 and aligned(offset, 4):
        words[offset >> 2] = value
    elif size == 2 and aligned(offset, 2):
        halves[offset >> 1] = value.astype(U16)
    else:
        for k in range(size):
            raw[offset + k] = (value >> U(8 * k)).astype(np.uint8)


def as_int64(address: Array) -> Array:
    """uint64 addresses as numpy's index type."""
    return address.view(I64)
