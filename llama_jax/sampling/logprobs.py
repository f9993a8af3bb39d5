"""Log-probabilities of raw logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from llama_jax.sharding import MeshAxes, local, reductions, split_over


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of one token per row [batch], and the most likely ids with theirs [batch, n]."""

    token: jax.Array
    top_ids: jax.Array
    top: jax.Array


def token_logprobs(logits: jax.Array, tokens: jax.Array, n: int) -> Logprobs:
    """Log-probabilities of `tokens` [batch] under raw `logits` float32 [batch, vocab], and of the n most likely."""
    vocab = logits.shape[1]
    compute = partial(_token_logprobs, n=min(max(n, 1), vocab), axis=split_over("vocab", vocab))
    axes = {"logits": ("batch", "vocab"), "tokens": ("batch",)}
    return local(compute, {"logits": logits, "tokens": tokens}, axes, ("batch",))


def _token_logprobs(logits: jax.Array, tokens: jax.Array, *, n: int, axis: MeshAxes | None) -> Logprobs:
    # Only for the few requested ids, instead of a second array as wide as the vocabulary.
    best = reductions.largest(logits, axis)
    log_sum = jnp.log(reductions.total(jnp.exp(logits - best[:, None]), axis))
    top, top_ids = reductions.top_k(logits, n, axis)
    token = reductions.take(logits, tokens, axis)
    return Logprobs(token - best - log_sum, top_ids, top - best[:, None] - log_sum[:, None])
