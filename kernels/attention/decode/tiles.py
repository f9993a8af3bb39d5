"""How the work of decode attention is cut, for each kind of device."""

from __future__ import annotations

from dataclasses import dataclass

from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.targets import Target

MIN_ROWS = 16
"""Rows of a matrix instruction: fewer query rows are filled up to it."""


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

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


def default_tiles(target: Target, *, rows: int, head_dim: int, itemsize: int) -> Tiles:
    """The best choice known for a target; chosen by budgets (registers, local memory, bytes in flight), not measured.

    AMD, CDNA: a wave alone, for there is then no barrier in the loop, and the 16 rows of a matrix instruction are not
    computed once for each wave; 8 KiB of keys at a time leave registers for two waves a SIMD, eight a unit, whose 64 to
    128 KiB in flight are several times bandwidth times latency (17 kB/µs a unit on an MI300X). More rows need more
    waves for their registers. RDNA: waves of 32 with 256 registers each hold half as much, and of rows of more than 256
    bytes only 16 queries.

    Args:
      rows: query rows that share a key/value head: group times queries.
      head_dim: numbers of a head.
      itemsize: bytes of a number, the wider of queries' and cache's.
    """
    row_bytes = next_power_of_2(head_dim) * itemsize
    wide = row_bytes > 256
    rdna = target.vendor == "amd" and target.wave_size == 32
    block_rows = padded_rows(rows, 16 if rdna and wide else 64)
    waves = block_rows // MIN_ROWS

    def slots(tile_bytes: int) -> int:
        return min(max(tile_bytes // row_bytes, 16), 64)

    if target.vendor == "nvidia":
        return Tiles(block_rows, slots(16 << 10), num_warps=4, num_stages=2, programs_per_unit=4)
    if rdna:
        return Tiles(block_rows, slots(4 << 10), num_warps=4 if wide else 2 * waves, num_stages=1, programs_per_unit=8)
    return Tiles(block_rows, slots(8 << 10), num_warps=waves, num_stages=1, programs_per_unit=8)
