"""Prefill: prompts into a cache, chunk by chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama_jax.cache import Cache, create_cache
from llama_jax.config import LlamaConfig
from llama_jax.decode import buckets
from llama_jax.model import forward
from llama_jax.params import Params
from llama_jax.sampling import Logprobs, token_logprobs
from llama_jax.sharding import share, ways


def pad_prompts(prompts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded token ids and positions, int32 [rows, length]; padding has position -1. Extra rows are all padding
    but for one token, so that every row has something to attend to."""
    tokens = np.zeros((rows, length), np.int32)
    positions = np.full((rows, length), -1, np.int32)
    for row in range(rows):
        ids = prompts[row] if row < len(prompts) else [0]
        tokens[row, length - len(ids) :] = ids
        positions[row, length - len(ids) :] = np.arange(len(ids))
    return tokens, positions


@partial(
    jax.jit, static_argnames=("config", "capacity", "dtype", "page_size", "prompt_logprobs"), donate_argnames=("cache",)
)
def prefill_chunk(
    params: Params,
    cache: Cache | None,
    tokens: jax.Array,
    positions: jax.Array,
    next_tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: LlamaConfig,
    capacity: int,
    dtype: DTypeLike,
    page_size: int | None,
    prompt_logprobs: int | None,
) -> tuple[jax.Array, Cache, Logprobs | None]:
    """Puts one chunk of the prompts into the cache, a new one if None; logits [batch, vocab] of its last token."""
    batch, length = tokens.shape
    if cache is None:
        # A chunk alone does not tell how long its text is.
        slots = dataclasses.replace(
            create_cache(config, batch, capacity, dtype, page_size=page_size), rope_length=lengths
        )
    else:
        slots = cache
    if prompt_logprobs is None:
        count = buckets.pieces(share("batch", batch), length, ways("mlp"))
        last = jnp.full((batch, 1), length // count - 1, jnp.int32)
        for ids, places in zip(jnp.split(tokens, count, axis=1), jnp.split(positions, count, axis=1), strict=True):
            logits, slots = forward(params, config, ids, places, slots, logits_at=last)
        return logits[:, 0], slots, None
    logits, slots = forward(params, config, tokens, positions, slots)
    flat = token_logprobs(logits.reshape(batch * length, -1), next_tokens.reshape(-1), prompt_logprobs)
    return logits[:, -1], slots, jax.tree.map(lambda x: x.reshape(batch, length, *x.shape[1:]), flat)


def prefill(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    *,
    rows: int,
    capacity: int,
    dtype: DTypeLike,
    page_size: int | None = None,
    prompt_logprobs: int | None = None,
) -> tuple[jax.Array, Cache, Logprobs | None]:
    """Runs the prompts, chunk by chunk.

    Args:
      prompts: token ids of each row; rows beyond them are dummies.
      rows: batch size of the cache, at least len(prompts).
      capacity: slots of the cache, more than the padded prompts take.
      dtype: of the cache.
      page_size: slots of a page; None for a dense cache.
      prompt_logprobs: also report each prompt token's log-probability and the n most likely tokens in its place.

    Returns:
      logits float32 [rows, vocab] of each prompt's last token, the cache, and the prompt's log-probabilities
      [rows, padded - 1] (entry i is of padded token i + 1), or None.
    """
    length = buckets.prompt_bucket(max(len(p) for p in prompts))
    tokens, positions = pad_prompts(prompts, rows, length)
    chunk = buckets.chunk_length(config, rows, length, capacity)
    if prompt_logprobs is not None and length % 256 == 0:
        # The logits of a whole chunk exist at once here.
        chunk = min(chunk, 256)
    next_tokens = np.roll(tokens, -1, axis=1)
    lengths = positions.max(axis=1) + 1
    pieces = []
    logits = cache = None
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        logits, cache, piece = prefill_chunk(
            params,
            cache,
            tokens[:, part],
            positions[:, part],
            next_tokens[:, part],
            lengths,
            config=config,
            capacity=capacity,
            dtype=jnp.dtype(dtype),
            page_size=page_size,
            prompt_logprobs=prompt_logprobs,
        )
        pieces.append(piece)
    assert logits is not None and cache is not None
    if prompt_logprobs is None:
        return logits, cache, None
    return logits, cache, jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1)[:, :-1], *pieces)


@jax.jit
def take_rows(logits: jax.Array, cache: Cache, index: jax.Array) -> tuple[jax.Array, Cache]:
    """Rows `index` int32 [n] of logits and cache: a prompt is prefilled once for all its continuations."""
    return logits[index], cache.rows(index)
