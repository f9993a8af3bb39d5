"""An engine that is made anew with more room: what was under way loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engines import alone, some_requests, tiny_model

from llama_jax.config import preset
from llama_jax.engine import sizing
from llama_jax.engine.replicas import Replicas
from llama_jax.engine.settings import EngineSettings
from llama_jax.errors import DoesNotFit, RequestError
from llama_jax.generation import jobs
from llama_jax.generation.jobs import Jobs
from llama_jax.generation.llm import LLM
from llama_jax.generation.request import Requests, prepare
from llama_jax.sampling import SamplingParams


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines begin with 32 tokens, and foresee answers of 4."""
    monkeypatch.setattr(sizing, "CPU_START", 32)
    monkeypatch.setattr(jobs, "FORESEEN", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_outputs_do_not_know_of_it() -> None:
    llm = LLM(tiny_model(), rows=3)
    assert llm.settings.context == 32
    asked = [*some_requests(llm.model, 8), ([5, 6], SamplingParams(seed=2, max_tokens=80, ignore_eos=True))]
    outputs = llm.generate([prompt for prompt, _ in asked], [params for _, params in asked])
    assert llm.settings.context == 128
    for request, output in zip(asked, outputs, strict=True):
        expected = alone(llm.model, request)
        assert output.outputs[0].token_ids == expected.tokens
        assert output.outputs[0].finish_reason == expected.ending
        if output.outputs[0].logprobs is not None:
            found = [entry.logprob for entry in output.outputs[0].logprobs]
            np.testing.assert_allclose(found, expected.logprobs, atol=1e-5)
    assert llm.snapshot().counts.pages_used == 0


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_continuations_without_a_seed_keep_the_one_that_they_drew() -> None:
    llm = LLM(tiny_model(), rows=2)
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(n=2, max_tokens=70, ignore_eos=True, logprobs=0))
    assert [len(completion.token_ids) for completion in output.outputs] == [70, 70]
    for completion in output.outputs:
        assert completion.logprobs is not None
        assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_without_memory_for_more_the_engine_stays_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(tiny_model(), rows=2)

    def refuse(*args: object, **options: object) -> None:
        raise DoesNotFit("no memory", hint="a smaller one")

    with monkeypatch.context() as patch:
        patch.setattr(sizing, "default_settings", refuse)
        with pytest.raises(DoesNotFit, match="no memory"):
            llm.generate([[5] * 40], max_tokens=3)
    request = [5, 6], SamplingParams(temperature=0.0, max_tokens=3)
    assert llm.generate([request[0]], request[1])[0].outputs[0].token_ids == alone(llm.model, request).tokens


@pytest.mark.usefixtures("small")
def test_a_growth_that_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller engine is there again."""
    llm = LLM(tiny_model(), rows=2)
    made = Jobs._made

    def interrupted(jobs: Jobs, settings: EngineSettings) -> Replicas:
        if settings.context > 32:
            raise KeyboardInterrupt
        return made(jobs, settings)

    with monkeypatch.context() as patch:
        patch.setattr(Jobs, "_made", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5] * 40], max_tokens=3)
    request = [5, 6], SamplingParams(temperature=0.0, max_tokens=3)
    assert llm.generate([request[0]], request[1])[0].outputs[0].token_ids == alone(llm.model, request).tokens


def test_a_context_that_was_asked_for_stays() -> None:
    llm = LLM(tiny_model(), rows=2, context=64)
    with pytest.raises(DoesNotFit, match="do not fit into the 64"):
        llm.generate([[5] * 60], max_tokens=5)


def test_less_where_memory_has_less() -> None:
    config = tiny_model().config
    free = sizing._beside_pages(config, np.float32, None, 2) + 50 * sizing.cache_bytes(config, None, 4, 1)
    given = {"on_cpu": False, "free": free, "rows": 4, "page_size": 16}
    with pytest.raises(DoesNotFit, match="there is memory for 3"):
        sizing.settings_for(config, np.float32, None, context=64, **given)
    settings = sizing.settings_for(config, np.float32, None, context=64, least=20, **given)
    assert (settings.context, settings.pages) == (48, 3)
    with pytest.raises(DoesNotFit):
        sizing.settings_for(config, np.float32, None, context=64, least=50, **given)


def test_more_rows_leave_less_for_pages() -> None:
    """A step's logits, and what the sampler makes of them, grow with the rows."""
    config = preset("llama-3.1-8b")
    given: dict[str, Any] = {"on_cpu": False, "free": 40 << 30, "context": 8192}
    few, many = (sizing.settings_for(config, "bfloat16", None, rows=rows, **given).pages for rows in (256, 1024))
    page = sizing.cache_bytes(config, None, 2, 64)
    assert (few - many) * page > 4 * 5 * 768 * config.vocab_size - page


@pytest.mark.slow
def test_a_stream_shows_its_prompt_and_ends_within_a_chunk() -> None:
    llm = LLM(tiny_model(), rows=1, context=128)
    prompt = [5 + i % 30 for i in range(100)]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    seen: list[tuple[int, int]] = []
    pieces = list(llm.stream(prompt, params, progress=lambda done, all: seen.append((done, all))))
    assert tuple(piece.token for piece in pieces) == alone(llm.model, (prompt, params)).tokens
    assert [piece.generation_tokens for piece in pieces] == [1, 2, 3, 4, 5, 6]
    assert (pieces[0].prompt_tokens, pieces[-1].finish_reason) == (100, "length")
    assert seen[0] == (0, 100)
    assert {total for _, total in seen} == {100}

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    others = [6 + i % 31 for i in range(100)]
    with pytest.raises(KeyboardInterrupt):
        list(llm.stream(others, params, progress=stop))
    assert llm.snapshot().counts.running == 0
    assert [piece.token for piece in llm.stream(prompt, params)] == [piece.token for piece in pieces]


@pytest.mark.slow
def test_requests_that_come_while_others_run_and_an_early_end() -> None:
    llm = LLM(tiny_model(), rows=2, context=64)
    taken: list[int] = []

    def asked() -> Iterator[tuple[str, Requests]]:
        for i in range(20):
            taken.append(i)
            params = SamplingParams(temperature=0.0, max_tokens=4 + i % 3, ignore_eos=True)
            yield f"line {i}", prepare(llm.model, None, [[5 + i, 6], [9, 8 + i]], params)

    done = []
    for key, i, output in llm.serve(asked(), ahead=6, stop=lambda: len(done) > 7):
        done.append((key, i))
        assert len(output.outputs[0].token_ids) == 4 + int(key.split()[1]) % 3
        assert len(taken) <= 4 + len(done)
    assert 7 < len(done) < 14
    assert len(set(done)) == len(done)
    assert llm.snapshot().counts.running + llm.snapshot().counts.waiting == 0


@pytest.mark.slow
def test_more_stop_ids_than_there_is_room_for() -> None:
    """They are refused at once: a step that failed of them would end everybody's requests."""
    llm = LLM(tiny_model(), rows=2, context=64)
    many = SamplingParams(max_tokens=2, stop_token_ids=tuple(range(65)), logit_bias={})
    with pytest.raises(RequestError, match="stop_token_ids"):
        llm.generate([[5], [6]], [SamplingParams(max_tokens=2), many])
    assert len(llm.generate([[5]], max_tokens=2, ignore_eos=True)[0].outputs[0].token_ids) == 2
