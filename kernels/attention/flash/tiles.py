"""Tile sizes of the flash attention kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """How the work is cut up. Block sizes are powers of two.

    Attributes:
      block_q: query rows of a tile in the forward kernel; block_k: key/value slots that it takes a step.
      heads: query heads of one key/value head that share the rows of a tile (block_q // heads queries of each).
      num_warps, num_stages: waves of a work-group; steps of the loop over slots that overlap.
      dq_block_q, dq_block_k, dq_warps: likewise for the gradient of the queries,
      dkv_block_q, dkv_block_k, dkv_warps: and for that of keys and values, which steps over queries.
      backward_stages: as num_stages, in both of these.
    """

    block_q: int = 128
    block_k: int = 64
    heads: int = 1
    num_warps: int = 4
    num_stages: int = 1
    dq_block_q: int = 64
    dq_block_k: int = 64
    dq_warps: int = 4
    dkv_block_q: int = 64
    dkv_block_k: int = 64
    dkv_warps: int = 4
    backward_stages: int = 1


def default_tiles(target, *, head_dim, dtype, q_len, group):
    return Tiles()
