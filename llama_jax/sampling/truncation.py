"""min_p, top_k and top_p without sorting the vocabulary, whole or split over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from llama_jax.sharding import MeshAxes, reductions

CANDIDATES = 128
"""Of each device's part of a row, so many of the largest logits are compared with those of the other devices."""


class Limits(Protocol):
    """What a row may be drawn from: float32 [batch], int32 [batch] for `top_k` (the vocabulary's size keeps all)."""

    @property
    def min_p(self) -> jax.Array: ...
    @property
    def top_k(self) -> jax.Array: ...
    @property
    def top_p(self) -> jax.Array: ...


def truncate(logits: jax.Array, limits: Limits, axis: MeshAxes | None = None) -> jax.Array:
    """Forbids the tokens that min_p, top_k and top_p leave out, in this order.

    Instead of sorting the vocabulary, bisects for the smallest logit that is kept: 32 halvings of the ordered integers
    behind the floats find it exactly.

    Args:
      logits: float32 [batch, vocab], over the temperature; a part of the vocabulary inside of `sharding.local`.
      axis: the axis of the mesh that the vocabulary is split over, None for whole rows.

    Returns:
      The logits, -inf where a token is forbidden.
    """
    best = reductions.largest(logits, axis)[:, None]
    logits = jnp.where(logits - best < jnp.log(limits.min_p)[:, None], -jnp.inf, logits)
    cut = _exact_cut(logits, best, limits, None) if axis is None else _cut_of_parts(logits, best, limits, axis)
    return jnp.where(_ordered(logits) >= cut[:, None], logits, -jnp.inf)


def _exact_cut(logits: jax.Array, best: jax.Array, limits: Limits, axis: MeshAxes | None) -> jax.Array:
    """uint32 [batch], `_ordered` of the smallest logit that top_k and top_p keep."""
    order = _ordered(logits)
    kth = _kth(order, limits.top_k, axis)
    # Relative to the best token's, so that the sum is exact enough whatever the vocabulary.
    weights = jnp.where(order >= kth[:, None], jnp.exp(logits - best), 0.0)
    nucleus = _nucleus(order, weights, limits.top_p * reductions.total(weights, axis), axis)
    # A top_p that is zero in float32 would leave nothing.
    nucleus = jnp.minimum(nucleus, reductions.largest(order, axis))
    return jnp.maximum(kth, jnp.where(limits.top_p >= 1.0, jnp.uint32(0), nucleus))


def _cut_of_parts(logits: jax.Array, best: jax.Array, limits: Limits, axis: MeshAxes) -> jax.Array:
    """`_exact_cut` of a split row, from the largest logits of every part.

    No logit above `floor` is missing among these candidates. So a cut at or above it is the row's own: above it the
    candidates' counts and sums are the row's, and what they reach at `floor` itself the row reaches too. Where the cut
    lies lower (a flat distribution with a top_p near 1, or a large top_k), the bisection runs over the whole row,
    with a message for each halving.
    """
    own, _ = jax.lax.top_k(logits, min(CANDIDATES, logits.shape[1]))
    gathered = jax.lax.all_gather(own, axis, axis=1)  # [batch, parts, candidates]
    candidates = gathered.reshape(gathered.shape[0], -1)
    # A part that is among the candidates as a whole misses nothing.
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
    """The k-th largest number of each row of `order`; 0 if there are fewer."""
    return _bisect(lambda cut: reductions.total(order >= cut[:, None], axis) >= k, order.shape[0])


def _nucleus(order: jax.Array, weights: jax.Array, enough: jax.Array, axis: MeshAxes | None) -> jax.Array:
    """The largest cut at which the weights of numbers no smaller add up to `enough`; 0 if they never do."""
    return _bisect(
        lambda cut: reductions.total(jnp.where(order >= cut[:, None], weights, 0.0), axis) >= enough, order.shape[0]
    )


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 of the same order as the float32 x."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 is no less than 0.0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _bisect(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """The largest uint32 cut [rows] for which `holds(cut)`; it must hold for 0 and be monotone."""

    def halve(i: jax.Array, cut: jax.Array) -> jax.Array:
        raised = cut | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(raised), raised, cut)

    return jax.lax.fori_loop(0, 32, halve, jnp.zeros((rows,), jnp.uint32))
