"""Attention in two steps, with its weights in between: for those who want to see or change them.

As `kernels.attention.attention_reference` computes it, for keys and values without a cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.kernels.attention import Places, Rule, visible
from llama_jax.kernels.attention.reference import MASKED
from llama_jax.kernels.precision import matmul_precision


def attention_probs(q: jax.Array, k: jax.Array, places: Places, rule: Rule) -> jax.Array:
    """Each query's weights of the tokens: float32 [batch, num_heads, len of queries, len of keys], in float32.

    Rows of padding, which sees nothing, are 0.

    Args:
      q: [batch, len, num_heads, head_dim]; k: [batch, num_kv_heads, len, head_dim].
    """
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, k.shape[1], -1, width)
    logits = jnp.einsum(
        "bqhgd,bhkd->bhgqk", grouped, k, precision=matmul_precision(q.dtype), preferred_element_type=jnp.float32
    )
    see = visible(places, rule.visibility)[:, None]
    logits = logits.reshape(batch, heads, length, -1) * rule.scale
    return jnp.where(see, jax.nn.softmax(jnp.where(see, logits, MASKED), axis=-1), 0.0)


def weighted_values(probs: jax.Array, v: jax.Array) -> jax.Array:
    """Sums of the values with these weights: [batch, len, num_heads, head_dim] in v's dtype.

    Args:
      probs: [batch, num_heads, len of queries, len of keys]; v: [batch, num_kv_heads, len of keys, head_dim].
    """
    batch, heads, length, _ = probs.shape
    grouped = probs.astype(v.dtype).reshape(batch, v.shape[1], -1, *probs.shape[2:])
    out = jnp.einsum("bhgqk,bhkd->bqhgd", grouped, v, precision=matmul_precision(v.dtype))
    return out.reshape(batch, length, heads, -1).astype(v.dtype)
