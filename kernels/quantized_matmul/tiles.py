"""How a product with a quantised weight is cut into programs, for each kind of device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """How the work is cut; powers of two.

    Attributes:
      rows: of the input that a program multiplies. Fewer than 16 are multiplied one by one, without matrix units.
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
