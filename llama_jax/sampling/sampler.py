"""The pure sampler: logits in, tokens out."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.sampling.params import GREEDY_BELOW, SamplingParams
from llama_jax.sampling.truncation import truncate
from llama_jax.sharding import MeshAxes, constrain, local, reductions, split_over

_FORBIDDEN = -1e30


@dataclass(frozen=True)
class SamplerOptions:
    """What the compiled sampler can do: the static half. A batch compiles only the steps that one of its rows needs."""

    greedy: bool = True
    bias: bool = False
    penalties: bool = False
    truncate: bool = False
    min_tokens: bool = False
    logprobs: int | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """The numbers of each row, arrays [batch] unless said otherwise; None where no row needs them.

    Attributes:
      seed: uint32 [batch, 2], the high and low half of each row's seed.
      step: int32, tokens drawn so far.
      bias: float32 [batch, vocab].
      in_prompt: bool [batch, vocab], tokens of the prompt.
      counts: int32 [batch, vocab], occurrences among the generated tokens.
      stop_ids: int32 [batch, k], ids that end the row, -1 for none.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    seed: jax.Array
    step: jax.Array
    min_tokens: jax.Array
    stop_ids: jax.Array
    bias: jax.Array | None
    in_prompt: jax.Array | None
    counts: jax.Array | None


def make_sampler(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    eos_token_ids: Sequence[int] = (),
) -> tuple[SamplerOptions, SamplerState]:
    """The sampler of a batch, one entry of `params` and `prompts` (token ids) per row.

    Rows whose seed is None draw one here.
    """
    for p in params:
        p.check_vocab(vocab_size)
    options = SamplerOptions(
        greedy=all(p.greedy for p in params),
        bias=any(p.logit_bias for p in params),
        penalties=any(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0 for p in params),
        truncate=any(not p.greedy and (p.top_p < 1 or p.top_k > 0 or p.min_p > 0) for p in params),
        min_tokens=any(p.min_tokens > 0 for p in params),
        logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
    )
    rows = len(params)
    bias = in_prompt = counts = None
    if options.bias:
        bias = np.zeros((rows, vocab_size), np.float32)
        for row, p in zip(bias, params, strict=True):
            for token, value in p.logit_bias.items():
                row[token] = value
    if options.penalties:
        in_prompt = np.zeros((rows, vocab_size), bool)
        for row_mask, prompt in zip(in_prompt, prompts, strict=True):
            row_mask[list(prompt)] = True
        counts = np.zeros((rows, vocab_size), np.int32)
    stops = [sorted(p.ending_ids(eos_token_ids)) for p in params]
    # A few widths only, so that the number of stop ids does not make a new program.
    width = max(4, 1 << (max((len(s) for s in stops), default=0) - 1).bit_length())
    stop_ids = np.full((rows, width), -1, np.int32)
    for row_ids, ids in zip(stop_ids, stops, strict=True):
        row_ids[: len(ids)] = ids
    seeds = [secrets.randbits(64) if p.seed is None else p.seed for p in params]

    # numpy arrays: they go to the device with the program that uses them.
    def floats(name: str) -> Any:
        return np.asarray([getattr(p, name) for p in params], np.float32)

    fields: dict[str, Any] = {
        "temperature": floats("temperature"),
        "top_p": floats("top_p"),
        "top_k": np.asarray([p.top_k if p.top_k > 0 else vocab_size for p in params], np.int32),
        "min_p": floats("min_p"),
        "presence": floats("presence_penalty"),
        "frequency": floats("frequency_penalty"),
        "repetition": floats("repetition_penalty"),
        "seed": np.asarray([[s >> 32, s & 0xFFFFFFFF] for s in seeds], np.uint32),
        "step": np.zeros((), np.int32),
        "min_tokens": np.asarray([p.min_tokens for p in params], np.int32),
        "stop_ids": stop_ids,
        "bias": bias,
        "in_prompt": in_prompt,
        "counts": counts,
    }
    return options, SamplerState(**fields)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Of one token per row: its log-probability [batch], and the most likely ids and theirs [batch, n]."""

    token: jax.Array
    top_ids: jax.Array
    top: jax.Array


def token_logprobs(logits: jax.Array, tokens: jax.Array, n: int) -> Logprobs:
    """Log-probabilities of `tokens` [batch] under raw `logits` float32 [batch, vocab], and of the n most likely."""
    compute = partial(_token_logprobs, n=n, axis=split_over("vocab", logits.shape[1]))
    axes = {"logits": ("batch", "vocab"), "tokens": ("batch",)}
    return local(compute, {"logits": logits, "tokens": tokens}, axes, ("batch",))


def _token_logprobs(logits: jax.Array, tokens: jax.Array, *, n: int, axis: MeshAxes | None) -> Logprobs:
    logprobs = reductions.log_softmax(logits, axis)
    top, top_ids = reductions.top_k(logprobs, max(n, 1), axis)
    return Logprobs(reductions.take(logprobs, tokens, axis), top_ids, top)


def sample(
    logits: jax.Array, state: SamplerState, options: SamplerOptions
) -> tuple[jax.Array, SamplerState, Logprobs | None]:
    """Draws each row's next token.

    Args:
      logits: float32 [batch, vocab].

    Returns:
      tokens int32 [batch], the state after the draw, and the log-probabilities if `options` ask for them.
    """
    vocab = logits.shape[1]
    # Made outside: noise has the same numbers however the vocabulary is split.
    noise = None if options.greedy else constrain(_noise(state, vocab), ("batch", "vocab"))
    of_state = sampler_axes(state)
    return local(
        partial(_sample, options=options, axis=split_over("vocab", vocab)),
        {"logits": logits, "state": state, "noise": noise},
        {"logits": ("batch", "vocab"), "state": of_state, "noise": ("batch", "vocab")},
        (("batch",), of_state, ("batch",)),
    )


def sampler_axes(state: SamplerState) -> SamplerState:
    """The logical axes of every array of a sampler's state, for `llama_jax.sharding`."""
    rows: Any = jax.tree.map(lambda x: ("batch", "vocab")[: x.ndim], state)
    return dataclasses.replace(rows, seed=("batch",), stop_ids=("batch",))


