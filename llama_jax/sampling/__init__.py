"""Sampling: what a request asks for (`SamplingParams`), and the pure sampler that turns logits into tokens.

Field names, defaults and order are vLLM's: log-probabilities of the raw logits; then min_tokens, logit_bias, penalties,
temperature, min_p, top_k, top_p. Every row draws from its own key, so a row's tokens do not depend on its batch. On
several devices each keeps its part of the vocabulary; only a few candidates of each row are sent
(`sharding.reductions`).
"""

from __future__ import annotations

from llama_jax.sampling.params import GREEDY_BELOW, MAX_LOGPROBS, SamplingParams
from llama_jax.sampling.sampler import (
    FULL,
    GREEDY,
    Logprobs,
    SamplerProfile,
    SamplerState,
    make_sampler,
    sample,
    sampler_axes,
    token_logprobs,
)

__all__ = [
    "FULL",
    "GREEDY",
    "GREEDY_BELOW",
    "MAX_LOGPROBS",
    "Logprobs",
    "SamplerProfile",
    "SamplerState",
    "SamplingParams",
    "make_sampler",
    "sample",
    "sampler_axes",
    "token_logprobs",
]
