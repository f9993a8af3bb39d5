"""The tiling of the two kernels of low-rank adapters, for each kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llama_jax.kernels.dispatch.cases import neighbours
from llama_jax.kernels.pallas import tile_width
from llama_jax.targets import Target

MOST_TILE_ROWS = 64
MOST_SPLITS = 8
"""Parts of a sum: the second kernel reads them all."""
LEAST_STEPS = 2
"""Of a part."""
CONTRACTION = 128
"""Numbers that a step of the second kernel sums over, those of several slots together."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of both kernels.

    Attributes:
      rows: tokens that a program computes.
      inner: numbers of the input that a step of the first kernel reads.
      splits: programs that share a sum of the first kernel.
      cols: numbers of the result of a program of the second.
      num_warps: waves of a program.
      num_stages: steps of the first kernel that overlap.
    """

    rows: int
    inner: int
    splits: int
    cols: int
    num_warps: int
    num_stages: int


def default_tiles(target: Target, *, rows: int, inner: int, slots: int, projections: int) -> Tiles:
    """The best choice known for a target.

    Args:
      rows: tokens; inner: numbers of each; slots: with slot 0; projections: of the call.
    """
    tile = min(tile_width(rows), MOST_TILE_ROWS)
    step, stages = (256, 3) if target.vendor == "nvidia" else (128, 2)
    step = min(step, tile_width(inner))
    # No more programs have work than there are tokens.
    programs = min(max(slots - 1, 1), tile) * projections * -(-rows // tile)
    splits, steps = 1, -(-inner // step)
    while splits < MOST_SPLITS and programs * splits < target.compute_units and steps >= 2 * LEAST_STEPS * splits:
        splits *= 2
    return Tiles(tile, step, splits, 64, 4, stages)


def candidates(target: Target, *, rows: int, inner: int, slots: int, projections: int) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first. Arguments as for `default_tiles`."""
    best = default_tiles(target, rows=rows, inner=inner, slots=slots, projections=projections)
    splits = [n for n in (2 * best.splits, best.splits // 2) if n]
    yield from neighbours(best, splits=splits, cols=(128, 32), num_warps=(2, 8), inner=(best.inner // 2,))


def slots_together(rank: int) -> int:
    """Slots whose numbers a step of the second kernel sums over."""
    return max(CONTRACTION // tile_width(rank), 1)
