"""Quantised matrices in memory: codes, scales, and the floats they represent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

E2M1 = np.array([sign * size for sign in (1, -1) for size in (0, 1, 2, 3, 4, 6, 8, 12)], np.int8)
"""Twice the number that each code of the four-bit floats of MXFP4 represents, so that all are whole."""
_BLOCK_ELEMENTS = 1 << 18
"""Floats that are computed at a time: 1 MiB, which stays in a processor's cache."""


@dataclass(frozen=True)
class Codes:
    """A quantised matrix: element [i, j] is (code[i, j] - zero) * scale, with the zero and scale of its block.

    Attributes:
      values: [rows, cols], integers or 8-bit floats.
      scales: [rows / block[0], cols / block[1]], rounded up.
      zeros: the codes that stand for 0, in the shape of `scales`; None where that is 0 everywhere.
      block: rows and columns of the blocks; the last ones may be cut off.
      groups: [cols] int, the column of `scales` that each column belongs to, where it does not follow from `block`.
      table: [codes] float32, what each code stands for, where that is not its number.
    """

    values: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]
    zeros: np.ndarray | None = None
    groups: np.ndarray | None = None
    table: np.ndarray | None = None

    def turned(self) -> Codes:
        """The matrix with rows as columns, of one that has no `groups`."""
        zeros = None if self.zeros is None else self.zeros.T
        return Codes(self.values.T, self.scales.T, (self.block[1], self.block[0]), zeros, table=self.table)

    def dequantize_into(self, out: np.ndarray, first: int = 0) -> None:
        """Fills `out`, [n, cols] of a float dtype, with rows first to first + n.

        Everything is computed in float32 and rounded once, to the dtype of `out`.
        """
        rows, cols = out.shape
        step = max(1, _BLOCK_ELEMENTS // cols)
        for start in range(0, rows, step):
            part = slice(first + start, first + min(start + step, rows))
            values = self.values[part]
            floats = np.empty(values.shape, np.float32)
            floats[...] = values if self.table is None else self.table[values]
            # A product that a float32 cannot hold is found as an infinite weight by whoever asks for finite ones.
            with np.errstate(over="ignore", invalid="ignore"):
                if self.zeros is not None:
                    self._apply(np.subtract, floats, self.zeros, part)
                self._apply(np.multiply, floats, self.scales, part)
                out[start : start + len(floats)] = floats

    def _apply(self, operation: np.ufunc, floats: np.ndarray, blocks: np.ndarray, part: slice) -> None:
        """Combines rows of floats, in place, with the numbers of their blocks."""
        rows = np.arange(part.start, part.stop) // self.block[0]
        numbers = (blocks[:1] if blocks.shape[0] == 1 else blocks[rows]).astype(np.float32)
        cols = floats.shape[1]
        if numbers.shape[1] == 1:
            operation(floats, numbers, out=floats)
        elif self.groups is None and cols == numbers.shape[1] * self.block[1]:
            whole = floats.reshape(len(floats), -1, self.block[1])
            operation(whole, numbers[:, :, None], out=whole)
        else:
            groups = np.arange(cols) // self.block[1] if self.groups is None else self.groups
            operation(floats, numbers[:, groups], out=floats)


def packed_words(bits: int, count: int) -> tuple[int, int]:
    """Words that `count` numbers take as one stream of bits, and where no number is cut by the end of a word."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpacks unsigned integers of a few bits from 32-bit words, along the last axis.

    The words are one stream of bits, lowest bits first; a number may begin in one word and end in the next. Where there
    are as many words as numbers take that are not cut (`packed_words`), the last bits of each word stand for nothing.

    Args:
      words: [..., n] int32 or uint32.
      bits: of each number, 1 to 8.
      count: how many numbers to take, at most n * 32 / bits.

    Returns:
      [..., count] uint8.
    """
    words = np.ascontiguousarray(words).view("<u4")
    stream, whole = packed_words(bits, count)
    if stream < whole == words.shape[-1]:
        each = words[..., None] >> np.arange(0, 32 - bits + 1, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
        return each.astype(np.uint8).reshape(*words.shape[:-1], -1)[..., :count]
    if bits == 8:
        return words.view(np.uint8)[..., :count]
    if 8 % bits == 0:
        octets = words.view(np.uint8)[..., None]
        numbers = (octets >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
        return numbers.reshape(*words.shape[:-1], -1)[..., :count]
    starts = np.arange(count) * bits
    out = np.empty((*words.shape[:-1], count), np.uint8)
    padded = np.concatenate([words, np.zeros_like(words[..., :1])], axis=-1)
    for offset in range(32):  # all numbers that begin at the same bit of their word at one time
        at = np.flatnonzero(starts % 32 == offset)
        if at.size:
            word = starts[at] // 32
            low = padded[..., word] >> np.uint32(offset)
            if offset + bits > 32:
                low |= padded[..., word + 1] << np.uint32(32 - offset)
            out[..., at] = low & np.uint32(2**bits - 1)
    return out
