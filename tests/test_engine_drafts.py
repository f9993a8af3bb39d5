"""Drafts: the same tokens as without them, whatever is guessed, and fewer steps where the guesses are right."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from engines import Guesses, alone, assert_as_alone, run, small_settings, some_requests, tiny_model, tokens

from llama_jax.engine import drafting, lookup
from llama_jax.engine.core import Core
from llama_jax.engine.drafting import PAUSE, Drafter
from llama_jax.errors import RequestError
from llama_jax.generation.llm import LLM
from llama_jax.sampling import SamplingParams


def test_what_followed_the_last_time_is_proposed() -> None:
    drafter = Drafter(4)
    text = [1, 2, 3, 4, 5, 6, 7, 9, 2, 3]
    assert drafter.propose(text, 4) == (4, 5, 6, 7)
    assert drafter.propose([*text, 4], 2) == (5, 6)  # three tokens occur again
    assert drafter.propose([*text, 4, 8], 4) == ()
    # Of several the last one counts, and the most tokens alike before that.
    assert Drafter(4).propose([1, 2, 5, 1, 2, 6, 1, 2], 1) == (6,)
    assert Drafter(4).propose([7, 1, 2, 5, 8, 1, 2, 6, 7, 1, 2], 1) == (5,)


@hypothesis.given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 7))
def test_text_by_text_or_at_once(text: list[int], most: int) -> None:
    """A draft depends on the text alone, and has followed the text's last tokens before."""
    grown = Drafter(7)
    for end in range(1, len(text)):
        grown.propose(text[:end], 7)
    proposed = Drafter(7).propose(text, most)
    assert grown.propose(text, most) == proposed
    if proposed:
        places = [i for i in range(len(text)) if tuple(text[i : i + len(proposed)]) == proposed]
        assert any(text[max(0, i - 2) : i] == text[-2:] for i in places)


@hypothesis.given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=24), min_size=3, max_size=3), st.data())
def test_the_device_finds_what_the_host_finds(texts: list[list[int]], data: st.DataObject) -> None:
    """Behind the texts is what others have left there."""
    most = data.draw(st.sampled_from([1, 7]))
    left = np.random.default_rng(len(texts[0])).integers(0, 4, (3, 24), np.int32)
    for row, text in zip(left, texts, strict=True):
        row[: len(text)] = text
    found = _find(left, np.asarray([len(text) for text in texts], np.int32), most)
    for row, text in zip(np.asarray(found).tolist(), texts, strict=True):
        expected = Drafter(most).find(text, most)
        assert row == [*expected, *[-1] * (most - len(expected))]


_find = jax.jit(lookup.find, static_argnums=2)


@pytest.mark.slow
def test_greedy_drafts_need_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a later step without any reads lie where its program wants them."""
    Guesses.instead(monkeypatch)
    model = tiny_model()
    core = Core(model, small_settings(drafts=3, greedy=True))
    for temperature in (0.0, 1.0):
        request = [5, 6, 7], SamplingParams(temperature=temperature, seed=1, max_tokens=6, ignore_eos=True)
        expected = alone(model, request)
        Guesses.known = [(request[0], expected.tokens)]
        assert_as_alone(run(core, [request])[0], expected)
        assert core.snapshot().accepted_tokens
        assert (core.programs._no_masks is None) == (temperature == 0)


def test_drafts_that_gain_nothing_end() -> None:
    drafter = Drafter(4)
    count = 10
    pauses = []
    for _ in range(2):
        while drafter.active(count):
            drafter.drawn(2, 1, count)
            count += 1
        begun = count
        while not drafter.active(count):
            count += 1
        pauses.append(count - begun)
    assert pauses[0] >= PAUSE - 1
    assert pauses[1] > 1.5 * pauses[0]
    for _ in range(20):
        drafter.drawn(4, 5, count)
        count += 5
        assert drafter.active(count)


@pytest.mark.slow
def test_right_guesses_save_steps() -> None:
    """A text that repeats itself: of 60 tokens most come from drafts, without anybody's help."""
    model = tiny_model()
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logit_bias={5: 40.0, 6: 40.0, 7: 40.0})
    prompt = [5, 6, 7, 5, 6, 7]
    expected = alone(model, (prompt, params)).tokens
    steps = []
    for drafts in (0, 4):
        core = Core(model, small_settings(drafts=drafts))
        (news,) = run(core, [(prompt, params)])
        assert tokens(news) == expected
        steps.append(core.snapshot().steps)
    assert steps[0] == 60
    assert steps[1] < 40


