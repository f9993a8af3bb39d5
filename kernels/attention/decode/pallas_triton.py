"""Decode attention on any GPU through Pallas-Triton; differentiable by q, k, v and sinks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.decode import MAX_QUERIES
from llama_jax.kernels.attention.decode.kernel import Call, combine, shares
from llama_jax.kernels.attention.decode.partition import visible_slots
from llama_jax.kernels.attention.decode.tiles import Tiles, default_tiles, padded_rows
from llama_jax.kernels.attention.records import KeysValues, Places, Rule, beyond_kernels
from llama_jax.kernels.attention.reference import attention_reference, visible
from llama_jax.targets import Target, current

__all__ = ["Tiles", "run", "unsupported"]

MAX_HEAD_DIM = 256
DTYPES = ("bfloat16", "float16", "float32")


def unsupported(
    target: Target,
    q: jax.Array,
    kv: KeysValues,
    places: Places,
    rule: Rule,
    *,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> str | None:
    """Why the kernels cannot run these arguments on that target, or None."""
    if target.vendor == "cpu" and not interpret:
        return "Pallas-Triton compiles for GPUs only; pallas_interpret runs the same kernels"
    if not 0 < q.shape[1] <= MAX_QUERIES:
        return f"{q.shape[1]} queries a row, it takes 1 to {MAX_QUERIES}"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"head_dim {q.shape[3]} is more than {MAX_HEAD_DIM}"
    if not places.kv_positions.shape[1]:
        return "the cache has no slots"
    for x in (q, kv.k, kv.v):
        if x.dtype.name not in DTYPES:
            return f"dtype {x.dtype.name}, it takes {', '.join(DTYPES)}"
    if not interpret and target.vendor == "amd" and target.wave_size == 32 and q.dtype == "float32":
        return f"{target.arch} has no matrix instruction for float32, and the kernels would spill registers"
    return beyond_kernels(kv, places, rule)


def run(
    q: jax.Array,
    kv: KeysValues,
    places: Places,
    rule: Rule,
    *,
    sinks: jax.Array | None = None,
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
        itemsize = max(q.dtype.itemsize, kv.k.dtype.itemsize)
        rows = q.shape[2] // kv.k.shape[1] * q.shape[1]
        tiles = default_tiles(current(), rows=rows, head_dim=q.shape[3], itemsize=itemsize)
    return _attend((rule, tiles, interpret), q, kv, sinks, places)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    program: tuple[Rule, Tiles, bool], q: jax.Array, kv: KeysValues, sinks: jax.Array | None, places: Places
) -> jax.Array:
    rule, tiles, interpret = program
    kv_heads = kv.k.shape[1]
    rows = q.shape[2] // kv_heads * q.shape[1]
    programs = kv_heads * -(-rows // padded_rows(rows, tiles.block_rows))
    call = Call(
        batch=q.shape[0],
        queries=q.shape[1],
        group=q.shape[2] // kv_heads,
        head_dim=q.shape[3],
        slots=places.kv_positions.shape[1],
        page_size=0 if kv.page_table is None else kv.k.shape[2],
        wanted=max(max(current().compute_units, 1) * tiles.programs_per_unit // programs, 1),
        rule=rule,
        tiles=tiles,
        interpret=interpret,
    )
    ranges = visible_slots(places.q_positions, places.kv_positions, rule.visibility)
    part, lse = shares(call, *ranges, q, kv, places)
    return combine(call, *ranges, part, lse, sinks, jax.ShapeDtypeStruct(q.shape, q.dtype))


def _forward(program: tuple[Rule, Tiles, bool], *args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _attend(program, *args), args


def _backward(program: tuple[Rule, Tiles, bool], saved: tuple[Any, ...], out_grad: jax.Array) -> tuple[Any, ...]:
    rule = program[0]
    q, kv, sinks, places = saved

    def reference(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        rounded = replace(kv, k=k.astype(q.dtype), v=v.astype(q.dtype))  # as the kernel does
        return attention_reference(q, rounded, places, rule, sinks=sinks)

    # The zeros of queries that see nothing depend on nothing.
    see = visible(places, rule.visibility)
    out_grad = jnp.where(see.any(axis=2)[:, :, None, None], out_grad, 0)
    _, pull = jax.vjp(reference, q, kv.k, kv.v, sinks)
    dq, dk, dv, d_sinks = pull(out_grad)
    return dq, replace(kv, k=dk, v=dv, page_table=None), d_sinks, None


_attend.defvjp(_forward, _backward)
