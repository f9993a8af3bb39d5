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
from llama_jax.sampling import MAX_LOGPROBS, Logprobs, token_logprobs
from llama_jax.sharding import share, ways
from llama_jax.targets import current

NO_ROW = np.iinfo(np.int32).max
"""An index past the last row of every cache: padding among row indices."""


def pad_prompts(prompts: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded token ids and positions, int32 [rows, length]; padding has position -1. Rows past the prompts are all
    padding."""
    tokens = np.zeros((rows, length), np.int32)
    positions = np.full((rows, length), -1, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, length - len(ids) :] = ids
        positions[row, length - len(ids) :] = np.arange(len(ids))
    return tokens, positions


@partial(jax.jit, static_argnames=("config", "new", "prompt_logprobs"), donate_argnames=("cache",))
def prefill_chunk(
    params: Params,
    cache: KVCache | None,
    rows: jax.Array | None,
    tokens: jax.Array,
    positions: jax.Array,
    next_tokens: jax.Array,
    lengths: jax.Array,
    adapters: Params | None = None,
    adapter_ids: jax.Array | None = None,
    patch: Patch | None = None,
    *,
    config: LlamaConfig,
    new: NewCache | None = None,
    prompt_logprobs: bool,
) -> tuple[jax.Array, KVCache, Logprobs | None]:
    """Puts one chunk of the prompts int32 [n, length] into rows int32 [n] of the cache (None: all of them, in order).

    Args:
      new: the cache to make if there is none.
      lengths: int32 [n], of the whole prompts, which a chunk alone does not tell.
      adapters, adapter_ids, patch: see `forward`; int32 [n, 1].

    Returns:
      float32 logits [n, vocab] of the chunk's last token, the cache, and the prompt's log-probabilities if asked for.
    """
    batch, length = tokens.shape
    if cache is None:
        assert new is not None
        cache = new.create(config)
    part = cache if rows is None else cache.select(rows)
    options = {"rope_lengths": lengths, "adapters": adapters, "adapter_ids": adapter_ids, "patch": patch}
    run = partial(forward, params, config, **options)
    logprobs = None
    if prompt_logprobs:
        logits, part = run(tokens, positions, part)
        flat = token_logprobs(logits.reshape(batch * length, -1), next_tokens.reshape(-1), MAX_LOGPROBS)
        logprobs = jax.tree.map(lambda x: x.reshape(batch, length, *x.shape[1:]), flat)
    else:
        count = buckets.pieces(share("batch", batch), length, ways("mlp"))
        last = jnp.full((batch, 1), length // count - 1, jnp.int32)
        for ids, at in zip(jnp.split(tokens, count, axis=1), jnp.split(positions, count, axis=1), strict=True):
            logits, part = run(ids, at, part, logits_at=last)
    return logits[:, -1], part if rows is None else cache.put(rows, part), logprobs


def prefill(
    params: Params,
    config: LlamaConfig,
    prompts: Sequence[Sequence[int]],
    cache: KVCache | NewCache,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    padded_rows: int,
    adapters: Params | None = None,
    adapter_ids: Sequence[int] | None = None,
    patch: Patch | None = None,
    prompt_logprobs: bool = False,
) -> tuple[jax.Array, KVCache, Logprobs | None]:
    """Runs the prompts, chunk by chunk.

    Args:
      prompts: token ids of each row.
      cache: an existing one, which is donated, or one to make. The rows to fill must be empty.
      rows: the cache rows for the prompts; None: the first ones of a cache with `padded_rows` rows.
      padded_rows: rows of the program, at least len(prompts).
      adapters: slots of adapters (`model.adapters`); adapter_ids: the slot of each prompt, all 0 by default.
      patch: functions that change activations (`model.activations.patch`).
      prompt_logprobs: also report each prompt token's log-probability and the most likely tokens in its place.

    Returns:
      logits float32 [padded_rows, vocab] of each prompt's last token, the cache, and the prompt's log-probabilities
      [padded_rows, padded length - 1] (entry i is of padded token i + 1), or None.
    """
    length = buckets.prompt_bucket(max(len(p) for p in prompts))
    tokens, positions = pad_prompts(prompts, padded_rows, length)
    chunk = chunks.chunk_length(
        config,
        current(),
        compute_dtype(params),
        batch=padded_rows,
        prompt=length,
        capacity=cache.capacity,
        cache_dtype=cache.dtype,
    )
    if prompt_logprobs and length % 256 == 0:
        # Here the logits of a whole chunk exist at once.
        chunk = min(chunk, 256)
    next_tokens = np.roll(tokens, -1, axis=1)
    lengths = positions.max(axis=1) + 1
    into = None if rows is None else np.full((padded_rows,), NO_ROW, np.int32)
    if into is not None and rows is not None:
        into[: len(rows)] = rows
    ids = None
    if adapters is not None:
        ids = np.zeros((padded_rows, 1), np.int32)
        ids[: len(prompts), 0] = adapter_ids or 0
    found = []
    logits = None
    slots, new = (None, cache) if isinstance(cache, NewCache) else (cache, None)
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        logits, slots, logprobs = prefill_chunk(
            params,
            slots,
            into,
            tokens[:, part],
            positions[:, part],
            next_tokens[:, part],
            lengths,
            adapters,
            ids,
            patch,
            config=config,
            new=new,
            prompt_logprobs=prompt_logprobs,
        )
        new = None
        found.append(logprobs)
    assert logits is not None and slots is not None
    if not prompt_logprobs:
        return logits, slots, None
    return logits, slots, jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1)[:, :-1], *found)
