"""Tile sizes of the flash attention kernels, and the best ones known for each kind of target."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax.typing import DTypeLike

from llama_jax.kernels.pallas import MIN_CONTRACTION, tile_width
from llama_jax.targets import Target


@dataclass(frozen=True)
class Tiles:
    """The tiling of the work. Block sizes are powers of two, at least 16.

    Attributes:
      block_q: query rows of a tile in the forward kernel; block_k: key/value slots that it takes a step.
      num_warps, num_stages: waves of a work-group; steps of the loop over slots that overlap.
      heads: query heads of one key/value head that share the rows of a tile (block_q // heads queries of each).
      dq_block_q, dq_block_k, dq_warps: likewise for the gradient of the queries,
      dkv_block_q, dkv_block_k, dkv_warps: and for that of keys and values, which steps over queries.
      dq_pieces, dkv_pieces: pieces of the head dimension, the sum of whose products is a block of logits. One keeps
        the kernel's own tiles in registers; more are read again in each step, and take fewer. `pieces_of` says how many
        a small head_dim is really cut into.
      backward_stages: as num_stages, in both of these.
    """

    block_q: int = 128
    block_k: int = 32
    num_warps: int = 4
    num_stages: int = 1
    heads: int = 1
    dq_block_q: int = 128
    dq_block_k: int = 32
    dq_warps: int = 8
    dq_pieces: int = 1
    dkv_block_q: int = 32
    dkv_block_k: int = 64
    dkv_warps: int = 4
    dkv_pieces: int = 1
    backward_stages: int = 1


def _tiles(
    forward: tuple[int, int, int],
    dq: tuple[int, int, int, int],
    dkv: tuple[int, int, int, int],
    stages: int = 1,
    backward_stages: int = 1,
) -> Tiles:
    """From (block_q, block_k, warps) and (block_q, block_k, warps, pieces) twice."""
    return Tiles(*forward, stages, 1, *dq, *dkv, backward_stages=backward_stages)


# By family and head_dim filled up to a power of two. AMD: chosen by compilation, so that nothing spills and two
# work-groups of the forward kernel share a CU (docs/architecture.md). Hopper: measured on an H100 for a head_dim of 64,
# on an H200 for 128. Other NVIDIA GPUs have less local memory: to be measured.
_BY_WIDTH: dict[str, dict[int, Tiles]] = {
    "cdna": {
        64: _tiles((128, 64, 4), (128, 32, 4, 1), (32, 128, 4, 1)),
        128: _tiles((128, 32, 4), (128, 32, 8, 1), (16, 64, 4, 1)),
        256: _tiles((64, 16, 4), (64, 16, 4, 1), (16, 64, 4, 1)),
    },
    "cdna4": {
        64: _tiles((128, 64, 4), (128, 32, 4, 1), (32, 128, 4, 1)),
        128: _tiles((128, 64, 4), (128, 32, 8, 1), (16, 64, 4, 1)),
        256: _tiles((64, 32, 4), (64, 16, 4, 1), (16, 64, 4, 1)),
    },
    "rdna3": {
        64: _tiles((64, 32, 4), (64, 32, 8, 1), (16, 64, 8, 1)),
        128: _tiles((64, 16, 4), (64, 16, 16, 2), (16, 64, 16, 4)),
        256: _tiles((32, 16, 8), (16, 16, 8, 16), (16, 32, 16, 8)),
    },
    "rdna4": {
        64: _tiles((128, 64, 8), (128, 32, 8, 1), (32, 64, 8, 1)),
        128: _tiles((128, 32, 8), (64, 32, 8, 1), (16, 64, 16, 2)),
        256: _tiles((64, 16, 8), (32, 16, 16, 8), (16, 32, 16, 16)),
    },
    "hopper": {
        64: _tiles((64, 64, 4), (128, 64, 8, 1), (64, 64, 4, 1), 3, 3),
        128: _tiles((128, 64, 4), (128, 32, 8, 1), (64, 128, 8, 1), 2, 3),
        256: _tiles((128, 32, 8), (64, 32, 8, 1), (32, 64, 8, 1), 2, 2),
    },
    # With tiles of 64 and 128 queries, an H200 takes 44 and 54 us for 4 prompts of 512, and 1.34 and 1.07 ms for 2048
    # tokens behind 14k. Of packed prompts, 4 of 512 take 82 and 84 us, one of 2048 150 and 139.
    "hopper, short prompts": {128: _tiles((64, 64, 4), (128, 32, 8, 1), (64, 128, 8, 1), 3, 3)},
    "nvidia": {
        64: _tiles((128, 64, 4), (128, 32, 4, 1), (32, 128, 4, 1), 3, 2),
        128: _tiles((128, 64, 8), (128, 32, 8, 1), (32, 128, 8, 1), 2, 2),
        256: _tiles((128, 32, 8), (64, 32, 8, 1), (32, 64, 8, 1), 2, 2),
    },
}
_SHORT, _SHORT_TEXT = 1024, 4096
"""Queries of a text and slots of a row, at most, where prompts are short."""
# float32 is for tests: RDNA has no matrix instruction for it, and everything takes twice the registers.
_FLOAT32 = _tiles((32, 16, 4), (32, 16, 4, 4), (16, 32, 4, 4))
_FLOAT32_RDNA = _tiles((16, 16, 8), (16, 16, 4, 4), (16, 16, 4, 4))


def pieces_of(head_dim: int, wanted: int) -> int:
    """The number of pieces to split head_dim into: fewer than wanted if a product would sum over too few columns."""
    return min(wanted, tile_width(head_dim) // MIN_CONTRACTION)


def _families(target: Target, text: int, kv_len: int) -> tuple[str, ...]:
    """Names in `_BY_WIDTH`; the first that has a width counts."""
    if target.arch == "sm_90":
        return ("hopper, short prompts", "hopper") if text <= _SHORT and kv_len <= _SHORT_TEXT else ("hopper",)
    if target.vendor == "nvidia":
        return ("nvidia",)
    if target.arch.startswith("gfx11"):
        return ("rdna3",)
    if target.arch.startswith("gfx12"):
        return ("rdna4",)
    return ("cdna4" if target.arch == "gfx950" else "cdna",)


def default_tiles(
    target: Target, *, head_dim: int, dtype: DTypeLike, q_len: int, kv_len: int, group: int, text: int = 0
) -> Tiles:
    """The best tiles known for a target (interpreted on a CPU, those of CDNA).

    Args:
      q_len, kv_len: queries and slots of a row.
      text: queries that a text may have, if a row is a piece of one.
      group: query heads of a key/value head.
    """
    width = max(64, tile_width(head_dim))
    if jnp.dtype(dtype) == jnp.float32:
        tiles = _FLOAT32_RDNA if target.wave_size == 32 and target.vendor == "amd" else _FLOAT32
    else:
        families = _families(target, max(q_len, text), kv_len)
        tiles = next(_BY_WIDTH[name][width] for name in families if width in _BY_WIDTH[name])
    # A few queries do not fill a tile: then heads that read the same keys share one.
    heads = max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * q_len <= tiles.block_q))
    return replace(tiles, heads=heads)
