"""Faults that other engines had on the device; each case names the public report. Those of schedulers are
in test_engine_failures.py, those of grammars and forced tokens in test_engine_lookahead.py too."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import numpy as np
import pytest
from engines import Guesses, alone, logprobs, run, small_settings, some_requests, tiny_model, tokens
from test_engine_constraints import by_parity, listed, nothing_is_held
from test_engine_lookahead import Forking, tiny_core

from llama_jax.engine.core import Core
from llama_jax.engine.scheduler import Scheduler
from llama_jax.generation.llm import LLM
from llama_jax.runtime import count_compilations
from llama_jax.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def small_core() -> Core:
    return Core(tiny_model(), small_settings())


def with_pages(core: Core, pages: int) -> Core:
    """The engine, whose scheduler has this many pages."""
    core.scheduler = Scheduler(dataclasses.replace(core.scheduler.limits, pages=pages))
    return core


def a_prompt(length: int, seed: int = 1) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, 40, length).tolist()
    return found


def test_tokens_drawn_last_are_not_overwritten_by_padding() -> None:
    """sgl-jax#1487: padding wrote into the slots in which other rows' newest tokens waited for the next step."""
    model, core = tiny_model(), small_core()
    # Two rows in a program for three, beside prompts that come one by one, and rows that change hands.
    asked = [(a_prompt(5, i), dataclasses.replace(GREEDY, max_tokens=4 + 9 * (i % 2))) for i in range(6)]
    for request, news in zip(asked, run(core, asked, arrivals=[0, 0, 3, 6, 9, 12]), strict=True):
        assert tokens(news) == alone(model, request).tokens
    nothing_is_held(core)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_scores_of_prompts_do_not_depend_on_the_order(order: tuple[int, ...]) -> None:
    """vllm#42019: log-probabilities of prompts were others when a request without them had come before. vllm#5344: with
    a cached prefix there were none."""
    model, core = tiny_model(), small_core()
    prompt = a_prompt(40)
    kinds = (GREEDY, dataclasses.replace(GREEDY, prompt_logprobs=2), SamplingParams(max_tokens=0, prompt_logprobs=0))
    expected = alone(model, (prompt, GREEDY))
    for kind in order:
        (news,) = run(core, [(prompt, kinds[kind])])
        assert tokens(news) == (() if kind == 2 else expected.tokens)
        scores = [drawn.prompt_logprobs for drawn in news if drawn.prompt_logprobs is not None]
        assert len(scores) == (kind > 0)
        for found in scores:
            np.testing.assert_allclose(found.token, expected.prompt_logprobs, atol=1e-5)
    assert core.snapshot().counts.prefix_hit_tokens == (32 if order[0] else 0)


def test_a_warm_cache_changes_nothing() -> None:
    """vllm#40896: a prefix that was found gave other tokens than one that was computed."""
    model, core = tiny_model(), small_core()
    prompt = a_prompt(60)
    for params in (GREEDY, SamplingParams(temperature=1.1, seed=3, max_tokens=12, ignore_eos=True, logprobs=2)):
        expected = alone(model, (prompt, params))
        for _ in range(3):
            (news,) = run(core, [(prompt, params)])
            assert tokens(news) == expected.tokens
            if params.logprobs:
                np.testing.assert_allclose(logprobs(news), expected.logprobs, atol=1e-4)
    assert core.snapshot().counts.prefix_hit_tokens == 5 * 48


def test_scores_of_a_prompt_survive_a_preemption() -> None:
    """Tokens that were scored before it are scored again, and not told twice."""
    model, core = tiny_model(), with_pages(small_core(), 4)
    scored = a_prompt(60), dataclasses.replace(GREEDY, max_tokens=2, prompt_logprobs=1)
    urgent = a_prompt(20, 2), dataclasses.replace(GREEDY, max_tokens=3)
    numbers = [core.add(*scored, 2, priority=1)]
    news = core.step()
    numbers.append(core.add(*urgent, 3))
    while not core.idle:
        news += core.step()
    assert core.snapshot().counts.preemptions == 1
    for number, request in zip(numbers, (scored, urgent), strict=True):
        assert tokens([drawn for drawn in news if drawn.id == number]) == alone(model, request).tokens
    (found,) = [drawn.prompt_logprobs for drawn in news if drawn.prompt_logprobs is not None]
    expected = alone(model, scored).prompt_logprobs
    assert found.token.shape == expected.shape
    np.testing.assert_allclose(found.token, expected, atol=1e-5)
    nothing_is_held(core)


