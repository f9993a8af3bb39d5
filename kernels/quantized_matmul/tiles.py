"""How a product with a quantised weight is cut into programs, for each kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llama_jax.kernels.dispatch.cases import neighbours
from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.quantized import Layout
from llama_jax.targets import Target

MATRIX_ROWS = 16
"""Rows of a matrix instruction."""
MOST_TILE_ROWS = 64
CHUNK = 16
"""Bytes that a thread reads at once."""


@dataclass(frozen=True)
class Tiles:
    """How the work is cut; powers of two.

    Attributes:
      rows: of the input that a program multiplies: at least 16, or 1, for which no matrix units are used.
      cols: rows of the weight, which are columns of the result.
      inner: bytes of each that a step of the loop reads.
      splits: programs that share a row of the weight, where there would be too few.
      num_warps: waves of a program.
      num_stages: steps whose loads overlap.
    """

    rows: int
    cols: int
    inner: int
    splits: int
    num_warps: int
    num_stages: int


def default_tiles(target: Target, *, rows: int, out: int, row_bytes: int, layout: Layout) -> Tiles:
    """The best choice known for a target: NVIDIA's measured on an H200, the others by budgets (registers, local memory,
    loads of 16 bytes).

    Args:
      rows: of the input.
      out: rows of the weight; row_bytes: of each.
    """
    wave = target.wave_size or 32
    if rows == 1:
        # A load of 16 bytes by each thread of a program reads a row of the weight, or a part of it. AMD's compiler
        # unpacks all that a thread has loaded at once, for which there are registers with half as many rows.
        cols, most = (4, 128) if target.vendor == "nvidia" else (4, 2 * wave)
        threads = min(max(next_power_of_2(row_bytes) // CHUNK, wave), most)
        return Tiles(1, cols, threads * CHUNK, 1, threads // wave, 1)
    tile = min(max(next_power_of_2(rows), MATRIX_ROWS), MOST_TILE_ROWS)
    inner = 128 if layout.bits == 8 else 32 if wave == 32 and target.vendor == "amd" else 64
    if layout.group is not None:
        inner = min(inner, layout.group // layout.per_byte)
    num_warps = min(max(64 * inner // (CHUNK * wave), 1), 4)
    tiles = Tiles(tile, 64, inner, 1, num_warps, 3 if target.vendor == "nvidia" else 1)
    programs, steps = -(-out // tiles.cols) * -(-rows // tile), -(-row_bytes // inner)
    splits = 1
    while programs * splits < target.compute_units and steps >= 16 * splits:
        splits *= 2
    return replace(tiles, splits=splits)


def candidates(target: Target, *, rows: int, out: int, row_bytes: int, layout: Layout) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first. Arguments as for `default_tiles`."""
    best = default_tiles(target, rows=rows, out=out, row_bytes=row_bytes, layout=layout)
    cols = [n for n in (best.cols * 2, best.cols // 2) if n >= 4]
    if best.rows < MATRIX_ROWS:
        yield from neighbours(best, cols=cols, inner=(best.inner * 2, best.inner // 2), num_stages=(2, 4))
        return
    warps = [n for n in (best.num_warps * 2, best.num_warps // 2) if n]
    stages = (1, 2) if target.vendor == "amd" else (2, 3, 4)
    found = neighbours(best, cols=cols, num_warps=warps, num_stages=stages, splits=(best.splits * 2, 1))
    yield from (tiles for tiles in found if tiles.cols >= MATRIX_ROWS * tiles.num_warps)
