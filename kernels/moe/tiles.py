"""The tiling of the routed experts' two grouped products into programs, and what suits a target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from llama_jax.kernels.moe.schedule import tile_count
from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.targets import Target


class Cut(NamedTuple):
    """One of the products, cut: a program computes `rows` times `cols`, in steps of `inner`.

    Attributes:
      splits: programs that share the inner axis.
    """

    rows: int
    cols: int
    inner: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """Both products, cut; sizes are powers of two, at least 16.

    Attributes:
      rows: pairs of one token and one of its experts that a program computes.
      up_cols, up_inner: columns of gate and of up, and how much of the inner axis a step of the loop reads.
      down_cols, down_inner: likewise of down.
      down_splits: programs that share the inner axis of down, where there would be too few.
      num_warps, num_stages: waves of a program, and steps of the loop that overlap.
    """

    rows: int
    up_cols: int
    up_inner: int
    down_cols: int
    down_inner: int
    down_splits: int
    num_warps: int
    num_stages: int

    @property
    def up(self) -> Cut:
        """The first product, by gate and up."""
        return Cut(self.rows, self.up_cols, self.up_inner, 1, self.num_warps, self.num_stages)

    @property
    def down(self) -> Cut:
        """The second product."""
        return Cut(self.rows, self.down_cols, self.down_inner, self.down_splits, self.num_warps, self.num_stages)

    def lds_bytes(self, target: Target, itemsize: int) -> int:
        """About what the larger of the two kernels takes: AMD's compiler keeps one step in registers."""
        buffers = max(self.num_stages - (target.vendor == "amd"), 1)
        up = (self.rows + 2 * self.up_cols) * self.up_inner
        down = (self.rows + self.down_cols) * self.down_inner
        return buffers * max(up, down) * itemsize

    def fits(self, target: Target, itemsize: int) -> bool:
        """Returns whether the target has that much; a CPU, which only interprets, has no limit."""
        return not target.lds_bytes or self.lds_bytes(target, itemsize) <= target.lds_bytes


# By rows: what compiles for gfx90a, gfx942 and gfx950, or for gfx1100, gfx1151 and gfx1201, without spills and with the
# largest share of matrix instructions (many rows) or the most bytes in flight (few rows). NVIDIA: measured on an H100.
_CDNA = {
    16: Tiles(16, 32, 128, 32, 128, 1, num_warps=2, num_stages=2),
    32: Tiles(32, 64, 64, 64, 64, 1, num_warps=4, num_stages=2),
    64: Tiles(64, 64, 64, 128, 64, 1, num_warps=4, num_stages=2),
    128: Tiles(128, 128, 64, 256, 64, 1, num_warps=8, num_stages=2),
}
_RDNA = {
    16: Tiles(16, 64, 64, 64, 64, 1, num_warps=4, num_stages=1),
    32: Tiles(32, 64, 64, 64, 64, 1, num_warps=4, num_stages=1),
    64: Tiles(64, 64, 32, 128, 32, 1, num_warps=8, num_stages=1),
    128: Tiles(128, 64, 32, 128, 32, 1, num_warps=8, num_stages=1),
}
_NVIDIA = {
    16: Tiles(16, 64, 128, 64, 128, 1, num_warps=4, num_stages=3),
    32: Tiles(32, 64, 128, 128, 128, 1, num_warps=4, num_stages=4),
    64: Tiles(64, 64, 128, 128, 128, 1, num_warps=4, num_stages=3),
    128: Tiles(128, 128, 64, 256, 64, 1, num_warps=8, num_stages=3),
}


def default_tiles(
    target: Target, *, pairs: int, experts: int, hidden: int, intermediate: int, itemsize: int = 2
) -> Tiles:
    """The best tiles known for a target, by its budgets.

    Args:
      pairs: tokens times experts of each.
      itemsize: bytes of an element.
    """
    family = _NVIDIA if target.vendor == "nvidia" else _RDNA if target.wave_size == 32 else _CDNA
    # Twice the mean, so that most experts need one tile and their weights are read once.
    tiles = family[min(max(next_power_of_2(2 * pairs // min(pairs, experts)), 16), 128)]
    if itemsize > 2:
        tiles = replace(tiles, up_inner=tiles.up_inner // 2, down_inner=tiles.down_inner // 2)
    while tiles.num_stages > 1 and not tiles.fits(target, itemsize):
        tiles = replace(tiles, num_stages=tiles.num_stages - 1)
    # Eight waves for every compute unit, if need be by splitting, as long as each program has eight steps to do.
    waves = tile_count(pairs, experts, tiles.rows) * -(-hidden // tiles.down_cols) * tiles.num_warps
    splits = 1
    while waves * splits < 8 * target.compute_units and intermediate >= 16 * splits * tiles.down_inner:
        splits *= 2
    return replace(tiles, down_splits=splits)


def candidates(
    target: Target, *, pairs: int, experts: int, hidden: int, intermediate: int, itemsize: int = 2
) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first, then its neighbours that fit."""
    best = default_tiles(
        target, pairs=pairs, experts=experts, hidden=hidden, intermediate=intermediate, itemsize=itemsize
    )
    stages = (1, 2) if target.vendor == "amd" else (2, 3, 4)
    tried: dict[Tiles, None] = {}  # in order
    for rows in (best.rows, best.rows // 2, best.rows * 2):
        for cols in (best.up_cols, best.up_cols // 2, best.up_cols * 2):
            for inner in (best.up_inner, best.up_inner // 2, best.up_inner * 2):
                for num_stages in (best.num_stages, *stages):
                    sizes = {"up_cols": cols, "up_inner": inner, "down_inner": inner}
                    sizes["down_cols"] = cols * best.down_cols // best.up_cols
                    tiles = replace(best, rows=rows, num_stages=num_stages, **sizes)
                    if tiles.fits(target, itemsize) and 16 <= rows <= 256 and min(cols, inner) >= 16:
                        tried[tiles] = None
    yield from tried
