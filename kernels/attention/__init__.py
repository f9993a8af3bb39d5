"""Scaled dot-product attention over keys and values whose positions are given, slot by slot.

Causality, sliding windows, chunks, padding and packing are all one rule about positions (`Visibility`), so prefill,
decode, left- and right-padded batches are the same call. Two operations compute it, both with these arguments and the
contract `attention_reference`: `flash_attention` for many queries, `decode_attention` for a few.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from llama_jax.kernels.attention.decode import MAX_QUERIES, decode_attention
from llama_jax.kernels.attention.flash import flash_attention
from llama_jax.kernels.attention.reference import Visibility, attention_reference, gather_pages, visible
from llama_jax.sharding import local

__all__ = [
    "Visibility",
    "attention",
    "attention_reference",
    "decode_attention",
    "flash_attention",
    "gather_pages",
    "visible",
]


def attention(
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
    in_order: bool = False,
    backend: str = "auto",
) -> jax.Array:
    """Attention of `q` over the visible ones of `k`, `v`.

    Args:
      q: [batch, q_len, q_heads, head_dim].
      k, v: [batch, kv_heads, kv_len, head_dim]; query head i uses key/value head i // (q_heads // kv_heads). With a
        page table [pages, kv_heads, page_size, head_dim].
      q_positions: int32 [batch, q_len], the position of each query in its text; negative for padding.
      kv_positions: int32 [batch, kv_len], likewise for each slot; negative for an empty or padded slot.
      visibility: which positions a query sees.
      scale: factor on the logits, usually head_dim ** -0.5.
      soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2, arXiv:2408.00118, section 2).
      sinks: float32 [q_heads], a logit per head that takes part in the softmax and adds nothing to the output
        (gpt-oss; "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453).
      q_segments, kv_segments: int32 [batch, q_len] and [batch, kv_len]; with them, only equal segments see each other.
      page_table: int32 [batch, kv_len // page_size]; slot s of row b is slot s % page_size of page
        page_table[b, s // page_size]. Entries whose slots all have negative positions are not read: any number will do.
      in_order: the caller vouches that positions are 0, 1, 2, ... in every row of queries and of slots, without padding.
        A backend that knows causal order only by index (cuDNN) needs it; positions are given all the same.
      backend: "auto" or the name of one backend.

    Returns:
      [batch, q_len, q_heads, head_dim] in q's dtype. Rows of padding queries are finite but meaningless.

    Raises:
      KernelError: the named backend does not exist, or cannot run this here.
    """
    # A few queries over a cache are never known to be in order, so decoding is not told.
    op = decode_attention if q.shape[1] <= MAX_QUERIES else partial(flash_attention, in_order=in_order)
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "q_positions": q_positions,
        "kv_positions": kv_positions,
        "sinks": sinks,
        "q_segments": q_segments,
        "kv_segments": kv_segments,
        "page_table": page_table,
    }
    # Query heads are split with the key/value heads that they use. Any row may use any page.
    of_cache = ("batch" if page_table is None else None, "kv_heads")
    axes = dict.fromkeys(arrays, ("batch",)) | {
        "q": ("batch", None, "kv_heads"),
        "k": of_cache,
        "v": of_cache,
        "sinks": ("kv_heads",),
    }

    def run(**a: Any) -> jax.Array:
        first = [a.pop(name) for name in ("q", "k", "v", "q_positions", "kv_positions")]
        return op(*first, visibility, scale=scale, soft_cap=soft_cap, backend=backend, **a)

    return local(run, arrays, axes, ("batch", None, "kv_heads"))
