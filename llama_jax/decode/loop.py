"""The decode step on the device, and the loop that runs it: token ids in, token ids out.

Every row counts its own tokens: it may start and end at any step, and draws the same tokens as it would alone. `_step`
is the only implementation of a step. `advance` runs it in a `lax.while_loop`: many times for a batch, once for streams.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.cache import KVCache
from llama_jax.config import LlamaConfig
from llama_jax.decode.graphs import graph_options
from llama_jax.decode.weights_read import weight_options
from llama_jax.model import Patch, forward
from llama_jax.params import Params
from llama_jax.sampling import MAX_LOGPROBS, Logprobs, SamplerProfile, SamplerState, sample, sampler_axes
from llama_jax.sampling import failed as no_token
from llama_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that changes from step to step; arrays [batch], one entry per row.

    Attributes:
      tokens: int32, the last token, not yet in the cache; positions: int32, its position.
      done: bool, whether the row has ended, or never begun: it stores and draws nothing.
      finished_by_stop: bool, whether a stop id ended it.
      failed: bool, whether it ended because there was no next token (`sampling.failed`).
      limit: int32, the most tokens to draw; the sampler's `count` has the tokens drawn so far.
      rope_lengths: int32, see `forward`.
      adapter_ids: int32, the adapter's slot, 0 for none.
    """

    tokens: jax.Array
    positions: jax.Array
    done: jax.Array
    finished_by_stop: jax.Array
    failed: jax.Array
    limit: jax.Array
    rope_lengths: jax.Array
    adapter_ids: jax.Array
    cache: KVCache
    sampler: SamplerState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """The new tokens of a dispatch, for the host: copies, so that the state can be donated to the next dispatch.

    Attributes:
      tokens: int32 [batch, stride]; those of row i are tokens[i, :new[i]].
      logprobs: of them, arrays [batch, stride] and [batch, stride, n], or None.
      new: int32 [batch].
      done, finished_by_stop, failed: bool [batch], after the dispatch.
    """

    tokens: jax.Array
    logprobs: Logprobs | None
    new: jax.Array
    done: jax.Array
    finished_by_stop: jax.Array
    failed: jax.Array


def idle_state(cache: KVCache, sampler: SamplerState) -> DecodeState:
    """The state of a batch in which no row has begun."""
    batch = sampler.count.shape[0]

    def numbers() -> jax.Array:
        # Separate buffers: donated arrays must not alias one another.
        return jnp.zeros((batch,), jnp.int32)

    return DecodeState(
        tokens=numbers(),
        positions=numbers() - 1,
        done=jnp.ones((batch,), bool),
        finished_by_stop=jnp.zeros((batch,), bool),
        failed=jnp.zeros((batch,), bool),
        limit=numbers(),
        rope_lengths=numbers(),
        adapter_ids=numbers(),
        cache=cache,
        sampler=sampler,
    )


@partial(jax.jit, static_argnames=("profile",), donate_argnames=("cache",))
def begin(
    logits: jax.Array,
    cache: KVCache,
    sampler: SamplerState,
    prompt_lengths: jax.Array,
    limit: jax.Array,
    adapter_ids: jax.Array,
    *,
    profile: SamplerProfile,
) -> tuple[DecodeState, Progress]:
    """The state of a batch after every row's first token was drawn.

    Args:
      logits: float32 [batch, vocab] of the prompts' last tokens.
      cache: holds the prompts.
      prompt_lengths, limit, adapter_ids: int32 [batch]; rows with limit 0 stay idle.
    """
    state = dataclasses.replace(
        idle_state(cache, sampler),
        positions=prompt_lengths - 1,
        done=limit <= 0,
        limit=limit,
        rope_lengths=prompt_lengths,
        adapter_ids=adapter_ids,
    )
    state, progress = emit(logits, state, no_progress(state, 1, profile, logits.shape[1]), 0, profile)
    return by_rows(state), progress


