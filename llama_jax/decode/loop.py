"""Prefill and the decode step on the device, and the loop that runs it: token ids in, token ids out.

The step is written once, in `_emit` and `decode_step`. `advance` runs it in a `lax.while_loop` as many times as it is
told: to the end for a batch, once for a stream. Shapes come from a few buckets, so that few programs are compiled.
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

from llama_jax.cache import Cache
from llama_jax.config import LlamaConfig
from llama_jax.decode.graphs import graph_options
from llama_jax.model import forward
from llama_jax.params import Params
from llama_jax.sampling import Logprobs, SamplerOptions, SamplerState, sample, sampler_axes
from llama_jax.sharding import constrain


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that changes from step to step.

    Attributes:
      tokens: int32 [batch], the last token of each row, not yet in the cache.
      positions: int32 [batch], its position.
      done: bool [batch].
      finished_by_stop: bool [batch], whether a stop id ended the row.
      output: int32 [batch, room], the tokens so far.
      logprobs: of the tokens so far, [batch, room] and [batch, room, n], or None.
      limit: int32 [batch], tokens each row may have.
      step: int32 [], tokens so far.
    """

    tokens: jax.Array
    positions: jax.Array
    done: jax.Array
    finished_by_stop: jax.Array
    output: jax.Array
    logprobs: Logprobs | None
    limit: jax.Array
    step: jax.Array
    cache: Cache
    sampler: SamplerState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """What the host reads between dispatches: copies, so that the state itself can be donated to the next one."""

    output: jax.Array
    logprobs: Logprobs | None
    done: jax.Array
    finished_by_stop: jax.Array
    step: jax.Array


@partial(jax.jit, static_argnames=("options", "room"), donate_argnames=("cache",))
def first_token(
    logits: jax.Array,
    cache: Cache,
    sampler: SamplerState,
    prompt_lengths: jax.Array,
    limit: jax.Array,
    *,
    options: SamplerOptions,
    room: int,
) -> tuple[DecodeState, Progress]:
    """The state after the first token was drawn from the prompts' logits float32 [batch, vocab].

    Args:
      prompt_lengths, limit: int32 [batch]; rows with limit 0 are dummies.
      room: tokens that the output can hold.
    """
    batch = logits.shape[0]
    logprobs = None
    if options.logprobs is not None:
        n = max(options.logprobs, 1)
        logprobs = Logprobs(
            jnp.zeros((batch, room)), jnp.zeros((batch, room, n), jnp.int32), jnp.zeros((batch, room, n))
        )
    state = DecodeState(
        tokens=jnp.zeros((batch,), jnp.int32),
        positions=prompt_lengths - 1,
        done=limit <= 0,
        finished_by_stop=jnp.zeros((batch,), bool),
        output=jnp.zeros((batch, room), jnp.int32),
        logprobs=logprobs,
        limit=limit,
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        sampler=sampler,
    )
    state = _by_rows(_emit(logits, state, options))
    return state, _progress(state)


def _emit(logits: jax.Array, state: DecodeState, options: SamplerOptions) -> DecodeState:
    """Draws the next token of every row, records it, and sees whether the row has ended."""
    tokens, sampler, drawn = sample(logits, state.sampler, options)
    step = state.step + 1
    hit_stop = jnp.any(tokens[:, None] == state.sampler.stop_ids, axis=1)
    if options.min_tokens:
        hit_stop &= step >= sampler.min_tokens
    logprobs = state.logprobs
    if logprobs is not None:

        def record(buffer: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(buffer, new, state.step, axis=1)

        logprobs = jax.tree.map(record, logprobs, drawn)
    return DecodeState(
        tokens=tokens,
        positions=state.positions + 1,
        done=state.done | hit_stop | (step >= state.limit),
        finished_by_stop=state.finished_by_stop | (~state.done & hit_stop),
        output=jax.lax.dynamic_update_index_in_dim(state.output, tokens, state.step, axis=1),
        logprobs=logprobs,
        limit=state.limit,
        step=step,
        cache=state.cache,
        sampler=sampler,
    )


def decode_step(params: Params, state: DecodeState, *, config: LlamaConfig, options: SamplerOptions) -> DecodeState:
    """One token more for every row: the last tokens go through the model, the next ones are drawn."""
    logits, cache = forward(params, config, state.tokens[:, None], state.positions[:, None], state.cache)
    return _emit(logits[:, 0], dataclasses.replace(state, cache=cache), options)


def advance(
    params: Params,
    state: DecodeState,
    until: jax.Array | np.ndarray | np.int32,
    *,
    config: LlamaConfig,
    options: SamplerOptions,
    many: bool = False,
) -> tuple[DecodeState, Progress]:
    """Decode steps until every row is done or has `until` int32 [] tokens. The state is donated.

    Args:
      many: many steps will run, so that a program made for them is worth it (`graph_options`).
    """
    compiler_options = tuple(sorted(graph_options().items())) if many else ()
    return compiled_advance(compiler_options)(params, state, until, config=config, options=options)


@functools.cache
def compiled_advance(compiler_options: tuple[tuple[str, str], ...]) -> Callable[..., tuple[DecodeState, Progress]]:
    """The jitted function behind `advance`, compiled with these options of XLA."""

    @partial(
        jax.jit,
        static_argnames=("config", "options"),
        donate_argnames=("state",),
        compiler_options=dict(compiler_options) or None,
    )
    def advance(
        params: Params, state: DecodeState, until: jax.Array, *, config: LlamaConfig, options: SamplerOptions
    ) -> tuple[DecodeState, Progress]:
        def unfinished(state: DecodeState) -> jax.Array:
            return (state.step < until) & ~jnp.all(state.done)

        state = jax.lax.while_loop(unfinished, partial(decode_step, params, config=config, options=options), state)
        state = _by_rows(state)
        return state, _progress(state)

    return advance


def _by_rows(state: DecodeState) -> DecodeState:
    """The state, laid out over a mesh alike at the end of every dispatch, so that the next needs no new program."""

    axes = {"sampler": sampler_axes(state.sampler)}
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    # A cache lays itself out.
    placed = {n: constrain(x, axes.get(n, ("batch",))) for n, x in fields.items() if n != "cache"}
    return dataclasses.replace(state, **placed)


def _progress(state: DecodeState) -> Progress:
    return Progress(state.output, state.logprobs, state.done, state.finished_by_stop, state.step)


@partial(jax.jit, donate_argnames=("state",))
def stop_rows(state: DecodeState, ended: jax.Array) -> DecodeState:
    """Ends rows bool [batch] from the host's side, because it found a stop string."""
    return dataclasses.replace(state, done=state.done | ended)


@partial(jax.jit, static_argnames=("capacity", "room"))
def grow(state: DecodeState, *, capacity: int, room: int) -> DecodeState:
    """The same state with a larger cache, and `room` tokens of output."""
    more = room - state.output.shape[1]

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))

    return dataclasses.replace(
        state,
        output=pad(state.output),
        logprobs=None if state.logprobs is None else jax.tree.map(pad, state.logprobs),
        cache=state.cache.grow(capacity),
    )
