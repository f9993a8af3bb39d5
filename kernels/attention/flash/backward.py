"""The backward kernels: weights are made again from the log-sum-exp, block by block.

"FlashAttention-2", arXiv:2307.08691, algorithm 2, as two kernels without atomic additions: one owns a tile of queries
and walks over slots, the other owns a tile of slots and walks over the queries of all heads of its group.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from llama_jax.kernels.attention.flash.blocks import (
    NOTHING_SEEN,
    Program,
    load_queries,
    load_slots,
    load_span,
    sees,
    visit,
)
from llama_jax.kernels.attention.flash.spans import block_pairs, spans
from llama_jax.kernels.attention.flash.tiles import pieces_of
from llama_jax.kernels.attention.records import Places
from llama_jax.kernels.attention.reference import MASKED
from llama_jax.kernels.exponential import exp2
from llama_jax.kernels.pallas import Index, dot, launch, load_row, load_tile, narrow, store_tile, tile_width


class Saved(NamedTuple):
    """The inputs of the backward pass; k and v are rows, not pages.

    Attributes:
      q, out_grad: [batch, q_len, q_heads, head_dim]. k, v: [batch, kv_heads, kv_len, head_dim].
      lse: float32 [batch, q_heads, q_len], from `forward`.
      delta: float32 [batch, q_heads, q_len], the sum over head_dim of output times its gradient.
    """

    q: Any
    k: Any
    v: Any
    out_grad: Any
    lse: Any
    delta: Any


@dataclass(frozen=True)
class _Rows:
    """Rows of an array in memory; `held`: in registers too."""

    ref: Any
    index: Index
    valid: jax.Array | None
    held: jax.Array | None = None

    def tile(self) -> jax.Array:
        """[rows, width], head_dim filled up."""
        return self.piece(0, 1) if self.held is None else self.held

    def piece(self, i: int, pieces: int) -> jax.Array:
        """The i-th of this many pieces of the columns."""
        width = tile_width(self.ref.shape[-1]) // pieces
        return load_tile(self.ref, self.index, width, self.valid, first=i * width)

    def hold(self, pieces: int) -> _Rows:
        """The same rows, read now if they are to be used in one piece."""
        return replace(self, held=self.tile()) if pieces == 1 else self


def _products(a: _Rows, b: _Rows, pieces: int) -> jax.Array:
    """[rows of a, rows of b]: a b^T, float32."""
    if pieces == 1:
        return dot(a.tile(), b.tile(), transpose_b=True)
    return functools.reduce(
        jnp.add, (dot(a.piece(i, pieces), b.piece(i, pieces), transpose_b=True) for i in range(pieces))
    )


def _weights_and_slope(
    rule: Program, products: jax.Array, lse: jax.Array, see: jax.Array | None
) -> tuple[jax.Array, jax.Array | float]:
    """Softmax weights for q k^T, and the derivative of the logits; lse must broadcast against products."""
    logits = rule.logits(products)
    slope = rule.logits_slope(logits)
    if see is not None:
        logits = jnp.where(see, logits, MASKED)
    return exp2(logits * rule.factor - lse), slope


def backward(rule: Program, saved: Saved, places: Places) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, in their shapes and dtypes."""
    dk, dv = _slots_backward(rule, saved, places)
    return _queries_backward(rule, saved, places), dk, dv


