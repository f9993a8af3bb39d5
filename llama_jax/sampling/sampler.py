"""The pure sampler: logits in, tokens out."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import RequestError
from llama_jax.sampling.params import GREEDY_BELOW, MAX_LOGPROBS, SamplingParams
from llama_jax.sampling.truncation import truncate
from llama_jax.sharding import MeshAxes, constrain, local, reductions, split_over

_FORBIDDEN = -1e30
_KINDS = ("greedy", "sampling", "full")


STOP_IDS = 16
"""Stop ids that every row has room for; a batch with more has room for a power of two."""


@dataclass(frozen=True)
class SamplerProfile:
    """What a compiled sampler can do. There are six, so that a new mix of requests compiles nothing.

    Attributes:
      kind: "greedy"; "sampling", with temperature, top_p, top_k and min_p; "full", with logit_bias, penalties and
        min_tokens besides. Each can do what the ones before it can.
      logprobs: whether it reports log-probabilities, of the chosen token and of the `MAX_LOGPROBS` most likely.
    """

    kind: Literal["greedy", "sampling", "full"] = "greedy"
    logprobs: bool = False

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> SamplerProfile:
        """The least profile that serves all of them."""
        full = any(
            p.logit_bias or p.min_tokens or p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
            for p in params
        )
        kind: Any = "full" if full else "greedy" if all(p.greedy for p in params) else "sampling"
        return cls(kind, any(p.logprobs is not None for p in params))


GREEDY = SamplerProfile()
FULL = SamplerProfile("full", logprobs=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """The numbers of each row, arrays [batch] unless said otherwise; None where the profile needs none.

    Attributes:
      seed: uint32 [batch, 2], the high and low half of each row's seed.
      count: int32 [batch], tokens drawn so far. Seed and count alone decide a row's random numbers.
      stop_ids: int32 [batch, k], ids that end the row, -1 for none.
      bias: float32 [batch, vocab].
      in_prompt: bool [batch, vocab], tokens of the prompt.
      seen: int32 [batch, vocab], occurrences among the generated tokens.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    presence: jax.Array
    frequency: jax.Array
    repetition: jax.Array
    seed: jax.Array
    count: jax.Array
    min_tokens: jax.Array
    stop_ids: jax.Array
    bias: jax.Array | None
    in_prompt: jax.Array | None
    seen: jax.Array | None


def make_sampler(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    eos_token_ids: Sequence[int] = (),
    profile: SamplerProfile | None = None,
    stop_width: int = 0,
    bias_width: int = 0,
) -> tuple[SamplerProfile, SamplerState]:
    """The sampler of some rows, one entry of `params` and `prompts` (token ids) per row.

    Rows whose seed is None draw one here.

    Args:
      profile: one that serves all of them; by default the least.

    Raises:
      RequestError: the profile lacks what a row asks for.
    """
    for p in params:
        p.check_vocab(vocab_size)
    least = SamplerProfile.of(params)
    profile = profile or least
    if _KINDS.index(profile.kind) < _KINDS.index(least.kind) or (least.logprobs and not profile.logprobs):
        raise RequestError(
            f"the sampler is of profile {profile}, a request needs {least}",
            param="profile",
            hint="make the sampler with a profile that serves every request",
        )
    rows = len(params)
    bias = in_prompt = seen = None
    if profile.kind == "full":
        bias = np.zeros((rows, vocab_size), np.float32)
        in_prompt = np.zeros((rows, vocab_size), bool)
        seen = np.zeros((rows, vocab_size), np.int32)
        for row, (p, prompt) in enumerate(zip(params, prompts, strict=True)):
            in_prompt[row, list(prompt)] = True
            bias[row, list(p.logit_bias)] = list(p.logit_bias.values())
    stops = [sorted(p.ending_ids(eos_token_ids)) for p in params]
    width = max(stop_width, STOP_IDS, 1 << (max((len(s) for s in stops), default=0) - 1).bit_length())
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
        "count": np.zeros((rows,), np.int32),
        "min_tokens": np.asarray([p.min_tokens for p in params], np.int32),
        "stop_ids": stop_ids,
        "bias": bias,
        "in_prompt": in_prompt,
        "seen": seen,
    }
    return profile, SamplerState(**fields)


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
    vocab = logits.shape[1] * (1 if axis is None else jax.lax.axis_size(axis))
    top, top_ids = reductions.top_k(logprobs, min(max(n, 1), vocab), axis)
    return Logprobs(reductions.take(logprobs, tokens, axis), top_ids, top)


