"""The tiling of the two kernels of low-rank adapters, for each kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llama_jax.kernels.dispatch.cases import neighbours
from llama_jax.kernels.pallas import next_power_of_2, tile_width
from llama_jax.targets import Target

MOST_TILE_ROWS = 64
MOST_SPLITS = 16
"""Parts of a sum: the second kernel reads them all."""
LEAST_STEPS = 2
"""Of a part."""
MOST_OF_B = 4096
"""Numbers of b in a program of the second kernel."""
MOST_OF_STEP = 28672
"""Numbers that a step of the first kernel reads: three steps of 16 bits fit into a Hopper's shared memory."""
MOST_OF_STEP_RDNA = 4096
"""The same on RDNA, whose registers hold the operands of a matrix instruction twice."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of both kernels.

    Attributes:
      rows: tokens of one slot that a program computes.
      inner: numbers of each token that a step of the first kernel reads.
      splits: programs that share a sum of the first kernel.
      num_warps, num_stages: waves of a program of the first kernel, and steps that overlap.
      cols: numbers of the result of a program of the second.
      expand_warps: waves of that.
    """

    rows: int
    inner: int
    splits: int
    num_warps: int
    num_stages: int
    cols: int
    expand_warps: int


def default_tiles(target: Target, *, rows: int, inner: int, slots: int, rank: int, projections: int) -> Tiles:
    """The best choice known for a target.

    Args:
      rows: tokens; inner: numbers of each; slots: with slot 0; projections: of the call.
    """
    groups = min(max(slots - 1, 1), rows)
    tile = min(max(next_power_of_2(rows // groups), 16), MOST_TILE_ROWS)
    nvidia, waves = target.vendor == "nvidia", 64 // (target.wave_size or 32)
    step, stages = (256, 3) if nvidia else (128, 2)
    most = MOST_OF_STEP_RDNA if waves > 1 and target.vendor == "amd" else MOST_OF_STEP
    step = min(step, tile_width(inner))
    while step > 16 and (tile + projections * tile_width(rank)) * step > most:
        step //= 2
    splits, steps, programs = 1, -(-inner // step), max(groups, -(-rows // tile))
    while splits < MOST_SPLITS and programs * splits < target.compute_units and steps >= 2 * LEAST_STEPS * splits:
        splits *= 2
    cols = max(min(128, MOST_OF_B // tile_width(rank)), 16)
    return Tiles(tile, step, splits, waves * tile // 16, stages, cols, 2 * waves)


def candidates(target: Target, *, rows: int, inner: int, slots: int, rank: int, projections: int) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first. Arguments as for `default_tiles`."""
    best = default_tiles(target, rows=rows, inner=inner, slots=slots, rank=rank, projections=projections)
    splits = [n for n in (2 * best.splits, best.splits // 2) if n]
    choices = {"splits": splits, "cols": (2 * best.cols, best.cols // 2), "expand_warps": (2, 8), "num_warps": (1, 4)}
    yield from neighbours(best, **choices, inner=(best.inner // 2,))
