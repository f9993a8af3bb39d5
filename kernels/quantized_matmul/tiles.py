"""How a product with a quantised weight is cut into programs, for each kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llama_jax.kernels.dispatch.cases import neighbours
from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.quantized import Layout
from llama_jax.targets import Target

MATRIX_ROWS = 16
"""Rows of a matrix instruction."""
MOST_TILE_ROWS = 64
WAVES_A_UNIT = 8
"""Waves that a compute unit should have at least, to hide how long they wait for memory and for each other."""
LEAST_STEPS = 4
"""Steps that a program should have at least."""
CHUNK = 16
"""Bytes that a thread reads at once."""


@dataclass(frozen=True)
class Tiles:
    """How the work is cut; powers of two, but for `num_stages`.

    Attributes:
      rows: of the input that a program multiplies.
      cols: rows of the weight, which are columns of the result.
      inner: bytes of each that a step of the loop reads.
      splits: programs that share a row of the weight, where there would be too few.
      num_warps: waves of a program.
      num_stages: steps of the loop that overlap.
    """

    rows: int
    cols: int
    inner: int
    splits: int
    num_warps: int
    num_stages: int


def default_tiles(target: Target, *, rows: int, out: int, row_bytes: int, layout: Layout) -> Tiles:
    """The best choice known for a target: by budgets (registers, local memory, loads of 16 bytes, waves of a unit).

    Args:
      rows: of the input.
      out: rows of the weight; row_bytes: of each.
    """
    wave, nvidia = target.wave_size or 32, target.vendor == "nvidia"
    tile = min(max(next_power_of_2(rows), MATRIX_ROWS), MOST_TILE_ROWS)
    inner = 128 if layout.bits == 8 else 32 if wave == 32 and not nvidia else 64
    if layout.group is not None:
        inner = min(inner, layout.group // layout.per_byte)
    if nvidia:
        # Products of four warps are asynchronous ones, which want their operands elsewhere: with few rows it takes less
        # to have two.
        cols, num_warps = (64, 2) if tile == MATRIX_ROWS else (128, 4)
    else:
        cols, num_warps = 64, min(max(64 * inner // (CHUNK * wave), 1), 4)
    programs, steps = -(-out // cols) * -(-rows // tile), -(-row_bytes // inner)
    splits = 1
    while programs * splits * num_warps < WAVES_A_UNIT * target.compute_units and steps >= 2 * LEAST_STEPS * splits:
        splits *= 2
    return Tiles(tile, cols, inner, splits, num_warps, 3 if nvidia else 1)


def candidates(target: Target, *, rows: int, out: int, row_bytes: int, layout: Layout) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first. Arguments as for `default_tiles`."""
    best = default_tiles(target, rows=rows, out=out, row_bytes=row_bytes, layout=layout)
    warps = [n for n in (best.num_warps * 2, best.num_warps // 2) if n]
    stages = (1, 2) if target.vendor == "amd" else (2, 3, 4)
    splits = [n for n in (best.splits * 2, best.splits // 2) if n]
    found = neighbours(best, cols=(best.cols * 2, best.cols // 2), num_warps=warps, num_stages=stages, splits=splits)
    yield from (tiles for tiles in found if tiles.cols >= MATRIX_ROWS * tiles.num_warps)