def sample(
    logits: jax.Array, state: SamplerState, profile: SamplerProfile, *, drawing: jax.Array | None = None
) -> tuple[jax.Array, SamplerState, Logprobs | None]:
    """Draws each row's next token.

    Args:
      logits: float32 [batch, vocab].
      drawing: bool [batch], rows whose token counts; the state of others stays as it is. All by default.

    Returns:
      tokens int32 [batch], the state after the draw, and the log-probabilities if the profile has them.
    """
    vocab = logits.shape[1]
    # Made outside: noise has the same numbers however the vocabulary is split.
    noise = None if profile.kind == "greedy" else constrain(_noise(state, vocab), ("batch", "vocab"))
    of_state = sampler_axes(state)
    return local(
        partial(_sample, profile=profile, axis=split_over("vocab", vocab)),
        {"logits": logits, "state": state, "noise": noise, "drawing": drawing},
        {"logits": ("batch", "vocab"), "state": of_state, "noise": ("batch", "vocab"), "drawing": ("batch",)},
        (("batch",), of_state, ("batch",)),
    )


def sampler_axes(state: SamplerState) -> SamplerState:
    """The logical axes of every array of a sampler's state, for `llama_jax.sharding`."""
    rows: Any = jax.tree.map(lambda x: ("batch", "vocab")[: x.ndim], state)
    return dataclasses.replace(rows, seed=("batch",), stop_ids=("batch",))


def _noise(state: SamplerState, vocab: int) -> jax.Array:
    """Gumbel noise float32 [batch, vocab] of each row's next draw, from its own key."""

    def gumbel(seed: jax.Array, count: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, count), (vocab,), jnp.float32)

    return jax.vmap(gumbel)(state.seed, state.count)


def _sample(
    logits: jax.Array,
    state: SamplerState,
    noise: jax.Array | None,
    drawing: jax.Array | None,
    *,
    profile: SamplerProfile,
    axis: MeshAxes | None,
) -> tuple[jax.Array, SamplerState, Logprobs | None]:
    """`sample` of this device's rows and part of the vocabulary."""
    raw = logits
    batch, width = logits.shape
    first, row = reductions.start(logits, axis), jnp.arange(batch)
    if profile.kind == "full":
        early = state.count < state.min_tokens
        column = state.stop_ids - first
        here = early[:, None] & (state.stop_ids >= 0) & (column >= 0)
        logits = logits.at[row[:, None], jnp.where(here, column, width)].set(_FORBIDDEN, mode="drop")
        logits = _penalize(logits + state.bias, state)
    tokens = reductions.argmax(logits, axis)
    if noise is not None:
        scaled = logits / jnp.maximum(state.temperature, GREEDY_BELOW)[:, None]
        vocab = width if axis is None else width * jax.lax.axis_size(axis)
        limited = (state.top_p < 1) | (state.top_k < vocab) | (state.min_p > 0)
        # Most requests sample from the whole distribution: the bisection runs only where a row asks for it.
        scaled = jax.lax.cond(
            jnp.any(limited & (state.temperature >= GREEDY_BELOW)),
            lambda: truncate(scaled, state, axis),
            lambda: scaled,
        )
        drawn = reductions.argmax(scaled + noise, axis)
        tokens = jnp.where(state.temperature < GREEDY_BELOW, tokens, drawn)
    drawing = jnp.ones((batch,), bool) if drawing is None else drawing
    seen = state.seen
    if profile.kind == "full":
        column = tokens - first
        seen = jnp.asarray(seen).at[row, jnp.where(drawing & (column >= 0), column, width)].add(1, mode="drop")
    new_state = dataclasses.replace(state, count=state.count + drawing, seen=seen)
    logprobs = _token_logprobs(raw, tokens, n=MAX_LOGPROBS, axis=axis) if profile.logprobs else None
    return tokens, new_state, logprobs


def _penalize(logits: jax.Array, state: SamplerState) -> jax.Array:
    """Repetition penalty (arXiv:1909.05858) on prompt and output tokens, then frequency and presence on output's."""
    assert state.seen is not None and state.in_prompt is not None
    generated = state.seen > 0
    factor = jnp.where(generated | state.in_prompt, state.repetition[:, None], 1.0)
    # Clipped, so that an extreme penalty makes no infinity or NaN.
    logits = jnp.clip(jnp.where(logits > 0, logits / factor, logits * factor), _FORBIDDEN, -_FORBIDDEN)
    return logits - state.frequency[:, None] * state.seen - state.presence[:, None] * generated
