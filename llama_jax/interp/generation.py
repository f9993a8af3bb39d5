"""Generation with a patch, in the functional loop (`llama_jax.decode`): a static batch and a dense cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llama_jax.cache import NewCache
from llama_jax.decode import buckets, loop
from llama_jax.decode.prefill import prefill
from llama_jax.errors import RequestError
from llama_jax.generation.request import Prompt, check_prompts, prepare, sampling
from llama_jax.kernels.dispatch import using
from llama_jax.model import Patch
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams, make_sampler
from llama_jax.sharding import on
from llama_jax.text.tokenizer import Tokenizer

STRIDE = 64
"""Decode steps per dispatch."""


def patched_generate(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    patch: Patch,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    **fields: Any,
) -> list[list[int]]:
    """Continues prompts with changed activations, of the prompts' tokens and of the new ones.

    The patch sees a batch that is padded to the left (`Place.positions` is negative for padding) and one token of each
    row at a time while it decodes. The prompts run as one batch, which has to fit into memory.

    Args:
      tokenizer: None for prompts of token ids.
      prompts, params, fields: as for `batch_generate`; greedy by default. One continuation each, no stop strings, and
        no structured output.

    Returns:
      New token ids of each prompt; the last is the id that ended the text, if one did. With a seed, the tokens of
      `batch_generate` where the patch changes nothing.

    Raises:
      RequestError: a parameter is out of range or not available here, or the patch names no activation.
    """
    check_prompts(prompts)
    if not len(prompts):
        return []
    requests = prepare(model, tokenizer, prompts, sampling(params, fields))
    for each in requests.params:
        each.check_generates("a continuation with a patch")
        if each.stop or each.n != 1:
            _unavailable("stop" if each.stop else "n")
    if any(row.constraints for row in requests.rows):
        _unavailable("structured output")
    with on(model.mesh), using(**model.kernels):
        return _run(
            model, requests.prompts, [row.params for row in requests.rows], [r.limit for r in requests.rows], patch
        )


def _unavailable(what: str) -> None:
    raise RequestError(
        f"{what} is not available with a patch",
        param=what,
        hint="end texts by stop_token_ids or max_tokens, and repeat a prompt for several continuations",
    )


def _run(
    model: Model, prompts: Sequence[list[int]], params: list[SamplingParams], limits: list[int], patch: Patch
) -> list[list[int]]:
    config, batch = model.config, buckets.batch_bucket(len(prompts))
    padding = batch - len(prompts)

    def rows(values: Sequence[int], idle: int) -> np.ndarray:
        return np.asarray([*values, *[idle] * padding], np.int32)

    capacity = buckets.cache_bucket(buckets.prompt_bucket(max(map(len, prompts))) + max(limits))
    cache = NewCache(batch, capacity, model.cache_dtype, None)
    logits, made = prefill(model.params, config, prompts, cache, patch=patch)
    every, of_all = [*params, *[params[0]] * padding], [*prompts, *[prompts[0]] * padding]
    profile, sampler = make_sampler(every, of_all, config.vocab_size, model.eos_token_ids)
    lengths = rows([len(prompt) for prompt in prompts], 1)
    adapter_ids = np.zeros((batch,), np.int32)
    state, progress = loop.begin(logits, made, sampler, lengths, rows(limits, 0), adapter_ids, profile=profile)
    found: list[list[int]] = [[] for _ in prompts]
    while True:
        tokens, new, done = jax.device_get((progress.tokens, progress.new, progress.done))
        for row, ids in enumerate(found):
            ids.extend(tokens[row, : new[row]].tolist())
        if done.all():
            return found
        steps = np.int32(STRIDE)
        state, progress = loop.advance(
            model.params, state, steps, config=config, profile=profile, stride=STRIDE, patch=patch
        )
