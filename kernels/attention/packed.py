"""Attention of packed tokens, by the operations for one query and for many: a step of an engine, where most rows have
one new token and a few have a piece of a prompt.

A row with one token is a row of a decode step. The tokens of a row with more are cut into blocks, each a row of a
prefill over the same keys. A backend that is `Backend.indexed` reads a block's queries where they are; for others they
are gathered. Where they are depends on rows and positions alone, so that the layers of a model share the arrays of
numbers, which take O(n log n) to make.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.decode import MAX_QUERIES, decode_attention
from llama_jax.kernels.attention.flash import flash_attention
from llama_jax.kernels.attention.records import KeysValues, Places, Rule
from llama_jax.kernels.dispatch import REFERENCE, Backend, Operation, choose
from llama_jax.targets import current

MAX_BLOCK = 256
"""The most queries of a block: a tile of a kernel has no more."""
LOOPED_BLOCK = 32
"""Queries of a block that the reference computes at a time: their logits over a few thousand slots stay in a cache."""


def packed_rows(rows: jax.Array, positions: jax.Array, count: int) -> jax.Array:
    """The row of each packed token, int32 of the shape of `rows`; `count`, which is no row, for padding."""
    return jnp.where((positions >= 0) & (rows >= 0) & (rows < count), rows, count)


class Ranks(NamedTuple):
    """Packed tokens by row.

    Attributes:
      rank: int32 [n], how many tokens of its row, or of padding, come before each.
      counts: int32 [rows + 1], the tokens of each row; the last: those that are padding.
    """

    rank: jax.Array
    counts: jax.Array


def ranks(row: jax.Array, rows: int) -> Ranks:
    """The place of each token within its row, in whatever order rows stand.

    Args:
      row: int32 [n], of `packed_rows`.
    """
    index = jnp.arange(row.shape[0], dtype=jnp.int32)
    count = jnp.zeros((rows + 1,), jnp.int32).at[row].add(1)
    start = jnp.cumsum(count, dtype=jnp.int32) - count
    order = jnp.argsort(row, stable=True)
    sorted_index = jnp.zeros_like(index).at[order].set(index, unique_indices=True)
    return Ranks(sorted_index - start[row], count)


class Pieces(NamedTuple):
    """Packed tokens [n] cut into pieces, each of one row.

    Attributes:
      place: int32 [n], where each token lies among all places [pieces * size]; beyond them if it is in no piece.
      token: int32 [pieces, size], the token at each place; n where there is none.
      row: int32 [pieces], the row of each piece.
    """

    place: jax.Array
    token: jax.Array
    row: jax.Array


def most_blocks(tokens: int, size: int, rows: int, *, several: bool = True) -> int:
    """The most blocks of `size` > 2 tokens that `tokens` tokens fill, of which those of at most `rows` rows with two or
    more are cut, or with `several=False` those of rows with any: no fewer would do for every input.

    A row of t tokens fills 1 + floor((t - 1) / size) blocks, which is at most 1 + (t - 1) / size and, for t >= 2, at
    most 1 + (t - 2) / (size - 1). The sums over c rows grow with c, which is no more than `rows`, nor than tokens / 2.
    """
    if not several:
        most = min(rows, tokens)
        return most + (tokens - most) // size
    most = min(rows, tokens // 2)
    return most + min((tokens - most) // size, (tokens - 2 * most) // (size - 1)) if most else 0


def block_size(tokens: int, rows: int) -> int:
    """Queries of a block, a power of two: enough that not much more than twice the tokens are computed if every one of
    `rows` rows leaves its last block almost empty."""
    each = max(tokens // max(min(rows, tokens // 2), 1), 1)
    return min(max(1 << (each.bit_length() - 1), MAX_QUERIES), MAX_BLOCK)


def block_multiple(tokens: int, rows: int) -> int:
    """A multiple of the length of the blocks that packed tokens are cut into, whatever backend runs.

    Args:
      tokens: in the axis; rows: `Rule.chunk_rows`.
    """
    return max(block_size(tokens, rows), LOOPED_BLOCK)


def single_tokens(row: jax.Array, of: Ranks) -> jax.Array:
    """The token of each row that has one alone, int32 [rows]; n for other rows."""
    rows = of.counts.shape[0] - 1
    return _inverse(jnp.where(of.counts[row] == 1, row, rows), rows)


def blocks(row: jax.Array, of: Ranks, size: int, most: int, *, least: int = 2, padding: bool = False) -> Pieces:
    """The tokens of rows with `least` or more as `most` pieces of `size`, those of a row one behind the other; with
    `padding` that too, which takes one piece more at most."""
    rows = of.counts.shape[0] - 1
    several = (of.counts >= least).at[rows].set(padding)
    pieces = jnp.where(several, (of.counts + size - 1) // size, 0)
    first = jnp.cumsum(pieces, dtype=jnp.int32) - pieces
    place = jnp.where(several[row], first[row] * size + of.rank, most * size)
    of_row = jnp.full((most,), rows, jnp.int32).at[place // size].set(row, mode="drop")
    return Pieces(place, _inverse(place, most * size).reshape(most, size), of_row)


def longest_first(pieces: Pieces, positions: jax.Array) -> Pieces:
    """The pieces in the order of how many slots they may see, most first: a GPU starts them in this order, and would
    otherwise wait for the last ones of a causal text. Where a token lies among them (`place`) is no longer known.

    Args:
      positions: int32 [n], of the tokens.
    """
    last = positions.at[pieces.token].get(mode="fill", fill_value=-1).max(axis=1)
    order = jnp.argsort(-last, stable=True)
    return Pieces(pieces.place, pieces.token[order], pieces.row[order])


def _inverse(place: jax.Array, places: int) -> jax.Array:
    """The token at each place, int32 [places]; the number of tokens where there is none."""
    n = place.shape[0]
    return jnp.full((places,), n, jnp.int32).at[place].set(jnp.arange(n, dtype=jnp.int32), mode="drop")


def by_piece(
    q: jax.Array, kv: KeysValues, places: Places, token: jax.Array, row: jax.Array | None, *, indexed: bool
) -> tuple[jax.Array, KeysValues, Places]:
    """Packed queries as a batch row for each piece, beside the pages of its row.

    Args:
      token, row: of `Pieces`; None for piece i of row i.
      indexed: whether the queries stay where they are, and the places tell where that is.
    """

    def own(x: Any) -> Any:
        return x if x is None or row is None else x.at[row].get(mode="fill", fill_value=-1)

    def query(x: Any, fill: int = -1) -> Any:
        return None if x is None else x[0].at[token].get(mode="fill", fill_value=fill)

    at = Places(
        query(places.q_positions),
        own(places.kv_positions),
        query(places.q_segments),
        own(places.kv_segments),
        q_spans=query(places.q_spans),
        kv_spans=own(places.kv_spans),
        q_index=token if indexed else None,
    )
    return q if indexed else query(q, 0), replace(kv, page_table=own(kv.page_table)), at


def packed_attention(
    q: jax.Array,
    kv: KeysValues,
    places: Places,
    rule: Rule,
    *,
    sinks: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`, with `places.rows`, in any order: what `by_row` would give.

    Padding gives zeros, and so does a query that sees nothing where a kernel runs.

    Args:
      rule: with `chunk_rows`, fewer blocks are made. If the guarantee does not hold, the queries for which there is no
        block give NaN, or with an indexed backend anything.
    """
    q, kv, places = jax.tree.map(jnp.asarray, (q, kv, places))
    n, rows = q.shape[1], places.kv_positions.shape[0]
    if kv.page_table is None:  # a row of slots is a page
        kv = replace(kv, page_table=jnp.arange(rows, dtype=jnp.int32)[:, None])
    row = packed_rows(places.rows, places.q_positions, rows)[0]
    of = ranks(row, rows)

    def attend(
        op: Operation, token: jax.Array, row: jax.Array | None, *, indexed: bool = False, looped: bool = False
    ) -> jax.Array:
        """Attention of each piece [pieces, size, ...], or of the packed queries if they are indexed. The reference
        copies the keys of a piece and writes its logits, so it computes one piece at a time, and none that is empty."""
        if not looped:
            return op(*by_piece(q, kv, places, token, row, indexed=indexed), rule, sinks=sinks, backend=backend)

        def one(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
            token, row = piece
            nothing = jnp.zeros((*token.shape, *q.shape[2:]), q.dtype)
            return jax.lax.cond((token < n).any(), lambda: attend(op, token[None], row[None])[0], lambda: nothing)

        return jax.lax.map(one, (token, jnp.arange(rows, dtype=jnp.int32) if row is None else row))

    def backend_of(op: Operation, queries: int) -> Backend | None:
        """The backend for pieces of N queries; None for the reference."""
        some, at = (
            jax.ShapeDtypeStruct((1, queries, *q.shape[2:]), q.dtype),
            jax.ShapeDtypeStruct((1, queries), jnp.int32),
        )
        those = replace(places, q_positions=at, rows=None)
        name = choose(op, current(), backend, some, kv, those, rule, sinks=sinks).backend
        return None if name == REFERENCE else op.all_backends()[name]

    chunk_rows = rows if rule.chunk_rows is None else min(max(rule.chunk_rows, 0), rows)
    of_one, of_many = backend_of(decode_attention, 1), backend_of(flash_attention, MAX_BLOCK)
    looped = of_many is None
    size = LOOPED_BLOCK if looped else block_size(n, chunk_rows)
    op = decode_attention if size <= MAX_QUERIES else flash_attention
    indexed = op is flash_attention and of_many is not None and of_many.indexed
    # Batch-invariant also where a row has one token, which another call might cut together with those before it. And
    # where any row may have several, and one backend computes either, blocks for all of them are no more work.
    alike = rule.batch_invariant or (chunk_rows == rows and of_one == of_many and not looped)
    out = jnp.zeros(q.shape[1:], q.dtype)
    if most := most_blocks(n, size, chunk_rows, several=not alike):
        pieces = blocks(row, of, size, most + indexed, least=1 if alike else 2, padding=indexed)
        if indexed:
            pieces = longest_first(pieces, places.q_positions[0])
        out = attend(op, pieces.token, pieces.row, indexed=indexed, looped=looped)
        if indexed:
            out = out[0]
        else:
            out = out.reshape(-1, *q.shape[2:]).at[pieces.place].get(mode="fill", fill_value=jnp.nan)
            out = jnp.where((row < rows)[:, None, None], out, 0)
    if not alike:
        token = single_tokens(row, of)
        alone = attend(decode_attention, token[:, None], None, looped=of_one is None)
        out = out.at[token].set(alone[:, 0], mode="drop")
    return out[None]
