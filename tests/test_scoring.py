"""Scores without new text: `max_tokens=0`, `unembed`; and a model's one line."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN_CASES, TOLERANCE, error, load_golden, random_params, run, tiny_config

import llama_jax as lj
from llama_jax import generation
from llama_jax.cli.chat_conversation import default_sampling, with_setting
from llama_jax.errors import RequestError
from llama_jax.model.fuse import arrange
from llama_jax.model.loaded import Model
from llama_jax.sampling import SamplingParams


@pytest.fixture(scope="module")
def golden() -> Model:
    case = load_golden("llama2-mha")
    return Model(case.params, case.config)


def prompts_of(model: Model, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths]


# max_tokens=0.


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"page_size": 16}], ids=str)
def test_scores_equal_forward(golden: Model, fields: dict[str, Any]) -> None:
    prompts = prompts_of(golden, 1, 5, 33)
    outputs = lj.batch_generate(golden, None, prompts, max_tokens=0, prompt_logprobs=2, logprobs=1, **fields)
    for prompt, output in zip(prompts, outputs, strict=True):
        want = np.asarray(jax.nn.log_softmax(run(golden.params, golden.config, jnp.asarray([prompt]))[0][0]))
        assert output.prompt_logprobs is not None
        assert [None if t is None else t.token_id for t in output.prompt_logprobs] == [None, *prompt[1:]]
        for at, entry in enumerate(output.prompt_logprobs[1:], 1):
            assert entry is not None
            assert entry.logprob == pytest.approx(want[at - 1, prompt[at]], abs=2e-4)
        assert len(output.outputs) == fields.get("n", 1)
        for completion in output.outputs:
            assert (completion.token_ids, completion.text, completion.finish_reason) == ((), "", "length")
            assert completion.logprobs == ()
        assert output.timing.ttft_s > 0
        assert output.timing.prompt_tps > 0
        assert output.timing.generation_tps == 0


@pytest.mark.slow
def test_scored_rows_among_others(golden: Model) -> None:
    """A row that asks for no token neither gets one nor changes what the others get."""
    prompts = prompts_of(golden, 5, 9, 4)
    params = [SamplingParams(seed=2, max_tokens=n, prompt_logprobs=0, ignore_eos=True) for n in (0, 7, 0)]
    scored, generated, _ = lj.batch_generate(golden, None, prompts, params)
    (alone,) = lj.batch_generate(golden, None, [prompts[1]], params[1])
    assert scored.outputs[0].token_ids == ()
    assert scored.outputs[0].finish_reason == "length"
    assert generated.outputs[0].token_ids == alone.outputs[0].token_ids
    assert len(generated.outputs[0].token_ids) == 7
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == 5


def test_a_prompt_may_fill_the_context_to_be_scored() -> None:
    config = tiny_config(max_position_embeddings=32)
    model = Model(random_params(config), config)
    (prompt,) = prompts_of(model, 32)
    (output,) = lj.batch_generate(model, None, [prompt], max_tokens=0, prompt_logprobs=0)
    want = np.asarray(jax.nn.log_softmax(run(model.params, config, jnp.asarray([prompt]))[0][0]))
    assert output.prompt_logprobs is not None
    for at, entry in enumerate(output.prompt_logprobs[1:], 1):
        assert entry is not None
        assert entry.logprob == pytest.approx(want[at - 1, prompt[at]], abs=2e-4)
    for bad, asked in ((prompt, None), (prompt, 1), ([*prompt, 1], 0)):
        with pytest.raises(RequestError) as caught:
            lj.batch_generate(model, None, [bad], max_tokens=asked)
        assert caught.value.param == "prompt"


@pytest.mark.slow
def test_scoring_compiles_no_decode_step(golden: Model) -> None:
    llm = lj.LLM(golden, context=64, rows=3)  # sizes that no other test has
    (output,) = llm.generate(prompts_of(golden, 4)[:1], max_tokens=0, prompt_logprobs=1)
    assert output.prompt_logprobs is not None
    programs = llm._jobs.engine.cores[0].programs
    assert {key.name for key in set(programs.keys) - set(programs.awaited())} == {"scored"}


def test_what_is_about_new_text_refuses_none(golden: Model) -> None:
    (prompt,) = prompts_of(golden, 4)
    assert generation.generate(golden, None, prompt, max_tokens=0) == ""
    refused = (
        lambda: lj.stream_generate(golden, None, prompt, max_tokens=0),
        lambda: default_sampling({}, {"max_tokens": 0}),
        lambda: with_setting(SamplingParams(), "max_tokens", "0"),
        lambda: SamplingParams(max_tokens=0, min_tokens=1),
    )
    params = []
    for call in refused:
        with pytest.raises(RequestError) as caught:
            call()
        assert caught.value.hint
        params.append(caught.value.param)
    assert params == ["max_tokens", "max_tokens", "max_tokens", "min_tokens"]


# unembed.


@pytest.mark.parametrize("case", ["llama2-mha", "llama-rope-llama3-tied", "qwen2-bias", "llama4-text"])
def test_unembed_gives_the_logits_of_forward(case: str) -> None:
    """Of the normed states, and of what the last block gives; with weights as they are, and fused."""
    golden = load_golden(case)
    config, tokens, positions = golden.config, jnp.asarray(golden.tokens), jnp.asarray(golden.positions)
    last = f"layers.{config.num_layers - 1}.out"
    logits, _, seen = run(golden.params, config, tokens, positions, capture=("final_norm", last))
    assert error(logits, golden.logits, golden.mask) < TOLERANCE
    fused, fused_config = arrange(golden.params, config, None, fuse=True)
    for params, of in ((golden.params, config), (fused, fused_config)):
        for x, norm in ((seen["final_norm"], False), (seen[last], True)):
            found = lj.unembed(params, of, x, norm=norm)
            assert found.dtype == jnp.float32
            assert error(found, golden.logits, golden.mask) < TOLERANCE
            assert error(found, logits) < 1e-5
    assert error(lj.unembed(golden.params, config, seen["final_norm"], norm=True), logits) > 1e-2


def test_unembed_takes_any_leading_dimensions_and_any_dtype() -> None:
    assert "llama-rope-llama3-tied" in GOLDEN_CASES
    golden = load_golden("llama-rope-llama3-tied")
    assert golden.config.tie_word_embeddings
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, golden.config.hidden_size))
    want = np.asarray(x) @ np.asarray(golden.params["embed"]["weight"]).T
    assert error(lj.unembed(golden.params, golden.config, x), want) < 1e-5
    assert error(lj.unembed(golden.params, golden.config, x[0, 0, 0]), want[0, 0, 0]) < 1e-5
    assert error(jax.jit(lj.unembed, static_argnums=1)(golden.params, golden.config, x[0, 0]), want[0, 0]) < 1e-5
    assert lj.unembed(golden.params, golden.config, x.astype(jnp.bfloat16)).dtype == jnp.float32
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), golden.params)
    assert error(lj.unembed(half, golden.config, x), want) < 0.02
    for bad in (jnp.ones(()), jnp.ones((2, golden.config.hidden_size + 1))):
        with pytest.raises(RequestError) as caught:
            lj.unembed(golden.params, golden.config, bad)
        assert caught.value.param == "x"


# repr.


def test_a_model_is_shown_in_one_line(golden: Model) -> None:
    count = sum(leaf.size for leaf in jax.tree.leaves(golden.params))
    assert 10_000 < count < 10**6
    named = Model(golden.params, golden.config, name="tiny")
    assert repr(named) == f"Model(tiny, {count / 1000:.1f}K parameters, float32, cpu:0)"
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), golden.params)
    assert repr(Model(half, golden.config)) == f"Model(unnamed, {count / 1000:.1f}K parameters, bfloat16, cpu:0)"
    mesh = lj.make_mesh({"tensor": 1})
    assert repr(Model(golden.params, golden.config, mesh)).endswith("float32, 1 x cpu (tensor=1))")


def test_the_default_model_is_shown_as_people_name_it(smollm2: tuple[Model, Any]) -> None:
    assert repr(smollm2[0]) == "Model(smollm2-135m-instruct, 134.5M parameters, float32, cpu:0)"
