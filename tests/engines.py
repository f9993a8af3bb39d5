"""Small engines for tests, and what their answers must be: what a request gets alone, without engine and cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import load_golden, random_params, tiny_config

from llama_jax.engine import drafting
from llama_jax.engine.core import Core, Drawn
from llama_jax.engine.drafting import Drafter, NGrams
from llama_jax.engine.rules import Rule
from llama_jax.engine.settings import EngineSettings
from llama_jax.model import forward
from llama_jax.model.loaded import Model
from llama_jax.sampling import FULL, Constraint, SamplingParams, make_sampler, sample

Asked = tuple[list[int], SamplingParams]


def small_settings(**changes: Any) -> EngineSettings:
    """Three rows of up to 96 tokens, steps of at most 24 tokens; one size of each program."""
    fields: dict[str, Any] = {
        "rows": 3,
        "context": 96,
        "pages": 18,
        "decode_rows": (3,),
        "mixed_tokens": (24,),
        "chunk_rows": 2,
        "page_size": 16,
    }
    return EngineSettings(**fields | changes)


@functools.cache
def golden_model(case: str) -> Model:
    """A golden model in float32."""
    golden = load_golden(case)
    return Model(golden.params, golden.config, name=case)


@functools.cache
def tiny_model(seed: int = 0) -> Model:
    """A model of one layer that compiles in no time."""
    config = tiny_config(max_position_embeddings=128)
    return Model(random_params(config, seed), config, name="tiny")


@dataclass(frozen=True)
class Alone:
    """The result of a request that runs alone: its tokens, their log-probabilities, why it ended, and those of the
    prompt's tokens but the first."""

    tokens: tuple[int, ...]
    logprobs: list[float]
    ending: str
    prompt_logprobs: np.ndarray


_LENGTH = 128
_forward = jax.jit(forward, static_argnames="config")
_sample = jax.jit(sample, static_argnames="profile")


def alone(model: Model, asked: Asked, allowed: Callable[[list[int]], Any] | None = None) -> Alone:
    """Without a cache: the whole text once more for each token.

    Args:
      allowed: bool [vocab], which tokens may follow those drawn so far. Without any, the text has ended.
    """
    prompt, params = asked
    config = model.config
    profile, state = make_sampler([params], [prompt], config.vocab_size, model.eos_token_ids, FULL)
    text, drawn, found, ending = list(prompt), [], [], "length"
    of_prompt = np.zeros(0)
    for count in range(max(params.max_tokens or 0, 1)):
        padded = np.zeros((1, _LENGTH), np.int32)
        padded[0, : len(text)] = text
        positions = np.where(np.arange(_LENGTH) < len(text), np.arange(_LENGTH), -1)[None].astype(np.int32)
        lengths = np.asarray([len(prompt)], np.int32)
        logits, _ = _forward(model.params, config, padded, positions, rope_lengths=lengths)
        if not count:
            each = np.asarray(jax.nn.log_softmax(logits[0, : len(prompt) - 1]))
            of_prompt = each[np.arange(len(prompt) - 1), prompt[1:]]
        if not params.max_tokens:
            break
        logits = raw = logits[:, len(text) - 1]
        if allowed is not None:
            may = np.asarray(allowed(drawn))
            if not may.any():
                ending = "stop"
                break
            logits = jnp.where(may, logits, -jnp.inf)
        token, state, logprobs = _sample(logits, state, profile)
        text.append(int(token[0]))
        drawn.append(text[-1])
        found.append(float(logprobs.token[0] if allowed is None else jax.nn.log_softmax(raw[0])[token[0]]))
        if text[-1] in params.ending_ids(model.eos_token_ids) and len(drawn) >= params.min_tokens:
            ending = "stop"
            break
    return Alone(tuple(drawn), found, ending, of_prompt)


