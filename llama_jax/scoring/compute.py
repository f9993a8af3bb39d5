"""Log-probabilities of continuations on the device. Continuations of one context are computed from one copy of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.cache import DenseCache
from llama_jax.checkpoint import Progress
from llama_jax.config import LlamaConfig
from llama_jax.decode.buckets import batch_bucket, bucket
from llama_jax.decode.prefill import pad_prompts
from llama_jax.kernels.dispatch import using
from llama_jax.model import forward, unembed
from llama_jax.model.loaded import Model
from llama_jax.params import Params
from llama_jax.scoring.pairs import Pair
from llama_jax.sharding import on

GPU_TOKENS, CPU_TOKENS = 16384, 2048
"""Tokens of a batch, padding included: a device's arithmetic is busy with these, and their cache is small."""
COPIES = 4
"""Tokens that a batch keeps in copies of its contexts, at most, for each that it computes."""
LOGITS = 2**25
"""Logits that exist at once, at most: 128 MiB."""


@dataclass
class Batch:
    """Continuations that are computed together.

    Attributes:
      length, scored: what contexts and continuations are padded to.
      contexts: of which each is computed once.
      members: numbers of pairs; owners: the context of each.
    """

    length: int
    scored: int = 1
    contexts: list[tuple[int, ...]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)


