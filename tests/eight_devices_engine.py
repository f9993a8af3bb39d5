"""The engine over several devices: what it draws on one. Run by tests/test_engine.py."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from engines import alone, run, small_settings, some_requests, tokens
from helpers import load_golden, random_params, tiny_config

from llama_jax.engine.core import Core
from llama_jax.errors import RequestError
from llama_jax.model.fuse import arrange
from llama_jax.model.loaded import Model
from llama_jax.sampling import BadWords, SamplingParams
from llama_jax.sharding import make_mesh


def on_mesh(params: Any, config: Any, **sizes: int) -> Model:
    mesh = make_mesh(**sizes, devices=jax.devices()[:2])
    return Model(*arrange(params, config, mesh), mesh, name="split")


@pytest.mark.parametrize("case", ["tiny", "llama3.1-rope"])
def test_a_split_model_draws_the_same(case: str) -> None:
    if case == "tiny":
        config = tiny_config(max_position_embeddings=128)
        params = random_params(config)
    else:
        golden = load_golden(case)
        config, params = golden.config, golden.params
    single = Model(params, config, name=case)
    core = Core(on_mesh(params, config, tensor=2), small_settings(pages=12))
    asked = some_requests(single, 8)
    for request, news in zip(asked, run(core, asked), strict=True):
        assert tokens(news) == alone(single, request).tokens
    for _ in core.programs.compile_all():
        pass
    run(core, asked)
    assert core.programs.late == 0


def test_constraints_on_a_split_vocabulary() -> None:
    config = tiny_config(max_position_embeddings=128)
    params = random_params(config)
    single = Model(params, config, name="tiny")
    core = Core(on_mesh(params, config, tensor=2), small_settings())
    asked = [([5 + i, 6], SamplingParams(temperature=i % 2, seed=i, max_tokens=12, ignore_eos=True)) for i in range(4)]
    drawn = {token for request in asked for token in alone(single, request).tokens[::2]}
    words = [[token] for token in sorted(drawn)[: config.vocab_size // 2]]
    allowed = [[token] not in words for token in range(config.vocab_size)]
    found = run(core, asked, constraints={i: [BadWords(words)] for i in range(4)})
    for request, news in zip(asked, found, strict=True):
        assert tokens(news) == alone(single, request, lambda _: allowed).tokens


def test_replicas_are_refused() -> None:
    config = tiny_config()
    with pytest.raises(RequestError, match="2 replicas"):
        Core(on_mesh(random_params(config), config, data=2), small_settings())
