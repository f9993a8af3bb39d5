"""Drafts under constraints, and constraints that take their time: against loops that know neither."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines import Guesses, alone, assert_as_alone, run, small_settings, some_requests, tiny_model, tokens
from scheduler_cases import host, ids, sequence
from spelling import END, EOS, spelling_llm, spelling_model, spelling_tokenizer
from test_engine_constraints import VOCAB, Listed, by_parity, listed, nothing_is_held

from llama_jax.engine import rules
from llama_jax.engine.core import Core
from llama_jax.engine.rules import Rule
from llama_jax.errors import LlamaJaxError, RequestError
from llama_jax.generation.llm import LLM
from llama_jax.sampling import BadWords, Grammar, SamplingParams, token_mask
from llama_jax.text import grammar as text_grammar
from llama_jax.text.grammar import GrammarMatcher

Allowed = Callable[[list[int]], set[int]]
Forced = Callable[[list[int]], tuple[int, ...]]


class Forking(Listed):
    """One that can look ahead, and says what a function of the text forces."""

    def __init__(self, allowed: Allowed, forced: Forced = lambda text: (), **functions: Callable):
        super().__init__(allowed, **functions)
        self._functions, self._forced = functions, forced

    def fork(self) -> Forking:
        other = Forking(self._allowed, self._forced, **self._functions)
        other.text = list(self.text)
        return other

    def forced(self) -> tuple[int, ...]:
        return self._forced(self.text)


def tiny_core(**changes: int | float) -> Core:
    return Core(
        tiny_model(),
        small_settings(drafts=7, draft_rows=2, rows=2, decode_rows=(2,), steps=4, **changes),
    )


# --- What is drafted


def ahead_of(constraints: list, guess: tuple[int, ...] = (), most: int = 7, **fields: Any) -> rules.Ahead:
    rule = Rule(constraints, SamplingParams(**fields), VOCAB)
    rule.prepare(guess, most)
    return rule.ahead


def test_forced_tokens_are_the_draft() -> None:
    found = ahead_of([Forking(lambda text: {5 + len(text)}, lambda text: tuple(range(5 + len(text), 20)))], most=4)
    assert found.draft == (5, 6, 7, 8)
    assert [mask.tolist() for mask in found.masks] == [token_mask.only([t], VOCAB).tolist() for t in range(5, 10)]


def test_a_guess_goes_on_where_it_agrees_with_what_is_forced() -> None:
    def forced(text: list[int]) -> tuple[int, ...]:
        return (3, 4) if not text else ()

    assert ahead_of([Forking(lambda text: set(range(9)), forced)], (3, 4, 8, 1)).draft == (3, 4, 8, 1)
    assert ahead_of([Forking(lambda text: set(range(9)), forced)], (3, 5, 8, 1)).draft == (3, 4)


def test_a_draft_ends_before_what_is_not_allowed() -> None:
    anything = Forking(lambda text: set(range(VOCAB)))
    assert ahead_of([anything, BadWords([[2, 3]])], (1, 2, 3, 4)).draft == (1, 2)
    assert ahead_of([anything], (1, 2, 3, 4), allowed_token_ids=[1, 2, 4]).draft == (1, 2)
    assert ahead_of([anything], (1, VOCAB, 2)).draft == (1,)
    assert ahead_of([anything], (1, -1, 2)).draft == (1,)


def test_a_draft_ends_before_the_end_of_a_text_and_before_dead_ends() -> None:
    """The token that ends it is drawn behind the draft."""
    everything = set(range(VOCAB))
    assert ahead_of([Forking(lambda text: everything, ends=lambda text: len(text) == 2)], (1, 2, 3)).draft == (1,)
    assert ahead_of([Forking(lambda text: everything if len(text) < 2 else set())], (1, 2, 3)).draft == (1,)
    fails = Forking(lambda text: everything, fails=lambda text: "no" if len(text) == 2 else None)
    assert ahead_of([fails], (1, 2, 3)).draft == (1,)
    assert fails.text == []


def test_no_draft_where_a_constraint_cannot_look_ahead() -> None:
    both = [Forking(lambda text: {5}, lambda text: (5, 5)), Listed(lambda text: set(range(VOCAB)))]
    found = ahead_of(both, (5, 5))
    assert (found.draft, len(found.masks)) == ((), 1)


# --- What is drawn


@pytest.mark.slow
def test_guesses_under_constraints_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled and greedy, with penalties and log-probabilities, beside rows without constraints."""
    Guesses.instead(monkeypatch)
    model, core = tiny_model(), tiny_core()
    asked = [
        (prompt, replace(params, max_tokens=24, ignore_eos=True, stop_token_ids=()))
        for prompt, params in some_requests(model, 6)
    ]
    allowed = [None if i == 1 else lambda drawn: listed(by_parity(drawn)) for i in range(6)]
    answers = [alone(model, request, only) for request, only in zip(asked, allowed, strict=True)]
    Guesses.known = [(prompt, answer.tokens) for (prompt, _), answer in zip(asked, answers, strict=True)]
    for i in range(0, len(asked), 2):
        bound = {j: [Forking(by_parity)] for j in range(2) if allowed[i + j]}
        for expected, news in zip(answers[i : i + 2], run(core, asked[i : i + 2], constraints=bound), strict=True):
            assert_as_alone(news, expected)
    snapshot = core.snapshot()
    assert snapshot.drafted_tokens > 30
    assert 0.15 < snapshot.accepted_tokens / snapshot.drafted_tokens < 1
    nothing_is_held(core)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return spelling_llm(drafts=7)