class Guesses(Drafter):
    """Drafts of known answers, with every third token of them wrong, and none at times.

    Attributes:
      known: prompts and their answers.
    """

    known: ClassVar[list[tuple[list[int], tuple[int, ...]]]] = []

    @classmethod
    def instead(cls, patch: pytest.MonkeyPatch) -> None:
        """Has engines try these, and not what the device finds in the texts."""
        patch.setattr(drafting, "Drafter", cls)
        patch.setattr(NGrams, "on_device", False)

    def active(self, count: int) -> bool:
        return count % 7 != 0

    def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        text = list(tokens)
        for prompt, answer in self.known:
            if [*prompt, *answer][: len(text)] == text and len(text) >= len(prompt):
                at = len(text) - len(prompt)
                return tuple(t if (at + i) % 3 else t + 1 for i, t in enumerate(answer[at : at + most]))
        raise AssertionError("a text that nobody asked for")

    def drawn(self, drafted: int, count: int, text: int) -> None:
        assert 1 <= count <= drafted + 1


def some_requests(model: Model, count: int, seed: int = 0) -> list[Asked]:
    """Requests of every kind: greedy and seeded, with penalties, biases and log-probabilities; some prompts begin
    alike."""
    rng = np.random.default_rng(seed)
    vocab = model.config.vocab_size
    shared = rng.integers(3, vocab, 40).tolist()
    kinds: Sequence[dict[str, Any]] = (
        {"temperature": 0.0},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
        {"temperature": 1.1, "top_k": 7, "logprobs": 3},
        {"temperature": 0.0, "logit_bias": {5: 2.5, 6: -4.0}, "min_tokens": 3},
        {"temperature": 0.7, "presence_penalty": 0.8, "stop_token_ids": [7, 9, 11]},
    )
    asked = []
    for i in range(count):
        own = rng.integers(3, vocab, int(rng.integers(1, 30))).tolist()
        prompt = shared[: int(rng.integers(10, 41))] + own if i % 2 else own
        params = SamplingParams(seed=i, max_tokens=int(rng.integers(1, 20)), **kinds[i % len(kinds)])
        asked.append((prompt, params))
    return asked


def run(
    core: Core,
    asked: Sequence[Asked],
    *,
    arrivals: Sequence[int] | None = None,
    constraints: Mapping[int, Sequence[Constraint]] | None = None,
) -> list[list[Drawn]]:
    """Runs requests that arrive before these steps (all at once by default), some of them with constraints; the news of
    each."""
    arrivals = arrivals or [0] * len(asked)
    waiting = sorted(range(len(asked)), key=lambda i: arrivals[i])
    news: list[list[Drawn]] = [[] for _ in asked]
    of: dict[int, int] = {}
    for step in range(20_000):
        while waiting and arrivals[waiting[0]] <= step:
            i = waiting.pop(0)
            prompt, params = asked[i]
            given = (constraints or {}).get(i)
            rule = Rule(given, params, core.model.config.vocab_size) if given else None
            of[core.add(prompt, params, params.max_tokens or 0, rule=rule)] = i
        for drawn in core.step():
            news[of[drawn.id]].append(drawn)
        if core.idle and not waiting:
            return news
    raise AssertionError(f"the engine does not end: {core.snapshot()}")


def tokens(news: Sequence[Drawn]) -> tuple[int, ...]:
    """All that was drawn for one request."""
    return tuple(token for drawn in news for token in drawn.tokens)


def logprobs(news: Sequence[Drawn]) -> list[float]:
    """Log-probabilities of what was drawn for one request; none unless it asked for them."""
    return [float(x) for drawn in news if drawn.logprobs is not None for x in drawn.logprobs.token]


def assert_as_alone(news: Sequence[Drawn], expected: Alone) -> None:
    """Tokens are those of a request that runs alone, and so are log-probabilities, if there are any."""
    assert tokens(news) == expected.tokens
    found = logprobs(news)
    assert not found or found == pytest.approx(expected.logprobs, abs=2e-4)
