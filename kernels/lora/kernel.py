"""The two kernels: from a token's numbers to the few of its adapter, and from these to what its projections get.

`lora_shrink` has a program for each slot, and `lora_expand` one for a few columns of the result. Programs without a
token that uses their slot, or any, end at once. A token's numbers are those of its own slot alone, so the first kernel
writes `rank` numbers for each token and projection, in as many parts as programs share a sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llama_jax.kernels.lora.reference import Activation, Part, Slots
from llama_jax.kernels.lora.tiles import Tiles, slots_together
from llama_jax.kernels.pallas import dot, launch, load_row, tile_width


def shrink(x: jax.Array, slots: Sequence[Slots], ids: jax.Array, tiles: Tiles, *, interpret: bool) -> jax.Array:
    """x a^T of each token's slot: float32 [splits, projections, tokens, tile_width(rank)], of which the parts add up.

    What belongs to tokens without an adapter is not written.

    Args:
      x: [tokens, in]; ids: int32 [tokens].
    """
    tokens, size = x.shape
    number, rank, _ = slots[0]["a"].shape
    width, row_tiles = tile_width(rank), -(-tokens // tiles.rows)
    steps = -(-size // tiles.inner)
    share = -(-steps // tiles.splits)
    ragged = size % tiles.inner > 0

    def lora_shrink(x_ref: Any, ids_ref: Any, *refs: Any) -> None:
        *a_refs, inner_ref = refs
        slot, part_of_sum = pl.program_id(0) + 1, pl.program_id(2)
        row, real, own = _rows(ids_ref, pl.program_id(1) % row_tiles, tiles.rows, tokens)
        mine = own == slot
        j = jnp.arange(width, dtype=jnp.int32)

        def of_projection(n: int, a_ref: Any) -> None:
            def step(i: jax.Array, total: jax.Array) -> jax.Array:
                k = i * tiles.inner + jnp.arange(tiles.inner, dtype=jnp.int32)
                inside = (k < size)[None, :] if ragged else None
                numbers = _load(x_ref.at[row[:, None], k[None, :]], _both(real, inside))
                a = _load(a_ref.at[slot, j[:, None], k[None, :]], _both((j < rank)[:, None], inside))
                return total + dot(numbers, a, transpose_b=True)

            start = part_of_sum * share
            stop = jnp.minimum(start + share, steps)
            total = jax.lax.fori_loop(start, stop, step, jnp.zeros((tiles.rows, width), jnp.float32))
            plgpu.store(inner_ref.at[part_of_sum, n, row[:, None], j[None, :]], total, mask=mine[:, None])

        for n, a_ref in enumerate(a_refs):
            _when(_any(mine) & (pl.program_id(1) // row_tiles == n), partial(of_projection, n, a_ref))

    inner: jax.Array = launch(
        lora_shrink,
        *(x, ids, *(of_one["a"] for of_one in slots)),
        grid=(number - 1, len(slots) * row_tiles, tiles.splits),
        out=jax.ShapeDtypeStruct((tiles.splits, len(slots), tokens, width), jnp.float32),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
    )
    return inner


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
        count = 1
        for head in heads:
            count *= head
        return cls(count, part[0] * columns, (part[1] - part[0]) * columns, n * columns)

    @property
    def size(self) -> int:
        return self.heads * self.width

    def at(self, column: jax.Array) -> jax.Array:
        """Where the column of the projection itself is."""
        if self.heads == 1:
            return self.first + column
        width = jnp.full_like(column, self.width)
        return jax.lax.div(column, width) * self.period + self.first + jax.lax.rem(column, width)


def expand(
    out: jax.Array,
    inner: jax.Array,
    slots: Sequence[Slots],
    ids: jax.Array,
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
    number, rank, _ = slots[0]["b"].shape
    together, width, dtype = slots_together(rank), tile_width(rank), slots[0]["b"].dtype
    chunks = -(-(number - 1) // together)
    programs = [-(-at.size // tiles.cols) for at in places]
    gated = activation is not None
    members = [of_one[name] for of_one in slots for name in ("b", "scale")]

    def lora_expand(out_ref: Any, inner_ref: Any, ids_ref: Any, *refs: Any) -> None:
        *member_refs, result_ref = refs
        tile = pl.program_id(0)
        row, real, own = _rows(ids_ref, pl.program_id(1), tiles.rows, tokens)
        used = (own > 0) & (own < number)

        def added(n: int, column: jax.Array, there: jax.Array | None) -> jax.Array:
            """What is added to columns of a projection: float32 [rows, cols]."""
            b_ref, scale_ref = member_refs[2 * n : 2 * n + 2]
            j = jnp.arange(width, dtype=jnp.int32)
            parts = [
                _load(inner_ref.at[part, n, row[:, None], j[None, :]], used[:, None]) for part in range(len(inner))
            ]
            scale = load_row(scale_ref, (own,), used, 0)
            numbers = (sum(parts[1:], parts[0]) * scale.astype(jnp.float32)[:, None]).astype(dtype)

            def some(i: jax.Array, total: jax.Array) -> jax.Array:
                """Of the slots that a step sums over."""
                first = 1 + i * together
                slot = first + jnp.arange(together, dtype=jnp.int32)
                wide = jnp.where((own[:, None] == slot[None, :])[:, :, None], numbers[:, None, :], 0)
                k = jnp.arange(together * width, dtype=jnp.int32)
                of_slot = first + jax.lax.div(k, jnp.full_like(k, width))
                within = jax.lax.rem(k, jnp.full_like(k, width))
                exists = ((of_slot < number) & (within < rank))[:, None]
                b = _load(b_ref.at[of_slot[:, None], within[:, None], column[None, :]], _both(exists, there))
                return total + dot(wide.astype(dtype).reshape(tiles.rows, together * width), b)

            total = jnp.zeros((tiles.rows, tiles.cols), jnp.float32)
            if chunks == 1:
                return some(jnp.int32(0), total)

            def step(i: jax.Array, total: jax.Array) -> jax.Array:
                first = 1 + i * together
                needed = _any((own >= first) & (own < first + together))
                return jax.lax.cond(needed, lambda: some(i, total), lambda: total)

            return jax.lax.fori_loop(0, chunks, step, total)

        def of_projection(n: int, began: int) -> None:
            column = (tile - began) * tiles.cols + jnp.arange(tiles.cols, dtype=jnp.int32)
            there = (column < places[n].size)[None, :] if places[n].size % tiles.cols else None
            at = row[:, None], places[n].at(column)[None, :]
            mask = _both(used[:, None], there)
            before = _load(out_ref.at[at], mask).astype(jnp.float32)
            plgpu.store(result_ref.at[at], (before + added(n, column, there)).astype(out.dtype), mask=mask)

        def of_both(activation: Activation) -> None:
            column = tile * tiles.cols + jnp.arange(tiles.cols, dtype=jnp.int32)
            there = (column < places[0].size)[None, :] if places[0].size % tiles.cols else None
            mask = _both(real, there)
            sums = [
                _load(out_ref.at[row[:, None], of_one.at(column)[None, :]], mask).astype(jnp.float32)
                + added(n, column, there)
                for n, of_one in enumerate(places)
            ]
            plgpu.store(
                result_ref.at[row[:, None], column[None, :]],
                (activation(sums[0]) * sums[1]).astype(out.dtype),
                mask=mask,
            )

        if activation is not None:
            of_both(activation)
            return
        began = 0
        for n, count in enumerate(programs):
            here = (tile >= began) & (tile < began + count)
            _when(_any(used) & here, partial(of_projection, n, began))
            began += count

    # Said at every lowering, see `kernels.pallas.launch`.
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    result: jax.Array = pl.pallas_call(
        lora_expand,
        grid=(programs[0] if gated else sum(programs), -(-tokens // tiles.rows)),
        out_shape=jax.ShapeDtypeStruct((tokens, places[0].size if gated else columns), out.dtype),
        input_output_aliases={} if gated else {0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=1),
        interpret=interpret,
    )(out, inner, ids, *members)
    return result


def _rows(ids_ref: Any, tile: jax.Array, rows: int, tokens: int) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Tokens of a tile, which of them exist, [rows, 1], or None if all do, and their ids, of those that do not -1."""
    row = tile * rows + jnp.arange(rows, dtype=jnp.int32)
    if tokens % rows == 0:
        return row, None, load_row(ids_ref, (row,), None, -1)
    return row, (row < tokens)[:, None], load_row(ids_ref, (row,), row < tokens, -1)


def _any(mask: jax.Array) -> jax.Array:
    return jnp.max(mask.astype(jnp.int32)) > 0


def _when(condition: jax.Array, body: Callable[[], None]) -> None:
    pl.when(condition)(body)


def _both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    return b if a is None else a if b is None else a & b


def _load(ref: Any, mask: jax.Array | None) -> jax.Array:
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)