def score_pairs(
    model: Model, pairs: Sequence[Pair], batch_tokens: int | None = None, progress: Progress | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores pairs that fit the model's context.

    Args:
      batch_tokens: tokens of a batch, padding included; one row may have more.
      progress: called after each batch with pairs done, pairs in all and "pairs".

    Returns:
      For each pair, in order, of each token of its continuation: float32 log-probabilities, and bool, whether it is the
      likeliest token.
    """
    budget = batch_tokens or (CPU_TOKENS if model.device.platform == "cpu" else GPU_TOKENS)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    under_way: deque[tuple[Batch, Any]] = deque()

    def collect() -> None:
        batch, out = under_way.popleft()
        logprobs, greedy = jax.device_get(out)
        for row, number in enumerate(batch.members):
            n = len(pairs[number].continuation)
            found[number] = logprobs[row, :n], greedy[row, :n]
        if progress is not None:
            progress(len(found), len(pairs), "pairs")

    with on(model.mesh), using(**model.kernels):
        for batch in batches(pairs, budget, stretches=model.config.rope.kind == "dynamic"):
            under_way.append((batch, _dispatch(model, pairs, batch)))
            if len(under_way) > 1:  # the device has the next batch when this one ends
                collect()
        while under_way:
            collect()
    return [found[number] for number in range(len(pairs))]


def batches(pairs: Sequence[Pair], budget: int, *, stretches: bool = False) -> Iterator[Batch]:
    """Deals pairs out to batches, the longest first: one that does not fit into memory shows at once.

    Args:
      stretches: whether the length of a whole text changes what is computed of its beginning ("dynamic" rope), so that
        only texts of one length can have a context in common.
    """
    groups: dict[Any, list[int]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault((pair.context, pair.length if stretches else None), []).append(number)

    def sizes(numbers: list[int]) -> tuple[int, int]:
        longest = max(len(pairs[i].continuation) for i in numbers)
        return bucket(len(pairs[numbers[0]].context), 32, 1), 1 if longest == 1 else bucket(longest, 8, 1)

    def fits(length: int, scored: int, contexts: int, members: int) -> bool:
        contexts, members = batch_bucket(contexts), batch_bucket(members)
        computed, cached = contexts * length + members * scored, members * (length + scored)
        return computed <= budget and cached <= COPIES * budget

    batch = None
    for numbers in sorted(groups.values(), key=sizes, reverse=True):
        length, scored = sizes(numbers)
        owner = None
        for number in numbers:
            # Shorter ones fill a batch up: another shape is another program.
            wider = max(scored, batch.scored if batch else 0)
            if batch is not None:
                contexts = len(batch.contexts) + (owner is None)
                if not fits(batch.length, wider, contexts, len(batch.members) + 1):
                    yield batch
                    batch, owner, wider = None, None, scored
            batch = batch or Batch(length)
            batch.scored = wider
            if owner is None:
                owner = len(batch.contexts)
                batch.contexts.append(pairs[number].context)
            batch.members.append(number)
            batch.owners.append(owner)
    if batch is not None:
        yield batch


def _dispatch(model: Model, pairs: Sequence[Pair], batch: Batch) -> Any:
    """Starts a batch on the device; its result is that of `_scored`."""
    rows = batch_bucket(len(batch.members))
    contexts, positions = pad_prompts(batch.contexts, batch_bucket(len(batch.contexts)), batch.length)
    targets = np.zeros((rows, batch.scored), np.int32)
    owners, lengths = np.zeros((rows,), np.int32), np.ones((rows,), np.int32)
    following = np.full((rows, batch.scored), -1, np.int32)
    owners[: len(batch.owners)] = batch.owners
    for row, number in enumerate(batch.members):
        pair = pairs[number]
        n = len(pair.continuation)
        targets[row, :n] = pair.continuation
        following[row, : n - 1] = len(pair.context) + np.arange(n - 1)
        lengths[row] = pair.length
    return _scored(
        model.params,
        contexts,
        positions,
        owners,
        targets,
        following,
        lengths,
        config=model.config,
        cache_dtype=model.cache_dtype,
    )


@partial(jax.jit, static_argnames=("config", "cache_dtype"))
def _scored(
    params: Params,
    contexts: jax.Array,
    positions: jax.Array,
    owners: jax.Array,
    targets: jax.Array,
    following: jax.Array,
    lengths: jax.Array,
    *,
    config: LlamaConfig,
    cache_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Scores continuations int32 [rows, scored] behind left-padded contexts int32 [contexts, length].

    Args:
      positions: of the contexts' tokens; following: of the continuations', -1 for the last one and for padding.
      owners: int32 [rows], the context of each continuation.
      lengths: int32 [rows], tokens that the model reads in all.

    Returns:
      float32 and bool [rows, scored]: log-probabilities, and whether each token is the likeliest.
    """
    count, length = contexts.shape
    rows, scored = targets.shape

    def run(
        tokens: jax.Array, at: jax.Array, cache: DenseCache, lengths: jax.Array, only: jax.Array | None = None
    ) -> tuple[jax.Array, DenseCache]:
        """Hidden states that logits are made of, and the cache."""
        _, cache, seen = forward(
            params, config, tokens, at, cache, rope_lengths=lengths, logits_at=only, capture=("final_norm",)
        )
        return seen["final_norm"], cache

    cache = DenseCache.create(config, count, length + (scored if scored > 1 else 0), cache_dtype)
    last = jnp.full((count, 1), length - 1, jnp.int32)
    text = jnp.ones((count,), jnp.int32).at[owners].max(lengths)  # the same for all continuations where it matters
    hidden, cache = run(contexts, positions, cache, text, last)
    hidden = hidden[owners]
    if scored > 1:
        behind, _ = run(targets, following, cache.select(owners), lengths)
        hidden = jnp.concatenate([hidden, behind[:, :-1]], axis=1)

    def compared(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, tokens = part
        logits = unembed(params, config, hidden)
        own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return own - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == tokens

    # Both are powers of two, or one.
    width = min(scored, 1 << max(LOGITS // (config.vocab_size * rows), 1).bit_length() - 1)
    parts = [jnp.moveaxis(x.reshape(rows, scored // width, width, *x.shape[2:]), 1, 0) for x in (hidden, targets)]
    logprobs, greedy = (jnp.moveaxis(x, 0, 1).reshape(rows, scored) for x in jax.lax.map(compared, tuple(parts)))
    return logprobs, greedy
