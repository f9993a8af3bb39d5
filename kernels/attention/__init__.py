"""Scaled dot-product attention over keys and values whose positions are given, slot by slot.

Causality, sliding windows, chunks, padding and packing are all one rule about positions (`Visibility`), so prefill,
decode, left- and right-padded batches are the same call.
"""

from __future__ import annotations

import jax

from llama_jax.kernels.attention.reference import Visibility, attention_reference, visible
from llama_jax.kernels.dispatch import choose

BACKENDS = {"reference": attention_reference}

__all__ = ["BACKENDS", "Visibility", "attention", "attention_reference", "visible"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Attention of `q` over the visible ones of `k`, `v`.

    Args:
      q: [batch, q_len, q_heads, head_dim].
      k, v: [batch, kv_heads, kv_len, head_dim]; query head i uses key/value head i // (q_heads // kv_heads).
      q_positions: int32 [batch, q_len], the position of each query in its text; negative for padding.
      kv_positions: int32 [batch, kv_len], likewise for each slot; negative for an empty or padded slot.
      visibility: which positions a query sees.
      scale: factor on the logits, usually head_dim ** -0.5.
      q_segments, kv_segments: int32 [batch, q_len] and [batch, kv_len]; with them, only equal segments see each other.
      backend: "auto" or the name of one backend.

    Returns:
      [batch, q_len, q_heads, head_dim] in q's dtype. Rows of padding queries are finite but meaningless.

    Raises:
      KernelError: the named backend does not exist.
    """
    run = choose("attention", BACKENDS, backend)
    return run(
        q,
        k,
        v,
        q_positions,
        kv_positions,
        visibility,
        scale=scale,
        q_segments=q_segments,
        kv_segments=kv_segments,
    )
