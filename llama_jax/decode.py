"""Prefill and the decode step on the device, and the loop that runs it: token ids in, token ids out.

The step is written once, in `_emit` and `decode_step`. `advance` runs it in a `lax.while_loop` as many times as it is
told: to the end for a batch, once for a stream. Shapes come from a few buckets, so that few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama_jax.cache import Cache, create_cache
from llama_jax.config import LlamaConfig
from llama_jax.graphs import graph_options
from llama_jax.model import forward
from llama_jax.params import Params
from llama_jax.sampling import Logprobs, SamplerOptions, SamplerState, sample, sampler_axes, token_logprobs
from llama_jax.sharding import constrain, local_size, parts

MIN_PROMPT = 16
MAX_CHUNK = 2048
# Room for new tokens that a request without a small limit starts with; the cache grows when it is used up.
FIRST_ROOM = 1024
# Prompt tokens of a device in each of two pieces that run side by side: products of so many still run at full speed.
PIECE_TOKENS = 4096
# Attention materialises float32 logits of the prompt chunk against the cache: this bounds them.
ATTENTION_BYTES = 2 << 30


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


def bucket(n: int, minimum: int, per_octave: int) -> int:
    """The smallest bucket that holds n: `per_octave` sizes, evenly spaced, between one power of two and the next."""
    if n <= minimum:
        return minimum
    octave = 1 << (n - 1).bit_length() - 1
    step = max(octave // per_octave, 1)
    return -(-n // step) * step


def prompt_bucket(length: int) -> int:
    """Padded length of a prompt: 16, 24, 32, 48, 64, ... 2048, then multiples of 2048."""
    if length > MAX_CHUNK:
        return -(-length // MAX_CHUNK) * MAX_CHUNK
    return bucket(length, MIN_PROMPT, 2)


def cache_bucket(slots: int) -> int:
    """Capacity of a cache: four sizes per octave, at least 64."""
    return bucket(slots, 64, 4)


def capacities(padded: int, new: int) -> tuple[int, ...]:
    """Capacities that a cache has one after the other while `new` tokens follow a padded prompt: it starts with room
    for FIRST_ROOM of them, and is grown when they are used up."""
    sizes = [cache_bucket(padded + min(new, FIRST_ROOM))]
    while sizes[-1] < padded + new:
        sizes.append(cache_bucket(2 * sizes[-1]))
    return tuple(sizes)


def batch_bucket(rows: int) -> int:
    """Padded batch size: powers of two, and the same number on every device of the mesh in use."""
    return -(-(1 << (rows - 1).bit_length()) // parts("batch")) * parts("batch")


def chunk_length(config: LlamaConfig, batch: int, prompt: int, capacity: int) -> int:
    """Prompt tokens of one prefill call; divides the padded prompt length."""
    chunk = min(prompt, MAX_CHUNK)
    rows, heads = local_size("batch", batch), local_size("kv_heads", config.num_kv_heads)
    heads *= config.num_heads // config.num_kv_heads
    while chunk % 2 == 0 and chunk > 128 and 4 * rows * heads * chunk * capacity > ATTENTION_BYTES:
        chunk //= 2
    return chunk


def pieces(rows: int, length: int, ways: int) -> int:
    """Into how many pieces a device's `rows` rows of `length` prompt tokens are cut in one prefill call.

    Two where `ways` devices add up what they computed: XLA's scheduler then lets one piece compute while the sums of
    the other are under way. Each piece needs the keys and values of the one before, layer by layer, and no more.
    """
    return 2 if ways > 1 and length % 2 == 0 and rows * length >= 2 * PIECE_TOKENS else 1


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
        count = pieces(local_size("batch", batch), length, parts("mlp"))
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
    length = prompt_bucket(max(len(p) for p in prompts))
    tokens, positions = pad_prompts(prompts, rows, length)
    chunk = chunk_length(config, rows, length, capacity)
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


@jax.jit
def take_rows(logits: jax.Array, cache: Cache, index: jax.Array) -> tuple[jax.Array, Cache]:
    """Rows `index` int32 [n] of logits and cache: a prompt is prefilled once for all its continuations."""
    return logits[index], cache.rows(index)
