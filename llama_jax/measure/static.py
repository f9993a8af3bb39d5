"""A static batch through the functional loop (`llama_jax.decode`): rows of equal prompts that begin and end together."""

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
"""Decode steps of one dispatch."""


def time_static(model: Model, prompts: Sequence[list[int]], new: int, page_size: int | None) -> tuple[float, float]:
    """Greedy tokens after prompts of equal lengths, whatever ends a text.

    Args:
      new: tokens of each row, at least 1.
      page_size: slots of a page; None for a dense cache.

    Returns:
      Seconds to the first tokens, and from there to the last ones. Programs that are missing are compiled in neither.
    """
    rows, length = len(prompts), len(prompts[0])
    padded = buckets.prompt_bucket(length)
    capacity, *larger = buckets.capacities(padded, new)

    def here[**P, R](function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        with on(model.mesh), using(**model.kernels):
            return function(*args, **kwargs)

    batch = here(buckets.batch_bucket, rows)

    def each(value: int, idle: int) -> np.ndarray:
        return np.asarray([value] * rows + [idle] * (batch - rows), np.int32)

    params = SamplingParams(temperature=0.0, ignore_eos=True)
    profile, sampler = make_sampler([params] * batch, [()] * batch, model.config.vocab_size)
    start = time.perf_counter()
    cache = NewCache(batch, capacity, model.dtype, page_size)
    logits, made, _ = here(prefill, model.params, model.config, prompts, cache, padded_rows=batch)
    state, progress = here(
        loop.begin, logits, made, sampler, each(length, 1), each(new, 0), each(0, 0), profile=profile
    )
    jax.device_get(progress)
    first = time.perf_counter() - start

    def advance(state: loop.DecodeState, steps: int) -> tuple[loop.DecodeState, loop.Progress]:
        options = {"config": model.config, "profile": profile, "stride": STRIDE}
        return here(loop.advance, model.params, state, np.int32(steps), **options)

    state, progress = advance(state, 0)  # only compiles
    jax.block_until_ready(progress)
    start, done = time.perf_counter(), 1
    while done < new:
        if done == capacity - padded:
            capacity = larger.pop(0)
            state = here(loop.grow, state, capacity=capacity)
        steps = min(STRIDE, new - done, capacity - padded - done)
        state, progress = advance(state, steps)
        jax.device_get(progress)
        done += steps
    return first, time.perf_counter() - start
