"""Rotary embedding of queries and keys, and the write of keys and values into a cache, in one operation."""

from __future__ import annotations

import jax

from llama_jax.kernels.dispatch import Backend, Operation
from llama_jax.kernels.rope.cases import rope_candidates, rope_cases, rope_models, rope_shape
from llama_jax.kernels.rope.reference import Stored, rope_and_store_reference, rotate, split_heads
from llama_jax.sharding import local

__all__ = ["rope_and_store", "rope_and_store_op", "rope_and_store_reference", "rotate", "split_heads"]

rope_and_store_op = Operation(
    "rope_and_store",
    {
        "reference": Backend(rope_and_store_reference),
        "pallas_triton": Backend.at(f"{__name__}.pallas_triton", candidates=rope_candidates),
        "pallas_interpret": Backend.at(f"{__name__}.pallas_triton", interpreted=True, interpret=True),
    },
    shape=rope_shape,
    cases=rope_cases,
    models=rope_models,
)


def rope_and_store(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot: jax.Array,
    page: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    interleaved: bool,
    backend: str = "auto",
) -> Stored:
    """Rotates queries and keys (RoFormer, arXiv:2104.09864) and stores keys and values.

    The rotation is computed in float32 and rounded to qkv's dtype, then to the cache's. On a mesh every device works on
    its own rows and heads.

    Args:
      qkv: [batch, len, kv_heads, group + 2, head_dim], of each key/value head its queries, its key, its value.
      cos, sin: float32 [batch, len, head_dim / 2], of each token.
      k, v: [batch, kv_heads, slots, head_dim], or with pages [pages, kv_heads, page_size, head_dim]. They are
        overwritten in place where nothing else needs them.
      slot: int32 [batch, len], in the page; without pages [], the slot of every row's first token.
      page: int32 [batch, len], of each token; a token whose page does not exist (>= pages) is not stored, and no two
        tokens have one place. None: token t of row b goes to slot `slot` + t of entry b.
      k_scale, v_scale: of a quantised cache, whose k and v are codes (`kernels.attention.records`); in shape as k and v
        without the last dimension. Queries and keys are then rotated once more (`coding`).
      interleaved: whether neighbours are rotated together, or numbers half a head apart.
      backend: "auto" or the name of one backend.

    Returns:
      The queries [batch, len, kv_heads * group, head_dim] in qkv's dtype, and k, v, k_scale and v_scale with the new
      tokens.

    Raises:
      KernelError: the named backend does not exist, or cannot run this here.
    """

    def run(**arrays: jax.Array) -> Stored:
        out: Stored = rope_and_store_op(**arrays, interleaved=interleaved, backend=backend)
        return out

    token, heads, cache = ("batch",), ("batch", None, "kv_heads"), ("batch", "kv_heads")
    arrays = {"qkv": qkv, "cos": cos, "sin": sin, "k": k, "v": v, "slot": slot, "page": page}
    arrays |= {"k_scale": k_scale, "v_scale": v_scale}
    axes = {"qkv": heads, "cos": token, "sin": token, "k": cache, "v": cache, "page": token}
    axes |= {"slot": token if slot.ndim else (), "k_scale": cache, "v_scale": cache}
    out: Stored = local(run, arrays, axes, (heads, cache, cache, cache, cache))
    return out
