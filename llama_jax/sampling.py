"""Sampling: what a request asks for (`SamplingParams`), and the pure sampler that turns logits into tokens.

Field names, defaults and order are vLLM's: log-probabilities of the raw logits; then min_tokens, logit_bias, penalties,
temperature, min_p, top_k, top_p. Every row draws from its own key, so a row's tokens do not depend on its batch.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import RequestError

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""
MAX_LOGPROBS = 20
_FORBIDDEN = -1e30
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt; vLLM's names, meanings and defaults.

    Attributes:
      n: number of continuations.
      temperature: 0 is greedy.
      top_p: smallest set of tokens whose probabilities reach top_p; 1 keeps all.
      top_k: only the k most likely tokens; 0 or -1 keeps all.
      min_p: only tokens at least min_p times as likely as the most likely one.
      presence_penalty, frequency_penalty: subtracted once, or per occurrence, for tokens already generated.
      repetition_penalty: divides (multiplies, if negative) the logits of tokens in prompt or output; 1 is none.
      logit_bias: token id to a number in [-100, 100] added to its logit.
      seed: makes the tokens reproducible; None draws one.
      stop: strings that end the text; they are not part of it.
      stop_token_ids: ids that end the text, besides the model's own end-of-text ids.
      min_tokens: no end before this many tokens.
      max_tokens: end after this many; None is the rest of the model's context.
      logprobs: number of most likely tokens to report per generated token (the chosen one is always among them).
      prompt_logprobs: likewise for each prompt token.
      ignore_eos: go on after end-of-text ids.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _items(stop, "stop", "a string or a list of strings"))
        object.__setattr__(self, "stop_token_ids", _items(self.stop_token_ids, "stop_token_ids", "a list of token ids"))
        if self.logit_bias is None:
            object.__setattr__(self, "logit_bias", {})
        _check_number(self, "temperature", 0.0, math.inf)
        _check_number(self, "top_p", 0.0, 1.0, open_low=True)
        _check_number(self, "min_p", 0.0, 1.0)
        _check_number(self, "presence_penalty", -2.0, 2.0)
        _check_number(self, "frequency_penalty", -2.0, 2.0)
        _check_number(self, "repetition_penalty", 0.0, math.inf, open_low=True)
        _check_int(self, "n", 1, 1024)
        _check_int(self, "top_k", -1, 2**31 - 1)
        _check_int(self, "min_tokens", 0, 2**31 - 1)
        _check_int(self, "max_tokens", 1, 2**31 - 1, optional=True)
        _check_int(self, "seed", 0, 2**64 - 1, optional=True)
        _check_int(self, "logprobs", 0, MAX_LOGPROBS, optional=True)
        _check_int(self, "prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise _bad("stop", text, "non-empty strings")
        for token in self.stop_token_ids:
            if not _is_int(token) or token < 0:
                raise _bad("stop_token_ids", token, "token ids, integers from 0 up")
        if not isinstance(self.ignore_eos, bool):
            raise _bad("ignore_eos", self.ignore_eos, "True or False")
        if not isinstance(self.logit_bias, Mapping):
            raise _bad("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not _is_int(token) or token < 0:
                raise _bad("logit_bias", token, "token ids as keys, integers from 0 up")
            if not _is_number(bias) or not -100 <= bias <= 100:
                raise _bad("logit_bias", bias, "numbers in [-100, 100] as values")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken every time."""
        return self.temperature < GREEDY_BELOW

    def ending_ids(self, eos_token_ids: Sequence[int]) -> frozenset[int]:
        """Every id that ends a text: the model's own, unless ignored, and stop_token_ids."""
        return frozenset({*(() if self.ignore_eos else eos_token_ids), *self.stop_token_ids})

    def check_vocab(self, vocab_size: int) -> None:
        """Raises RequestError if a token id lies outside of the vocabulary."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                if token >= vocab_size:
                    raise _bad(name, token, f"token ids below the vocabulary's size, {vocab_size}")


def _items(values: Any, name: str, want: str) -> tuple[Any, ...]:
    """The items of a list; None has none. A text is no list: it would be taken apart silently."""
    if values is None:
        return ()
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str | bytes):
        raise _bad(name, values, want)
    return tuple(values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _bad(name: str, value: Any, want: str) -> RequestError:
    return RequestError(f"{name} must be {want}; got {value!r}", param=name, hint=f"see SamplingParams.{name}")


def _check_number(p: SamplingParams, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    value = getattr(p, name)
    # Of the size of a float32, as which the device sees it: 1e39 would be infinite there. Compared as Python numbers,
    # since an integer may be too large for any float.
    ok = _is_number(value) and low <= value <= high and abs(value) <= _LARGEST and not (open_low and value == low)
    if not ok:
        bounds = f"{'(' if open_low else '['}{low:g}, {'inf)' if high == math.inf else f'{high:g}]'}"
        raise _bad(name, value, f"a number in {bounds}")


def _check_int(p: SamplingParams, name: str, low: int, high: int, *, optional: bool = False) -> None:
    value = getattr(p, name)
    if optional and value is None:
        return
    if not _is_int(value) or not low <= value <= high:
        raise _bad(name, value, f"an integer in [{low}, {high}]{' or None' if optional else ''}")


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
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    top, top_ids = jax.lax.top_k(logprobs, max(n, 1))
    return Logprobs(chosen, top_ids.astype(jnp.int32), top)


def sample(
    logits: jax.Array, state: SamplerState, options: SamplerOptions
) -> tuple[jax.Array, SamplerState, Logprobs | None]:
    """Draws each row's next token.

    Args:
      logits: float32 [batch, vocab].

    Returns:
      tokens int32 [batch], the state after the draw, and the log-probabilities if `options` ask for them.
    """
    raw = logits
    if options.min_tokens:
        early = state.step < state.min_tokens
        stop_ids = jnp.where(early[:, None], state.stop_ids, -1)
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = logits.at[rows, jnp.where(stop_ids < 0, logits.shape[1], stop_ids)].set(_FORBIDDEN, mode="drop")
    if options.bias and state.bias is not None:
        logits = logits + state.bias
    if options.penalties:
        logits = _penalize(logits, state)
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not options.greedy:
        drawn = _draw(logits, state, truncate=options.truncate)
        tokens = jnp.where(state.temperature < GREEDY_BELOW, tokens, drawn)
    counts = state.counts
    if counts is not None:
        counts = jnp.asarray(counts).at[jnp.arange(tokens.shape[0]), tokens].add(1)
    new_state = dataclasses.replace(state, step=state.step + 1, counts=counts)
    logprobs = None if options.logprobs is None else token_logprobs(raw, tokens, options.logprobs)
    return tokens, new_state, logprobs


def _penalize(logits: jax.Array, state: SamplerState) -> jax.Array:
    """Repetition penalty (arXiv:1909.05858) on prompt and output tokens, then frequency and presence on output's."""
    assert state.counts is not None and state.in_prompt is not None
    generated = state.counts > 0
    factor = jnp.where(generated | state.in_prompt, state.repetition[:, None], 1.0)
    # Clipped, so that an extreme penalty makes no infinity or NaN.
    logits = jnp.clip(jnp.where(logits > 0, logits / factor, logits * factor), _FORBIDDEN, -_FORBIDDEN)
    return logits - state.frequency[:, None] * state.counts - state.presence[:, None] * generated


