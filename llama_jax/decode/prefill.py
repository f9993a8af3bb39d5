"""Prefill: prompts into a cache, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.cache import KVCache, NewCache
from llama_jax.config import LlamaConfig
from llama_jax.decode import buckets, chunks
from llama_jax.model import Patch, forward
from llama_jax.model.weights import compute_dtype
from llama_jax.params import Params
from llama_jax.sharding import share, ways
from llama_jax.targets import current


def pad_prompts(prompts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded token ids and positions, int32 [rows, length]; padding has position -1. Rows past the prompts are all
    padding."""
    tokens = np.zeros((rows, length), np.int32)
    positions = np.full((rows, length), -1, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, length - len(ids) :] = ids
        positions[row, length - len(ids) :] = np.arange(len(ids))
    return tokens, positions


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def prefill_chunk(
    params: Params,
    cache: KVCache | NewCache,
    tokens: jax.Array,
    positions: jax.Array,
    lengths: jax.Array,
    patch: Patch | None = None,
    *,
    config: LlamaConfig,
) -> tuple[jax.Array, KVCache]:
    """Puts one chunk of the prompts int32 [batch, length] into the cache, or into a new one.

    Args:
      lengths: int32 [batch], of the whole prompts, which a chunk alone does not tell.
      patch: see `forward`.

    Returns:
      float32 logits [batch, vocab] of the chunk's last token, and the cache.
    """
    batch, length = tokens.shape
    filled = cache.create(config) if isinstance(cache, NewCache) else cache
    count = buckets.pieces(share("batch", batch), length, ways("mlp"))
    last = jnp.full((batch, 1), length // count - 1, jnp.int32)
    run = partial(forward, params, config, rope_lengths=lengths, patch=patch, logits_at=last)
    for ids, at in zip(jnp.split(tokens, count, axis=1), jnp.split(positions, count, axis=1), strict=True):
        logits, filled = run(ids, at, filled)
    return logits[:, -1], filled


def prefill(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    cache: NewCache,
    *,
    patch: Patch | None = None,
) -> tuple[jax.Array, KVCache]:
    """Runs the prompts, chunk by chunk.

    Args:
      prompts: token ids of each row.
      cache: to make, with at least as many rows as there are prompts.
      patch: functions that change activations (`model.activations.patch`).

    Returns:
      logits float32 [cache.rows, vocab] of each prompt's last token, and the cache.
    """
    length = buckets.prompt_bucket(max(len(p) for p in prompts))
    tokens, positions = pad_prompts(prompts, cache.rows, length)
    chunk = chunks.chunk_length(
        config,
        current(),
        compute_dtype(params),
        batch=cache.rows,
        prompt=length,
        capacity=cache.capacity,
        cache_dtype=cache.dtype,
    )
    lengths = positions.max(axis=1) + 1
    filled: KVCache | NewCache = cache
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        logits, filled = prefill_chunk(
            params, filled, tokens[:, part], positions[:, part], lengths, patch, config=config
        )
    assert not isinstance(filled, NewCache)
    return logits, filled