def _queries_backward(rule: Program, saved: Saved, places: Places) -> jax.Array:
    block_q, block_k = rule.tiles.dq_block_q, rule.tiles.dq_block_k
    batch, q_len, q_heads, head_dim = saved.q.shape
    pieces = pieces_of(head_dim, rule.tiles.dq_pieces)
    kv_heads, kv_len = saved.k.shape[1:3]
    width = tile_width(head_dim)
    round_to = functools.partial(narrow, dtype=saved.k.dtype, by_hand=rule.round_by_hand)

    def flash_attention_backward_queries(refs: Saved, at: Places, spans_ref: Any, dq_ref: Any) -> None:
        head, row = pl.program_id(0), pl.program_id(2)
        block = pl.num_programs(1) - 1 - pl.program_id(1)
        kv_head = jax.lax.div(head, q_heads // kv_heads)
        query = block * block_q + jnp.arange(block_q, dtype=jnp.int32)
        valid = query < q_len if q_len % block_q else None
        query_rows = load_queries(at, row, query, valid, rule)
        q = _Rows(refs.q, (row, query, head), valid).hold(pieces)
        out_grad = _Rows(refs.out_grad, (row, query, head), valid).hold(pieces)
        lse = load_row(refs.lse, (row, head, query), valid, NOTHING_SEEN)
        delta = load_row(refs.delta, (row, head, query), valid, 0.0)

        def step(masked: bool, j: jax.Array, dq: jax.Array) -> jax.Array:
            slots = j * block_k + jnp.arange(block_k, dtype=jnp.int32)
            there = slots < kv_len if kv_len % block_k else None
            k = _Rows(refs.k, (row, kv_head, slots), there).hold(pieces)
            v = _Rows(refs.v, (row, kv_head, slots), there)
            see = sees(query_rows, load_slots(at, row, slots, there)) if masked else None
            weights, slope = _weights_and_slope(rule, _products(q, k, pieces), lse[:, None], see)
            grad = weights * (_products(out_grad, v, pieces) - delta[:, None]) * slope
            return dq + dot(round_to(grad), k.tile())

        dq = visit(load_span(spans_ref, row, block), step, jnp.zeros((block_q, width), jnp.float32))
        store_tile(dq_ref, (row, query, head), dq * rule.scale, valid)

    return launch(
        flash_attention_backward_queries,
        saved,
        places,
        spans(*block_pairs(places, rule.visibility, block_q, block_k)),
        grid=(q_heads, -(-q_len // block_q), batch),
        out=jax.ShapeDtypeStruct(saved.q.shape, saved.q.dtype),
        num_warps=rule.tiles.dq_warps,
        num_stages=rule.tiles.backward_stages,
        interpret=rule.interpret,
    )


def _slots_backward(rule: Program, saved: Saved, places: Places) -> tuple[jax.Array, jax.Array]:
    block_q, block_k = rule.tiles.dkv_block_q, rule.tiles.dkv_block_k
    batch, q_len, q_heads, head_dim = saved.q.shape
    pieces = pieces_of(head_dim, rule.tiles.dkv_pieces)
    kv_heads, kv_len = saved.k.shape[1:3]
    group = q_heads // kv_heads
    width = tile_width(head_dim)
    round_to = functools.partial(narrow, dtype=saved.q.dtype, by_hand=rule.round_by_hand)

    def flash_attention_backward_slots(refs: Saved, at: Places, spans_ref: Any, dk_ref: Any, dv_ref: Any) -> None:
        kv_head, block, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        slots = block * block_k + jnp.arange(block_k, dtype=jnp.int32)
        there = slots < kv_len if kv_len % block_k else None
        slot_rows = load_slots(at, row, slots, there)
        k = _Rows(refs.k, (row, kv_head, slots), there).hold(pieces)
        v = _Rows(refs.v, (row, kv_head, slots), there).hold(pieces)
        span = load_span(spans_ref, row, block)

        def of_head(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            head = kv_head * group + i

            def step(masked: bool, j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                dk, dv = carry
                query = j * block_q + jnp.arange(block_q, dtype=jnp.int32)
                valid = query < q_len if q_len % block_q else None
                q = _Rows(refs.q, (row, query, head), valid).hold(pieces)
                out_grad = _Rows(refs.out_grad, (row, query, head), valid).hold(pieces)
                lse = load_row(refs.lse, (row, head, query), valid, NOTHING_SEEN)
                delta = load_row(refs.delta, (row, head, query), valid, 0.0)
                see = sees(load_queries(at, row, query, valid, rule), slot_rows).T if masked else None
                # Everything transposed, [slots, queries]: so weights are left operands, as they come.
                weights, slope = _weights_and_slope(rule, _products(k, q, pieces), lse[None, :], see)
                dv = dv + dot(round_to(weights), out_grad.tile())
                grad = weights * (_products(v, out_grad, pieces) - delta[None, :]) * slope
                return dk + dot(round_to(grad), q.tile()), dv

            return visit(span, step, carry)

        zeros = jnp.zeros((block_k, width), jnp.float32)
        dk, dv = jax.lax.fori_loop(0, group, of_head, (zeros, zeros))
        store_tile(dk_ref, (row, kv_head, slots), dk * rule.scale, there)
        store_tile(dv_ref, (row, kv_head, slots), dv, there)

    some, every = (jnp.swapaxes(x, 1, 2) for x in block_pairs(places, rule.visibility, block_q, block_k))
    return launch(
        flash_attention_backward_slots,
        saved,
        places,
        spans(some, every),
        grid=(kv_heads, -(-kv_len // block_k), batch),
        out=(
            jax.ShapeDtypeStruct(saved.k.shape, saved.k.dtype),
            jax.ShapeDtypeStruct(saved.v.shape, saved.v.dtype),
        ),
        num_warps=rule.tiles.dkv_warps,
        num_stages=rule.tiles.backward_stages,
        interpret=rule.interpret,
    )
