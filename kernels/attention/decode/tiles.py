"""How the work of decode attention is cut, for each kind of device."""

from __future__ import annotations

from dataclasses import dataclass

from llama_jax.kernels.pallas import next_power_of_2
from llama_jax.targets import Target

MIN_ROWS = 16
"""Rows of a matrix instruction: fewer query rows are filled up to it."""
MAX_ROWS = 64
"""The most query rows of one program; more of them (one key/value head, many queries) are several programs."""


@dataclass(frozen=True)
class Tiles:
    """How the work is cut.

    Attributes:
      block_k: slots that a program reads at a time; a power of two, at least 16.
      num_warps: waves of a program.
      num_stages: blocks that Triton loads ahead; 1 reads each when it is needed.
      programs_per_unit: programs aimed at for each compute unit of the device, over all rows and heads.
    """

    block_k: int
    num_warps: int
    num_stages: int
    programs_per_unit: int


def block_rows(rows: int) -> int:
    """Query rows of one program, of `rows` that share a key/value head: group times queries."""
    return min(max(next_power_of_2(rows), MIN_ROWS), MAX_ROWS)


def default_tiles(target: Target, *, rows: int, head_dim: int, itemsize: int) -> Tiles:
    """The best choice known for a target; chosen by budgets (registers, local memory, bytes in flight), not measured.

    AMD, CDNA: a wave alone, for there is then no barrier in the loop, and the 16 rows of a matrix instruction are not
    computed once for each wave; 8 KiB of keys at a time leave registers for two waves a SIMD, eight a unit, whose 64 to
    128 KiB in flight are several times bandwidth times latency (17 kB/µs a unit on an MI300X). More rows need more
    waves for their registers. RDNA: waves of 32 with 256 registers each hold half as much.

    Args:
      rows: query rows that share a key/value head: group times queries.
      head_dim: numbers of a head.
      itemsize: bytes of a number, the wider of queries' and cache's.
    """
    waves = block_rows(rows) // MIN_ROWS
    row_bytes = next_power_of_2(head_dim) * itemsize

    def slots(tile_bytes: int) -> int:
        return min(max(tile_bytes // row_bytes, 16), 64)

    if target.vendor == "nvidia":
        return Tiles(slots(16 << 10), num_warps=4, num_stages=2, programs_per_unit=4)
    if target.wave_size == 32:
        return Tiles(slots(4 << 10), num_warps=max(2 * waves, 4 if row_bytes > 256 else 2), num_stages=1, programs_per_unit=8)
    return Tiles(slots(8 << 10), num_warps=waves, num_stages=1, programs_per_unit=8)
