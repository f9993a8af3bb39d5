"""Sampling: a request's parameters (`SamplingParams`), and the pure sampler that turns logits into tokens.

Field names, defaults and order are vLLM's: log-probabilities of the raw logits; then min_tokens, logit_bias, penalties,
masks of allowed tokens, temperature, min_p, top_k, top_p. Every row draws from its own key, so a row's tokens do not
depend on its batch. On several devices each keeps its part of the vocabulary; only a few candidates per row are
exchanged (`sharding.reductions`).
"""

from __future__ import annotations

from llama_jax.sampling.bad_words import BadWords
from llama_jax.sampling.constraints import Constraint, Forkable
from llama_jax.sampling.grammar import Grammar
from llama_jax.sampling.logprobs import Logprobs, token_logprobs
from llama_jax.sampling.params import GREEDY_BELOW, MAX_LOGPROBS, SamplingParams
from llama_jax.sampling.sampler import failed, sample
from llama_jax.sampling.state import (
    FULL,
    GREEDY,
    WIDE,
    SamplerProfile,
    SamplerState,
    check_widths,
    make_sampler,
    sampler_axes,
    widths,
)

__all__ = [
    "FULL",
    "GREEDY",
    "GREEDY_BELOW",
    "MAX_LOGPROBS",
    "WIDE",
    "BadWords",
    "Constraint",
    "Forkable",
    "Grammar",
    "Logprobs",
    "SamplerProfile",
    "SamplerState",
    "SamplingParams",
    "check_widths",
    "failed",
    "make_sampler",
    "sample",
    "sampler_axes",
    "token_logprobs",
    "widths",
]