POINT = {
    "type": "object",
    "properties": {"longitude": {"type": "boolean"}, "kind": {"enum": ["fast", "fair", "slow"]}},
    "required": ["longitude", "kind"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": Grammar.json_schema(POINT),
    "expression": Grammar.regex("(the first|the second) of [a-c]{2,5}( and (one|two) more){0,3}[.]"),
    "repeats": Grammar.regex("((ab|abba) ){3,12}end"),
    "lark": Grammar.lark('start: item ("," item)*\nitem: "<entry>" /[0-9]{1,2}/ "</entry>"'),
}


def by_grammar(grammar: Grammar) -> Callable[[list[int]], np.ndarray]:
    """Tokens that may follow, by a matcher that takes one token after the other."""
    model = spelling_model()
    vocab = model.config.vocab_size
    matcher, taken = GrammarMatcher.of(grammar, spelling_tokenizer(), vocab, model.eos_token_ids), [0]

    def allowed(drawn: list[int]) -> np.ndarray:
        for token in drawn[taken[0] :]:
            matcher.accept(token)
        taken[0] = len(drawn)
        mask = token_mask.all_allowed(vocab)
        if matcher.ended:
            return np.zeros(vocab, bool)
        matcher.mask(mask)
        return np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab].astype(bool)

    return allowed


KINDS: tuple[dict, ...] = (
    {"temperature": 0.0},
    {"temperature": 1.3, "seed": 5},
    {"temperature": 0.9, "seed": 6, "top_p": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.8, "seed": 7, "min_p": 0.05, "presence_penalty": 0.5, "min_tokens": 9},
)


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", GRAMMARS)
def test_texts_of_a_grammar_are_those_of_a_loop_without_drafts(llm: LLM, name: str) -> None:
    """vllm#37105, #15554, #27969, #42744: forced tokens were lost, a stop was passed over, drafts left the grammar, or
    were drawn without min_p and biases."""
    prompt = [40, 41, 42]
    each = [SamplingParams(max_tokens=60, logprobs=1, response_format=GRAMMARS[name], **kind) for kind in KINDS]
    before = llm.snapshot()
    for params, output in zip(each, llm.generate([prompt] * len(each), each), strict=True):
        expected = alone(llm.model, (prompt, params), by_grammar(GRAMMARS[name]))
        (found,) = output.outputs
        assert tuple(found.token_ids) == expected.tokens
        assert found.finish_reason == expected.ending
        assert found.logprobs is not None
        assert [entry.logprob for entry in found.logprobs] == pytest.approx(expected.logprobs, abs=2e-4)
    after = llm.snapshot()
    assert after.accepted_tokens - before.accepted_tokens >= 12
    assert after.counts.pages_used == 0


