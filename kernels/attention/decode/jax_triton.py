"""Decode attention through jax-triton: the partition, tiles and gradient of Pallas-Triton, with kernels in Triton."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention.decode import call as calls
from llama_jax.kernels.attention.decode.call import Call
from llama_jax.kernels.attention.decode.partition import Shares
from llama_jax.kernels.attention.decode.tiles import Tiles
from llama_jax.kernels.attention.records import KeysValues, Places, Rule
from llama_jax.kernels.dispatch import jax_triton
from llama_jax.kernels.dispatch.jax_triton import Launch
from llama_jax.targets import Target

__all__ = ["Tiles", "run", "unsupported"]


def unsupported(target: Target, q: jax.Array, kv: KeysValues, *args: Any, **arguments: Any) -> str | None:
    """The reason the kernels cannot run these arguments on that target, or None."""
    if kv.scheme not in ("", "int8"):
        return f"it takes codes in int8, not in {kv.scheme}"
    return jax_triton.unsupported(target) or calls.unsupported(q, kv, *args, **arguments)


def run(
    q: jax.Array,
    kv: KeysValues,
    places: Places,
    rule: Rule,
    *,
    sinks: jax.Array | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """See `llama_jax.kernels.attention.attention`, and `pallas_triton.run`."""
    return calls.run(calls.Kernels(shares, combine), q, kv, places, rule, sinks=sinks, tiles=tiles)


def shares(call: Call, cut: Shares, q: jax.Array, kv: KeysValues, places: Places) -> tuple[jax.Array, jax.Array]:
    """See `kernel.shares`."""
    from llama_jax.kernels.attention.decode.triton_kernel import decode_attention_shares

    how = shares_launch(call, cut, q, kv, places)
    part, lse = jax_triton.call(decode_attention_shares, "decode_attention_shares", how)
    return part, lse


def combine(
    call: Call,
    cut: Shares,
    part: jax.Array,
    lse: jax.Array,
    sinks: jax.Array | None,
    out: jax.ShapeDtypeStruct,
) -> jax.Array:
    """See `kernel.combine`."""
    from llama_jax.kernels.attention.decode.triton_kernel import decode_attention_combine

    how = combine_launch(call, cut, part, lse, sinks, out)
    (result,) = jax_triton.call(decode_attention_combine, "decode_attention_combine", how)
    return result


def shares_launch(call: Call, cut: Shares, q: jax.Array, kv: KeysValues, places: Places) -> Launch:
    """Arguments of `triton_kernel.decode_attention_shares`."""
    # The kernel has a fixed number of arguments: positions take the place of those that it will not read.
    optional = (kv.k_scale, kv.v_scale, kv.page_table, places.q_segments, places.kv_segments)
    *scales, table, q_segments, kv_segments = (places.q_positions if x is None else x for x in optional)
    kv_heads = kv.k.shape[1]
    lse = jax.ShapeDtypeStruct((call.most_shares, kv_heads, call.rows), jnp.float32)
    at = (places.q_positions, places.kv_positions, table, q_segments, kv_segments)
    return Launch(
        (cut.row, cut.start, cut.stop, q, kv.k, kv.v, *scales, *at),
        _constants(call, kv_heads)
        | {
            "SLOTS": call.slots,
            "BLOCK_K": call.cut.block_k,
            "PAGE": call.page_size,
            "PAGES": kv.k.shape[0],
            "HEIGHT": call.height,
            "KIND": call.rule.visibility.kind,
            "WINDOW": call.rule.visibility.window,
            "SCALE": call.rule.scale,
            "SOFT_CAP": call.rule.soft_cap or 0.0,
            "SEGMENTS": places.q_segments is not None,
            "SCALED": kv.quantised,
        },
        (jax.ShapeDtypeStruct((*lse.shape, call.head_dim), jnp.float32), lse),
        (-(-call.rows // call.height), call.most_shares, kv_heads),
        call.tiles.num_warps,
        call.tiles.num_stages,
    )


def combine_launch(
    call: Call,
    cut: Shares,
    part: jax.Array,
    lse: jax.Array,
    sinks: jax.Array | None,
    out: jax.ShapeDtypeStruct,
) -> Launch:
    """Arguments of `triton_kernel.decode_attention_combine`."""
    kv_heads = lse.shape[1]
    constants = _constants(call, kv_heads) | {"AT_A_TIME": call.combined, "SINKS": sinks is not None}
    arrays = (cut.first, cut.end, part, lse, lse if sinks is None else sinks)
    return Launch(arrays, constants, (out,), (call.batch, call.group * kv_heads, call.queries), 4, 1, fused=False)


def _constants(call: Call, kv_heads: int) -> dict[str, Any]:
    """Arguments that both kernels take."""
    return {
        "QUERIES": call.queries,
        "GROUP": call.group,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": call.head_dim,
        "WIDTH": call.width,
    }
