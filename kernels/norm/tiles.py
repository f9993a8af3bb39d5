"""The assignment of rows to programs, for each kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llama_jax.kernels.dispatch.cases import neighbours
from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.targets import Target

MOST_THREADS = 1024
"""Of a work-group, on every target."""
MOST_NUMBERS = 64
"""The most columns of a program for each of its threads: three arrays of them have to stay in registers."""


@dataclass(frozen=True)
class Tiles:
    """The tiling of the work.

    Attributes:
      rows: that a program computes, a power of two.
      num_warps: waves of a program.
    """

    rows: int
    num_warps: int

    def fits(self, target: Target, hidden: int) -> bool:
        """Returns whether a program has threads enough for its rows, and no more than there can be."""
        threads = self.num_warps * (target.wave_size or 32)
        return threads <= MOST_THREADS and self.rows * next_power_of_2(hidden) <= MOST_NUMBERS * threads


def default_tiles(target: Target, *, rows: int, hidden: int) -> Tiles:
    """The best choice known for a target; not measured.

    A few rows leave most compute units idle, so that what counts is how soon one row is done: one load of 16 bytes a
    thread for each array of 16-bit numbers. Many rows fill all units: half as many threads a row make shorter sums
    across them, and rows of few columns share a program.

    Args:
      rows: of the call; hidden: columns of each.
    """
    wave, width = target.wave_size or 32, next_power_of_2(hidden)
    many = rows >= 8 * max(target.compute_units, 1)
    together = 1
    while many and together < 4 and 2 * together * width <= 4096:
        together *= 2
    threads = together * width // (16 if many else 8)
    return Tiles(together, min(max(threads // wave, 1), MOST_THREADS // wave))


def candidates(target: Target, *, rows: int, hidden: int) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first, then its neighbours that fit. Arguments as for
    `default_tiles`."""
    best = default_tiles(target, rows=rows, hidden=hidden)
    warps = [n for n in (best.num_warps // 2, 2 * best.num_warps, best.num_warps // 4) if n]
    together = [n for n in (2 * best.rows, best.rows // 2, 4 * best.rows) if 1 <= n <= min(rows, 16)]
    for tiles in neighbours(best, num_warps=warps, rows=together):
        if tiles == best or tiles.fits(target, hidden):
            yield tiles