def _draw(logits: jax.Array, state: SamplerState, *, truncate: bool) -> jax.Array:
    scaled = logits / jnp.maximum(state.temperature, GREEDY_BELOW)[:, None]
    if truncate:
        scaled = _truncate(scaled, state)

    def gumbel(seed: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, state.step), (logits.shape[1],), jnp.float32)

    return jnp.argmax(scaled + jax.vmap(gumbel)(state.seed), axis=-1).astype(jnp.int32)


def _truncate(logits: jax.Array, state: SamplerState) -> jax.Array:
    """Forbids the tokens that min_p, top_k and top_p leave out, in this order.

    Instead of sorting the vocabulary, bisects for the smallest logit that is kept: 32 halvings of the ordered integers
    behind the floats find it exactly.
    """
    best = jnp.max(logits, axis=-1, keepdims=True)
    logits = jnp.where(logits - best < jnp.log(state.min_p)[:, None], -jnp.inf, logits)
    order = _ordered(logits)

    kth = _bisect(lambda cut: jnp.sum(order >= cut[:, None], axis=-1) >= state.top_k, logits.shape[0])
    logits = jnp.where(order >= kth[:, None], logits, -jnp.inf)
    # Relative to the best token's, so that the sum is exact enough whatever the vocabulary.
    weights = jnp.exp(logits - best)
    enough = state.top_p * jnp.sum(weights, axis=-1)
    order = _ordered(logits)
    nucleus = _bisect(
        lambda cut: jnp.sum(jnp.where(order >= cut[:, None], weights, 0.0), axis=-1) >= enough, logits.shape[0]
    )
    # A top_p that is zero in float32 would leave nothing.
    nucleus = jnp.minimum(nucleus, jnp.max(order, axis=-1))
    keep = (order >= nucleus[:, None]) | (state.top_p >= 1.0)[:, None]
    return jnp.where(keep, logits, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 of the same order as the float32 x."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 is no less than 0.0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _bisect(holds: Any, rows: int) -> jax.Array:
    """The largest uint32 cut [rows] for which `holds(cut)`; it must hold for 0 and be monotone."""

    def halve(i: jax.Array, cut: jax.Array) -> jax.Array:
        raised = cut | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(raised), raised, cut)

    return jax.lax.fori_loop(0, 32, halve, jnp.zeros((rows,), jnp.uint32))