@pytest.mark.slow
def test_drafts_are_drawn_with_all_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """vllm#42744: min_p and logit_bias did not hold where drafts were tried."""
    Guesses.instead(monkeypatch)
    model, core = tiny_model(), tiny_core()
    common: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "temperature": 1.5}
    asked = [
        (a_prompt(6), SamplingParams(seed=1, min_p=0.2, **common)),
        (a_prompt(6, 2), SamplingParams(seed=2, logit_bias={7: 3.0, 8: -9.0}, min_tokens=20, **common)),
    ]
    answers = [alone(model, request) for request in asked]
    Guesses.known = [(prompt, answer.tokens) for (prompt, _), answer in zip(asked, answers, strict=True)]
    assert [tokens(news) for news in run(core, asked)] == [answer.tokens for answer in answers]
    assert core.snapshot().accepted_tokens > 5


@pytest.mark.slow
def test_forced_tokens_survive_a_preemption() -> None:
    """vllm#37105: forced tokens were missing from what was computed again, and nobody looked whether they end the text.
    vllm#46899: so were drafts."""
    model, core = tiny_model(), with_pages(tiny_core(), 6)

    def allowed(text: list[int]) -> set[int]:
        return {10 + len(text) % 20} if len(text) % 12 < 8 else by_parity(text)

    def forced(text: list[int]) -> tuple[int, ...]:
        return tuple(10 + n % 20 for n in range(len(text), len(text) + 8 - len(text) % 12))

    params = SamplingParams(temperature=1.0, seed=5, max_tokens=60, ignore_eos=True)
    asked = [(a_prompt(3, i), params) for i in range(2)]
    rules = {i: [Forking(allowed, forced, ends=lambda text: len(text) == 54)] for i in range(2)}
    for request, news in zip(asked, run(core, asked, constraints=rules), strict=True):
        expected = alone(model, request, lambda drawn: listed(allowed(drawn) if len(drawn) < 54 else set()))
        assert tokens(news) == expected.tokens
        assert (len(expected.tokens), news[-1].ending) == (54, "stop")
    snapshot = core.snapshot()
    assert snapshot.counts.preemptions > 0
    assert snapshot.accepted_tokens > 20
    nothing_is_held(core)


def test_seeds_beside_requests_without() -> None:
    """vllm#51226: a request with a seed drew others when one without ran beside it, whose own draws repeated."""
    model = tiny_model()
    llm = LLM(model, settings=small_settings())
    seeded = SamplingParams(temperature=1.2, seed=7, max_tokens=16, ignore_eos=True)
    free = dataclasses.replace(seeded, seed=None)
    expected = alone(model, ([5, 6], seeded)).tokens
    drawn: set[tuple[int, ...]] = set()
    for _ in range(2):
        outputs = llm.generate([[5, 6], [5, 6], [5, 6]], [free, seeded, free])
        found = [tuple(output.outputs[0].token_ids) for output in outputs]
        assert found[1] == expected
        drawn |= {found[0], found[2]}
    assert len(drawn) == 4


def test_the_first_log_probabilities_compile_nothing() -> None:
    """sgl-jax#609: the first request that asked for them waited for a program of its own, long after the start."""
    core = small_core()
    request = (a_prompt(6), GREEDY)
    run(core, [request])
    counted = count_compilations()
    before = core.programs.count, counted.count
    for width in (0, 3, 20):
        (news,) = run(core, [(request[0], dataclasses.replace(GREEDY, logprobs=width))])
        assert len(logprobs(news)) == GREEDY.max_tokens
    assert (core.programs.count, counted.count) == before


def test_the_same_again_is_the_same() -> None:
    """vllm#51187: the same requests in the same order gave other bits."""
    changes: dict[str, Any] = {"logprobs": 1, "max_tokens": 12}
    asked = [(prompt, dataclasses.replace(params, **changes)) for prompt, params in some_requests(tiny_model(), 6)]
    first, second = (run(small_core(), asked, arrivals=[0, 0, 1, 2, 5, 5]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert tokens(one) == tokens(other)
        assert len(logprobs(one)) == len(tokens(one))
        assert np.asarray(logprobs(one)).tobytes() == np.asarray(logprobs(other)).tobytes()


@pytest.mark.slow
def test_the_clock_may_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    """Durations and deadlines come from a clock that nobody sets."""
    core = small_core()
    hours = itertools.cycle((0.0, 1e9, -1e9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(hours))
    (news,) = run(core, [([5, 6], GREEDY)], constraints={0: [Forking(by_parity)]})
    assert news[-1].ending == "length"
    snapshot = core.snapshot()
    assert 0 <= snapshot.step_s < 600
    assert 0 <= snapshot.tokens_per_s < 1e7
