"""The tiling of a product with a quantised weight into programs, for each kind of device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llama_jax.kernels.dispatch.cases import neighbours
from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.kernels.quantized_matmul.unpack import NO_BFLOAT16
from llama_jax.quantized import Layout
from llama_jax.targets import Target

COLUMNS = 16
"""Rows of the weight that one matrix instruction takes."""
MOST_TILE_ROWS = 64
WAVES_A_UNIT = 8
"""Waves that a compute unit should have at least, to hide how long they wait for memory and for each other."""
WAVES_A_UNIT_NVIDIA = 6
"""The same where a wave has 32 lanes and loads several steps ahead: measured on an H200, more shares of a row cost more
than they bring. Parts of a row that are rows of the tile cost nothing: of four bits, twice as many."""
TOGETHER_BELOW = 128
"""Length of groups from which on a single row, too, has a product for each of them. On an H200 that took 32 us in place
of 42 ([28672, 4096]); with groups of 64 it took 52 in place of 46, with groups of 32 111 in place of 46."""
FOLDED_FROM = 64
"""The same on NVIDIA's GPUs, where a row is cut into parts instead (`Tiles.fold`): on an H200 an earlier form
took 38 us that way in place of 46 with groups of 64; in groups of 32 the present one takes 51, in place of 29."""
LEAST_STEPS = 4
"""Steps that a program should have at least."""
CHUNK = 16
"""Bytes that a thread reads at once."""


@dataclass(frozen=True)
class Tiles:
    """The tiling of the work; powers of two, except for `num_stages`.

    Attributes:
      rows: of the input that a program multiplies.
      cols: rows of the weight, which are columns of the result.
      inner: bytes of each that a step of the loop reads: a part of a group, or several.
      splits: programs that share a row of the weight, where there would be too few.
      num_warps: waves of a program.
      num_stages: steps of the loop that overlap.
      fold: parts of a row of the weight, and of the input, that are rows of their own: `rows` and `cols` count them.
      scaled: scales of groups multiply the weight (`scaled`), not sums (`kernel`).
    """

    rows: int
    cols: int
    inner: int
    splits: int
    num_warps: int
    num_stages: int
    fold: int = 1
    scaled: bool = False


def matrix_rows(target: Target) -> int:
    """Rows of the input that one matrix instruction takes."""
    return 8 if target.vendor == "nvidia" else 16


def default_tiles(target: Target, *, rows: int, out: int, row_bytes: int, layout: Layout) -> Tiles:
    """The best choice known for a target, of either kernel.

    Args:
      rows: of the input.
      out: rows of the weight; row_bytes: of each.
    """
    sizes: dict[str, Any] = {"rows": rows, "out": out, "row_bytes": row_bytes, "layout": layout}
    scaled = _has_scaled(target, layout) and rows >= scaled_from(layout)
    return scaled_tiles(target, **sizes) if scaled else summed_tiles(target, **sizes)


def _has_scaled(target: Target, layout: Layout) -> bool:
    return target.vendor == "nvidia" and target.arch not in NO_BFLOAT16 and math.isfinite(scaled_from(layout))


def scaled_from(layout: Layout) -> float:
    """The rows of the input from which on scales multiply the weight on NVIDIA's GPUs: the shorter the groups, the more
    sums there are to be multiplied instead. On an H200 32 rows of [28672, 4096] take 30 us in place of 35 in groups of
    128, 37 in place of 141 in groups of 32 with minima."""
    if layout.group is None:
        return 17 if layout.bits == 8 and layout.offset is None else math.inf
    if layout.group < 64:
        return 2
    return 9 if layout.bits == 8 or layout.group < 128 else 17


def scaled_tiles(target: Target, *, rows: int, out: int, row_bytes: int, layout: Layout) -> Tiles:
    """The best choice known for the kernel whose scales multiply the weight (`scaled`), as measured on an H200.
    Arguments as for `default_tiles`."""
    tile = min(max(next_power_of_2(rows), matrix_rows(target)), MOST_TILE_ROWS)
    many = tile == MOST_TILE_ROWS
    cols = 64 if layout.bits == 4 and layout.group == 64 and not many else 128
    programs, steps, splits = -(-out // cols) * -(-rows // tile), -(-row_bytes // 128), 1
    while 2 * programs * splits < 3 * target.compute_units and steps >= 2 * LEAST_STEPS * splits:
        splits *= 2
    return Tiles(tile, cols, 128, splits, 4, 2 if many and layout.bits == 4 else 3, scaled=True)


def summed_tiles(target: Target, *, rows: int, out: int, row_bytes: int, layout: Layout) -> Tiles:
    """The best choice known for the kernel whose scales multiply sums of products (`kernel`): by budgets (registers,
    local memory, loads of 16 bytes, waves of a unit). Arguments as for `default_tiles`."""
    wave, nvidia = target.wave_size or 32, target.vendor == "nvidia"
    tile = min(max(next_power_of_2(rows), matrix_rows(target)), MOST_TILE_ROWS)
    few, stages, fold = tile <= COLUMNS, 1, 1
    group_bytes = layout.group // layout.per_byte if layout.group else row_bytes
    # Some have the groups of a step in one tile (`kernel.product`).
    below = FOLDED_FROM if nvidia else TOGETHER_BELOW
    together = tile * group_bytes if rows == 1 and (layout.group or below) < below else group_bytes
    if nvidia:
        cols, inner, num_warps, stages = (64, 128, 2, 3) if tile < MOST_TILE_ROWS else (128, 64, 4, 3)
        if few and layout.bits == 8 and (tile == COLUMNS or layout.group):
            cols, num_warps, stages = 128, 4, 4
        elif tile < COLUMNS and layout.bits == 4 and rows > 1:
            cols = 32
        inner, waves = min(inner, max(together, 4 * group_bytes)), WAVES_A_UNIT_NVIDIA
    else:
        # The fewer waves share the columns, the fewer rearrange the input. Of many rows, sums fill the registers.
        cols, inner = 64, 128 if layout.bits == 8 else (128 if wave == 64 else 64) // (1 if few else 2)
        inner, waves = min(inner, max(together, 2 * group_bytes)), WAVES_A_UNIT
        most = 2 if few and wave == 64 else 4
        num_warps = min(max(cols * min(inner, together) // (CHUNK * wave), 1), most)
    programs, steps, splits = -(-out // cols) * -(-rows // tile), -(-row_bytes // inner), 1
    if nvidia and together == group_bytes:
        fold = _fold(tile // next_power_of_2(rows), row_bytes, max(inner, group_bytes if layout.group else 0))
        wanted = waves * target.compute_units * 8 // layout.bits
        fold = min(fold, next_power_of_2(-(-wanted // (programs * num_warps))))
    while (
        programs * splits * fold * num_warps < waves * target.compute_units and steps >= 2 * LEAST_STEPS * splits * fold
    ):
        splits *= 2
    return Tiles(tile, cols, inner, splits, num_warps, stages, fold)


def _fold(most: int, row_bytes: int, least: int) -> int:
    """The most parts, a power of two, of a row: each of whole times `least` bytes."""
    return next((n for n in (8, 4, 2) if n <= most and row_bytes % (n * least) == 0), 1)


def candidates(target: Target, *, rows: int, out: int, row_bytes: int, layout: Layout) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first, at last that of the other kernel. Arguments as for
    `default_tiles`."""
    sizes: dict[str, Any] = {"rows": rows, "out": out, "row_bytes": row_bytes, "layout": layout}
    best = default_tiles(target, **sizes)
    warps = [n for n in (best.num_warps * 2, best.num_warps // 2) if n]
    stages = (1, 2) if target.vendor == "amd" else (2, 3, 4)
    splits = [n for n in (best.splits * 2, best.splits // 2) if n]
    folds = [best.fold // 2] if best.fold > 1 else []
    choices = {"num_warps": warps, "num_stages": stages, "splits": splits, "fold": folds}
    found = neighbours(best, cols=(best.cols * 2, best.cols // 2), **choices)
    yield from (tiles for tiles in found if tiles.cols >= COLUMNS * tiles.num_warps)
    if _has_scaled(target, layout):
        yield summed_tiles(target, **sizes) if best.scaled else scaled_tiles(target, **sizes)
