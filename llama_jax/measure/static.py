"""Static batches: rows that start together and wait for the longest of them, in the functional loop
(`llama_jax.decode`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from llama_jax.cache import NewCache
from llama_jax.decode import buckets, loop
from llama_jax.decode.prefill import prefill
from llama_jax.kernels.dispatch import using
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams, make_sampler
from llama_jax.sharding import on

STRIDE = 64
"""Decode steps per dispatch."""


def time_static(
    model: Model, prompts: Sequence[Sequence[int]], new: Sequence[int], page_size: int | None = None
) -> tuple[float, float]:
    """Draws the most likely tokens after prompts, ignoring end-of-text.

    Args:
      new: tokens of each row, at least 1.
      page_size: tokens per page; None for a dense cache.

    Returns:
      Seconds to the first tokens, and from there to the last ones. Compilation of a missing decode step counts in
      neither.
    """
    padded, longest = buckets.prompt_bucket(max(map(len, prompts))), max(new)
    capacity, *larger = buckets.capacities(padded, longest)
    config = model.config

    def here[**P, R](function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        with on(model.mesh), using(**model.kernels):
            return function(*args, **kwargs)

    batch = here(buckets.batch_bucket, len(prompts))

    def each(values: Sequence[int], idle: int) -> np.ndarray:
        return np.asarray([*values, *[idle] * (batch - len(prompts))], np.int32)

    params = SamplingParams(temperature=0.0, ignore_eos=True)
    profile, sampler = make_sampler([params] * batch, [()] * batch, config.vocab_size)
    start = time.perf_counter()
    cache = NewCache(batch, capacity, model.cache_dtype, page_size)
    logits, made = here(prefill, model.params, config, prompts, cache)
    lengths = each([len(prompt) for prompt in prompts], 1)
    state, progress = here(
        loop.begin, logits, made, sampler, lengths, each(new, 0), each([0] * len(prompts), 0), profile=profile
    )
    jax.device_get(progress)
    first = time.perf_counter() - start

    def advance(state: loop.DecodeState, steps: int) -> tuple[loop.DecodeState, loop.Progress]:
        return here(loop.advance, model.params, state, np.int32(steps), config=config, profile=profile, stride=STRIDE)

    state, progress = advance(state, 0)  # only compiles
    jax.block_until_ready(progress)
    start, done = time.perf_counter(), 1
    while done < longest:
        if done == capacity - padded:
            capacity = larger.pop(0)
            state = here(loop.grow, state, capacity=capacity)
        steps = min(STRIDE, longest - done, capacity - padded - done)
        state, progress = advance(state, steps)
        jax.device_get(progress)
        done += steps
    return first, time.perf_counter() - start
