"""Settings of a sampler's rows: compiled in (`SamplerProfile`), and as arrays (`SamplerState`)."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from llama_jax.errors import RequestError
from llama_jax.sampling import token_mask
from llama_jax.sampling.params import SamplingParams

_KINDS = ("greedy", "sampling", "full")

WIDE = ("allowed", "in_prompt", "seen")
"""A sampler's arrays over the vocabulary."""

LEAST_WIDTH = 16
"""Least room of every row for stop ids, and for biases; a batch with more has room for a power of two."""


@dataclass(frozen=True)
class SamplerProfile:
    """Capabilities of a compiled sampler. There are only six, so that a new mix of requests compiles nothing.

    Attributes:
      kind: "greedy"; "sampling", with temperature, top_p, top_k and min_p; "full", which adds logit_bias, penalties,
        min_tokens and masks of allowed tokens. Each includes the ones before it.
      logprobs: whether it reports log-probabilities of the chosen token and of the `MAX_LOGPROBS` most likely.
    """

    kind: Literal["greedy", "sampling", "full"] = "greedy"
    logprobs: bool = False

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> SamplerProfile:
        """The smallest profile that serves all of them."""
        full = any(
            p.logit_bias
            or p.constrained
            or p.allowed_token_ids is not None
            or p.min_tokens
            or p.presence_penalty
            or p.frequency_penalty
            or p.repetition_penalty != 1.0
            for p in params
        )
        kind: Any = "full" if full else "greedy" if all(p.greedy for p in params) else "sampling"
        return cls(kind, any(p.logprobs is not None for p in params))


GREEDY = SamplerProfile()
FULL = SamplerProfile("full", logprobs=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """The parameters of each row, arrays [batch] unless noted; None if the profile does not need them.

    Every array has a row for each row of the batch, so that tree maps take rows out and put them back.

    Attributes:
      seed: uint32 [batch, 2], the high and low half of each row's seed.
      count: int32 [batch], tokens drawn so far. Seed and count alone decide a row's random numbers.
      stop_ids: int32 [batch, k], ids that end the row, -1 for none.
      reports: bool [batch], whether the row requests log-probabilities.
      bias_ids: int32 [batch, k], ids whose logits get the numbers in bias, float32 [batch, k], added; -1 for none.
      restricted: bool [batch], whether the row may draw only tokens of its mask.
      allowed: uint32 [batch, ceil(vocab / 32)], the masks (`sampling.token_mask`).
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
    reports: jax.Array
    bias_ids: jax.Array | None
    bias: jax.Array | None
    restricted: jax.Array | None
    allowed: jax.Array | None
    in_prompt: jax.Array | None
    seen: jax.Array | None


def sampler_axes(state: SamplerState) -> SamplerState:
    """The logical axes of every array of a sampler's state, for `llama_jax.sharding`.

    Masks are replicated when the vocabulary is split, since its parts may begin within a word.
    """
    rows: Any = jax.tree.map(lambda _: ("batch",), state)
    wide = {name: ("batch", "vocab") for name in ("in_prompt", "seen") if getattr(state, name) is not None}
    return dataclasses.replace(rows, **wide)


def make_sampler(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]] | None,
    vocab_size: int,
    eos_token_ids: Sequence[int] = (),
    profile: SamplerProfile | None = None,
    *,
    stop_width: int | None = None,
    bias_width: int | None = None,
) -> tuple[SamplerProfile, SamplerState]:
    """Makes the sampler of some rows, with one entry of `params` and `prompts` (token ids) per row.

    Rows whose seed is None get a random one here.

    Args:
      prompts: None leaves out the arrays over the vocabulary.
      profile: one that serves all of them; by default the smallest.
      stop_width, bias_width: each row's room for stop ids and biases; by default a sufficient power of two.

    Raises:
      RequestError: the profile does not serve a row, or a row has no room for its stop ids or biases.
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
    seeds = [secrets.randbits(64) if p.seed is None else p.seed for p in params]
    stop_ids = [sorted(p.ending_ids(eos_token_ids)) for p in params]
    full = _full_fields(params, prompts, vocab_size, bias_width) if profile.kind == "full" else {}

    # numpy arrays: they are sent to the device with the program that uses them.
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
        "count": np.zeros((len(params),), np.int32),
        "min_tokens": np.asarray([p.min_tokens for p in params], np.int32),
        "stop_ids": _filled(stop_ids, _width(stop_ids, stop_width, "stop_token_ids"), -1, np.int32),
        "reports": np.asarray([p.logprobs is not None for p in params], bool),
        **(full or dict.fromkeys(("bias_ids", "bias", "restricted", "allowed", "in_prompt", "seen"))),
    }
    return profile, SamplerState(**fields)


def check_widths(params: SamplingParams, eos_token_ids: Sequence[int], *, stop_width: int, bias_width: int) -> None:
    """Raises RequestError if a row of these widths (see `make_sampler`) has no room for a request."""
    _width([params.ending_ids(eos_token_ids)], stop_width, "stop_token_ids")
    _width([params.logit_bias], bias_width, "logit_bias")


def widths(params: Sequence[SamplingParams], eos_token_ids: Sequence[int]) -> tuple[int, int]:
    """Room that these requests need for stop ids, and for biases: the default of `make_sampler`."""
    return (
        _width([p.ending_ids(eos_token_ids) for p in params], None, "stop_token_ids"),
        _width([p.logit_bias for p in params], None, "logit_bias"),
    )


def _full_fields(
    params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]] | None, vocab_size: int, bias_width: int | None
) -> Mapping[str, np.ndarray | None]:
    """Arrays that only the full profile has."""
    biases = [p.logit_bias for p in params]
    width = _width(biases, bias_width, "logit_bias")
    return {
        "bias_ids": _filled([list(b) for b in biases], width, -1, np.int32),
        "bias": _filled([list(b.values()) for b in biases], width, 0, np.float32),
        "restricted": np.asarray([p.allowed_token_ids is not None for p in params], bool),
        **(dict.fromkeys(WIDE) if prompts is None else _wide_fields(params, prompts, vocab_size)),
    }


def _wide_fields(
    params: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], vocab_size: int
) -> Mapping[str, np.ndarray]:
    in_prompt = np.zeros((len(params), vocab_size), bool)
    allowed = np.tile(token_mask.all_allowed(vocab_size), (len(params), 1))
    for row, (p, prompt) in enumerate(zip(params, prompts, strict=True)):
        in_prompt[row, list(prompt)] = True
        if p.allowed_token_ids is not None:
            allowed[row] = token_mask.only(p.allowed_token_ids, vocab_size)
    return {"allowed": allowed, "in_prompt": in_prompt, "seen": np.zeros((len(params), vocab_size), np.int32)}


def _width(rows: Sequence[Any], width: int | None, param: str) -> int:
    """Columns needed for each row's items of `param`."""
    most = max(map(len, rows), default=0)
    if width is None:
        return max(LEAST_WIDTH, 1 << max(most - 1, 0).bit_length())
    if most > width:
        raise RequestError(
            f"a request has {most} tokens in {param}, with the model's own; the sampler has room for {width}",
            param=param,
            hint=f"name at most {width} in all, or make the sampler with more room",
        )
    return width


def _filled(rows: Sequence[Sequence[Any]], width: int, rest: Any, dtype: Any) -> np.ndarray:
    """[rows, width] with the rows' items, then `rest`."""
    table = np.full((len(rows), width), rest, dtype)
    for into, items in zip(table, rows, strict=True):
        into[: len(items)] = items
    return table
