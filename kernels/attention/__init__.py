"""Scaled dot-product attention over keys and values whose positions are given, slot by slot.

Causality, sliding windows, chunks, padding and packing are all one rule about positions (`Visibility`), so prefill,
decode, left- and right-padded batches are the same call. Two operations compute it, both with these arguments and the
contract `attention_reference`: `flash_attention` for many queries, `decode_attention` for a few. Queries of several
rows that are packed in one axis are dealt out to both (`packed_attention`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from llama_jax.errors import KernelError
from llama_jax.kernels.attention.decode import MAX_QUERIES, decode_attention
from llama_jax.kernels.attention.flash import flash_attention
from llama_jax.kernels.attention.packed import packed_attention
from llama_jax.kernels.attention.records import (
    KeysValues,
    Places,
    Rule,
    Visibility,
    batch_invariant,
    is_batch_invariant,
)
from llama_jax.kernels.attention.reference import attention_reference, gather_pages, visible
from llama_jax.sharding import local

__all__ = [
    "KeysValues",
    "Places",
    "Rule",
    "Visibility",
    "attention",
    "attention_reference",
    "batch_invariant",
    "decode_attention",
    "flash_attention",
    "gather_pages",
    "is_batch_invariant",
    "visible",
]


def attention(
    q: jax.Array,
    kv: KeysValues,
    places: Places,
    rule: Rule,
    *,
    sinks: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Attention of `q` over the visible slots of `kv`.

    Args:
      q: [batch, q_len, q_heads, head_dim].
      sinks: float32 [q_heads], a logit per head that takes part in the softmax and adds nothing to the output
        (gpt-oss; "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453).
      backend: "auto" or the name of one backend.

    Returns:
      [batch, q_len, q_heads, head_dim] in q's dtype. Rows of padding queries are finite but meaningless.

    Raises:
      KernelError: the named backend does not exist, or cannot run this here; segments or spans are given of queries
        alone or of slots alone.
    """
    for name in ("segments", "spans"):
        q_given, kv_given = (getattr(places, f"{side}_{name}") is not None for side in ("q", "kv"))
        if q_given != kv_given:
            there, missing = ("q", "kv") if q_given else ("kv", "q")
            raise KernelError(f"attention has {there}_{name} without {missing}_{name}", hint="give both or neither")
    op: Callable[..., jax.Array] = decode_attention if q.shape[1] <= MAX_QUERIES else flash_attention
    if places.rows is not None:
        op = packed_attention
    # Query heads are split with the key/value heads that they use. Any row may use any page.
    heads, row = ("batch", None, "kv_heads"), ("batch",)
    of_cache = ("batch" if kv.page_table is None else None, "kv_heads")
    axes = {"q": heads, "kv": KeysValues(of_cache, of_cache, row, of_cache, of_cache), "places": row}

    def run(q: jax.Array, kv: KeysValues, places: Places, sinks: jax.Array | None) -> jax.Array:
        return op(q, kv, places, rule, sinks=sinks, backend=backend)

    arrays = {"q": q, "kv": kv, "places": places, "sinks": sinks}
    return local(run, arrays, axes | {"sinks": ("kv_heads",)}, heads)