@pytest.mark.slow
def test_texts_that_repeat_themselves_now_and_then() -> None:
    """Drafts that the device finds, some of them wrong, of two rows at a time, the next step always under way before
    the last one's tokens are known; others arrive meanwhile, and steps with their prompts come between."""
    model = tiny_model()
    core = Core(model, small_settings(drafts=3, draft_rows=2, pages=12, steps=4))
    params = SamplingParams(max_tokens=50, ignore_eos=True, logit_bias={5: 40.0, 6: 40.0, 7: 40.0})
    rng = np.random.default_rng(3)
    asked = [(rng.integers(5, 8, 6 + 5 * i).tolist(), replace(params, seed=i)) for i in range(5)]
    for news, request in zip(run(core, asked, arrivals=[0, 0, 20, 21, 60]), asked, strict=True):
        assert_as_alone(news, alone(model, request))
    snapshot = core.snapshot()
    assert snapshot.drafted_tokens > 60
    assert 0.15 < snapshot.accepted_tokens / snapshot.drafted_tokens < 0.9
    assert snapshot.counts.pages_used == 0


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [1, 7])
def test_wrong_guesses_change_nothing(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled and greedy, with penalties and log-probabilities, two at a time."""
    Guesses.instead(monkeypatch)
    model = tiny_model()
    core = Core(model, small_settings(drafts=drafts, draft_rows=2, rows=2, decode_rows=(2,), steps=4))
    asked = [
        (prompt, replace(params, max_tokens=30, ignore_eos=True, stop_token_ids=()))
        for prompt, params in some_requests(model, 6)
    ]
    answers = [alone(model, request) for request in asked]
    Guesses.known = [(prompt, answer.tokens) for (prompt, _), answer in zip(asked, answers, strict=True)]
    for i in range(0, len(asked), 2):
        for expected, news in zip(answers[i : i + 2], run(core, asked[i : i + 2]), strict=True):
            assert_as_alone(news, expected)
    snapshot = core.snapshot()
    assert snapshot.drafted_tokens > 40
    assert 0.15 < snapshot.accepted_tokens / snapshot.drafted_tokens < 0.9
    assert snapshot.counts.pages_used == 0


@pytest.mark.slow
def test_streams_and_logprobs_with_drafts() -> None:
    llm = LLM(tiny_model(), rows=2, context=128, drafts=3)
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=40, ignore_eos=True, logprobs=1)
    prompt = [5, 6, 7, 8] * 6
    pieces = list(llm.stream(prompt, params))
    assert pieces[-1].generation_tokens == 40
    (output,) = llm.generate([prompt], params)
    expected = alone(llm.model, (prompt, params))
    assert output.outputs[0].token_ids == expected.tokens
    assert output.outputs[0].logprobs is not None
    found = [entry.logprob for entry in output.outputs[0].logprobs]
    assert found == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.slow
def test_nothing_is_compiled_for_them_later() -> None:
    core = Core(tiny_model(), small_settings(drafts=2))
    assert any(key.name == "verify" for key in core.programs.keys)
    for _ in core.programs.compile_all():
        pass
    run(core, [([5, 6, 5, 6, 5], SamplingParams(max_tokens=20, seed=1, ignore_eos=True))])
    assert core.programs.late == 0


def test_settings() -> None:
    assert not any(key.name == "verify" for key in Core(tiny_model(), small_settings()).programs.keys)
    with pytest.raises(RequestError, match="drafts must be in"):
        small_settings(drafts=8)
    assert drafting.Drafter is Drafter