def _noise(state: SamplerState, vocab: int) -> jax.Array:
    """Gumbel noise float32 [batch, vocab] of this step, each row from its own key."""

    def gumbel(seed: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, state.step), (vocab,), jnp.float32)

    return jax.vmap(gumbel)(state.seed)


def _sample(
    logits: jax.Array, state: SamplerState, noise: jax.Array | None, *, options: SamplerOptions, axis: MeshAxes | None
) -> tuple[jax.Array, SamplerState, Logprobs | None]:
    """`sample` of this device's rows and part of the vocabulary."""
    raw = logits
    batch, width = logits.shape
    first, row = reductions.start(logits, axis), jnp.arange(batch)
    if options.min_tokens:
        early = state.step < state.min_tokens
        column = state.stop_ids - first
        here = early[:, None] & (state.stop_ids >= 0) & (column >= 0)
        logits = logits.at[row[:, None], jnp.where(here, column, width)].set(_FORBIDDEN, mode="drop")
    if options.bias and state.bias is not None:
        logits = logits + state.bias
    if options.penalties:
        logits = _penalize(logits, state)
    tokens = reductions.argmax(logits, axis)
    if noise is not None:
        scaled = logits / jnp.maximum(state.temperature, GREEDY_BELOW)[:, None]
        if options.truncate:
            scaled = truncate(scaled, state, axis)
        drawn = reductions.argmax(scaled + noise, axis)
        tokens = jnp.where(state.temperature < GREEDY_BELOW, tokens, drawn)
    counts = state.counts
    if counts is not None:
        column = tokens - first
        counts = jnp.asarray(counts).at[row, jnp.where(column >= 0, column, width)].add(1, mode="drop")
    new_state = dataclasses.replace(state, step=state.step + 1, counts=counts)
    logprobs = None if options.logprobs is None else _token_logprobs(raw, tokens, n=options.logprobs, axis=axis)
    return tokens, new_state, logprobs


def _penalize(logits: jax.Array, state: SamplerState) -> jax.Array:
    """Repetition penalty (arXiv:1909.05858) on prompt and output tokens, then frequency and presence on output's."""
    assert state.counts is not None and state.in_prompt is not None
    generated = state.counts > 0
    factor = jnp.where(generated | state.in_prompt, state.repetition[:, None], 1.0)
    # Clipped, so that an extreme penalty makes no infinity or NaN.
    logits = jnp.clip(jnp.where(logits > 0, logits / factor, logits * factor), _FORBIDDEN, -_FORBIDDEN)
    return logits - state.frequency[:, None] * state.counts - state.presence[:, None] * generated
