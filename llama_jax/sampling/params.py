"""Sampling parameters of a request, with vLLM's field names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.errors import RequestError
from llama_jax.sampling.grammar import Grammar

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""
MAX_LOGPROBS = 20
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SamplingParams:
    """Parameters for continuing one prompt, with vLLM's names, meanings and defaults.

    Attributes:
      n: number of continuations.
      temperature: 0 is greedy.
      top_p: smallest set of tokens whose probabilities reach top_p; 1 keeps all.
      top_k: only the k most likely tokens; 0 or -1 keeps all.
      min_p: only tokens at least min_p times as likely as the most likely one.
      presence_penalty, frequency_penalty: subtracted once, or once per occurrence, from logits of generated tokens.
      repetition_penalty: divides positive (multiplies negative) logits of tokens in prompt or output; 1 is none.
      logit_bias: token id to a number in [-100, 100] added to its logit.
      allowed_token_ids: the only ids that may be generated; ids that end a text must be listed too.
      bad_words: words that the text must not contain, as tokenized at the start of a text and after a space.
      response_format: required form of the text: a `Grammar`, or OpenAI's `response_format` object; None for any.
      logits_processors: names of plugins that restrict the next tokens (docs/plugins.md).
      seed: makes the tokens reproducible; None draws a random one.
      stop: strings that end the text; they are not part of it.
      stop_token_ids: ids that end the text, in addition to the model's own end-of-text ids.
      min_tokens: least number of tokens before the text may end.
      max_tokens: most tokens to generate; None is the rest of the model's context, 0 generates nothing and is for the
        prompt's own log-probabilities.
      logprobs: number of most likely tokens to report per generated token (the chosen one is always among them).
      prompt_logprobs: likewise for each prompt token.
      ignore_eos: continue after end-of-text ids.
      skip_special_tokens: omit control tokens from the text.
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
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    response_format: Grammar | Mapping[str, Any] | None = None
    logits_processors: Sequence[str] = ()
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", _items(stop, "stop", "a string or a list of strings"))
        object.__setattr__(self, "stop_token_ids", _items(self.stop_token_ids, "stop_token_ids", "a list of token ids"))
        if self.allowed_token_ids is not None:
            allowed = _items(self.allowed_token_ids, "allowed_token_ids", "a list of token ids or None")
            object.__setattr__(self, "allowed_token_ids", allowed)
            if not allowed:
                raise _bad("allowed_token_ids", allowed, "at least one token id, or None to allow every token")
        for name in ("bad_words", "logits_processors"):
            object.__setattr__(self, name, _items(getattr(self, name), name, "a list of strings"))
        object.__setattr__(self, "response_format", Grammar.of(self.response_format))
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
        _check_int(self, "max_tokens", 0, 2**31 - 1, optional=True)
        _check_int(self, "seed", 0, 2**64 - 1, optional=True)
        _check_int(self, "logprobs", 0, MAX_LOGPROBS, optional=True)
        _check_int(self, "prompt_logprobs", 0, MAX_LOGPROBS, optional=True)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _bad("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise _bad("stop", text, "non-empty strings")
        for name in ("bad_words", "logits_processors"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not text.strip():
                    raise _bad(name, text, "texts of more than spaces")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                if not _is_int(token) or token < 0:
                    raise _bad(name, token, "token ids, integers from 0 up")
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "True or False")
        if not isinstance(self.logit_bias, Mapping):
            raise _bad("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            if not _is_int(token) or token < 0:
                raise _bad("logit_bias", token, "token ids as keys, integers from 0 up")
            if not _is_number(bias) or not -100 <= bias <= 100:
                raise _bad("logit_bias", bias, "numbers in [-100, 100] as values")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def constrained(self) -> bool:
        """Whether the host has a say in each token: `bad_words`, `response_format`, `logits_processors`."""
        return bool(self.bad_words or self.response_format or self.logits_processors)

    def ending_ids(self, eos_token_ids: Sequence[int]) -> frozenset[int]:
        """Every id that ends a text: the model's own, unless ignored, and stop_token_ids."""
        return frozenset({*(() if self.ignore_eos else eos_token_ids), *self.stop_token_ids})

    def check_generates(self, what: str) -> None:
        """Raises RequestError if nothing is to be generated, since `what` concerns new text."""
        if self.max_tokens == 0:
            raise RequestError(
                f"{what} needs at least one new token; got max_tokens=0",
                param="max_tokens",
                hint="prompts alone are scored by batch_generate or `llama-jax batch`, with prompt_logprobs",
            )

    def check_vocab(self, vocab_size: int) -> None:
        """Raises RequestError if a token id is outside the vocabulary."""
        for name in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise _bad(name, token, f"token ids below the vocabulary's size, {vocab_size}")


def _items(values: Any, name: str, want: str) -> tuple[Any, ...]:
    """The items of a list; none for None. A string is refused: it would silently be split into characters."""
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
    # Within float32, the device's type: 1e39 would be infinite there. Compared as Python numbers,
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