@pytest.mark.slow
def test_forced_tokens_save_steps(llm: LLM) -> None:
    before = llm.snapshot().steps
    params = SamplingParams(temperature=0.0, max_tokens=60, response_format=Grammar.regex("exactly this text, (a|b)"))
    (output,) = llm.generate([[9, 8]], params)
    assert len(output.outputs[0].token_ids) in range(19, 22)
    assert output.outputs[0].text[:-1] == "exactly this text, "
    assert llm.snapshot().steps - before <= 5


@pytest.mark.slow
def test_a_limit_and_stop_ids_within_forced_tokens(llm: LLM) -> None:
    whole = Grammar.regex("exactly this text")
    (short,) = llm.generate([[9]], SamplingParams(temperature=0.0, max_tokens=6, response_format=whole))
    assert (short.outputs[0].text, short.outputs[0].finish_reason) == ("exactl", "length")
    stop = spelling_tokenizer().token_id("y")
    params = SamplingParams(temperature=0.0, max_tokens=30, response_format=whole, stop_token_ids=[stop])
    (stopped,) = llm.generate([[9]], params)
    assert stopped.outputs[0].token_ids[-1] == stop
    assert len(stopped.outputs[0].token_ids) == len("exactly")
    params = SamplingParams(temperature=0.0, max_tokens=30, response_format=whole, stop=["this"])
    (stopped,) = llm.generate([[9]], params)
    assert (stopped.outputs[0].text, stopped.outputs[0].finish_reason) == ("exactly ", "stop")
    assert {EOS, END}.isdisjoint(stopped.outputs[0].token_ids)


# --- What takes its time


PARAMS = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)


def impatient_core() -> Core:
    """With programs that are compiled already."""
    core = Core(tiny_model(), small_settings())
    asked = [([5], replace(PARAMS, max_tokens=count)) for count in (3, 5)]
    run(core, asked, constraints={1: [BadWords([[3]])]})
    core.settings = replace(core.settings, constraint_s=0.5)
    return core


class Slow(Listed):
    """Does not know what comes third until it is told to."""

    def __init__(self) -> None:
        super().__init__(lambda text: set(range(VOCAB)))
        self.go_on, self.begun = threading.Event(), threading.Event()

    def mask(self, out: np.ndarray) -> None:
        if len(self.text) == 2:
            self.begun.set()
            self.go_on.wait(60)


def test_a_constraint_that_takes_too_long_ends_its_sequence_alone() -> None:
    """The others go on meanwhile, to their ends."""
    model, slow = tiny_model(), Slow()
    core, params = impatient_core(), PARAMS
    number = core.add([5, 6, 7], params, 30, rule=Rule([slow], params, VOCAB))
    other = core.add([8, 9], params, 30, rule=Rule([BadWords([[3]])], params, VOCAB))
    drawn: dict[int, list[int]] = {number: [], other: []}
    endings = []
    while not core.idle:
        for news in core.step():
            drawn[news.id] += news.tokens
            if news.ending:
                endings.append((news.id, news.ending, news.error))
    slow.go_on.set()
    assert [ending[:2] for ending in endings] == [(other, "length"), (number, "failed")]
    assert endings[1][2] == "its constraints took longer than 0.5 s for the next token"
    assert len(drawn[number]) == 2
    only = listed(set(range(VOCAB)) - {3})
    assert tuple(drawn[other]) == alone(model, ([8, 9], params), lambda _: only).tokens
    nothing_is_held(core)


def test_those_behind_constraints_that_hang_get_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    rules.abandon_threads()
    slow, core, params = Slow(), impatient_core(), replace(PARAMS, max_tokens=3)
    hangs = core.add([5, 6, 7], params, 3, rule=Rule([slow], params, VOCAB))
    while not slow.begun.is_set():
        core.step()
    other = core.add([8, 9], params, 3, rule=Rule([BadWords([[3]])], params, VOCAB))
    news = [new for _ in range(2000) if not core.idle for new in core.step()]
    slow.go_on.set()
    assert {new.id: new.ending for new in news if new.ending} == {hangs: "failed", other: "length"}
    rules.abandon_threads()


