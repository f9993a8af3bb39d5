"""min_p, top_k and top_p without sorting the vocabulary, whole or split over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from llama_jax.sharding import MeshAxes, reductions

CANDIDATES = 128
"""This many of the largest logits of each device's part of a row are compared with those of the other devices."""


class Limits(Protocol):
    """Truncation limits of each row: float32 [batch], int32 [batch] for `top_k` (the vocabulary's size keeps all)."""

    @property
    def min_p(self) -> jax.Array: ...
    @property
    def top_k(self) -> jax.Array: ...
    @property
    def top_p(self) -> jax.Array: ...


def truncate(logits: jax.Array, limits: Limits, axis: MeshAxes | None = None) -> jax.Array:
    """Forbids the tokens that min_p, top_k and top_p exclude, applied in this order.

    Instead of sorting the vocabulary, bisects for the smallest logit to keep: 32 halvings of the order-preserving
    integers of the floats find it exactly.

    Args:
      logits: float32 [batch, vocab], divided by temperature; a part of the vocabulary inside `sharding.local`.
      axis: the mesh axis over which the vocabulary is split, None for whole rows.

    Returns:
      The logits, with -inf for forbidden tokens.
    """
    best = reductions.largest(logits, axis)[:, None]
    logits = jnp.where(logits - best < jnp.log(limits.min_p)[:, None], -jnp.inf, logits)
    cut = _exact_cut(logits, best, limits, None) if axis is None else _cut_of_parts(logits, best, limits, axis)
    return jnp.where(_ordered(logits) >= cut[:, None], logits, -jnp.inf)


def _exact_cut(logits: jax.Array, best: jax.Array, limits: Limits, axis: MeshAxes | None) -> jax.Array:
    """`_ordered` of the smallest logit that top_k and top_p keep, uint32 [batch]."""
    order = _ordered(logits)
    kth = _kth(order, limits.top_k, axis)
    # Relative to the best token's, so that the sum is accurate enough for any vocabulary.
    weights = jnp.where(order >= kth[:, None], jnp.exp(logits - best), 0.0)
    nucleus = _nucleus(order, weights, limits.top_p * reductions.total(weights, axis), axis)
    # A top_p that is zero in float32 would keep nothing.
    nucleus = jnp.minimum(nucleus, reductions.largest(order, axis))
    return jnp.maximum(kth, jnp.where(limits.top_p >= 1.0, jnp.uint32(0), nucleus))


def _cut_of_parts(logits: jax.Array, best: jax.Array, limits: Limits, axis: MeshAxes) -> jax.Array:
    """`_exact_cut` of a split row, from the largest logits of every part.

    The candidates include every logit above `floor`, so a cut at or above it is exact: above it, counts and sums of the
    candidates are those of the row, and a threshold reached at `floor` by the candidates is reached by the row too. If
    the cut is lower (a flat distribution with a top_p near 1, or a large top_k), the bisection runs over the whole row,
    with one message per halving.
    """
    own, _ = jax.lax.top_k(logits, min(CANDIDATES, logits.shape[1]))
    gathered = jax.lax.all_gather(own, axis, axis=1)  # [batch, parts, candidates]
    candidates = gathered.reshape(gathered.shape[0], -1)
    # A part that is entirely among the candidates misses nothing.
    complete = own.shape[1] == logits.shape[1]
    lowest = jnp.full(gathered.shape[:1], -jnp.inf) if complete else jnp.max(gathered[:, :, -1], axis=1)
    floor, order = _ordered(lowest), _ordered(candidates)

    all_kept = limits.top_k >= logits.shape[1] * jax.lax.axis_size(axis)
    kth = jnp.where(all_kept, jnp.uint32(0), _kth(order, limits.top_k, None))
    mass = reductions.total(jnp.where(_ordered(logits) >= kth[:, None], jnp.exp(logits - best), 0.0), axis)
    weights = jnp.where(order >= kth[:, None], jnp.exp(candidates - best), 0.0)
    nucleus = _nucleus(order, weights, limits.top_p * mass, None)
    nucleus = jnp.minimum(nucleus, jnp.max(order, axis=-1))
    unbounded = limits.top_p >= 1.0
    found = (all_kept | (kth >= floor)) & (unbounded | (nucleus >= floor))
    return jax.lax.cond(
        jnp.all(found),
        lambda: jnp.maximum(kth, jnp.where(unbounded, jnp.uint32(0), nucleus)),
        lambda: _exact_cut(logits, best, limits, axis),
    )


def _kth(order: jax.Array, k: jax.Array, axis: MeshAxes | None) -> jax.Array:
    """The k-th largest number in each row of `order`; 0 if there are fewer."""
    return _bisect(lambda cut: reductions.total(order >= cut[:, None], axis) >= k, order.shape[0])


def _nucleus(order: jax.Array, weights: jax.Array, enough: jax.Array, axis: MeshAxes | None) -> jax.Array:
    """The largest cut at which the weights of numbers at or above it sum to `enough`; 0 if they never do."""
    return _bisect(
        lambda cut: reductions.total(jnp.where(order >= cut[:, None], weights, 0.0), axis) >= enough, order.shape[0]
    )


def _ordered(x: jax.Array) -> jax.Array:
    """Maps float32 x to uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 equals 0.0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _bisect(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """The largest uint32 cut [rows] for which `holds(cut)`; it must hold for 0 and be monotone."""

    def halve(i: jax.Array, cut: jax.Array) -> jax.Array:
        raised = cut | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(raised), raised, cut)

    return jax.lax.fori_loop(0, 32, halve, jnp.zeros((rows,), jnp.uint32))
