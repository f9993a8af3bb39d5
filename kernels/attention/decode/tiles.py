"""The tiling of decode attention, for each kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llama_jax.kernels.attention.cases import SPLIT
from llama_jax.kernels.pallas import next_power_of_2, tile_width
from llama_jax.targets import Target

MIN_ROWS = 16
"""Rows of a matrix instruction: fewer query rows are padded to it."""


@dataclass(frozen=True)
class Tiles:
    """The tiling of the work.

    Attributes:
      block_rows: the most query rows of a program; more rows that share a head are several programs.
      block_k: slots that a program reads at a time; a power of two, at least 16.
      num_warps: waves of a program.
      num_stages: blocks that Triton loads ahead; 1 reads each when it is needed.
      programs_per_unit: programs aimed at for each compute unit of the device, over all rows and heads.
    """

    block_rows: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_unit: int


def padded_rows(rows: int, most: int) -> int:
    """The height of a tile for `rows` query rows."""
    return min(max(next_power_of_2(rows), MIN_ROWS), most)


def default_tiles(target: Target, *, rows: int, head_dim: int, itemsize: int, slots: int, codes: bool = False) -> Tiles:
    """The best choice known for a target: NVIDIA's measured on an H100, with codes on an H200, the others by budgets
    (registers, local memory, bytes in flight).

    AMD, CDNA: a wave alone, for there is then no barrier in the loop, and the 16 rows of a matrix instruction are not
    computed once for each wave; 8 KiB of keys at a time leave registers for two waves a SIMD, eight a unit, whose 64 to
    128 KiB in flight are several times bandwidth times latency (17 kB/µs a unit on an MI300X). More rows need more
    waves for their registers. RDNA: waves of 32 with 256 registers each hold half as much, and of rows of more than 256
    bytes only 16 queries.

    Args:
      rows: query rows that share a key/value head: group times queries.
      head_dim: numbers of a head.
      itemsize: bytes of a number, the wider of queries' and cache's.
      slots: of each row of the cache. Of short rows, smaller blocks can be shared more evenly: on an H200 32 rows with
        544 slots took 25.0 us in place of 27.0. Of 4 rows with 32k slots they took 132 in place of 129.
      codes: whether the cache is quantised. What makes numbers of it takes time between a load and its product: more
        waves and programs hide that.
    """
    row_bytes = tile_width(head_dim) * itemsize
    wide = row_bytes > 256
    rdna = target.vendor == "amd" and target.wave_size == 32
    block_rows = padded_rows(rows, 16 if rdna and wide else 64)
    waves = block_rows // MIN_ROWS

    def block(tile: int, most: int) -> int:
        """The number of slots whose keys take `tile` bytes."""
        return min(max(tile // row_bytes, MIN_ROWS), most)

    if target.vendor == "nvidia":
        few = block_rows == MIN_ROWS and not codes
        if few and slots < SPLIT:
            return Tiles(block_rows, max(block(8 << 10, 64), 32), 2, 3, 3)
        return Tiles(block_rows, block(16 << 10, 64), 2 if few else 4, 2, 4 if codes else 3)

    def tiles(num_warps: int, tile: int, unit: int) -> Tiles:
        """With `tile` bytes of keys at a time, of which a compute unit's programs together hold `unit`."""
        block_k = block(tile, 32)
        return Tiles(block_rows, block_k, num_warps, 1, max(unit // (block_k * row_bytes), 1))

    if rdna:
        return tiles(4 if wide else 2 * waves, 4 << 10, 32 << 10)
    return tiles(waves, 8 << 10, 64 << 10)


def candidates(
    target: Target, *, rows: int, head_dim: int, itemsize: int, slots: int, codes: bool = False
) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first, then neighbours whose keys and values fit into the local
    memory. Arguments as for `default_tiles`."""
    best = default_tiles(target, rows=rows, head_dim=head_dim, itemsize=itemsize, slots=slots, codes=codes)
    row_bytes = tile_width(head_dim) * itemsize
    tried: dict[Tiles, None] = {best: None}  # in order
    for block_k in (best.block_k, best.block_k // 2, best.block_k * 2):
        for num_warps in (best.num_warps, best.num_warps // 2, best.num_warps * 2):
            for num_stages in (1, 2) if target.vendor == "amd" else (2, 3, 4):
                for programs in (best.programs_per_unit, best.programs_per_unit // 2, best.programs_per_unit * 2):
                    tiles = replace(
                        best,
                        block_k=block_k,
                        num_warps=num_warps,
                        num_stages=num_stages,
                        programs_per_unit=programs,
                    )
                    fits = 2 * block_k * row_bytes * num_stages <= target.lds_bytes
                    if fits and block_k >= MIN_ROWS and 1 <= num_warps <= 8 and programs:
                        tried[tiles] = None
    yield from tried
