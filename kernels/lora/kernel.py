"""The two kernels: from a token's numbers to the few of its adapter, and from these to what its projections get.

Tokens are sorted by slot, and a program has a tile of tokens of one slot (`kernels.moe.schedule`): what a step costs
depends on the slots in use. `lora_shrink` writes `rank` numbers for each token and projection, in as many parts as
programs share a sum. `lora_expand` adds these up and multiplies them with a few columns of b.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.lora.reference import Activation, Part, Slots
from llama_jax.kernels.lora.tiles import Tiles
from llama_jax.kernels.moe.schedule import Schedule
from llama_jax.kernels.pallas import dot, launch, load_row, tile_width


@dataclass(frozen=True)
class Places:
    """Columns of rows [heads * period] that belong to one projection: of each head `width`, from `first` on."""

    heads: int
    first: int
    width: int
    period: int

    @classmethod
    def of(cls, part: Part, shape: Sequence[int]) -> Places:
        """Of a part of an array [..., n, columns]; the axes before are heads."""
        *heads, n, columns = shape
        return cls(math.prod(heads), part[0] * columns, (part[1] - part[0]) * columns, n * columns)

    @property
    def size(self) -> int:
        return self.heads * self.width

    def at(self, column: jax.Array) -> jax.Array:
        """Where the column of the projection itself is."""
        if self.heads == 1:
            return self.first + column
        width = jnp.full_like(column, self.width)
        return jax.lax.div(column, width) * self.period + self.first + jax.lax.rem(column, width)


@dataclass(frozen=True)
class _Tile:
    """A tile of tokens of one slot.

    Attributes:
      used: whether it has any.
      place: [rows], where in the order they are.
      real: [rows], which of these places are in the tile.
      token: [rows]; one past the last token for places that are not.
    """

    used: jax.Array
    slot: jax.Array
    place: jax.Array
    real: jax.Array
    token: jax.Array

    @classmethod
    def read(cls, refs: Sequence[Any], tile: jax.Array, rows: int) -> _Tile:
        order, slot, start, end = refs
        first, last = start[tile], end[tile]
        place = first + jnp.arange(rows, dtype=jnp.int32)
        real = place < last
        return cls(first < last, slot[tile], place, real, load_row(order, (place,), real, len(order)))


def shrink(x: jax.Array, slots: Sequence[Slots], order: Schedule, tiles: Tiles, *, interpret: bool) -> jax.Array:
    """x a^T of each token's slot: float32 [splits, projections, tokens, tile_width(rank)], of which the parts add up;
    tokens are in order. What belongs to those without an adapter is not written.

    Args:
      x: [tokens, in].
    """
    tokens, size = x.shape
    _, rank, _ = slots[0]["a"].shape
    width, steps = tile_width(rank), -(-size // tiles.inner)
    share = -(-steps // tiles.splits)
    ragged = size % tiles.inner > 0

    def lora_shrink(x_ref: Any, *refs: Any) -> None:
        a_refs, inner_ref = refs[4:-1], refs[-1]
        tile = _Tile.read(refs[:4], pl.program_id(0), tiles.rows)
        part_of_sum = pl.program_id(1)
        j = jnp.arange(width, dtype=jnp.int32)

        def step(i: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            k = i * tiles.inner + jnp.arange(tiles.inner, dtype=jnp.int32)
            inside = (k < size)[None, :] if ragged else None
            exists = _both((j < rank)[:, None] if rank < width else None, inside)
            numbers = _load(x_ref.at[tile.token[:, None], k[None, :]], _both(tile.real[:, None], inside))
            every = [_load(a_ref.at[tile.slot, j[:, None], k[None, :]], exists) for a_ref in a_refs]
            return tuple(total + dot(numbers, a, transpose_b=True) for total, a in zip(totals, every, strict=True))

        @pl.when(tile.used & (tile.slot > 0))
        def _() -> None:
            start = part_of_sum * share
            nothing = (jnp.zeros((tiles.rows, width), jnp.float32),) * len(a_refs)
            totals = jax.lax.fori_loop(start, jnp.minimum(start + share, steps), step, nothing)
            for n, total in enumerate(totals):
                at = inner_ref.at[part_of_sum, n, tile.place[:, None], j[None, :]]
                plgpu.store(at, total, mask=tile.real[:, None])

    inner: jax.Array = launch(
        lora_shrink,
        *(x, *order, *(of_one["a"] for of_one in slots)),
        grid=(len(order.expert), tiles.splits),
        out=jax.ShapeDtypeStruct((tiles.splits, len(slots), tokens, width), jnp.float32),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )
    return inner


def expand(
    out: jax.Array,
    inner: jax.Array,
    slots: Sequence[Slots],
    order: Schedule,
    places: Sequence[Places],
    tiles: Tiles,
    *,
    activation: Activation | None,
    interpret: bool,
) -> jax.Array:
    """out + scale * inner b^T of each token's slot; behind an activation of the first of two projections, times the
    second.

    Args:
      out: [tokens, columns], of which only what adapters change is read and written; `places` of each projection.
      inner: of `shrink`.
    """
    tokens, columns = out.shape
    _, rank, _ = slots[0]["b"].shape
    width, dtype = tile_width(rank), slots[0]["b"].dtype
    programs = [-(-at.size // tiles.cols) for at in places]
    gated = activation is not None
    members = [of_one[name] for of_one in slots for name in ("b", "scale")]

    def lora_expand(out_ref: Any, inner_ref: Any, *refs: Any) -> None:
        member_refs, result_ref = refs[4:-1], refs[-1]
        across = pl.program_id(0)
        tile = _Tile.read(refs[:4], pl.program_id(1), tiles.rows)

        def columns_of(n: int, first: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array]:
            """The program's columns of a projection, [cols], which of them exist, and which numbers of the tile do."""
            column = first + jnp.arange(tiles.cols, dtype=jnp.int32)
            there = (column < places[n].size)[None, :] if places[n].size % tiles.cols else None
            return column, there, tile.real[:, None] if there is None else tile.real[:, None] & there

        def changed(
            n: int, column: jax.Array, there: jax.Array | None, mask: jax.Array
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            """Columns of a projection with what is added to them, float32 [rows, cols], and where they are."""
            b_ref, scale_ref = member_refs[2 * n : 2 * n + 2]
            slot = jnp.maximum(tile.slot, 1)
            j = jnp.arange(width, dtype=jnp.int32)
            real = tile.real[:, None]
            parts = [_load(inner_ref.at[part, n, tile.place[:, None], j[None, :]], real) for part in range(len(inner))]
            exists = (j < rank)[:, None] if rank < width else None
            b = _load(b_ref.at[slot, j[:, None], column[None, :]], _both(exists, there))
            at = tile.token[:, None], places[n].at(column)[None, :]
            before = _load(out_ref.at[at], mask)
            scale = jnp.where(tile.slot > 0, scale_ref[slot].astype(jnp.float32), 0.0)
            numbers = jnp.where(tile.slot > 0, sum(parts[1:], parts[0]) * scale, 0.0).astype(dtype)
            return before.astype(jnp.float32) + dot(numbers, b), at

        def of_projection(n: int, began: int) -> None:
            column, there, mask = columns_of(n, (across - began) * tiles.cols)
            total, at = changed(n, column, there, mask)
            plgpu.store(result_ref.at[at], total.astype(out.dtype), mask=mask)

        def of_both(activation: Activation) -> None:
            column, there, mask = columns_of(0, across * tiles.cols)
            (gate, _), (up, _) = (changed(n, column, there, mask) for n in range(2))
            at = result_ref.at[tile.token[:, None], column[None, :]]
            plgpu.store(at, (activation(gate) * up).astype(out.dtype), mask=mask)

        if activation is not None:
            pl.when(tile.used)(partial(of_both, activation))
            return
        began = 0
        for n, count in enumerate(programs):
            here = (across >= began) & (across < began + count)
            pl.when(here & (tile.slot > 0) & tile.used)(partial(of_projection, n, began))
            began += count

    # Said at every lowering, see `kernels.pallas.launch`.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    result: jax.Array = pl.pallas_call(
        lora_expand,
        grid=(programs[0] if gated else sum(programs), len(order.expert)),
        out_shape=jax.ShapeDtypeStruct((tokens, places[0].size if gated else columns), out.dtype),
        input_output_aliases={} if gated else {0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.expand_warps, num_stages=1),
        interpret=interpret,
    )(out, inner, *order, *members)
    return result


def _both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    return b if a is None else a if b is None else a & b


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)
