"""Decode attention on any GPU through Pallas-Triton; differentiable by q, k, v and sinks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.decode.kernel import Call, combine, shares
from llama_jax.kernels.attention.decode.plan import visible_slots
from llama_jax.kernels.attention.decode.tiles import Tiles, default_tiles, padded_rows
from llama_jax.kernels.attention.reference import Visibility, attention_reference, visible
from llama_jax.targets import current


@dataclass(frozen=True)
class _Rule:
    """What does not depend on data."""

    visibility: Visibility
    scale: float
    soft_cap: float | None
    tiles: Tiles
    interpret: bool


class _Places(NamedTuple):
    """The integer arguments of `llama_jax.kernels.attention.attention`."""

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segments: jax.Array | None
    kv_segments: jax.Array | None
    page_table: jax.Array | None


def run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    page_table: jax.Array | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`.

    Queries that see nothing give zeros. Slots that nothing sees may be read, as padding of a block: what they hold must
    be finite. The gradient is that of the reference, which computes everything again: what is trained on is a text of a
    few tokens, so its cost does not matter.

    Args:
      tiles: default: `default_tiles` of the current target.
      interpret: runs as plain JAX operations, on any device.
    """
    if tiles is None:
        itemsize = max(q.dtype.itemsize, k.dtype.itemsize)
        rows = q.shape[2] // k.shape[1] * q.shape[1]
        tiles = default_tiles(current(), rows=rows, head_dim=q.shape[3], itemsize=itemsize)
    rule = _Rule(visibility, scale, soft_cap, tiles, interpret)
    return _attend(rule, q, k, v, sinks, _Places(q_positions, kv_positions, q_segments, kv_segments, page_table))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rule: _Rule, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None, places: _Places
) -> jax.Array:
    target, tiles = current(), rule.tiles
    rows = q.shape[2] // k.shape[1] * q.shape[1]
    programs = k.shape[1] * -(-rows // padded_rows(rows, tiles.block_rows))
    call = Call(
        batch=q.shape[0],
        queries=q.shape[1],
        group=q.shape[2] // k.shape[1],
        head_dim=q.shape[3],
        slots=places.kv_positions.shape[1],
        page_size=0 if places.page_table is None else k.shape[2],
        wanted=max(max(target.compute_units, 1) * tiles.programs_per_unit // programs, 1),
        visibility=rule.visibility,
        scale=rule.scale,
        soft_cap=rule.soft_cap,
        tiles=tiles,
        interpret=rule.interpret,
    )
    ranges = visible_slots(places.q_positions, places.kv_positions, rule.visibility)
    part, lse = shares(
        call,
        *ranges,
        q,
        k,
        v,
        places.q_positions,
        places.kv_positions,
        places.page_table,
        places.q_segments,
        places.kv_segments,
    )
    return combine(call, *ranges, part, lse, sinks, jax.ShapeDtypeStruct(q.shape, q.dtype))


def _forward(rule: _Rule, *args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _attend(rule, *args), args


def _backward(rule: _Rule, saved: tuple[Any, ...], out_grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, sinks, places = saved

    def reference(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        return attention_reference(
            q,
            k.astype(q.dtype),  # as the kernel does
            v.astype(q.dtype),
            visibility=rule.visibility,
            scale=rule.scale,
            soft_cap=rule.soft_cap,
            sinks=sinks,
            **places._asdict(),
        )

    # The zeros of queries that see nothing depend on nothing.
    see = visible(places.q_positions, places.kv_positions, rule.visibility, places.q_segments, places.kv_segments)
    out_grad = jnp.where(see.any(axis=2)[:, :, None, None], out_grad, 0)
    _, pull = jax.vjp(reference, q, k, v, sinks)
    return *pull(out_grad), None


_attend.defvjp(_forward, _backward)
