"""`batch_invariant`: a request gets the same tokens and log-probabilities, to the bit, in any company."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import Asked, new_core, run, small_settings
from helpers import random_params, tiny_config

from llama_jax.config import LayerSpec
from llama_jax.engine.core import Core, Drawn
from llama_jax.engine.settings import EngineSettings
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams


@functools.cache
def bfloat16_model() -> Model:
    layer = LayerSpec(mlp=96)
    config = tiny_config(layer, layer, hidden_size=64, head_dim=16, vocab_size=96, max_position_embeddings=256)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
    return Model(params, config, name="tiny in bfloat16")


def settings(**changes: Any) -> EngineSettings:
    """Chunks of 32 tokens, of which a step has two."""
    fields: dict[str, Any] = {"decode_rows": (3,), "mixed_tokens": (64,), "pages": 15, "batch_invariant": True}
    return small_settings(**fields | changes)


KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"temperature": 1.1, "top_k": 7},
    {"temperature": 1.0},
    {"temperature": 0.0, "logit_bias": {5: 2.5, 6: -4.0}, "min_tokens": 3},
    {"temperature": 0.7, "presence_penalty": 0.8, "stop_token_ids": [7, 9, 11]},
    {"temperature": 0.0, "prompt_logprobs": 1},
)


def some_requests(rng: np.random.Generator, vocab: int, count: int) -> list[Asked]:
    """Of every kind, with prompts of one token to three chunks, most of which begin with a prefix that others have."""
    shared = np.random.default_rng(7).integers(3, vocab, 80)
    asked = []
    for i in range(count):
        tail = rng.integers(3, vocab, int(rng.integers(1, 40))).tolist()
        head = shared[: int(rng.choice([0, 20, 31, 32, 63, 64, 65, 80]))].tolist()
        prompt = (head + tail)[:80]
        kind = KINDS[int(rng.integers(len(KINDS)))]
        params = SamplingParams(seed=int(rng.integers(1000)), logprobs=2, max_tokens=int(rng.integers(3, 16)), **kind)
        asked.append((prompt, params))
    return asked


def bits(news: list[Drawn]) -> tuple[bytes, ...]:
    """Everything that a request got."""
    found: list[Any] = [news[-1].ending.encode()]
    for drawn in news:
        found.append(np.asarray(drawn.tokens).tobytes())
        for each in (drawn.logprobs, drawn.prompt_logprobs):
            if each is not None:
                found += [each.token.tobytes(), each.top_ids.tobytes(), each.top.tobytes()]
    joined: tuple[bytes, ...] = tuple(found)
    return joined


def test_x() -> None:
    model = bfloat16_model()
    for steps in (1,):
        core = new_core(model, settings(steps=steps))
        bad = 0
        for seed in range(10):
            rng = np.random.default_rng(seed)
            asked = some_requests(rng, model.config.vocab_size, 7)
            one = [
                bits(
                    run(
                        new_core(
                            model,
                            settings(
                                steps=steps,
                            ),
                        ),
                        [each],
                    )[0]
                )
                for each in asked
            ]
            arrivals = rng.integers(0, 12, 7).tolist()
            for _ in range(2):
                for request, alone, news in zip(asked, one, run(core, asked, arrivals=arrivals)):
                    bad += bits(news) != alone
        print(bad, core.snapshot().counts)
        assert not bad
