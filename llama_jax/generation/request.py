"""Requests: prompts and sampling parameters, checked before any device is used."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import RequestError
from llama_jax.generation.constraints import constraints_of
from llama_jax.model.loaded import Model
from llama_jax.sampling import GREEDY, Constraint, SamplerProfile, SamplingParams
from llama_jax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Row:
    """One continuation of a prompt.

    Attributes:
      prompt: index of the prompt.
      params: sampling parameters, with the row's own seed if the request has one.
      limit: most tokens to generate.
      constraints: of this continuation alone, in their initial state.
    """

    prompt: int
    params: SamplingParams
    limit: int
    constraints: tuple[Constraint, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether it takes the most likely tokens and nothing modifies the logits."""
        return not self.constraints and SamplerProfile.of([self.params]) == GREEDY


@dataclass(frozen=True)
class Requests:
    """A batch of prompts, ready to run.

    Attributes:
      prompts: token ids; params: of each prompt.
      rows: the continuations, those of one prompt adjacent.
      adapters: name of the adapter of each prompt, "" for none.
    """

    prompts: tuple[list[int], ...]
    params: tuple[SamplingParams, ...]
    rows: tuple[Row, ...]
    adapters: tuple[str, ...]

    @functools.cached_property
    def continuations(self) -> tuple[tuple[Row, ...], ...]:
        """The rows of each prompt."""
        return tuple(tuple(rows) for _, rows in itertools.groupby(self.rows, key=lambda row: row.prompt))

    def prompt_of(self, row: int) -> list[int]:
        """Prompt token ids of a row."""
        return self.prompts[self.rows[row].prompt]


def check_prompts(prompts: Any) -> None:
    """Raises RequestError for a single text in place of several prompts: it would silently be split into characters."""
    if isinstance(prompts, str | bytes):
        raise RequestError(
            "prompts must be a list of prompts, not a single text",
            param="prompts",
            hint="pass [prompt], or use generate",
        )


def check_stream(requests: Requests) -> None:
    """Raises RequestError if a stream would not be a single growing text."""
    if len(requests.rows) != 1:
        raise RequestError("a stream has one continuation: n must be 1", param="n", hint="use batch_generate")
    requests.params[0].check_generates("a stream")


def sampling(params: Any, fields: Mapping[str, Any]) -> Any:
    """Sampling parameters, one for all or one for each, with some fields replaced; greedy by default."""
    base = SamplingParams(temperature=0.0) if params is None else params
    if isinstance(base, SamplingParams):
        return dataclasses.replace(base, **fields) if fields else base
    return [dataclasses.replace(p, **fields) for p in base] if fields else list(base)


def prepare(
    model: Model,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams],
    adapter: str | Sequence[str] = "",
) -> Requests:
    """Checks everything that can be checked before a device is used.

    Raises:
      RequestError: a prompt or a parameter is invalid, or a prompt exceeds the model's context.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise RequestError(
            f"{len(prompts)} prompts but {len(each)} sampling parameters",
            param="params",
            hint="give one SamplingParams for all, or one for each prompt",
        )
    config = model.config
    for p in each:
        p.check_vocab(config.vocab_size)
    ids = [encode_prompt(tokenizer, p) for p in prompts]
    for i, tokens in enumerate(ids):
        bad = next((t for t in (min(tokens), max(tokens)) if not 0 <= t < config.vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"prompt {i} holds token id {bad}; the vocabulary has {config.vocab_size}",
                param="prompt",
                hint="encode the prompt with this model's tokenizer",
            )
    if tokenizer is None and any(p.stop for p in each):
        raise RequestError("stop strings need a tokenizer", param="stop", hint="use stop_token_ids")
    rows = [
        Row(
            i,
            _with_seed(p, copy),
            token_limit(config, len(ids[i]), p.max_tokens),
            constraints_of(tokenizer, ids[i], p, config.vocab_size, model.eos_token_ids),
        )
        for i, p in enumerate(each)
        for copy in range(p.n)
    ]
    return Requests(tuple(ids), tuple(each), tuple(rows), _adapter_names(adapter, len(ids)))


def _adapter_names(names: str | Sequence[str], prompts: int) -> tuple[str, ...]:
    each = [names] * prompts if isinstance(names, str) else list(names)
    if len(each) != prompts or not all(isinstance(name, str) for name in each):
        raise RequestError(
            f"{len(each)} names of adapters for {prompts} prompts",
            param="adapter",
            hint="give one name for all prompts or one for each, '' for none",
        )
    return tuple(each)


def _with_seed(params: SamplingParams, copy: int) -> SamplingParams:
    """With n > 1 and a seed, the continuations take seed, seed + 1, ..."""
    if params.seed is None or not copy:
        return params
    return dataclasses.replace(params, seed=(params.seed + copy) % 2**64)


def encode_prompt(tokenizer: Tokenizer | None, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, with BOS if the model wants one; ids are returned unchanged."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(
                "without a tokenizer a prompt must be token ids", param="prompt", hint="pass a list of token ids"
            )
        ids = tokenizer.encode(prompt)
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
    else:
        if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes):
            raise RequestError(
                f"a prompt must be text or a list of token ids; got {type(prompt).__name__}",
                param="prompt",
                hint="decode bytes as UTF-8; wrap a single id in a list",
            )
        given: Any = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        ids = list(given)
        if not set(map(type, ids)) <= {int}:  # fast for a long prompt of plain integers
            for token in ids:
                if not isinstance(token, int | np.integer) or isinstance(token, bool):
                    raise RequestError(
                        f"the prompt holds {token!r}, which is not a token id",
                        param="prompt",
                        hint="token ids are integers",
                    )
            ids = [int(token) for token in ids]
    if not ids:
        raise RequestError("the prompt is empty", param="prompt", hint="give at least one token")
    return ids


def token_limit(config: LlamaConfig, prompt_length: int, max_tokens: int | None) -> int:
    """The most tokens that may follow a prompt; the model's context bounds both together.

    A prompt that fills the context leaves room for none, and is accepted only with `max_tokens=0`.

    Raises:
      RequestError: the prompt, or prompt and max_tokens, exceed the context.
    """
    context = config.context_length
    if prompt_length > context or (prompt_length == context and max_tokens != 0):
        raise RequestError(
            f"the prompt has {prompt_length} tokens, the model's context is {context}",
            param="prompt",
            hint="shorten the prompt",
        )
    if max_tokens is None:
        return context - prompt_length
    if prompt_length + max_tokens > context:
        raise RequestError(
            f"{prompt_length} prompt tokens and max_tokens={max_tokens} exceed the model's context of {context}",
            param="max_tokens",
            hint=f"max_tokens can be {context - prompt_length} at most",
        )
    return max_tokens
