"""Adapters in an engine: several in a batch, each request with the tokens of a model merged with its own."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import alone, small_settings, tiny_model
from helpers import TINY, random_params, tiny_config

import llama_jax as lj
from llama_jax.adapters import Adapter, LoraConfig, attach, merge, new_adapter, with_adapter
from llama_jax.engine.adapter_pool import AdapterPool
from llama_jax.errors import Overloaded, RequestError
from llama_jax.generation.engine import Engine
from llama_jax.generation.llm import LLM
from llama_jax.generation.streams import Request
from llama_jax.model.fuse import fuse_params
from llama_jax.model.loaded import Model
from llama_jax.runtime import count_compilations
from llama_jax.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


def an_adapter(model: Model, seed: int, **fields: Any) -> Adapter:
    """An adapter that changes what the model says."""
    rng = np.random.default_rng(seed)
    lora = LoraConfig(**{"rank": 2, "alpha": 4, "target_modules": "all-linear"} | fields)
    fresh = new_adapter(model.params, model.config, lora, jax.random.key(seed))
    return jax.tree.map(lambda x: np.asarray(x + 0.5 * rng.standard_normal(x.shape), np.float32), fresh)


def merged(model: Model, adapter: Adapter | None) -> Model:
    if adapter is None:
        return model
    params, config = merge(model.params, model.config, adapter)
    return replace(model, params=params, config=config)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 40, int(n)).tolist() for n in rng.integers(3, 30, count)]


def tokens_of(outputs: Any) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in outputs]


def expected(model: Model, adapter: Adapter | None, prompt: list[int]) -> tuple[int, ...]:
    return tuple(alone(merged(model, adapter), (prompt, GREEDY)).tokens)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_the_output_projection_has_slots(tied: bool) -> None:
    """In prompts, in decoding and in the log-probabilities of prompts; loaded later too."""
    config = tiny_config(max_position_embeddings=128, tie_word_embeddings=tied)
    model = Model(random_params(config), config, name="tiny")
    given = {"head": an_adapter(model, 1, target_modules=("lm_head",))}
    llm = LLM(model, settings=small_settings(), adapters=given, max_adapters=2)
    given["all"] = an_adapter(model, 2, target_modules=("lm_head", "q_proj"))
    llm.load_adapter("all", given["all"])

    def apart(name: str) -> Model:
        if not name or not tied:
            return merged(model, given.get(name))
        params, its_config = attach(model.params, config, given[name])  # merging would end the tie
        return replace(model, params=params, config=its_config)

    asked, names, scored = prompts(5), ["head", "", "all", "head", "all"], replace(GREEDY, prompt_logprobs=0)
    for name, prompt, output in zip(names, asked, llm.generate(asked, scored, adapter=names), strict=True):
        want = alone(apart(name), (prompt, scored))
        assert tokens_of([output]) == [want.tokens]
        assert output.prompt_logprobs is not None
        found = [entry.logprob for entry in output.prompt_logprobs if entry is not None]
        np.testing.assert_allclose(found, want.prompt_logprobs, atol=2e-4)


@pytest.mark.slow
def test_adapters_come_and_go() -> None:
    """Different ranks, DoRA and plain, in one batch; loaded into a used slot; nothing is compiled; and what one adapter
    has computed of a prompt is not found by the next in its slot."""
    model = tiny_model()
    first = {"plain": an_adapter(model, 1), "dora": an_adapter(model, 2, rank=3, dora=True, target_modules=("q_proj",))}
    llm = LLM(model, settings=small_settings(), adapters=first, max_adapters=2, ahead=True)
    assert llm.settings.prefix_cache
    asked, names = prompts(6), ["plain", "", "dora", "dora", "plain", ""]
    found = tokens_of(llm.generate(asked, GREEDY, adapter=names))
    want = [expected(model, first.get(name), prompt) for name, prompt in zip(names, asked, strict=True)]
    assert found == want
    assert len({expected(model, adapter, asked[0]) for adapter in (None, *first.values())}) == 3

    prompt = list(range(36))
    assert tokens_of(llm.generate([prompt], GREEDY, adapter="plain")) == [expected(model, first["plain"], prompt)]
    other = an_adapter(model, 3, target_modules=("v_proj", "down_proj"), rank=5, alpha=3)
    with pytest.raises(Overloaded, match="all 2 slots"):
        llm.load_adapter("other", other)
    want_other, compiled = expected(model, other, prompt), count_compilations().count
    llm.unload_adapter("plain")
    llm.load_adapter("other", other)
    (output,) = llm.generate([prompt], GREEDY, adapter="other")
    assert (output.cached_tokens, tokens_of([output])) == (0, [want_other])
    (again,) = llm.generate([prompt], GREEDY, adapter="other")
    assert (again.cached_tokens, tokens_of([again])) == (32, [want_other])
    assert count_compilations().count == compiled
    with pytest.raises(RequestError, match="there is no adapter 'plain'"):
        llm.generate([prompt], GREEDY, adapter="plain")
    with pytest.raises(RequestError, match="2 names of adapters for 1 prompts"):
        llm.generate([prompt], GREEDY, adapter=["dora", "other"])


def test_adapters_that_cannot_share_a_batch() -> None:
    model = tiny_model()
    for fields, says in (
        ({"modules_to_save": ("lm_head",), "target_modules": ("q_proj",)}, "changes lm_head, which cannot differ"),
        ({"target_modules": ("embed_tokens",)}, "changes embed, which cannot differ"),
    ):
        with pytest.raises(RequestError, match=says) as caught:
            LLM(model, settings=small_settings(), adapters={"a": an_adapter(model, 1, **fields)})
        assert "merge-lora" in caught.value.hint
    for options, says in (
        ({"count": 0}, "1 adapters for 0 slots"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 1}, "has rank 2"),
    ):
        with pytest.raises(RequestError, match=says):
            AdapterPool([model], {"a": an_adapter(model, 1, target_modules=("q_proj",))}, **options)
    pool = AdapterPool([model], {"a": an_adapter(model, 1, target_modules=("q_proj",))})
    for fields, says in (
        ({"target_modules": ("v_proj",)}, "changes layers.0.attn.v_proj, which has no slots"),
        ({"target_modules": ("lm_head",)}, "changes lm_head, which has no slots"),
        ({"rank": 3}, "has rank 3, the slots have 2"),
        ({"target_modules": ("q_proj",), "dora": True}, "magnitudes"),
    ):
        with pytest.raises(RequestError, match=says) as caught:
            pool.prepare("b", an_adapter(model, 2, **fields))
        assert caught.value.hint
    with pytest.raises(RequestError, match="'a' already"):
        pool.put("a", pool.prepare("a", an_adapter(model, 2, target_modules=("q_proj",))), ())
    plain = LLM(model, settings=small_settings())
    for call in (lambda: plain.load_adapter("a", an_adapter(model, 1)), lambda: plain.generate([[1]], adapter="a")):
        with pytest.raises(RequestError, match="no adapters"):
            call()


def test_adapters_of_nan_are_refused_at_every_door() -> None:
    """One product has all slots, and zero times NaN is NaN: such an adapter would change requests without it."""
    model = tiny_model()
    sound = an_adapter(model, 1, target_modules=("q_proj", "v_proj"), dora=True)
    pool = AdapterPool([model], {"a": sound}, count=2)
    for member, value in (("a", np.nan), ("b", np.inf), ("magnitude", np.nan)):

        def spoil(path: Any, x: np.ndarray, member: str = member, value: float = value) -> np.ndarray:
            wanted = jax.tree_util.keystr(path).endswith(f"['0']['attn']['v_proj']['{member}']")
            return np.full_like(x, value) if wanted else x

        bad = jax.tree_util.tree_map_with_path(spoil, sound)
        for door in (
            lambda bad=bad: attach(model.params, model.config, bad),
            lambda bad=bad: merge(model.params, model.config, bad),
            lambda bad=bad: with_adapter(model, bad),
            lambda bad=bad: pool.prepare("b", bad),
            lambda bad=bad: AdapterPool([model], {"b": bad}),
            lambda bad=bad: lj.generate(model, None, [1], adapter=bad),
        ):
            with pytest.raises(RequestError, match=r"layers\.0\.attn\.v_proj\.\w+ has numbers that are NaN") as caught:
                door()
            assert "diverged" in caught.value.hint
    whole = an_adapter(model, 1, target_modules=("q_proj",), modules_to_save=("lm_head",))
    spoilt = replace(whole, whole=jax.tree.map(lambda x: x * np.nan, whole.whole))
    with pytest.raises(RequestError, match=r"adapter's lm_head\.weight has numbers"):
        attach(model.params, model.config, spoilt)
    moe = Model(random_params(TINY["sigmoid-moe"]), TINY["sigmoid-moe"])
    experts = an_adapter(moe, 1, target_modules=(), target_parameters=("experts.down_proj",))
    with pytest.raises(RequestError, match=r"moe\.experts\.down_proj\.a has numbers"):
        attach(moe.params, moe.config, jax.tree.map(lambda x: x * np.nan, experts))


@pytest.mark.slow
def test_a_slot_is_not_taken_from_a_request() -> None:
    """A dropped adapter stays for requests that have begun with it."""
    model = tiny_model()
    given = {"a": an_adapter(model, 1), "b": an_adapter(model, 2)}
    long, prompt = replace(GREEDY, max_tokens=60), [1, 2, 3]

    async def play() -> tuple[Any, ...]:
        async with Engine(model, settings=small_settings(), adapters=given, ahead=False) as engine:
            stream = engine.stream(Request(prompt, long, adapter="a"))
            begun = await anext(stream)
            await engine.unload_adapter("a")
            with pytest.raises(RequestError, match="no adapter 'a'"):
                await engine.generate(Request(prompt, GREEDY, adapter="a"))
            with pytest.raises(Overloaded):
                await engine.load_adapter("c", an_adapter(model, 3))
            pieces = [begun, *[piece async for piece in stream]]
            await engine.load_adapter("c", an_adapter(model, 3))
            other = await engine.generate(Request(prompt, GREEDY, adapter="c"))
            return tuple(t for piece in pieces for t in piece.token_ids), tokens_of([other])[0], engine.adapters

    drawn, other, names = asyncio.run(play())
    assert drawn == tuple(alone(merged(model, given["a"]), (prompt, long)).tokens)
    assert other == expected(model, an_adapter(model, 3), prompt)
    assert names == ("b", "c")


@pytest.mark.slow
def test_adapters_of_functions() -> None:
    """One for the call, or one for each prompt: an `Adapter`, or the name of one of the model's."""
    model = tiny_model()
    first, second = an_adapter(model, 1), an_adapter(model, 2, modules_to_save=("lm_head",))
    named = replace(model, adapters={"first": first})
    prompt = [3, 4, 5]
    assert lj.generate(named, None, prompt, GREEDY, adapter="first") == ""
    for given, adapter in ((first, first), ("first", first), (second, second), (None, None)):
        (output,) = lj.batch_generate(named, None, [prompt], GREEDY, adapter=given)
        assert tokens_of([output]) == [expected(model, adapter, prompt)]
    outputs = lj.batch_generate(named, None, [prompt, prompt], GREEDY, adapter=[None, first])
    assert tokens_of(outputs) == [expected(model, None, prompt), expected(model, first, prompt)]
    steps = lj.stream_generate(named, None, prompt, GREEDY, adapter=second)
    assert tuple(step.token for step in steps) == expected(model, second, prompt)