def no_progress(state: DecodeState, stride: int, profile: SamplerProfile, vocab_size: int) -> Progress:
    batch = len(state.done)
    logprobs = None
    if profile.logprobs:
        shape = (batch, stride, min(MAX_LOGPROBS, vocab_size))
        logprobs = Logprobs(jnp.zeros((batch, stride)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    return Progress(
        tokens=jnp.zeros((batch, stride), jnp.int32),
        logprobs=logprobs,
        new=jnp.zeros((batch,), jnp.int32),
        done=state.done,
        finished_by_stop=state.finished_by_stop,
        failed=state.failed,
    )


def emit(
    logits: jax.Array,
    state: DecodeState,
    progress: Progress,
    column: jax.Array | int,
    profile: SamplerProfile,
    *,
    where: jax.Array | None = None,
) -> tuple[DecodeState, Progress]:
    """Draws and records the next token of every unfinished row, and ends the row if the token does.

    With the sampler's full profile, logits that are not numbers, or a mask that allows no token, end the row without a
    token.

    Args:
      where: bool [batch], the rows that draw; all by default.
    """
    failed = jnp.zeros_like(state.done)
    if state.sampler.restricted is not None:  # only with the full profile; the others save a pass over the logits
        failed = no_token(logits, state.sampler) & ~state.done
    going = ~state.done & ~failed
    if where is not None:
        failed, going = failed & where, going & where
    tokens, sampler, drawn = sample(logits, state.sampler, profile, drawing=going)
    hit_stop = jnp.any(tokens[:, None] == sampler.stop_ids, axis=1) & (sampler.count >= sampler.min_tokens)

    def record(buffer: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(buffer, new, column, axis=1)

    state = dataclasses.replace(
        state,
        tokens=jnp.where(going, tokens, state.tokens),
        positions=state.positions + going,
        done=state.done | failed | (going & (hit_stop | (sampler.count >= state.limit))),
        finished_by_stop=state.finished_by_stop | (going & hit_stop),
        failed=state.failed | failed,
        sampler=sampler,
    )
    progress = Progress(
        tokens=record(progress.tokens, tokens),
        logprobs=None if progress.logprobs is None else jax.tree.map(record, progress.logprobs, drawn),
        new=progress.new + going,
        done=state.done,
        finished_by_stop=state.finished_by_stop,
        failed=state.failed,
    )
    return state, progress


def decode_step(
    params: Params,
    state: DecodeState,
    *,
    config: LlamaConfig,
    profile: SamplerProfile,
    adapters: Params | None = None,
) -> tuple[DecodeState, Progress]:
    """Runs the last token of every unfinished row through the model and draws the next."""
    progress = no_progress(state, 1, profile, config.vocab_size)
    return _step(params, state, progress, 0, adapters, None, config=config, profile=profile)


def _step(
    params: Params,
    state: DecodeState,
    progress: Progress,
    column: jax.Array | int,
    adapters: Params | None,
    patch: Patch | None,
    *,
    config: LlamaConfig,
    profile: SamplerProfile,
) -> tuple[DecodeState, Progress]:
    # Rows that have ended store nothing.
    positions = jnp.where(state.done, -1, state.positions)
    logits, cache = forward(
        params,
        config,
        state.tokens[:, None],
        positions[:, None],
        state.cache,
        rope_lengths=state.rope_lengths,
        adapters=adapters,
        adapter_ids=None if adapters is None else state.adapter_ids[:, None],
        patch=patch,
    )
    return emit(logits[:, 0], dataclasses.replace(state, cache=cache), progress, column, profile)


def advance(
    params: Params,
    state: DecodeState,
    steps: jax.Array | np.ndarray | np.int32,
    *,
    config: LlamaConfig,
    profile: SamplerProfile,
    stride: int,
    adapters: Params | None = None,
    patch: Patch | None = None,
) -> tuple[DecodeState, Progress]:
    """Runs decode steps until every row has ended or `steps` int32 [] have run. The state is donated.

    Args:
      stride: the most steps per dispatch; programs with more than one are compiled for many (`graph_options`).
      adapters: slots of adapters (`model.adapters`); each row keeps using the one it began with.
      patch: functions that change activations (`model.activations.patch`).
    """
    options = (graph_options() if stride > 1 else {}) | weight_options(config, len(state.done))
    run = compiled_advance(tuple(sorted(options.items())))
    return run(params, state, steps, adapters, patch, config=config, profile=profile, stride=stride)


@functools.cache
def compiled_advance(
    compiler_options: tuple[tuple[str, str | bool], ...],
) -> Callable[..., tuple[DecodeState, Progress]]:
    """`run_steps` jitted for `advance`, compiled with these options of XLA."""
    return jax.jit(
        run_steps,
        static_argnames=("config", "profile", "stride"),
        donate_argnames=("state",),
        compiler_options=dict(compiler_options) or None,
    )


def run_steps(
    params: Params,
    state: DecodeState,
    steps: jax.Array,
    adapters: Params | None,
    patch: Patch | None = None,
    *,
    config: LlamaConfig,
    profile: SamplerProfile,
    stride: int,
) -> tuple[DecodeState, Progress]:
    """The loop of `advance`, not jitted, for use inside larger programs."""
    type Carry = tuple[jax.Array, DecodeState, Progress]

    def unfinished(carry: Carry) -> jax.Array:
        step, state, _ = carry
        return (step < jnp.minimum(steps, stride)) & ~jnp.all(state.done)

    def run(carry: Carry) -> Carry:
        step, state, progress = carry
        return step + 1, *_step(params, state, progress, step, adapters, patch, config=config, profile=profile)

    start = (jnp.int32(0), state, no_progress(state, stride, profile, config.vocab_size))
    _, state, progress = jax.lax.while_loop(unfinished, run, start)
    return by_rows(state), progress


def by_rows(state: DecodeState) -> DecodeState:
    """The state in the same sharding after every dispatch, so that the next one is not recompiled."""
    axes = {"sampler": sampler_axes(state.sampler)}
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    # A cache shards itself.
    placed = {n: constrain(x, axes.get(n, ("batch",))) for n, x in fields.items() if n != "cache"}
    return dataclasses.replace(state, **placed)


@partial(jax.jit, static_argnames=("capacity",))
def grow(state: DecodeState, *, capacity: int) -> DecodeState:
    """The same state with a larger cache."""
    return dataclasses.replace(state, cache=state.cache.grow(capacity))
