"""The engine over several devices: what it draws on one. Run by tests/test_engine.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
from engines import Guesses, alone, run, small_settings, some_requests, tokens
from helpers import load_golden, random_params, tiny_config

from llama_jax import runtime
from llama_jax.engine.core import Core
from llama_jax.engine.replicas import replicas
from llama_jax.errors import RequestError
from llama_jax.generation.llm import LLM
from llama_jax.layout import param_sharding
from llama_jax.model.fuse import arrange
from llama_jax.model.loaded import Model
from llama_jax.params import flatten, param_specs, unflatten
from llama_jax.sampling import BadWords, SamplingParams
from llama_jax.sharding import make_mesh


def on_mesh(params: Any, config: Any, **sizes: int) -> Model:
    mesh = make_mesh(**sizes)
    where, flat = param_sharding(config, mesh), flatten(params)
    placed = unflatten({spec.name: jax.device_put(flat[spec.name], where(spec)) for spec in param_specs(config)})
    return Model(*arrange(placed, config, mesh), mesh, name="split")


def test_a_split_model_draws_the_same() -> None:
    golden = load_golden("llama3.1-rope")
    config, params = golden.config, golden.params
    single = Model(params, config)
    core = Core(on_mesh(params, config, tensor=2), small_settings(pages=12))
    asked = some_requests(single, 8)
    for request, news in zip(asked, run(core, asked), strict=True):
        assert tokens(news) == alone(single, request).tokens
    for _ in core.programs.compile_all():
        pass
    run(core, asked)
    assert core.programs.late == 0


def test_a_quantised_cache_is_split_by_heads() -> None:
    """Codes and scales of a head are on one device; the tokens are those of one device with such a cache."""
    config = tiny_config(max_position_embeddings=128)
    params = random_params(config)
    one, two = (
        Core(dataclasses.replace(model, kv_dtype="int4"), small_settings(pages=12))
        for model in (Model(params, config), on_mesh(params, config, tensor=2))
    )
    asked = some_requests(one.model, 8)
    for whole, split in zip(run(one, asked), run(two, asked), strict=True):
        assert tokens(split) == tokens(whole)
    cache = two._state.cache
    for x in (*cache.k, *cache.v, *cache.k_scale, *cache.v_scale):
        assert x.sharding.shard_shape(x.shape)[1] * 2 == x.shape[1] == 2


def test_constraints_on_a_split_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a row without; drafts of both are tried with it, and alone, and some steps have none."""
    Guesses.instead(monkeypatch)
    config = tiny_config(max_position_embeddings=128)
    params = random_params(config)
    single = Model(params, config, name="tiny")
    core = Core(on_mesh(params, config, tensor=2), small_settings(drafts=3))
    asked = [([5 + i, 6], SamplingParams(temperature=i % 2, seed=i, max_tokens=12, ignore_eos=True)) for i in range(5)]
    drawn = {token for request in asked for token in alone(single, request).tokens[::2]}
    words = [[token] for token in sorted(drawn)[: config.vocab_size // 2]]
    allowed = [[token] not in words for token in range(config.vocab_size)]
    expected = [
        alone(single, request, (lambda _: allowed) if i < 4 else None).tokens for i, request in enumerate(asked)
    ]
    Guesses.known = [(prompt, answer) for (prompt, _), answer in zip(asked, expected, strict=True)]
    found = run(core, asked[:2], constraints={i: [BadWords(words)] for i in range(2)})
    found += run(core, asked[2:], constraints={i: [BadWords(words)] for i in range(2)})
    assert [tokens(news) for news in found] == expected
    (news,) = run(core, asked[4:])
    assert tokens(news) == expected[4]
    assert core.snapshot().accepted_tokens > 10


def test_a_draft_model_is_split_as_the_model_is() -> None:
    """Each replica has its own; the model drafts for itself, and is right."""
    config = tiny_config(max_position_embeddings=128)
    params = random_params(config)
    single, model, draft = Model(params, config), *(on_mesh(params, config, data=2, tensor=2) for _ in range(2))
    sizes = {"rows": 2, "decode_rows": (2,), "mixed_tokens": (24,), "drafts": 3, "draft_rows": 2, "draft_context": 96}
    with pytest.raises(RequestError, match="other devices"):
        LLM(model, settings=small_settings(**sizes), draft=single)
    cores = LLM(model, settings=small_settings(**sizes), draft=draft)._jobs.engine.cores
    for core in cores:
        assert core.programs._draft is not None
        assert core.programs._draft.model.mesh == core.model.mesh
    asked = [(prompt, SamplingParams(temperature=0.0, max_tokens=9)) for prompt, _ in some_requests(single, 2)]
    for request, news in zip(asked, run(cores[1], asked), strict=True):
        assert tokens(news) == alone(single, request).tokens
    snapshot = cores[1].snapshot()
    assert snapshot.accepted_tokens == snapshot.drafted_tokens > 3


def test_stored_programs_of_a_split_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "programs_dir", lambda platform: tmp_path)
    monkeypatch.setattr("llama_jax.engine.core.compiled_before", lambda *_: {})  # not what another engine has compiled
    # What jax's own cache has is not stored: it is given none of these.
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    try:
        config = tiny_config(max_position_embeddings=128)
        model = on_mesh(random_params(config), config, tensor=2)
        settings = small_settings(rows=2, decode_rows=(2,), mixed_tokens=(24,), pages=17, context=96)
        asked = some_requests(model, 3)
        cores = [Core(model, settings) for _ in range(2)]
        found = []
        for core in cores:
            for _ in core.compile_all():
                pass
            found.append([tokens(news) for news in run(core, asked)])
        assert [core.snapshot().programs_from_cache for core in cores] == [0, len(cores[0].programs.keys)]
        assert found[0] == found[1]
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_replicas_draw_the_same() -> None:
    config = tiny_config(max_position_embeddings=128)
    params = random_params(config)
    single = Model(params, config, name="tiny")
    model = on_mesh(params, config, data=2, tensor=2)
    parts = replicas(model)
    assert len(parts) == 2
    places = [{d.id for d in part.mesh.devices.flat} for part in parts if part.mesh is not None]
    assert sorted(id for place in places for id in place) == list(range(model.mesh.size))  # type: ignore[union-attr]
    for leaf, own in zip(jax.tree.leaves(model.params), jax.tree.leaves(parts[-1].params), strict=True):
        assert {s.data.unsafe_buffer_pointer() for s in own.addressable_shards} <= {
            s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards
        }
    llm = LLM(model, settings=small_settings(pages=12))
    asked = some_requests(single, 12)
    outputs = llm.generate([prompt for prompt, _ in asked], [p for _, p in asked])
    for request, output in zip(asked, outputs, strict=True):
        assert output.outputs[0].token_ids == alone(single, request).tokens
    told = list(llm._jobs.engine.compile_all())
    assert [(news.done, news.total) for news in told] == [(i + 1, len(told)) for i in range(len(told))]
    assert told[-1].left_s == 0 < told[0].left_s
    assert llm.snapshot().programs == sum(len(core.programs.keys) for core in llm._jobs.engine.cores)
    steps = [core.snapshot().steps for core in llm._jobs.engine.cores]
    assert min(steps) > 0.4 * max(steps)
    assert llm.snapshot().steps == sum(steps)
    (output,) = llm.generate([[5, 6, 7] * 8], SamplingParams(seed=3, max_tokens=6, n=3))
    for i, completion in enumerate(output.outputs):
        one = SamplingParams(seed=3 + i, max_tokens=6)
        assert completion.token_ids == alone(single, ([5, 6, 7] * 8, one)).tokens
