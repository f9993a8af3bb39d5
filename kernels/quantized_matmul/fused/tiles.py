"""The tiling of a fused product: each program has whole sums, since only then can it do what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llama_jax.kernels.dispatch.cases import neighbours
from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.kernels.quantized_matmul import tiles as plain
from llama_jax.kernels.quantized_matmul.operands import SQUARED
from llama_jax.kernels.quantized_matmul.tiles import CHUNK, COLUMNS, LEAST_STEPS, Tiles, matrix_rows
from llama_jax.quantized import Layout
from llama_jax.targets import Target

__all__ = ["Tiles", "candidates", "default_tiles"]

FEW = 8
"""Rows up to which programs of a weight that has enough rows are faster with one step less in flight."""


def default_tiles(target: Target, *, rows: int, out: int, row_bytes: int, layout: Layout | None, least: int) -> Tiles:
    """The best choice known for a target. Where there are too few programs, rows of the weight are folded; they are
    never shared by several programs.

    Args:
      rows: of the input.
      out: rows of the weight; row_bytes: of each, numbers without a layout.
      least: rows of the weight that a program has at least.
    """
    nvidia = target.vendor == "nvidia"
    waves = plain.WAVES_A_UNIT_NVIDIA * 8 // (layout.bits if layout else 8) if nvidia else plain.WAVES_A_UNIT
    if layout is None:
        # At least two rows of the tile for each of the input, so that rows of the weight can be folded.
        tile = max(2 * next_power_of_2(rows), matrix_rows(target))
        best = Tiles(tile, 64, 128, 1, 4, 3) if nvidia else Tiles(tile, 64, 64, 1, 2, 1)
    else:
        best = plain.summed_tiles(target, rows=rows, out=out, row_bytes=row_bytes, layout=layout)
    length = layout.group if layout is not None else None
    group = length // layout.per_byte if layout is not None and length else 1
    most = min(best.rows // next_power_of_2(rows), 8)
    fold = next((n for n in (8, 4, 2) if n <= most and row_bytes % (n * max(best.inner, group)) == 0), 1)
    programs = -(-out // best.cols)
    fold = min(fold, next_power_of_2(-(-waves * target.compute_units // (programs * best.num_warps))))
    if nvidia and rows == 1 and (length or plain.FOLDED_FROM) < plain.FOLDED_FROM:
        # Groups that share a product take a third of the time that parts of a row do, where there are enough programs.
        fold = 1 if programs >= 2 * target.compute_units else min(fold, 4)
        best = replace(best, num_warps=4)
    if nvidia and layout is None and (fold > 1 or rows > FEW):
        # A unit has a program or two, which have to load further ahead. On an H200 four rows of [4096, 14336] took
        # 30.3 us in place of 35.0, 32 rows 31.6 in place of 36.2.
        best = replace(best, num_stages=4)
    cols = max(best.cols, fold * least)
    while -(-out // cols) < target.compute_units and cols // 2 >= max(COLUMNS * best.num_warps, fold * least):
        cols //= 2
    inner = best.inner
    while layout is not None and inner >= 8 * CHUNK and row_bytes < LEAST_STEPS * fold * inner:
        inner //= 2
    tile = max(fold * next_power_of_2(rows), matrix_rows(target))
    return replace(best, rows=tile, splits=1, fold=fold, cols=cols, inner=inner)


def least_columns(*, gated: bool, adds: bool) -> int:
    """Rows of the weight that a program needs."""
    return SQUARED if adds else 2 if gated else 1


def candidates(
    target: Target, *, rows: int, out: int, row_bytes: int, layout: Layout | None, least: int
) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first. Arguments as for `default_tiles`."""
    best = default_tiles(target, rows=rows, out=out, row_bytes=row_bytes, layout=layout, least=least)
    warps = [n for n in (best.num_warps * 2, best.num_warps // 2) if n]
    stages = (1, 2) if target.vendor == "amd" else (2, 3, 4)
    folds = [best.fold // 2] if best.fold > 1 else []
    cols = (best.cols * 2, best.cols // 2)
    for tiles in neighbours(best, cols=cols, num_warps=warps, num_stages=stages, fold=folds):
        if tiles.cols >= max(COLUMNS * tiles.num_warps, tiles.fold * least):
            yield tiles