def test_a_late_mask_is_in_time() -> None:
    """One that takes longer than others wait for it, and not too long."""
    model, slow, core, params = tiny_model(), Slow(), impatient_core(), replace(PARAMS, max_tokens=6)
    asked = [([5, 6, 7], params), ([8, 9], replace(params, max_tokens=40))]
    threading.Timer(0.2, slow.go_on.set).start()
    for request, news in zip(asked, run(core, asked, constraints={0: [slow]}), strict=True):
        assert tokens(news) == alone(model, request).tokens


def test_cancelled_while_its_constraints_hang() -> None:
    slow, core, params = Slow(), impatient_core(), replace(PARAMS, max_tokens=6)
    number = core.add([5, 6, 7], params, 6, rule=Rule([slow], params, VOCAB))
    while not slow.begun.is_set():
        core.step()
    core.cancel(number)
    while not core.idle:
        core.step()
    slow.go_on.set()
    nothing_is_held(core)


def test_no_step_draws_for_one_that_is_pending() -> None:
    """Nor do the others wait, were it most of the rows."""
    h = host(rows=4)
    each = [h.add(sequence(id, 2, 9, paced=id > 0)) for id in range(3)]
    assert ids(h.schedule()) == ([0, 1, 2], [])
    h.deliver()
    each[1].pending = each[2].pending = True
    for _ in range(3):
        assert ids(h.schedule()) == ([], [0])
    late = h.add(sequence(3, 2, 9, paced=True, pending=True))
    h.add(sequence(4, 2, 1))
    assert ids(h.schedule()) == ([4], [0])
    for waiting in (each[1], each[2], late):
        waiting.pending = False
    h.drain(60)


def test_a_grammar_that_takes_too_long_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(text_grammar, "_compile", lambda *_: go_on.wait(60))
    monkeypatch.setattr(text_grammar, "DEADLINE_S", 0.05)
    with pytest.raises(RequestError, match="the regex cannot be used: compiling it takes") as caught:
        GrammarMatcher.of(Grammar.regex("slow (one|two)"), spelling_tokenizer(), 120, [EOS])
    assert caught.value.param == "response_format"
    go_on.set()


def test_a_long_chain_of_rules() -> None:
    """It takes more of the stack than threads have as a rule."""
    count = 8000
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(count))
    matcher = GrammarMatcher.of(Grammar.lark(f'start: r0\n{rules}\nr{count}: "x"'), spelling_tokenizer(), 120, [EOS])
    mask = token_mask.all_allowed(120)
    matcher.mask(mask)
    x = spelling_tokenizer().token_id("x")
    assert x is not None
    assert token_mask.allows(mask, x)
    matcher.accept(x)
    assert matcher.ended


def test_a_grammar_that_is_too_long() -> None:
    with pytest.raises(RequestError, match="has 250001 characters"):
        GrammarMatcher.of(Grammar.regex("a" * 250_001), spelling_tokenizer(), 120, [EOS])


def no_thread(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_no_thread_for_a_mask_ends_its_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    core, params = impatient_core(), replace(PARAMS, max_tokens=6)
    rules.abandon_threads()
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    free, bound = run(core, [([8, 9], params)] * 2, constraints={1: [BadWords([[3]])]})
    assert tokens(free) == alone(tiny_model(), ([8, 9], params)).tokens
    assert (bound[-1].ending, bound[-1].error) == ("failed", "RuntimeError: can't start new thread")
    nothing_is_held(core)


def test_no_thread_for_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(LlamaJaxError, match="512 MiB of stack to compile in: can't start") as caught:
        GrammarMatcher.of(Grammar.regex("no (thread|stack)"), spelling_tokenizer(), 120, [EOS])
    assert "ulimit" in str(caught.value.hint)
    assert threading.stack_size() == 0


def test_no_time_at_all() -> None:
    with pytest.raises(RequestError, match="constraint_s must be above 0"):
        small_settings(constraint_s=0)
