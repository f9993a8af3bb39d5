"""The size of a program of the rotation and cache write, for each kind of device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llama_jax.kernels.dispatch.cases import neighbours
from llama_jax.targets import Target

NUMBERS = 8
"""Of queries, for each thread."""
MOST_WARPS = 4


@dataclass(frozen=True)
class Tiles:
    """A program takes one key/value head of one token.

    Attributes:
      num_warps: waves of a program.
    """

    num_warps: int


def default_tiles(target: Target, *, group: int, head_dim: int, coded: bool = False) -> Tiles:
    """The best choice known for a target.

    Args:
      group: query heads of a key/value head.
      coded: whether the cache holds codes: a Hadamard matrix is then shared by the waves' registers.
    """
    if coded:
        return Tiles(MOST_WARPS)
    waves = group * head_dim // (NUMBERS * (target.wave_size or 32))
    return Tiles(min(1 << max(waves, 1).bit_length() - 1, MOST_WARPS))


def candidates(target: Target, *, group: int, head_dim: int, coded: bool = False) -> Iterator[Tiles]:
    """Tiles worth measuring on a target: the default first. Arguments as for `default_tiles`."""
    yield from neighbours(default_tiles(target, group=group, head_dim=head_dim, coded=coded), num_warps=(1, 2, 4))