@pytest.mark.slow
def test_eight_adapters_in_a_batch_of_64() -> None:
    """On fused weights with experts and a shared expert: each row as alone, in the same engine."""
    config = TINY["sigmoid-moe"]
    model = Model(random_params(config), config, name="tiny")
    adapters = {f"a{i}": an_adapter(model, i, rank=i % 4 + 1, dora=i % 3 == 0) for i in range(8)}
    fused = replace(model, params=fuse_params(model.params, config))
    settings = small_settings(rows=64, decode_rows=(64,), mixed_tokens=(128,), pages=64 * 4, context=64, chunk_rows=8)
    llm = LLM(fused, settings=settings, adapters=adapters)
    asked = [prompt[:20] for prompt in prompts(64)]
    names = [f"a{i % 8}" for i in range(64)]
    together = tokens_of(llm.generate(asked, GREEDY, adapter=names))
    apart = [tokens_of(llm.generate([p], GREEDY, adapter=name))[0] for p, name in zip(asked, names, strict=True)]
    assert together == apart
    for i in range(8):
        own = merged(model, adapters[names[i]])
        assert together[i] == tuple(alone(own, (asked[i], GREEDY)).tokens)


def test_slots_of_adapters_take_the_dtype_of_the_model() -> None:
    model = replace(tiny_model(), params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_model().params))
    pool = AdapterPool([model], {"a": an_adapter(model, 1, rank=4)}, count=3, rank=8)
    leaf = pool.slots[0].tree["layers"]["0"]["attn"]["q_proj"]
    assert {name: (x.shape, x.dtype.name) for name, x in leaf.items()} == {
        "a": ((4, 8, 16), "bfloat16"),
        "b": ((4, 8, 32), "bfloat16"),
        "scale": ((4,), "float32"),
    }
