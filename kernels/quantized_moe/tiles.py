"""The tiling of routed experts with quantised weights into programs, for each kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llama_jax.kernels.dispatch.cases import neighbours
from llama_jax.kernels.moe.schedule import tile_count
from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.kernels.quantized_matmul.tiles import matrix_rows
from llama_jax.targets import Target

MOST_ROWS = 64
"""Of an expert, on average twice: beyond, codes would be decoded for every tile of rows again."""
LEAST_STEPS = 4
"""Steps that a program should have at least."""
WAVES_A_UNIT = 8


@dataclass(frozen=True)
class Tiles:
    """The tiling of both products; powers of two.

    Attributes:
      rows: pairs of one token and one of its experts that a program multiplies.
      cols: rows of a weight, which are columns of the result.
      inner: bytes of each that a step of the loop reads, at most.
      splits: programs that share a row of down, where there would be too few.
      num_warps: waves of a program.
      num_stages: steps of the loop that overlap.
    """

    rows: int
    cols: int
    inner: int
    splits: int
    num_warps: int
    num_stages: int


def rows_of(target: Target, pairs: int, experts: int) -> int:
    """Rows of a tile: twice what an expert has on average, so that most need one tile and are read once."""
    return max(next_power_of_2(2 * pairs // min(pairs, experts)), matrix_rows(target))


def default_tiles(target: Target, *, pairs: int, experts: int, hidden: int, row_bytes: int) -> Tiles:
    """The best choice known for a target.

    Args:
      pairs: tokens times experts of each.
      hidden: rows of down of an expert; row_bytes: of each.
    """
    rows = rows_of(target, pairs, experts)
    few, nvidia = rows <= 16, target.vendor == "nvidia"
    cols, inner, warps, stages = (64, 128, 4, 3) if nvidia else (64, 64, 2 if few else 4, 1)
    if target.wave_size == 32 and not nvidia:  # half the registers of a lane of CDNA
        cols, inner = 32, 32
        warps = 2
    programs, steps, splits = tile_count(pairs, experts, rows) * -(-hidden // cols), -(-row_bytes // inner), 1
    while programs * splits * warps < WAVES_A_UNIT * target.compute_units and steps >= 2 * LEAST_STEPS * splits:
        splits *= 2
    return Tiles(rows, cols, inner, splits, warps, stages)


def candidates(target: Target, *, pairs: int, experts: int, hidden: int, row_bytes: int) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first. Arguments as for `default_tiles`."""
    best = default_tiles(target, pairs=pairs, experts=experts, hidden=hidden, row_bytes=row_bytes)
    warps = [n for n in (best.num_warps * 2, best.num_warps // 2) if n]
    splits = [n for n in (best.splits * 2, best.splits // 2) if n]
    stages = (1, 2) if target.vendor == "amd" else (2, 3, 4)
    sizes = {"cols": (best.cols * 2, best.cols // 2), "inner": (best.inner * 2, best.inner // 2)}
    found = neighbours(best, **sizes, num_warps=warps, num_stages=stages, splits=splits)
    yield from (tiles for tiles in found if tiles.cols >= 16 * tiles.num_warps)
